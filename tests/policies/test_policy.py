"""Policies: when they say yes, and what they remember."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo

x64 = pytest.mark.usefixtures("x64")

# numpy: float64 in a test with x64, float32 in any other.
PARAMS = {"a": np.ones(3), "b": np.ones(())}


def decisions_of(
    policy: mo.policies.Policy,
    gradients: Any = None,
    steps: int = 12,
    params: Any = PARAMS,
    first_step: int = 0,
) -> tuple[list[bool], Any]:
    """The decisions on a sequence of gradients, and the last state."""
    if gradients is None:
        gradients = jax.tree.map(lambda x: jnp.ones((steps, *x.shape)), params)

    def body(carry: Any, g: Any) -> tuple[Any, Any]:
        state, step = carry
        decision, state = policy.decide(
            g, state, params, step=step, unrelated="swallowed"
        )
        chex.assert_shape(decision, ())
        chex.assert_type(decision, bool)
        return (state, step + 1), decision

    carry = policy.init(params), jnp.int32(first_step)
    (state, _), decisions = jax.lax.scan(body, carry, gradients)
    return decisions.tolist(), state


# --- Policies of the step -------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, steps",
    [
        (mo.policies.always(), range(12)),
        (mo.policies.never(), []),
        (mo.policies.every(1), range(12)),
        (mo.policies.every(2), range(0, 12, 2)),
        (mo.policies.every(5), [0, 5, 10]),
        (mo.policies.every(100), [0]),
        (mo.policies.between(3), range(3, 12)),
        (mo.policies.between(3, 6), [3, 4, 5]),
        (mo.policies.between(0, 2), [0, 1]),
        (mo.policies.bernoulli(1.0), range(12)),
        (mo.policies.bernoulli(0.0), []),
    ],
    ids=lambda x: None if isinstance(x, mo.policies.Policy) else str(list(x)),
)
def test_the_steps_employed(policy, steps):
    decisions, state = decisions_of(policy)
    assert [t for t, employed in enumerate(decisions) if employed] == list(steps)
    assert jax.tree.leaves(state) == []


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_bernoulli_draws_with_its_probability_independently(probability):
    n = 4000
    drawn = np.array(decisions_of(mo.policies.bernoulli(probability), steps=n)[0])
    variance = probability * (1 - probability)
    assert abs(drawn.mean() - probability) < 4 * math.sqrt(variance / n)
    correlation = np.mean((drawn[1:] - probability) * (drawn[:-1] - probability))
    assert abs(correlation) < 4 * variance / math.sqrt(n)


def test_bernoulli_draws_by_seed_and_step_alone():
    others = jax.tree.map(lambda x: jnp.full((50, *x.shape), 7.0), PARAMS)
    drawn = decisions_of(mo.policies.bernoulli(0.5, seed=3), steps=50)[0]
    assert decisions_of(mo.policies.bernoulli(0.5, seed=3), others)[0] == drawn
    assert decisions_of(mo.policies.bernoulli(0.5, seed=4), steps=50)[0] != drawn
    assert decisions_of(mo.policies.bernoulli(0.5), steps=50)[0] != drawn


def test_bernoulli_resumed_in_the_middle_continues_its_sequence():
    policy = mo.policies.bernoulli(0.5, seed=3)
    drawn = decisions_of(policy, steps=50)[0]
    assert decisions_of(policy, steps=30, first_step=20)[0] == drawn[20:]


@pytest.mark.parametrize("total, fraction", [(20, 0.2), (7, 0.5), (5, 1.0), (3, 0.2)])
def test_the_tail_is_where_the_learning_rate_falls(total, fraction):
    decisions, _ = decisions_of(mo.policies.tail(total, fraction), steps=total)
    rate = mo.hold_then_decay(0.3, total, fraction, end_value=0.1)
    rates = [float(rate(t)) for t in range(total + 1)]
    assert decisions == [new < old for old, new in itertools.pairwise(rates)]
    assert sum(decisions) == round(fraction * total)
    np.testing.assert_allclose([rates[0], rates[-1]], [0.3, 0.1], rtol=1e-6)
    falls = -np.diff(rates)[decisions]
    np.testing.assert_allclose(falls, 0.2 / sum(decisions), rtol=1e-5)


# --- The adaptive policy --------------------------------------------------------------


def adaptive_recursion(
    squared_norms: Sequence[float],
    total_steps: int,
    delta: float = 0.9,
    lambda_1: float = -1.0,
    lambda_2: float = 1.0,
    mean: float = 0.0,
    variance: float = 0.0,
) -> tuple[list[bool], float, float]:
    """The paper's recursion in plain Python; what is not finite is left out."""
    decisions = []
    for t, n in enumerate(squared_norms):
        if not math.isfinite(n):
            decisions.append(False)
            continue
        mean = delta * mean + (1 - delta) * n
        variance = delta * variance + (1 - delta) * (n - mean) ** 2
        share = min(t / total_steps, 1)
        c = share * lambda_1 + (1 - share) * lambda_2
        decisions.append(n >= mean + c * math.sqrt(variance))
    return decisions, mean, variance


def gradients_of(norms: Any) -> Any:
    """Gradients of these norms; each is spread over both leaves."""
    norms = jnp.asarray(norms)
    return {"a": norms[:, None] * jnp.array([[0.48, 0.0, 0.64]]), "b": 0.6 * norms}


noise = np.random.default_rng(0).lognormal(size=60)

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": dict(total_steps=60),
    "past the total": dict(total_steps=10),
    "quick statistics": dict(total_steps=40, delta=0.3),
    "no memory": dict(total_steps=60, delta=0.0, lambda_1=0.5, lambda_2=-0.5),
    "other thresholds": dict(total_steps=30, lambda_1=0.1, lambda_2=-0.7),
    "one step": dict(total_steps=1, lambda_1=0.2),
}

NORMS: dict[str, Any] = {
    "noise": noise,
    "falling": noise * np.exp(-0.1 * np.arange(60)),
    "growing": noise * np.exp(0.1 * np.arange(60)),
    "with NaN": np.where(np.arange(60) % 7 == 3, np.nan, noise),
    "NaN first": np.where(np.arange(60) < 3, np.nan, noise),
    "with infinity": np.where(np.arange(60) % 11 == 5, np.inf, noise),
    "zeros between": np.where(np.arange(60) % 5 == 2, 0.0, noise),
}


@x64
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("norms", NORMS)
def test_adaptive_is_its_recursion(norms, setting):
    policy = mo.policies.adaptive(**SETTINGS[setting])
    found, state = decisions_of(policy, gradients_of(NORMS[norms]))
    expected, mean, variance = adaptive_recursion(
        (NORMS[norms] ** 2).tolist(), **SETTINGS[setting]
    )
    assert found == expected
    assert 0 < sum(found) < 60 or setting == "no memory"
    np.testing.assert_allclose(state.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(state.variance, variance, rtol=1e-10)
    last = np.flatnonzero(np.isfinite(NORMS[norms]))[-1]
    share = min(last / SETTINGS[setting]["total_steps"], 1)
    low, high = (SETTINGS[setting].get(f"lambda_{i}", d) for i, d in ((1, -1), (2, 1)))
    c = share * low + (1 - share) * high
    np.testing.assert_allclose(
        state.threshold, mean + c * math.sqrt(variance), rtol=1e-10
    )


@x64
def test_adaptive_starts_from_the_statistics_it_is_given():
    start = dict(initial_mean=3.0, initial_variance=0.25)
    policy = mo.policies.adaptive(total_steps=60, **start)
    found, state = decisions_of(policy, gradients_of(noise))
    expected, mean, _ = adaptive_recursion(
        (noise**2).tolist(), 60, mean=3.0, variance=0.25
    )
    assert found == expected
    np.testing.assert_allclose(state.mean, mean, rtol=1e-10)
    zero_start = adaptive_recursion((noise**2).tolist(), 60)[0]
    assert found != zero_start


@x64
@hypothesis.settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@hypothesis.given(
    bad=st.lists(st.integers(0, 19), max_size=8),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_gradients_that_are_not_finite_neither_employ_nor_enter(bad, value):
    norms = noise[:20].copy()
    norms[bad] = value
    found, state = decisions_of(
        mo.policies.adaptive(total_steps=20), gradients_of(norms)
    )
    expected, mean, variance = adaptive_recursion((norms**2).tolist(), 20)
    assert found == expected
    assert not any(found[t] for t in bad)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(state.variance, variance, rtol=1e-10)


@x64
def test_the_threshold_is_that_of_the_last_gradient_that_was_finite():
    policy = mo.policies.adaptive(total_steps=20)
    norms = np.where(np.arange(20) == 19, np.nan, noise[:20])
    _, state = decisions_of(policy, gradients_of(norms))
    _, before = decisions_of(policy, gradients_of(norms[:19]))
    assert state.threshold == before.threshold != 0
    assert policy.init(PARAMS).threshold == 0


@pytest.mark.parametrize("huge", [1e10, 1e15, 1e18, 1e25])
def test_a_norm_whose_square_overflows_does_not_poison_the_statistics(huge):
    # In float32 already the square of 1e20, and the squared deviation of 1e10's square.
    norms = np.where(np.arange(60) == 4, huge, noise)
    found, state = decisions_of(
        mo.policies.adaptive(total_steps=60), gradients_of(norms)
    )
    chex.assert_tree_all_finite(state)
    if huge > 1e10:
        expected, mean, _ = adaptive_recursion(
            np.where(np.arange(60) == 4, np.nan, noise**2).tolist(), 60
        )
        assert found == expected
        np.testing.assert_allclose(state.mean, mean, rtol=1e-4)


def test_adaptive_employs_more_often_in_the_end_with_the_defaults():
    found, _ = decisions_of(mo.policies.adaptive(total_steps=60), gradients_of(noise))
    assert sum(found[40:]) > sum(found[:20])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_adaptive_sums_half_precision_gradients_in_single_precision(dtype):
    # 10,000 squares of 100: infinite in float16, and stuck in bfloat16.
    params = {"w": jnp.ones(10_000, dtype)}
    gradient = {"w": jnp.full((1, 10_000), 100, dtype)}
    _, state = decisions_of(
        mo.policies.adaptive(total_steps=10), gradient, params=params
    )
    np.testing.assert_allclose(state.mean, 0.1 * 1e8, rtol=1e-5)
    chex.assert_type([state.mean, state.variance], jnp.float32)


# --- Two policies combined ------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, steps",
    [
        (mo.policies.every(2) & mo.policies.between(3), [4, 6, 8, 10]),
        (mo.policies.every(5) | mo.policies.between(3, 5), [0, 3, 4, 5, 10]),
        (mo.policies.always() & mo.policies.never(), []),
        (mo.policies.never() | mo.policies.every(6), [0, 6]),
    ],
    ids=["every and late", "every or phase", "contradiction", "or never"],
)
def test_two_policies_combine(policy, steps):
    decisions, _ = decisions_of(policy)
    assert [t for t, employed in enumerate(decisions) if employed] == steps


@x64
def test_a_combined_adaptive_policy_sees_the_gradients_that_the_other_rules_out():
    combined = mo.policies.between(30) & mo.policies.adaptive(60)
    found, _ = decisions_of(combined, gradients_of(noise))
    alone, _ = decisions_of(mo.policies.adaptive(60), gradients_of(noise))
    assert found == [False] * 30 + alone[30:]


# --- Policies in general --------------------------------------------------------------

POLICIES = {
    "always": mo.policies.always(),
    "never": mo.policies.never(),
    "every": mo.policies.every(3),
    "between": mo.policies.between(3),
    "bernoulli": mo.policies.bernoulli(0.5),
    "adaptive": mo.policies.adaptive(10),
    "combined": mo.policies.every(2) | mo.policies.adaptive(10),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_the_state_keeps_its_dtypes_under_scan(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params = {"w": jnp.ones(3, dtype)}
        _, state = jax.eval_shape(lambda: decisions_of_traced(POLICIES[name], params))
        chex.assert_trees_all_equal_shapes_and_dtypes(
            state, POLICIES[name].init(params)
        )


def decisions_of_traced(policy: mo.policies.Policy, params: Any) -> Any:
    return jax.lax.scan(
        lambda state, step: policy.decide(params, state, params, step=step)[::-1],
        policy.init(params),
        jnp.arange(3),
    )[::-1]


# --- Bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: mo.policies.every(0),
            r"k must be one finite real number in \[1, inf\]",
        ),
        (lambda: mo.policies.every(-3), "k must be .* but -3 was given"),
        (lambda: mo.policies.every(2.0), "k must be an integer, but 2.0"),  # type: ignore[arg-type]
        (lambda: mo.policies.every("2"), "k must be .* but '2'"),  # type: ignore[arg-type]
        (lambda: mo.policies.every(True), "k must be .* but True"),
        (lambda: mo.policies.every(None), "k must be .* but None"),  # type: ignore[arg-type]
        (lambda: mo.policies.between(-1), "start must be"),
        (lambda: mo.policies.between(1.5), "start must be an integer"),  # type: ignore[arg-type]
        (lambda: mo.policies.between(0, -1), "stop must be"),
        (lambda: mo.policies.between(0, math.inf), "stop must be"),  # type: ignore[arg-type]
        (lambda: mo.policies.bernoulli(-0.1), r"probability must be .* in \[0, 1\]"),
        (lambda: mo.policies.bernoulli(1.1), r"probability must be .* in \[0, 1\]"),
        (lambda: mo.policies.bernoulli(math.nan), "probability must be"),
        (lambda: mo.policies.bernoulli("0.5"), "probability must be"),  # type: ignore[arg-type]
        (lambda: mo.policies.bernoulli(0.5, 1.5), "seed must be an integer"),  # type: ignore[arg-type]
        (lambda: mo.policies.bernoulli(0.5, -1), "seed must be"),
        (lambda: mo.policies.tail(0, 0.5), "total_steps must be"),
        (lambda: mo.policies.tail(10, 1.5), r"fraction must be .* in \[0, 1\]"),
        (lambda: mo.policies.tail(10, 0.01), "fraction=0.01 of total_steps=10 has no"),
        (lambda: mo.policies.tail(10, jnp.float32(0.2)), "must be Python numbers"),
        (lambda: mo.hold_then_decay(0.1, 10, 0.0), "at least one step"),
        (lambda: mo.hold_then_decay(math.nan, 10, 0.5), "value must be"),
        (lambda: mo.policies.adaptive(0), "total_steps must be"),
        (lambda: mo.policies.adaptive(10.0), "total_steps must be an integer"),  # type: ignore[arg-type]
        (lambda: mo.policies.adaptive(math.nan), "total_steps must be"),  # type: ignore[arg-type]
        (lambda: mo.policies.adaptive(10, delta=1.0), r"delta must .*\[0, 1\)"),
        (lambda: mo.policies.adaptive(10, delta=-0.1), "delta must be"),
        (lambda: mo.policies.adaptive(10, delta=1.5), "delta must be"),
        (lambda: mo.policies.adaptive(10, delta=math.nan), "delta must be"),
        (lambda: mo.policies.adaptive(10, lambda_1=math.inf), "lambda_1 must be"),
        (lambda: mo.policies.adaptive(10, lambda_2="1"), "lambda_2 must be"),  # type: ignore[arg-type]
        (
            lambda: mo.policies.adaptive(10, initial_mean=math.nan),
            "initial_mean must be",
        ),
        (
            lambda: mo.policies.adaptive(10, initial_variance=-1.0),
            "initial_variance must be",
        ),
    ],
)
def test_bad_arguments_are_refused_when_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda o: mo.ss_sam(o, 0.1, probability=2.0), "probability must be"),
        (lambda o: mo.ss_sam(o, math.nan), "rho .* must be"),
        (lambda o: mo.ae_sam(o, 0.1, total_steps=0), "total_steps must be"),
        (lambda o: mo.ae_sam(o, 0.1, total_steps=5, delta=1.0), "delta must"),
        (lambda o: mo.ae_sam(o, "0.1", total_steps=5), "rho .* must be"),  # type: ignore[arg-type]
        (lambda o: mo.sam(o, math.inf), "rho .* must be"),
        (lambda o: mo.asam(o, 0.1, eta=-1.0), "eta must be"),
    ],
)
def test_the_aliases_refuse_them_likewise(build, message):
    with pytest.raises(ValueError, match=message):
        build(optax.sgd(0.1))


def test_an_empty_phase_is_refused():
    with pytest.raises(ValueError, match="start=5 and stop=5 were given"):
        mo.policies.between(5, 5)


def test_policies_are_not_joined_by_and():
    with pytest.raises(ValueError, match="Join policies by & and"):
        _ = mo.policies.always() and mo.policies.every(2)
