"""employ: the chosen branch runs, and only that one."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo

PARAMS = {"w": jnp.linspace(-1.0, 2.0, 6).reshape(2, 3), "b": jnp.array([0.5, -1.0])}


def loss(params: Any, t: Any = 0) -> Any:
    return jnp.sum(jnp.cos(params["w"] * (1 + 0.3 * t))) + jnp.sum(params["b"] ** 2 * t)


def sam(rho: Any = 0.1) -> optax.GradientTransformationExtraArgs:
    return mo.sharpness_aware_gradient(mo.ascents.normalized(rho))


class Counter:
    """Counts how often something is executed, not traced."""

    def __init__(self) -> None:
        self.count = 0

    def tick(self, *_: Any) -> None:
        self.count += 1

    def grad(self, params: Any, t: Any) -> Any:
        g = jax.grad(loss)(params, t)
        # The callback hangs on the result, so that it runs where the gradient does.
        jax.debug.callback(self.tick, g["w"][0, 0])
        return g


def train(
    tx: Any, steps: int, counter: Counter | None = None, **extra_args: Any
) -> tuple[Any, Any]:
    """Params and state after some steps; the counter counts the extra gradients."""

    @jax.jit
    def step(params: Any, state: Any, t: Any) -> tuple[Any, Any]:
        def grad_fn(p: Any) -> Any:
            return counter.grad(p, t) if counter else jax.grad(loss)(p, t)

        g = jax.grad(loss)(params, t)
        updates, state = tx.update(g, state, params, grad_fn=grad_fn, **extra_args)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for t in range(steps):
        params, state = step(params, state, jnp.int32(t))
    jax.block_until_ready(params)
    jax.effects_barrier()
    return params, state


# --- Cost -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, extra",
    [
        (mo.policies.every(3), 10),
        (mo.policies.every(7), 5),
        (mo.policies.always(), 30),
        (mo.policies.never(), 0),
        (mo.policies.between(20), 10),
        (mo.policies.between(5, 9), 4),
    ],
    ids=["every 3", "every 7", "always", "never", "late", "phase"],
)
def test_thirty_steps_run_as_many_extra_gradients_as_the_policy_employs(policy, extra):
    counter = Counter()
    tx = optax.chain(mo.employ(policy, sam()), optax.sgd(0.1))
    _, state = train(tx, 30, counter)
    assert counter.count == extra
    assert state[0].employed_steps == extra
    assert state[0].step == 30


@pytest.mark.parametrize(
    "tx",
    [
        mo.ae_sam(optax.sgd(0.1), 0.1, total_steps=30),
        mo.ss_sam(optax.sgd(0.1), 0.1, probability=0.3),
    ],
    ids=["ae_sam", "ss_sam"],
)
def test_the_aliases_run_exactly_the_employed_extra_gradients(tx):
    counter = Counter()
    _, state = train(tx, 30, counter)
    assert 0 < counter.count < 30
    assert counter.count == state[0].employed_steps


def test_inside_scan_the_steps_not_taken_cost_nothing_either():
    counter = Counter()
    tx = optax.chain(mo.employ(mo.policies.every(3), sam()), optax.sgd(0.1))

    def body(carry: Any, t: Any) -> tuple[Any, None]:
        params, state = carry
        g = jax.grad(loss)(params, t)
        updates, state = tx.update(
            g, state, params, grad_fn=lambda p: counter.grad(p, t)
        )
        return (optax.apply_updates(params, updates), state), None

    scanned = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(30))[0])
    jax.block_until_ready(scanned((PARAMS, tx.init(PARAMS))))
    jax.effects_barrier()
    assert counter.count == 10


# --- Equivalences ---------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    "inner",
    [
        sam(),
        optax.trace(0.9),
        optax.scale_by_adam(),
        optax.clip_by_global_norm(0.1),
        optax.chain(sam(), optax.scale_by_schedule(lambda t: 1.0 / (1 + t))),
        optax.add_noise(0.1, 0.5, 7),
    ],
    ids=["sam", "trace", "adam", "clip", "sam and a schedule", "noise"],
)
def test_every_k_is_optax_conditionally_transform_bit_for_bit(inner, k):
    ours = optax.chain(mo.employ(mo.policies.every(k), inner), optax.sgd(0.1))
    theirs = optax.chain(
        optax.conditionally_transform(inner, lambda step: step % k == 0),
        optax.sgd(0.1),
    )
    params, (state, _) = train(ours, 5)
    expected, (expected_state, _) = train(theirs, 5)
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal(state.inner_state, expected_state.inner_state)
    chex.assert_trees_all_equal(state.step, expected_state.step)


def test_the_state_tells_the_last_decision():
    tx = mo.employ(mo.policies.every(2), sam())
    state = tx.init(PARAMS)
    seen = []
    for _ in range(4):
        _, state = tx.update(PARAMS, state, PARAMS, grad_fn=jax.grad(loss))
        seen.append((bool(state.employed), int(state.employed_steps), int(state.step)))
    assert seen == [(True, 1, 1), (False, 1, 2), (True, 2, 3), (False, 2, 4)]


def test_the_policy_sees_every_gradient_that_comes_in():
    def decide(updates, state, params, *, step, **extra_args):
        chex.assert_type(step, jnp.int32)
        return jnp.asarray(False), state + (step + 1) * updates["b"][0]

    tx = mo.employ(mo.policies.Policy(lambda params: jnp.zeros([]), decide), sam())
    state = tx.init(PARAMS)
    for t in range(3):
        updates = jax.tree.map(lambda x, t=t: jnp.full_like(x, 10.0**t), PARAMS)
        out, state = tx.update(updates, state, PARAMS, grad_fn=jax.grad(loss))
        chex.assert_trees_all_equal(out, updates)
    assert state.policy_state == 321


def test_an_employ_inside_another_and_its_policy_follow_the_steps_of_the_training():
    inner = mo.employ(mo.policies.every(3), sam())
    tx = mo.employ(mo.policies.every(2), inner)
    _, state = train(tx, 13)
    assert state.employed_steps == 7
    assert state.inner_state.employed_steps == 3  # 0, 6 and 12


def test_a_step_that_the_caller_gives_is_the_step_of_the_policy():
    tx = mo.employ(mo.policies.between(100), sam())
    _, state = train(tx, 3, step=99)
    assert state.employed_steps == 0
    _, state = train(tx, 3, step=100)
    assert state.employed_steps == 3
    assert state.step == 3


# --- otherwise ------------------------------------------------------------------------


def test_otherwise_runs_on_the_other_steps_with_the_inner_state_as_it_was_left():
    inner = optax.trace(0.5)
    tx = mo.employ(
        mo.policies.every(2),
        inner,
        otherwise=lambda updates, inner_state: optax.tree.add(
            optax.tree.scale(-1.0, updates), optax.tree.scale(100.0, inner_state.trace)
        ),
    )
    state = tx.init({"w": jnp.zeros(1)})
    outs = []
    for g in (1.0, 2.0, 3.0, 4.0):
        out, state = tx.update({"w": jnp.full(1, g)}, state)
        outs.append(out["w"].item())
    # The trace takes in the first and the third gradient only.
    assert outs == [1.0, -2.0 + 100 * 1.0, 3.5, -4.0 + 100 * 3.5]


# --- The static choice ----------------------------------------------------------------


@pytest.mark.parametrize("employed", [True, False])
@pytest.mark.parametrize("decision", [True, False])
def test_employed_chooses_the_branch_and_the_state_keeps_the_decision(
    employed, decision
):
    counter = Counter()
    policy = mo.policies.always() if decision else mo.policies.never()
    tx = optax.chain(mo.employ(policy, sam()), optax.sgd(0.1))
    params, state = train(tx, 3, counter, employed=employed)
    assert counter.count == (3 if employed else 0)
    assert state[0].employed == decision
    assert state[0].employed_steps == (3 if decision else 0)
    base = optax.with_extra_args_support(optax.sgd(0.1))
    expected, _ = train(mo.sam(base, 0.1) if employed else base, 3)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


@pytest.mark.parametrize("employed", [True, False])
def test_the_static_choice_compiles_no_cond(employed):
    tx = mo.employ(mo.policies.every(2), sam())

    def update(state: Any) -> Any:
        return tx.update(
            PARAMS, state, PARAMS, grad_fn=jax.grad(loss), employed=employed
        )

    def both(state: Any) -> Any:
        return tx.update(PARAMS, state, PARAMS, grad_fn=jax.grad(loss))

    state = tx.init(PARAMS)
    assert "cond[" not in str(jax.make_jaxpr(update)(state))
    assert "cond[" in str(jax.make_jaxpr(both)(state))


def test_decisions_then_static_branches_are_the_cond():
    """The two programs of the host dispatch make the same steps."""
    tx = mo.ae_sam(optax.sgd(0.1, 0.9), 0.1, total_steps=10)
    params, state = PARAMS, tx.init(PARAMS)
    both = set()
    for t in (3, 1, 0, 6, 0, 2):  # the gradient grows with t
        g = jax.grad(loss)(params, t)

        def update(g=g, params=params, state=state, t=t, **choice):
            return tx.update(
                g, state, params, grad_fn=lambda p: jax.grad(loss)(p, t), **choice
            )

        decision = bool(update(employed=False)[1][0].employed)
        both.add(decision)
        chex.assert_trees_all_close(update(employed=decision), update(), rtol=1e-6)
        updates, state = update()
        params = optax.apply_updates(params, updates)
    assert both == {True, False}


# --- Schedules ------------------------------------------------------------------------


def test_a_rho_schedule_inside_follows_the_training_steps():
    rhos = jnp.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    transform = sam(lambda t: rhos[t])
    tx = mo.employ(mo.policies.every(3), transform)
    state = tx.init(PARAMS)
    norms = []
    for t in range(7):
        g = jax.grad(loss)(PARAMS, t)
        _, state = tx.update(
            g, state, PARAMS, grad_fn=lambda p, t=t: jax.grad(loss)(p, t)
        )
        norms.append(float(state.inner_state.perturbation_norm))
    np.testing.assert_allclose(norms, [0.1, 0.1, 0.1, 0.4, 0.4, 0.4, 0.7], rtol=1e-6)


# --- vmap -----------------------------------------------------------------------------


def test_under_vmap_both_branches_run_but_the_results_are_right():
    """The documented caveat: there a cond becomes a select."""
    counter = Counter()
    tx = mo.employ(mo.policies.adaptive(10, lambda_1=0.5, lambda_2=0.5), sam())
    members = [jax.tree.map(lambda x, k=k: x * k, PARAMS) for k in (0.3, 1.0, 3.0)]
    # Each member has had a first gradient of its own size; only some stand out now.
    firsts = [optax.tree.scale(s, PARAMS) for s in (0.01, 10.0, 1.0)]

    def second_step(params: Any, first: Any, count: bool = False) -> Any:
        _, state = tx.update(
            first, tx.init(params), params, grad_fn=jax.grad(loss), employed=False
        )
        grad_fn = (lambda p: counter.grad(p, 1.0)) if count else jax.grad(loss)
        g = jax.grad(loss)(params, 1.0)
        return tx.update(
            g,
            state,
            params,
            grad_fn=grad_fn if count else lambda p: jax.grad(loss)(p, 1.0),
        )

    def stack(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    expected = stack(
        [jax.jit(second_step)(p, f) for p, f in zip(members, firsts, strict=True)]
    )
    found = jax.jit(jax.vmap(lambda p, f: second_step(p, f, count=True)))(
        stack(members), stack(firsts)
    )
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert set(found[1].employed.tolist()) == {True, False}
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    assert counter.count == 3


# --- Bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [2, None, lambda step: True, mo.policies.every])
def test_what_is_no_policy_is_refused_when_built(policy):
    with pytest.raises(ValueError, match=r"employ needs a Policy first, .*every\(2\)"):
        mo.employ(policy, sam())


@pytest.mark.parametrize("employed", [1, "yes", np.bool_(True), jnp.asarray(True)])
def test_a_choice_that_is_not_static_is_refused(employed):
    tx = mo.employ(mo.policies.every(2), sam())
    with pytest.raises(ValueError, match="employed chooses a branch while tracing"):
        tx.update(
            PARAMS,
            tx.init(PARAMS),
            PARAMS,
            grad_fn=jax.grad(loss),
            employed=employed,
        )


def test_a_missing_grad_fn_is_asked_for_even_where_it_is_not_employed():
    tx = mo.employ(mo.policies.never(), sam())
    with pytest.raises(ValueError, match="needs the keyword grad_fn"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_employing_msam_is_refused():
    tx = optax.chain(mo.employ(mo.policies.every(2), mo.msam(0.1, rho=0.3)))
    with pytest.raises(ValueError, match="give rho a schedule"):
        tx.init(jnp.ones(3))


def test_outside_of_jit_nothing_is_compiled_at_a_step():
    # A cond would be, and the whole gradient with it.
    tx = optax.chain(mo.employ(mo.policies.every(2), sam()), optax.sgd(0.1))
    grad_fn = jax.jit(jax.grad(loss))
    params, state = PARAMS, tx.init(PARAMS)
    in_graph = jax.jit(lambda p, s: tx.update(grad_fn(p), s, p, grad_fn=grad_fn))
    for t in range(6):
        expected = in_graph(params, state)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.lax, "cond", None)
            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        chex.assert_trees_all_close((updates, state), expected, rtol=1e-6)
        assert bool(state[0].employed) == (t % 2 == 0)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    "decide, message",
    [
        (lambda *args, **extra: jnp.asarray(True), "must return .decision, state."),
        (lambda *args, **extra: (jnp.ones(1, bool), ()), "shape .1,."),
        (lambda *args, **extra: (jnp.asarray(0.1), ()), "dtype float32"),
        (
            lambda *args, **extra: ((), jnp.asarray(True)),
            "must return .decision, state.",
        ),
    ],
)
def test_a_policy_that_decides_nothing_is_refused(decide, message):
    policy = mo.policies.Policy(lambda params: optax.EmptyState(), decide)
    tx = mo.employ(policy, sam())
    with pytest.raises(ValueError, match=message):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss))


def test_a_policy_joins_with_a_policy_alone():
    def other(*args: Any, **extra: Any) -> Any:
        return True

    joined: Any = mo.policies.every(2)
    with pytest.raises(ValueError, match="joins with a Policy"):
        joined & other
