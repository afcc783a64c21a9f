"""Which branch of a step runs, and who is asked: the program, or the host."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec

import msam_optax as mo
from msam_optax.training._dispatch import convolves, inputs_used
from tests.versions import needs_meshes

STEPS, RHO = 8, 0.1


def quadratic_loss(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    del key
    return jnp.mean((batch @ params["w"]) ** 2), (model_state, {"seen": batch[0, 0]})


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.convolve(x, kernel, mode="same")


def convolving_loss(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    del key
    outputs = jax.vmap(convolution, (0, None))(batch, params["w"])
    return jnp.mean(outputs**2), (model_state, {"seen": batch[0, 0]})


def state_of(tx: optax.GradientTransformation) -> mo.TrainState:
    params = {"w": jnp.arange(1.0, 4.0)}
    return mo.TrainState(params, tx.init(params))


def ae_sam() -> optax.GradientTransformationExtraArgs:
    return mo.ae_sam(optax.sgd(0.1, momentum=0.9), RHO, total_steps=STEPS)


def two_employs() -> optax.GradientTransformationExtraArgs:
    element = mo.sharpness_aware_gradient(mo.ascents.normalized(RHO))
    return optax.chain(
        mo.employ(mo.policies.every(2), element),
        mo.employ(mo.policies.every(3), optax.clip_by_global_norm(0.1)),
        optax.sgd(0.1),
    )


@pytest.fixture
def conds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that was traced under ``lax.cond``."""
    traced, cond = [], jax.lax.cond

    def spy(*args: Any, **kwargs: Any) -> Any:
        traced.append(args)
        return cond(*args, **kwargs)

    monkeypatch.setattr(jax.lax, "cond", spy)
    return traced


# --- What the loss computes -----------------------------------------------------------

KERNEL, X = jnp.ones(3), jnp.ones(5)


def in_shard_map(x: jax.Array) -> jax.Array:
    spec = PartitionSpec()
    return jax.shard_map(
        lambda x: convolution(x, KERNEL),
        mesh=jax.make_mesh((1,), ("one",)),
        in_specs=spec,
        out_specs=spec,
    )(x)


def in_custom_vjp(x: jax.Array) -> jax.Array:
    function = jax.custom_vjp(lambda x: convolution(x, KERNEL))
    function.defvjp(lambda x: (function(x), None), lambda _, g: (g,))
    return function(x)


def in_custom_jvp(x: jax.Array) -> jax.Array:
    function = jax.custom_jvp(lambda x: convolution(x, KERNEL))
    function.defjvps(lambda t, _, x: t)
    return function(x)


PLACES: dict[str, Callable[[jax.Array], Any]] = {
    "plain": lambda x: convolution(x, KERNEL),
    "jit": jax.jit(lambda x: convolution(x, KERNEL)),
    "remat": jax.checkpoint(lambda x: convolution(x, KERNEL)),
    "cond": lambda x: jax.lax.cond(
        x[0] > 0, lambda x: x, lambda x: convolution(x, KERNEL), x
    ),
    "scan": lambda x: jax.lax.scan(
        lambda c, _: (convolution(c, KERNEL), None), x, None, length=2
    ),
    "while": lambda x: jax.lax.while_loop(
        lambda c: c[0] < 9, lambda c: convolution(c, KERNEL), x
    ),
    "shard_map": in_shard_map,
    "custom_vjp": in_custom_vjp,
    "custom_jvp": in_custom_jvp,
    "deep": lambda x: jax.lax.map(
        jax.jit(jax.checkpoint(lambda a: convolution(a, KERNEL))), x[None]
    ),
}


@pytest.mark.parametrize(
    "place",
    [pytest.param(p, marks=needs_meshes if p == "shard_map" else ()) for p in PLACES],
)
def test_a_convolution_is_found_wherever_it_stands(place):
    assert convolves(jax.make_jaxpr(PLACES[place])(X).jaxpr)


def test_without_a_convolution_none_is_found():
    def dense(x):
        return jax.lax.scan(lambda c, _: (jnp.dot(c, c) * c, None), x, None, length=2)

    assert not convolves(jax.make_jaxpr(jax.grad(lambda x: dense(x)[0].sum()))(X).jaxpr)


@pytest.mark.parametrize(
    "loss_fn, where", [(quadratic_loss, "in_graph"), (convolving_loss, "host")]
)
def test_on_cpu_the_host_decides_where_the_loss_convolves(conds, loss_fn, where):
    assert jax.default_backend() == "cpu"
    tx = ae_sam()
    step = mo.make_train_step(loss_fn, tx, donate=False)
    arguments = state_of(tx), jnp.eye(3), None
    dispatch = step.dispatch(*arguments)
    assert dispatch.where == where
    assert "convolution" in dispatch.reason
    step(*arguments)
    assert bool(conds) == (where == "in_graph")


def test_the_loss_is_looked_at_once_and_traced_no_more_than_without():
    def traces(dispatch: Any) -> list[int]:
        count = 0

        def counted(*args: Any) -> Any:
            nonlocal count
            count += 1
            return convolving_loss(*args)

        tx = mo.ss_sam(optax.sgd(0.1), RHO)
        step = mo.make_train_step(counted, tx, dispatch=dispatch)
        state, seen = state_of(tx), []
        for _ in range(STEPS):
            state, _ = step(state, jnp.eye(3), None)
            seen.append(count)
        return seen

    assert traces("auto") == traces("host")


def test_an_optimizer_that_employs_nothing_is_asked_nothing(monkeypatch):
    """Not even whether the step is traced, which is asked once a step elsewhere."""
    tx = mo.sam(optax.sgd(0.1), RHO)
    step = mo.make_train_step(convolving_loss, tx)
    monkeypatch.delattr("msam_optax.training._dispatch.is_traced")
    state, _ = step(state_of(tx), jnp.eye(3), None)
    monkeypatch.delattr("msam_optax.training._dispatch.find_states")
    step(state, jnp.eye(3), None)


def test_a_step_does_not_leave_the_trace_to_ask_whether_there_is_one(monkeypatch):
    step = mo.make_train_step(quadratic_loss, ae_sam())
    state, _ = step(state_of(ae_sam()), jnp.eye(3), None)
    monkeypatch.delattr("jax.core.eval_context")
    state, _ = step(state, jnp.eye(3), None)
    jax.eval_shape(step, state, jnp.eye(3), None)


@pytest.mark.parametrize("dispatch", ["in_graph", "host"])
def test_what_is_asked_for_is_done(conds, dispatch):
    step = mo.make_train_step(quadratic_loss, ae_sam(), dispatch=dispatch)
    state = state_of(ae_sam())
    assert step.dispatch(state, jnp.eye(3), None) == (dispatch, "as asked for")
    step(state, jnp.eye(3), None)
    assert bool(conds) == (dispatch == "in_graph")


def test_auto_takes_two_policies_in_graph(conds):
    step = mo.make_train_step(convolving_loss, two_employs())
    _, metrics = step(state_of(two_employs()), jnp.eye(3), None)
    assert len(conds) == 2
    assert metrics.employed


# --- What the decision hangs on -------------------------------------------------------


def employed(policy: mo.policies.Policy) -> optax.GradientTransformationExtraArgs:
    element = mo.sharpness_aware_gradient(mo.ascents.normalized(RHO))
    return optax.chain(mo.employ(policy, element), optax.sgd(0.1, momentum=0.9))


FORESEEN: dict[str, tuple[Callable[[], Any], bool]] = {
    "never": (lambda: employed(mo.policies.never()), True),
    "every": (lambda: employed(mo.policies.every(2)), True),
    "coin": (lambda: mo.ss_sam(optax.sgd(0.1), RHO), True),
    "looksam": (lambda: mo.looksam(optax.sgd(0.1), RHO, k=3), True),
    "joined": (
        lambda: employed(mo.policies.every(2) & mo.policies.between(3)),
        True,
    ),
    "injected": (
        lambda: optax.inject_hyperparams(lambda rho: mo.ss_sam(optax.sgd(0.1), rho))(
            rho=RHO
        ),
        True,
    ),
    "ae_sam": (ae_sam, False),
    "ae_looksam": (lambda: mo.ae_looksam(optax.sgd(0.1), RHO, STEPS), False),
    "joined with adaptive": (
        lambda: employed(mo.policies.every(2) | mo.policies.adaptive(STEPS)),
        False,
    ),
}


@pytest.mark.parametrize("name", FORESEEN)
def test_a_decision_by_the_step_alone_is_read_before_the_gradient(name):
    """No gradient is in the first program then, and all of it in the second."""
    make, foreseen = FORESEEN[name]
    step = mo.make_train_step(convolving_loss, make(), donate=False)
    state = state_of(make())
    programs = step.lower(state, jnp.eye(3), None).compile().programs
    convolve = {
        key: "convolution(" in (p.as_text() or "") for key, p in programs.items()
    }
    assert convolve == {"decide": not foreseen, "plain": foreseen, "employed": True}
    in_graph = mo.make_train_step(
        convolving_loss, make(), dispatch="in_graph", donate=False
    )
    other = state
    for t in range(4):
        batch = (0.1 if t % 2 else 2.0) * jnp.eye(3)
        state, metrics = step(state, batch, None)
        other, expected = in_graph(other, batch, None)
        chex.assert_trees_all_close((state, metrics), (other, expected), rtol=1e-5)


@pytest.mark.parametrize("name", ["every", "ae_sam"])
def test_what_is_skipped_with_loss_scaling_is_the_same_from_the_host(name):
    make, _ = FORESEEN[name]
    states = []
    for dispatch in ("host", "in_graph"):
        step = mo.make_train_step(
            convolving_loss,
            make(),
            dispatch=dispatch,
            donate=False,
            loss_scaling=mo.LossScaling(),
        )
        state = state_of(make())._replace(loss_scale=mo.LossScaling().init())
        for size in (1.0, jnp.inf, 1.0, 2.0):
            state, _ = step(state, size * jnp.eye(3), None)
        states.append(state)
    chex.assert_trees_all_close(*states, rtol=1e-5)


def test_a_loss_that_calls_back_does_so_once_a_gradient():
    """Whether it does may hang on the shapes of the batch."""
    calls = []

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        if len(batch) == 2:
            jax.debug.callback(lambda: calls.append(1))
        return quadratic_loss(params, model_state, batch, key)

    tx = employed(mo.policies.every(2))
    step = mo.make_train_step(loss_fn, tx, dispatch="host", donate=False)
    state = state_of(tx)
    for rows in (3, 2, 3, 2, 2):
        state, _ = step(state, jnp.ones((rows, 3)), None)
    jax.effects_barrier()
    # Of the steps with two rows the last one takes a second gradient.
    assert len(calls) == 3 + 1


def test_inputs_are_found_that_outputs_hang_on():
    def program(a, b, c, d):
        called = jax.jit(lambda x, y: (x + 1, y + 1))(b, c)
        return jnp.sin(a), called[0], jnp.zeros(3), d

    jaxpr = jax.make_jaxpr(lambda *x: program(*x)[0])(*4 * [X]).jaxpr
    assert inputs_used(jaxpr) == [True, False, False, False]
    # Whatever is called is not looked into.
    jaxpr = jax.make_jaxpr(lambda *x: program(*x)[1:3])(*4 * [X]).jaxpr
    assert inputs_used(jaxpr) == [False, True, True, False]
    jaxpr = jax.make_jaxpr(lambda *x: program(*x)[2:])(*4 * [X]).jaxpr
    assert inputs_used(jaxpr) == [False, False, False, True]


# --- A step inside something else -----------------------------------------------------


def scanned(step: Any, state: Any, batch: Any) -> Any:
    state, _ = jax.lax.scan(lambda s, b: step(s, b, None), state, batch[None])
    return state


def closed_over_by_vmap(step: Any, state: Any, batch: Any) -> Any:
    """Neither state nor batch is traced; only the trace tells."""
    params = jax.vmap(lambda x: (step(state, batch, None)[0].params, x)[0])(jnp.ones(2))
    return state._replace(params=jax.tree.map(lambda x: x[0], params))


def mapped_over_batches(step: Any, state: Any, batch: Any) -> Any:
    states, _ = jax.vmap(step, in_axes=(None, 0, None))(state, batch[None], None)
    return jax.tree.map(lambda x: x[0], states)


def differentiated(step: Any, state: Any, batch: Any) -> Any:
    def loss_after(scale: Any) -> Any:
        new_state, metrics = step(state, scale * batch, None)
        return metrics.loss, new_state

    slope, new_state = jax.grad(loss_after, has_aux=True)(1.0)
    assert jnp.isfinite(slope)
    return new_state


def checked(step: Any, state: Any, batch: Any) -> Any:
    error, (new_state, _) = checkify.checkify(step)(state, batch, None)
    error.throw()
    return new_state


INSIDE: dict[str, Callable[..., Any]] = {
    "jit": lambda step, *args: jax.jit(step)(*args, None)[0],
    "jit of the batch": lambda step, state, batch: jax.jit(
        lambda batch: step(state, batch, None)[0]
    )(batch),
    "jit of nothing": lambda step, *args: jax.jit(lambda: step(*args, None)[0])(),
    "scan": scanned,
    "vmap over batches": mapped_over_batches,
    "vmap over something else": closed_over_by_vmap,
    "grad": differentiated,
    "checkify": checked,
}


@pytest.mark.parametrize("loss_fn", [quadratic_loss, convolving_loss])
@pytest.mark.parametrize("inside", INSIDE)
def test_a_step_inside_something_else_is_in_graph(inside, loss_fn):
    tx = ae_sam()
    state, batch = state_of(tx), jnp.eye(3)
    step = mo.make_train_step(loss_fn, tx, donate=False)
    expected, _ = step(state, batch, None)
    found = INSIDE[inside](step, state, batch)
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-6)


def test_shapes_are_had_without_a_step():
    tx = ae_sam()
    state = state_of(tx)
    step = mo.make_train_step(convolving_loss, tx)
    shapes, _ = jax.eval_shape(step, state, jnp.eye(3), None)
    closed, _ = jax.eval_shape(lambda: step(state, jnp.eye(3), None))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, closed, state)


def test_decisions_in_a_scan_are_those_of_the_host():
    tx = ae_sam()
    sizes = jnp.array([1.0, 0.1, 3.0, 0.1, 5.0])
    step = mo.make_train_step(quadratic_loss, tx)

    @jax.jit
    def epoch(state: Any) -> Any:
        return jax.lax.scan(
            lambda s, size: step(s, size * jnp.eye(3), None), state, sizes
        )

    last, metrics = epoch(state_of(tx))
    assert set(metrics.employed.tolist()) == {True, False}
    host = mo.make_train_step(quadratic_loss, tx, dispatch="host")
    state = state_of(tx)
    for size in sizes:
        state, _ = host(state, size * jnp.eye(3), None)
    chex.assert_trees_all_close(last, state, rtol=1e-5)


# --- Ahead of time --------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_fn, programs",
    [(quadratic_loss, ["step"]), (convolving_loss, ["decide", "plain", "employed"])],
)
def test_a_step_compiled_ahead_of_time_makes_the_same_steps(loss_fn, programs):
    tx = ae_sam()
    step = mo.make_train_step(loss_fn, tx, donate=False)
    state_shapes, batch_shape = jax.eval_shape(lambda: (state_of(tx), jnp.eye(3)))
    lowered = step.lower(state_shapes, batch_shape, None)
    assert list(lowered.programs) == programs
    compiled = lowered.compile()
    state = other = state_of(tx)
    employed = set()
    for t in range(4):
        batch = (0.1 if t % 2 else 2.0) * jnp.eye(3)
        state, metrics = compiled(state, batch, None)
        other, expected = step(other, batch, None)
        chex.assert_trees_all_equal((state, metrics), (other, expected))
        employed.add(bool(metrics.employed))
    assert employed == {True, False}
    assert all(p.memory_analysis() for p in compiled.programs.values())


# --- Bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["gpu", None, True, "HOST"])
def test_an_unknown_dispatch_is_refused_when_built(dispatch):
    with pytest.raises(ValueError, match='dispatch must be "auto", "in_graph" or "h'):
        mo.make_train_step(quadratic_loss, ae_sam(), dispatch=dispatch)


@pytest.mark.parametrize("inside", INSIDE)
def test_host_dispatch_inside_something_else_is_refused(inside):
    step = mo.make_train_step(quadratic_loss, ae_sam(), dispatch="host", donate=False)
    with pytest.raises(ValueError, match=r'inside jit, .* use dispatch="in_graph"'):
        INSIDE[inside](step, state_of(ae_sam()), jnp.eye(3))


def test_host_dispatch_of_two_policies_is_refused():
    step = mo.make_train_step(quadratic_loss, two_employs(), dispatch="host")
    with pytest.raises(ValueError, match="employs in 2 places"):
        step(state_of(two_employs()), jnp.eye(3), None)
