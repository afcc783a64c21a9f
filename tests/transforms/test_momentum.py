"""momentum_perturbation around every optimizer, against an explicit recursion."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.problems import Problem, mlp, named, quadratic, run
from tests.reference import recursions
from tests.reference.recursions import Tree, norm
from tests.versions import needs_no_temporaries

RHO, LR, MU = 0.2, 0.05, 0.9
STEPS = 12

x64 = pytest.mark.usefixtures("x64")


def ramp(t: Any) -> Any:
    """A rho schedule that changes on every step, and its sign once."""
    return 0.3 - 0.06 * t


def distance(a: Any, b: Any) -> float:
    chex.assert_trees_all_equal_structs(a, b)
    gaps = jax.tree.map(lambda x, y: float(np.max(np.abs(x - y), initial=0)), a, b)
    return max(jax.tree.leaves(gaps))


# --- The recursion: the base optimizer on the clean weights ---------------------------


def recursion(
    base: optax.GradientTransformation,
    momentum_of: Callable[[Any], Any],
    problem: Problem,
    rho: Callable[[int], float],
    normalise: Callable[[Any], Any] = lambda v: optax.tree.scale(
        1 / optax.tree.norm(v), v
    ),
) -> list[Any]:
    """The clean iterates of MSAM, from their definition.

    Both w and the perturbation are kept, so nothing has to be taken back.
    """

    @jax.jit
    def step(w: Any, epsilon: Any, state: Any, t: Any) -> tuple[Any, Any, Any]:
        g = problem.grad(optax.tree.add(w, epsilon), t)
        updates, state = base.update(g, state, w)
        w = optax.apply_updates(w, updates)
        epsilon = optax.tree.scale(-rho(t), normalise(momentum_of(state)))
        return w, epsilon, state

    w = jax.tree.map(jnp.asarray, problem.params)
    state, epsilon, iterates = base.init(w), optax.tree.zeros_like(w), []
    for t in range(STEPS):
        w, epsilon, state = step(w, epsilon, state, jnp.int32(t))
        iterates.append(w)
    return iterates


def clean_run(tx: optax.GradientTransformation, problem: Problem) -> list[Any]:
    return run(tx, problem, STEPS, observe=mo.eval_params).observed


class Case(NamedTuple):
    """An optimizer, and where its momentum is, said by hand."""

    base: Callable[[], optax.GradientTransformation]
    momentum_of: Callable[[Any], Any]


def kernels(params: Any) -> Any:
    """The mask of the matrices."""
    return jax.tree.map(lambda x: jnp.ndim(x) == 2, params)


def labels(params: Any) -> Any:
    return jax.tree.map(lambda x: "kernel" if jnp.ndim(x) == 2 else "other", params)


def merged(*parts: Any) -> Any:
    """One tree of several that mask each other's leaves; zeros where none has one."""

    def first(*leaves: Any) -> Any:
        return next((x for x in leaves if not isinstance(x, optax.MaskedNode)), MISSING)

    def masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    tree = jax.tree.map(first, *parts, is_leaf=masked)
    like = mlp().params
    return jax.tree.map(
        lambda x, p: jnp.zeros(np.shape(p)) if x is MISSING else x, tree, like
    )


MISSING = object()


def groups(state: Any) -> Any:
    """The states of a partition's groups."""
    return {name: s.inner_state for name, s in state.inner_states.items()}


def sgd() -> optax.GradientTransformation:
    return optax.sgd(LR, momentum=MU)


def adam() -> optax.GradientTransformation:
    return optax.adam(LR)


CASES: dict[str, Case] = {
    "sgd": Case(sgd, lambda s: s[0].trace),
    "sgd, nesterov": Case(
        lambda: optax.sgd(LR, MU, nesterov=True), lambda s: s[0].trace
    ),
    "adam": Case(adam, lambda s: s[0].mu),
    "adamw": Case(lambda: optax.adamw(LR, weight_decay=0.1), lambda s: s[0].mu),
    "nadam": Case(lambda: optax.nadam(LR), lambda s: s[0].mu),
    "nadamw": Case(lambda: optax.nadamw(LR), lambda s: s[0].mu),
    "lion": Case(lambda: optax.lion(0.01), lambda s: s[0].mu),
    "amsgrad": Case(lambda: optax.amsgrad(LR), lambda s: s[0].mu),
    "adabelief": Case(lambda: optax.adabelief(LR), lambda s: s[0].mu),
    "muon": Case(
        lambda: optax.contrib.muon(0.01),
        lambda s: merged(groups(s)["muon"][0].mu, groups(s)["adam"][0].mu),
    ),
    "partition": Case(
        lambda: optax.partition({"kernel": sgd(), "other": adam()}, labels),
        lambda s: merged(groups(s)["kernel"][0].trace, groups(s)["other"][0].mu),
    ),
    "partition with a frozen group": Case(
        lambda: optax.partition(
            {"kernel": adam(), "other": optax.set_to_zero()}, labels
        ),
        lambda s: merged(groups(s)["kernel"][0].mu),
    ),
    "masked": Case(
        lambda: optax.chain(
            optax.masked(optax.trace(MU), kernels), optax.scale_by_learning_rate(LR)
        ),
        lambda s: merged(s[0].inner_state.trace),
    ),
    "masked by a prefix": Case(
        lambda: optax.chain(
            optax.masked(optax.trace(MU), {"hidden": True, "output": False}),
            optax.scale_by_learning_rate(LR),
        ),
        lambda s: {
            "hidden": s[0].inner_state.trace["hidden"],
            "output": jax.tree.map(jnp.zeros_like, mlp().params["output"]),
        },
    ),
    "partition by prefixes": Case(
        lambda: optax.partition(
            {"a": sgd(), "b": adam()}, {"hidden": "a", "output": "b"}
        ),
        lambda s: {
            "hidden": groups(s)["a"][0].trace["hidden"],
            "output": groups(s)["b"][0].mu["output"],
        },
    ),
    "inject_hyperparams": Case(
        lambda: optax.inject_hyperparams(optax.sgd)(
            learning_rate=lambda t: LR / (1 + t), momentum=MU
        ),
        lambda s: s.inner_state[0].trace,
    ),
    "apply_if_finite": Case(
        lambda: optax.apply_if_finite(adam(), 3), lambda s: s.inner_state[0].mu
    ),
    "MultiSteps": Case(
        lambda: optax.MultiSteps(
            sgd(), 2, accumulator_dtype=jnp.float64
        ).gradient_transformation(),
        lambda s: s.inner_opt_state[0].trace,
    ),
    "a chain": Case(
        lambda: optax.chain(
            optax.clip_by_global_norm(0.5),
            optax.add_decayed_weights(0.1),
            optax.trace(MU),
            optax.scale_by_schedule(lambda t: -LR / (1 + 0.1 * t)),
        ),
        lambda s: s[2].trace,
    ),
    "a chain in a chain": Case(
        lambda: optax.chain(
            optax.chain(optax.scale(2.0), optax.chain(optax.trace(MU))),
            optax.scale(-LR),
        ),
        lambda s: s[0][1][0].trace,
    ),
    "named chain": Case(
        lambda: optax.named_chain(
            ("mu", optax.trace(MU)), ("trace", optax.scale_by_learning_rate(LR))
        ),
        lambda s: s["mu"].trace,
    ),
}


def safe_unit(v: Any) -> Any:
    size = optax.tree.norm(v)
    return optax.tree.scale(jnp.where(size > 0, 1 / size, 0.0), v)


@x64
@pytest.mark.parametrize("name", CASES)
def test_the_clean_weights_are_the_base_optimizers_at_the_perturbed_gradient(name):
    base, momentum_of = CASES[name]
    tx = mo.momentum_perturbation(base(), ramp)
    expected = recursion(base(), momentum_of, mlp(), ramp, safe_unit)
    assert distance(clean_run(tx, mlp()), expected) < 1e-12
    unperturbed = recursion(base(), momentum_of, mlp(), lambda t: 0.0 * t, safe_unit)
    assert distance(expected, unperturbed) > 1e-4


AROUND: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "a chain": lambda tx: optax.chain(optax.identity(), tx),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda x: True, p)),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rho: mo.momentum_perturbation(sgd(), rho)
    )(rho=ramp),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(
        tx, 1, accumulator_dtype=jnp.float64
    ).gradient_transformation(),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step: step >= 0
    ),
}


@x64
@pytest.mark.parametrize("wrapper", AROUND)
def test_eval_params_looks_inside(wrapper):
    expected = recursion(sgd(), CASES["sgd"].momentum_of, mlp(), ramp)
    tx = AROUND[wrapper](mo.momentum_perturbation(sgd(), ramp))
    assert distance(clean_run(tx, mlp()), expected) < 1e-12


@x64
def test_a_partition_of_two_perturbed_groups_is_made_of_both():
    tx = optax.partition(
        {
            "kernel": mo.momentum_perturbation(sgd(), ramp),
            "other": mo.momentum_perturbation(adam(), -0.1),
        },
        labels,
    )
    # On a loss that is a sum over the parameters, each group is on its own.
    params = jax.tree.map(jnp.asarray, mlp().params)

    def loss(p: Any, t: Any) -> Any:
        return sum(jnp.sum(jnp.cos(x * (1 + 0.1 * t))) for x in jax.tree.leaves(p))

    def group(label: str) -> dict[str, Any]:
        return {
            key: x
            for (key, x), name in zip(
                named(params).items(), jax.tree.leaves(labels(params)), strict=True
            )
            if name == label
        }

    found = clean_run(tx, Problem("separable", params, loss))[-1]
    kernel = recursion(
        sgd(),
        lambda s: s[0].trace,
        Problem("kernel", group("kernel"), loss),
        ramp,
    )[-1]
    other = recursion(
        adam(),
        lambda s: s[0].mu,
        Problem("other", group("other"), loss),
        lambda t: -0.1,
    )[-1]
    assert distance(dict(named(found)), {**other, **kernel}) < 1e-12


@x64
def test_a_part_of_a_chain_outside_sees_the_perturbed_weights():
    tx = optax.chain(
        optax.add_decayed_weights(0.3), mo.momentum_perturbation(sgd(), RHO)
    )
    options = dict(lr=LR, momentum=MU, rho=RHO)
    expected = recursions.msam(
        quadratic().named_grad,
        quadratic().named_params,
        STEPS,
        decay_of_perturbed=0.3,
        **options,  # type: ignore[arg-type]
    )[1]
    found = clean_run(tx, quadratic())
    assert distance(dict(named(found[-1])), dict(expected[-1])) < 1e-12


# --- Where the momentum is not found by itself ----------------------------------------


@x64
@pytest.mark.parametrize(
    "base, momentum_fn",
    [
        (lambda: optax.adan(LR), lambda s: s[0].m),
        (
            lambda: optax.chain(optax.ema(0.9), optax.scale_by_learning_rate(LR)),
            lambda s: s[0].ema,
        ),
        (
            lambda: optax.chain(sgd(), optax.trace(0.5)),
            lambda s: s[0][0].trace,
        ),
        (lambda: optax.sgd(LR), None),
        (lambda: optax.rmsprop(LR), None),
    ],
    ids=["adan", "ema", "two traces", "sgd without momentum", "rmsprop"],
)
def test_momentum_fn_says_where_the_momentum_is(base, momentum_fn):
    with pytest.raises(ValueError, match="momentum_fn=lambda inner_state"):
        mo.momentum_perturbation(base(), RHO).init(mlp().params)
    if momentum_fn is None:
        return
    tx = mo.momentum_perturbation(base(), ramp, momentum_fn=momentum_fn)
    expected = recursion(base(), momentum_fn, mlp(), ramp)
    assert distance(clean_run(tx, mlp()), expected) < 1e-12


# --- Ascents --------------------------------------------------------------------------


@x64
@pytest.mark.parametrize(
    "base, rho", [(sgd, -RHO), (adam, RHO), (lambda: optax.contrib.muon(0.01), ramp)]
)
def test_rho_means_the_normalized_ascent(base, rho):
    by_rho = mo.momentum_perturbation(base(), rho)
    by_ascent = mo.momentum_perturbation(base(), ascent=mo.ascents.normalized(rho))
    assert distance(clean_run(by_rho, mlp()), clean_run(by_ascent, mlp())) < 1e-12


@x64
def test_an_adaptive_ascent_scales_with_the_clean_weights():
    ascent = mo.ascents.adaptive(RHO, eta=0.01)
    tx = mo.momentum_perturbation(sgd(), ascent=ascent)
    problem = mlp()
    w = jax.tree.map(jnp.asarray, problem.params)
    v = epsilon = optax.tree.zeros_like(w)
    expected = []
    for t in range(STEPS):
        v = jax.tree.map(
            lambda v, g: MU * v + g, v, problem.grad(optax.tree.add(w, epsilon), t)
        )
        w = jax.tree.map(lambda w, v: w - LR * v, w, v)
        size = jax.tree.map(
            lambda w: jnp.abs(w) + 0.01 if w.ndim == 2 else jnp.ones_like(w), w
        )
        scaled = optax.tree.mul(size, v)
        epsilon = optax.tree.scale(
            -RHO / optax.tree.norm(scaled), optax.tree.mul(size, scaled)
        )
        expected.append(w)
    assert distance(clean_run(tx, problem), expected) < 1e-12


@x64
def test_what_a_masked_ascent_masks_out_is_not_perturbed():
    ascent = optax.masked(mo.ascents.normalized(RHO), kernels)
    tx = mo.momentum_perturbation(sgd(), ascent=ascent)

    def difference(state: Any, params: Any) -> Any:
        return optax.tree.sub(params, mo.eval_params(state, params))

    for epsilon in run(tx, mlp(), 3, observe=difference).observed:
        for layer in epsilon.values():
            assert not layer["bias"].any()
            assert layer["kernel"].any()
        assert norm(Tree(named(epsilon))) == pytest.approx(RHO, rel=1e-4)


@x64
def test_a_prefix_mask_of_an_ascent_keeps_a_whole_layer_unperturbed():
    mask = {"hidden": False, "output": True}
    tx = mo.momentum_perturbation(
        sgd(), ascent=optax.masked(mo.ascents.normalized(RHO), mask)
    )
    _, observed = run(
        tx,
        mlp(),
        3,
        observe=lambda s, p: optax.tree.sub(p, mo.eval_params(s, p)),
    )
    assert not any(x.any() for x in jax.tree.leaves(observed[-1]["hidden"]))
    assert all(x.any() for x in jax.tree.leaves(observed[-1]["output"]))


# The gradient is taken at w - lr mu v, and v moves as SGD's: that is Nesterov's method,
# and its clean weights are those *before* the look-ahead.
@x64
def test_unnormalised_with_rho_of_learning_rate_times_momentum_is_nesterov():
    def nesterov_by_its_definition(problem: Problem) -> list[Tree]:
        w = Tree(problem.named_params)
        v, iterates = 0.0 * w, []
        for t in range(STEPS):
            ahead = w - LR * MU * v
            v = MU * v + Tree(problem.named_grad(ahead, t))
            w = w - LR * v
            iterates.append(w)
        return iterates

    tx = mo.momentum_perturbation(sgd(), ascent=mo.ascents.unnormalized(LR * MU))
    for problem in (mlp(), quadratic()):
        found = clean_run(tx, problem)
        for w, expected in zip(found, nesterov_by_its_definition(problem), strict=True):
            assert distance(dict(named(w)), dict(expected)) < 1e-12


# --- The clean weights are kept -------------------------------------------------------


def bouncing(t: Any) -> Any:
    """A rho schedule that jumps by orders of magnitude, to zero and across it."""
    return jnp.asarray([1.0, 0.0, -0.5, 1e-3, 3.0])[t % 5]


@x64
@pytest.mark.parametrize(
    "tx, base, momentum_of",
    [
        (lambda: mo.msam(LR, MU, rho=bouncing), sgd, lambda s: s[0].trace),
        (
            lambda: mo.adamw_msam(LR, rho=bouncing),
            lambda: optax.adamw(LR),
            lambda s: s[0].mu,
        ),
        (
            lambda: mo.momentum_perturbation(adam(), bouncing),
            adam,
            lambda s: s[0].mu,
        ),
        (
            lambda: mo.momentum_perturbation(
                sgd(), ascent=mo.ascents.normalized(bouncing)
            ),
            sgd,
            lambda s: s[0].trace,
        ),
    ],
    ids=["msam", "adamw_msam", "around adam", "an ascent"],
)
def test_a_rho_that_changes_does_not_leak_into_the_weights(tx, base, momentum_of):
    expected = recursion(base(), momentum_of, quadratic(), bouncing)
    assert distance(clean_run(tx(), quadratic()), expected) < 1e-12


@x64
@pytest.mark.parametrize("alias", [mo.msam, mo.adamw_msam])
@pytest.mark.parametrize("new_rho", [0.1, -2.0])
def test_a_state_taken_over_with_another_rho_keeps_the_clean_weights(alias, new_rho):
    problem = mlp()
    before, after = alias(LR, rho=0.3), alias(LR, rho=new_rho)
    params = jax.tree.map(jnp.asarray, problem.params)
    state = before.init(params)
    for t in range(4):
        updates, state = before.update(problem.grad(params, t), state, params)
        params = optax.apply_updates(params, updates)
    clean = mo.eval_params(state, params)
    assert distance(clean, params) > 0.01

    # With either rho, the next clean weights are one base step from these.
    g = problem.grad(params, 4)
    same, there = before.update(g, state, params), after.update(g, state, params)
    chex.assert_trees_all_close(
        *(mo.eval_params(s, optax.apply_updates(params, u)) for u, s in (same, there)),
        rtol=0,
        atol=1e-13,
    )


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(
    "tx",
    [
        mo.msam(LR, rho=RHO),
        mo.msam(LR, rho=ramp),
        mo.adamw_msam(LR, rho=RHO),
        mo.momentum_perturbation(optax.lion(LR), RHO),
        mo.momentum_perturbation(sgd(), ascent=mo.ascents.adaptive(RHO, 0.01)),
    ],
    ids=["msam", "msam with a schedule", "adamw_msam", "around lion", "an ascent"],
)
def test_steps_with_gradients_that_are_not_finite_leave_no_trace(tx, poison):
    tx = optax.apply_if_finite(tx, max_consecutive_errors=3)
    params = jax.tree.map(jnp.asarray, mlp().params)

    @jax.jit
    def step(params: Any, state: Any, t: Any, factor: Any) -> Any:
        g = jax.tree.map(lambda w: factor * jnp.cos(w + t), params)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    healthy = poisoned = (params, tx.init(params))
    for t in range(6):
        if t in (0, 2, 3):
            before = mo.eval_params(poisoned[1], poisoned[0])
            poisoned = step(*poisoned, t, jnp.float32(poison))
            chex.assert_trees_all_equal(
                mo.eval_params(poisoned[1], poisoned[0]), before
            )
        healthy = step(*healthy, t, jnp.float32(1))
        poisoned = step(*poisoned, t, jnp.float32(1))
    chex.assert_trees_all_equal(poisoned[0], healthy[0])
    chex.assert_trees_all_equal(poisoned[1].inner_state, healthy[1].inner_state)
    assert int(poisoned[1].total_notfinite) == 3


def test_one_gradient_of_infinite_norm_does_not_poison_the_scale():
    # Each entry is finite, and so is the momentum, but its norm overflows.
    tx = mo.msam(1e-30, momentum=0.5, rho=RHO)
    params = {"w": jnp.ones(4)}
    state = tx.init(params)
    for g in (1e30, 1.0):
        updates, state = tx.update({"w": jnp.full(4, g)}, state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_tree_all_finite((params, state))
    chex.assert_tree_all_finite(mo.eval_params(state, params))


def drift(tx: Any, base: Any, dtype: Any, steps: int = 1000) -> tuple[float, float]:
    """How far clean weights and base's are from the base's in float32, rms.

    The gradients do not depend on the weights, so that the clean weights are the base
    optimizer's, but for rounding.
    """
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=64), jnp.float32)
    gradients = jnp.asarray(rng.normal(size=(steps, 64)), jnp.float32)

    def last(tx: Any, dtype: Any) -> Any:
        def body(carry: Any, g: Any) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(g.astype(dtype), state, params)
            return (optax.apply_updates(params, updates), state), None

        w = params.astype(dtype)
        (w, state), _ = jax.lax.scan(body, (w, tx.init(w)), gradients)
        return mo.eval_params(state, w).astype(jnp.float32)

    exact = last(base, jnp.float32)
    return tuple(  # type: ignore[return-value]
        float(jnp.sqrt(jnp.mean((last(t, dtype) - exact) ** 2))) for t in (tx, base)
    )


PAIRS: dict[str, tuple[Any, Any]] = {
    "msam": (lambda: mo.msam(0.01, MU, rho=RHO), lambda: optax.sgd(0.01, MU)),
    "adamw_msam": (lambda: mo.adamw_msam(1e-3, rho=RHO), lambda: optax.adamw(1e-3)),
    "around sgd": (
        lambda: mo.momentum_perturbation(optax.sgd(0.01, MU), RHO),
        lambda: optax.sgd(0.01, MU),
    ),
    "an ascent": (
        lambda: mo.momentum_perturbation(
            optax.sgd(0.01, MU), ascent=mo.ascents.normalized(RHO)
        ),
        lambda: optax.sgd(0.01, MU),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_thousand_steps_in_single_precision_keep_the_clean_weights(name):
    tx, base = (make() for make in PAIRS[name])
    ours, _ = drift(tx, base, jnp.float32)
    assert ours < 1e-5


# --- Memory ---------------------------------------------------------------------------


def state_bytes(tx: Any, params: Any) -> int:
    state = jax.eval_shape(tx.init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "make, base",
    [
        (lambda rho, **exact: mo.msam(LR, rho=rho, **exact), sgd()),
        (lambda rho, **exact: mo.adamw_msam(LR, rho=rho, **exact), optax.adamw(LR)),
        (
            lambda rho, **exact: mo.momentum_perturbation(optax.lion(LR), rho, **exact),
            optax.lion(LR),
        ),
    ],
    ids=["msam", "adamw_msam", "around lion"],
)
def test_the_state_is_the_base_optimizers_and_one_scalar(make, base, dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), mlp().params)
    for rho, scalars in ((RHO, 1), (ramp, 2)):
        extra = state_bytes(make(rho, exact=False), params) - state_bytes(base, params)
        assert extra == 4 * scalars
        more = state_bytes(make(rho), params) - state_bytes(base, params)
        if dtype == jnp.float32:
            assert more == extra
        else:  # one float32 tree in the place of the scalar
            size = sum(x.size for x in jax.tree.leaves(params))
            assert more == 4 * (size + scalars - 1)


def temporary_bytes(tx: Any, params: Any) -> int:
    """What a compiled, donated update needs over its arguments and results."""

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = (
        jax.jit(update, donate_argnums=(0, 1))
        .lower(params, jax.eval_shape(tx.init, params), params)
        .compile()
    )
    analysis = compiled.memory_analysis()
    assert analysis is not None
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert analysis.alias_size_in_bytes >= 2 * size, "params and momentum are donated"
    return analysis.temp_size_in_bytes


@needs_no_temporaries
@pytest.mark.parametrize(
    "tx, base",
    [
        (mo.msam(LR, rho=RHO), sgd()),
        (mo.msam(LR, rho=ramp), sgd()),
        (
            mo.msam(LR, rho=RHO, nesterov=True),
            optax.sgd(LR, MU, nesterov=True),
        ),
        (mo.adamw_msam(LR, rho=RHO), optax.adamw(LR)),
        (mo.adamw_msam(LR, rho=ramp), optax.adamw(LR)),
    ],
    ids=["msam", "msam schedule", "msam nesterov", "adamw_msam", "adamw_msam schedule"],
)
def test_the_update_needs_no_temporary_of_the_parameters_size(tx, base):
    params = {f"{i}": jax.ShapeDtypeStruct((125_000,), jnp.float32) for i in range(8)}
    extra = temporary_bytes(tx, params) - temporary_bytes(base, params)
    assert extra < 0.01 * 4e6


# --- Bad input ------------------------------------------------------------------------


def raises(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


def test_an_optimizer_without_momentum_is_named():
    tx = mo.momentum_perturbation(optax.rmsprop(0.1), RHO)
    with raises("No momentum .* of ScaleByRmsState"):
        tx.init(mlp().params)
    with raises("No momentum .* trace and mu .* momentum_fn"):
        mo.momentum_perturbation(optax.sgd(0.1), RHO).init(mlp().params)
    with raises("No momentum"):
        mo.momentum_perturbation(
            optax.sgd(0.1), ascent=mo.ascents.normalized(RHO)
        ).init(mlp().params)


def test_several_momenta_are_named():
    inner = optax.chain(optax.trace(0.9), optax.scale_by_adam())
    with raises(r"Several momenta .*\[0\]\.trace, .*\[1\]\.mu.* momentum_fn"):
        mo.momentum_perturbation(inner, RHO).init(mlp().params)


@pytest.mark.parametrize(
    "options", [{}, {"rho": RHO, "ascent": mo.ascents.normalized(RHO)}]
)
def test_either_rho_or_an_ascent_is_needed(options):
    with raises("either rho or an ascent, but rho="):
        mo.momentum_perturbation(sgd(), **options)


@pytest.mark.parametrize("rho", [np.nan, np.inf, "0.1", True, 1j, [0.1], jnp.ones(2)])
@pytest.mark.parametrize(
    "factory",
    [
        lambda rho: mo.momentum_perturbation(sgd(), rho),
        lambda rho: mo.msam(LR, rho=rho),
        lambda rho: mo.adamw_msam(LR, rho=rho),
    ],
)
def test_a_rho_that_is_no_number_is_refused_when_built(factory, rho):
    with raises("rho .* must be one finite real number, but .* was given"):
        factory(rho)


@pytest.mark.parametrize("factory", [mo.msam, mo.adamw_msam])
@pytest.mark.parametrize("decay", [np.nan, "0.9", None])
def test_a_momentum_that_is_no_number_is_refused_when_built(factory, decay):
    name = {mo.msam: "momentum", mo.adamw_msam: "b1"}[factory]
    with raises(f"{name} must be one finite real number"):
        factory(LR, rho=RHO, **{name: decay})


@pytest.mark.parametrize(
    "tx",
    [
        mo.msam(LR, rho=0.3),
        mo.adamw_msam(LR, rho=1.0),
        mo.momentum_perturbation(sgd(), ascent=mo.ascents.normalized(RHO)),
    ],
)
def test_missing_params_are_asked_for(tx):
    grads = {"w": jnp.ones(2)}
    with raises(r"params were None: call update\(updates, state, params\)"):
        tx.update(grads, tx.init(grads))


def test_a_momentum_fn_of_another_structure_is_refused():
    for bad in (lambda s: s, lambda s: jnp.zeros(3), lambda s: {"w": jnp.zeros(3)}):
        tx = mo.momentum_perturbation(sgd(), RHO, momentum_fn=bad)
        with raises("momentum_fn must return a tree like the parameters"):
            tx.init({"w": jnp.ones(2)})


def msam_state(params: Any) -> Any:
    return mo.msam(LR, rho=0.3).init(params)


def test_eval_params_refuses_the_state_of_other_parameters():
    params = {"w": jnp.ones(2)}
    for other in ({"w": jnp.ones(3)}, {"v": jnp.ones(2)}, {}, [jnp.ones(2)]):
        with raises("does not belong to these parameters"):
            mo.eval_params(msam_state(params), other)
        stored = mo.momentum_perturbation(sgd(), ascent=mo.ascents.normalized(RHO))
        with raises("does not belong to these parameters"):
            mo.eval_params(stored.init(params), other)


def test_eval_params_refuses_swapped_arguments():
    params = {"w": jnp.ones(2)}
    for state in (
        msam_state(params),
        optax.apply_if_finite(mo.msam(LR, rho=0.3), 2).init(params),
    ):
        with raises("were they swapped"):
            mo.eval_params(params, state)
    with raises("were they swapped"):
        mo.eval_params(params, params)
    with raises("were they swapped"):
        mo.eval_params(None, params)


def test_eval_params_refuses_a_batched_state_and_names_vmap():
    params = {"w": jnp.ones((3, 2))}
    state = jax.vmap(mo.msam(LR, rho=0.3).init)(params)
    with raises(r"use jax\.vmap\(eval_params\)\(state, params\)"):
        mo.eval_params(state, params)
    jax.vmap(mo.eval_params)(state, params)


@pytest.mark.parametrize(
    "tx", [sgd(), adam(), optax.sgd(0.1), mo.sam(sgd()), mo.msam(LR, rho=0.0)]
)
def test_eval_params_without_a_perturbation_are_the_params_themselves(tx):
    params = {"w": jnp.ones(2)}
    assert mo.eval_params(tx.init(params), params) is params


def test_without_rho_the_optimizer_is_the_base_itself():
    base = optax.with_extra_args_support(sgd())
    assert mo.momentum_perturbation(base, 0.0) is base
    params = {"w": jnp.ones(2)}
    chex.assert_trees_all_equal(
        mo.msam(LR, MU, rho=0.0).init(params), base.init(params)
    )


def test_parameters_named_like_states_are_no_momenta():
    names = ("trace", "mu", "nu", "count")
    params = {name: {name: jnp.ones(2)} for name in names}
    for base in (sgd(), adam(), optax.contrib.muon(0.1)):
        mo.momentum_perturbation(base, RHO).init(params)
    with raises("No momentum"):
        mo.momentum_perturbation(optax.rmsprop(0.1), RHO).init(params)


@pytest.mark.parametrize(
    "inner",
    [mo.msam(0.1, rho=0.3), optax.chain(optax.clip(1.0), mo.adamw_msam(0.1, rho=1.0))],
)
def test_msam_inside_msam_is_refused(inner):
    with pytest.raises(ValueError, match="must not be nested"):
        mo.momentum_perturbation(inner, rho=0.1).init(jnp.ones(3))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda tx, state, p: mo.eval_params(tx, p), "given the optimizer: pass its"),
        (
            lambda tx, state, p: mo.eval_params([state[0]._asdict()], p),
            "given a dictionary made of an optimizer state",
        ),
        (
            lambda tx, state, p: mo.eval_params(p, optax.sgd(0.1, 0.9).init(p)),
            "were they swapped",
        ),
    ],
    ids=["the optimizer", "a state dictionary", "swapped without MSAM"],
)
def test_eval_params_does_not_return_perturbed_parameters_in_silence(call, message):
    params = {"w": jnp.ones(3)}
    tx = optax.chain(mo.msam(0.1, rho=0.3))
    with pytest.raises(ValueError, match=message):
        call(tx, tx.init(params), params)


@pytest.mark.parametrize("make", [mo.msam, mo.adamw_msam])
def test_an_optimizer_in_the_place_of_a_learning_rate_is_named(make):
    with pytest.raises(ValueError, match="use momentum_perturbation"):
        make(optax.sgd(0.1), rho=0.1)


def test_eval_params_prints_no_array_to_find_the_momentum(monkeypatch):
    """JAX's error on trees of different structure copies their arrays from the device.

    It swallows what is raised meanwhile: the calls are counted.
    """
    printed = []

    def count(array):
        printed.append(array.shape)
        return ""

    params = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    state = optax.chain(optax.clip(1.0), mo.msam(0.1, rho=0.3)).init(params)
    array_type = type(params["layer"]["bias"])
    monkeypatch.setattr(array_type, "__repr__", count)
    clean = mo.eval_params(state, params)
    assert not printed
    monkeypatch.undo()
    chex.assert_trees_all_equal(clean, params)


@pytest.mark.parametrize("lost", [None, {}, optax.EmptyState()])
def test_a_schedule_over_the_state_of_a_constant_says_what_is_missing(lost):
    params = jnp.array([1.0, 2.0])
    state = mo.msam(0.1, rho=0.3).init(params)._replace(rho_state=lost)
    tx = mo.msam(0.1, rho=optax.linear_schedule(0.3, 0.0, 100))
    with pytest.raises(ValueError, match="_replace"):
        tx.update(params, state, params)
    state = state._replace(rho_state=jnp.asarray(50, jnp.int32))
    _, state = tx.update(params, state, params)
    assert state.rho_state == 51
