"""Ascents: closed forms, extremal properties, invariances and bad input."""

from typing import Any

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from msam_optax.ascents._draws import draws_like

RHO = 0.5
PS = [1, 1.5, 2, 3, np.inf]

x64 = pytest.mark.usefixtures("x64")
quick = hypothesis.settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def epsilon_of(
    ascent: optax.GradientTransformation, direction: Any, params: Any = None
) -> Any:
    state = ascent.init(direction if params is None else params)
    return ascent.update(direction, state, params)[0]


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def p_norm(tree: Any, p: float) -> float:
    return float(np.linalg.norm(flat(tree), p))


# --- Closed forms ---------------------------------------------------------------------

DIRECTION = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[-4.0]])}


@pytest.mark.parametrize(
    "p, a, b",
    [
        (2, [0.3, 0.0], -0.4),
        (2.0, [0.3, 0.0], -0.4),
        (np.inf, [0.5, 0.0], -0.5),
        (1, [0.0, 0.0], -0.5),
        # q = 3, so |g|^(q-1) is 9 and 16, divided by (27 + 64)^(2/3).
        (1.5, [0.5 * 9 / 91 ** (2 / 3), 0.0], -0.5 * 16 / 91 ** (2 / 3)),
    ],
)
def test_normalized_ascent_is_the_dual_direction_over_all_parameters(p, a, b):
    epsilon = epsilon_of(mo.ascents.normalized(RHO, p), DIRECTION)
    expected = {"a": jnp.asarray(a), "b": jnp.full((1, 1), b)}
    chex.assert_trees_all_close(epsilon, expected, rtol=1e-6)


def test_of_equal_largest_entries_all_get_their_share_with_p_1():
    direction = {"a": jnp.array([2.0, -2.0, 1.0]), "b": jnp.array([2.0])}
    epsilon = epsilon_of(mo.ascents.normalized(0.3, p=1), direction)
    expected = {"a": jnp.array([0.1, -0.1, 0.0]), "b": jnp.array([0.1])}
    chex.assert_trees_all_close(epsilon, expected, rtol=1e-6)


def test_adaptive_ascent_scales_matrices_and_no_vectors():
    params = {"w": jnp.array([[2.0, -1.0]]), "b": jnp.array([10.0])}
    direction = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.array([2.0])}
    # T is 3, 2 and 1, T g is 3, 4 and 2, of norm sqrt(29).
    expected = {"w": jnp.array([[9.0, 8.0]]), "b": jnp.array([2.0])}
    expected = optax.tree.scale(RHO / np.sqrt(29), expected)
    ascent = mo.ascents.adaptive(RHO, eta=1.0)
    chex.assert_trees_all_close(
        epsilon_of(ascent, direction, params), expected, rtol=1e-6
    )


PARAMS = {"layer": {"w": jnp.array([[2.0]]), "b": jnp.array([3.0])}, "s": jnp.ones([])}


@pytest.mark.parametrize(
    "mask, adaptive",
    [
        (None, (False, True, False)),
        (True, (True, True, True)),
        (False, (False, False, False)),
        ({"layer": True, "s": False}, (True, True, False)),
        ({"layer": {"b": True, "w": False}, "s": True}, (True, False, True)),
        (lambda p: jax.tree.map(lambda x: x.ndim == 1, p), (True, False, False)),
        (lambda params: True, (True, True, True)),
    ],
    ids=["default", "all", "none", "prefix", "tree", "function", "function prefix"],
)
def test_the_mask_says_where_the_ascent_is_adaptive(mask, adaptive):
    direction = jax.tree.map(jnp.ones_like, PARAMS)
    t = np.where(adaptive, flat(PARAMS) + 0.5, 1.0)
    expected = RHO * t**2 / np.linalg.norm(t)
    found = epsilon_of(mo.ascents.adaptive(RHO, 0.5, mask), direction, PARAMS)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-6)


def test_unnormalized_ascent_only_scales():
    epsilon = epsilon_of(mo.ascents.unnormalized(-RHO), DIRECTION)
    chex.assert_trees_all_close(epsilon, optax.tree.scale(-RHO, DIRECTION))


def test_a_negative_rho_turns_around():
    for make in (mo.ascents.normalized, mo.ascents.unnormalized, mo.ascents.adaptive):
        ahead, back = (epsilon_of(make(r), DIRECTION, DIRECTION) for r in (RHO, -RHO))
        chex.assert_trees_all_equal(ahead, optax.tree.scale(-1, back))
        assert np.vdot(flat(ahead), flat(DIRECTION)) > 0


# --- Extremal properties --------------------------------------------------------------

entries = st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
vectors = hnp.arrays(np.float64, st.integers(1, 6), elements=entries)


def as_tree(vector: np.ndarray) -> dict[str, jax.Array]:
    """A vector as a tree of two leaves, the first perhaps empty."""
    half = len(vector) // 2
    return {"a": jnp.asarray(vector[:half]), "b": jnp.asarray(vector[half:])}


@x64
@quick
@hypothesis.given(vector=vectors.filter(np.any), p=st.sampled_from(PS))
def test_the_perturbation_reaches_the_ball_and_the_dual_norm(vector, p):
    epsilon = epsilon_of(mo.ascents.normalized(RHO, p), as_tree(vector))
    q = {1: np.inf, np.inf: 1}.get(p) or p / (p - 1)
    assert p_norm(epsilon, p) == pytest.approx(RHO, rel=1e-10)
    # Hölder's inequality is an equality.
    assert vector @ flat(epsilon) == pytest.approx(
        RHO * np.linalg.norm(vector, q), rel=1e-10
    )


@x64
@quick
@hypothesis.given(
    vector=vectors.filter(np.any), p=st.sampled_from(PS), seed=st.integers(0, 100)
)
def test_no_other_point_of_the_ball_rises_higher(vector, p, seed):
    epsilon = epsilon_of(mo.ascents.normalized(RHO, p), as_tree(vector))
    rng = np.random.default_rng(seed)
    others = rng.normal(size=(50, len(vector)))
    others *= RHO / np.linalg.norm(others, p, axis=1, keepdims=True)
    highest = vector @ flat(epsilon)
    assert np.all(others @ vector <= highest * (1 + 1e-10))


@x64
@quick
@hypothesis.given(
    vector=vectors.filter(np.any),
    exponent=st.sampled_from([-150, -100, -3, 3, 100, 150]),
    p=st.sampled_from(PS),
)
def test_the_scale_of_the_direction_does_not_matter(vector, exponent, p):
    ascent = mo.ascents.normalized(RHO, p)
    scaled = 2.0**exponent * vector
    chex.assert_trees_all_close(
        epsilon_of(ascent, as_tree(scaled)),
        epsilon_of(ascent, as_tree(vector)),
        rtol=1e-10,
    )


@x64
@quick
@hypothesis.given(
    vector=vectors.filter(np.any), weights=vectors, factor=st.floats(0.1, 10)
)
def test_the_adaptive_radius_is_invariant_to_rescaling_a_weight(
    vector, weights, factor
):
    # Rescaling w by c scales g by 1/c and must scale epsilon by c.
    size = min(len(vector), len(weights))
    g, w = vector[:size], weights[:size]
    hypothesis.assume(np.any(g * w))
    factors = np.geomspace(factor, 1 / factor, size)
    ascent = mo.ascents.adaptive(RHO, eta=0.0, mask=True)
    epsilon = epsilon_of(ascent, as_tree(g), as_tree(w))
    rescaled = epsilon_of(ascent, as_tree(g / factors), as_tree(w * factors))
    np.testing.assert_allclose(
        flat(rescaled), factors * flat(epsilon), rtol=1e-9, atol=1e-300
    )
    # And it is the radius of the ellipsoid: ‖epsilon / w‖ = rho.
    moved = np.where(w == 0, 0, flat(epsilon) / np.where(w == 0, 1, np.abs(w)))
    assert np.linalg.norm(moved) == pytest.approx(RHO, rel=1e-9)


@pytest.mark.parametrize(("ratio", "length"), [(0.01, 0.05), (10.0, RHO)])
def test_a_limit_shortens_the_whole_perturbation_and_never_lengthens_it(ratio, length):
    params = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # of norm 5
    direction = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[-2.0]])}
    ascent = optax.chain(
        mo.ascents.normalized(RHO), mo.ascents.clip_by_weight_norm(ratio)
    )
    expected = jax.tree.map(lambda g: length * g / 3, direction)
    chex.assert_trees_all_close(epsilon_of(ascent, direction, params), expected)


def test_a_limited_momentum_perturbation_grows_with_the_weights():
    ascent = optax.chain(
        mo.ascents.normalized(1e3), mo.ascents.clip_by_weight_norm(0.04)
    )
    tx = mo.momentum_perturbation(optax.sgd(0.1, momentum=0.9), ascent=ascent)
    params = jnp.array([3.0, 4.0])
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        weights = mo.eval_params(state, params)
        length = np.linalg.norm(params - weights)
        assert length == pytest.approx(0.04 * np.linalg.norm(weights), rel=1e-4)


# --- Zeros and number formats ---------------------------------------------------------

ASCENTS = {
    **{f"normalized, p={p}": mo.ascents.normalized(RHO, p) for p in PS},
    "adaptive": mo.ascents.adaptive(RHO, 0.01),
    "adaptive without eta": mo.ascents.adaptive(RHO, 0.0, mask=True),
    "unnormalized": mo.ascents.unnormalized(RHO),
    "clipped": optax.chain(
        mo.ascents.normalized(RHO), mo.ascents.clip_by_weight_norm(0.01)
    ),
}
all_ascents = pytest.mark.parametrize("name", ASCENTS)


@all_ascents
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_zero_direction_gives_no_perturbation(name, dtype):
    zeros = {"a": jnp.zeros((2, 2), dtype), "b": jnp.zeros(0, dtype), "c": {}}
    params = jax.tree.map(jnp.ones_like, zeros)
    chex.assert_trees_all_equal(epsilon_of(ASCENTS[name], zeros, params), zeros)


def test_zero_weights_without_eta_give_no_perturbation():
    direction = {"w": jnp.ones((2, 2))}
    zeros = {"w": jnp.zeros((2, 2))}
    found = epsilon_of(mo.ascents.adaptive(RHO, eta=0.0), direction, zeros)
    chex.assert_trees_all_equal(found, zeros)


@all_ascents
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_perturbation_has_the_directions_dtype(name, dtype):
    direction = {"w": jnp.ones((2, 2), dtype), "v": jnp.ones(3, jnp.float32)}
    params = {"w": jnp.ones((2, 2), jnp.float32), "v": jnp.ones(3, dtype)}
    found = epsilon_of(ASCENTS[name], direction, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, direction)


@pytest.mark.parametrize("value", [100.0, 6e4, 1e-4])
@pytest.mark.parametrize("p", PS)
def test_norms_of_float16_neither_overflow_nor_vanish(p, value):
    direction = jnp.full(1000, value, jnp.float16)
    found = epsilon_of(mo.ascents.normalized(RHO, p), direction)
    np.testing.assert_allclose(np.float32(found), RHO / 1000 ** (1 / p), rtol=2e-3)


def test_the_adaptive_norm_of_float16_does_not_overflow():
    direction = jnp.full((10, 100), 100.0, jnp.float16)
    found = epsilon_of(mo.ascents.adaptive(RHO), direction, direction)
    np.testing.assert_allclose(np.float32(found), 100 * RHO / 1000**0.5, rtol=2e-3)


@pytest.mark.parametrize("p", PS)
def test_the_ascent_can_be_differentiated_at_zero(p):
    ascent = mo.ascents.normalized(RHO, p)
    slope = jax.grad(lambda g: jnp.sum(epsilon_of(ascent, {"w": g})["w"]))(jnp.zeros(3))
    chex.assert_tree_all_finite(slope)


# --- Schedules ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [mo.ascents.normalized, mo.ascents.adaptive, mo.ascents.unnormalized]
)
def test_a_schedule_is_read_at_0_1_2(make):
    ascent = make(lambda t: 0.1 * (t + 1))
    state = ascent.init(DIRECTION)
    for t in range(3):
        found, state = ascent.update(DIRECTION, state, DIRECTION)
        expected = epsilon_of(make(0.1 * (t + 1)), DIRECTION, DIRECTION)
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert jax.tree.leaves(state) == [3]


def test_a_step_given_as_an_extra_argument_is_the_schedules():
    ascent = mo.ascents.normalized(lambda t: 0.1 * t)
    found, state = ascent.update(
        DIRECTION, ascent.init(DIRECTION), None, step=jnp.int32(7)
    )
    assert p_norm(found, 2) == pytest.approx(0.7)
    found, _ = ascent.update(DIRECTION, state, None)
    assert p_norm(found, 2) == pytest.approx(0.8)


def test_a_constant_needs_no_state():
    for ascent in ASCENTS.values():
        assert jax.tree.leaves(ascent.init(DIRECTION)) == []


# --- Bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rho", [np.nan, np.inf, -np.inf, "0.1", True, None, 1j, [0.1], jnp.ones(2)]
)
@pytest.mark.parametrize(
    "make", [mo.ascents.normalized, mo.ascents.adaptive, mo.ascents.unnormalized]
)
def test_a_rho_that_is_no_number_is_refused_when_built(make, rho):
    with pytest.raises(ValueError, match=r"rho \(or a schedule step -> rho\) must be"):
        make(rho)


@pytest.mark.parametrize("rho", [1, 0.5, np.float32(0.5), np.int64(1), jnp.float32(1)])
def test_numbers_of_any_library_are_accepted(rho):
    found = epsilon_of(mo.ascents.normalized(rho), DIRECTION)
    assert p_norm(found, 2) == pytest.approx(float(rho))


@pytest.mark.parametrize(
    "p", [0.99, 0, -2, np.nan, "2", None, 2j, jnp.float32(2), True]
)
def test_a_p_outside_one_to_infinity_is_refused_when_built(p):
    with pytest.raises(ValueError, match=r"p must be a Python number in \[1, inf\]"):
        mo.ascents.normalized(RHO, p)


@pytest.mark.parametrize("eta", [-1e-3, np.nan, np.inf, "0", True, 1j, None])
def test_an_eta_that_is_no_length_is_refused_when_built(eta):
    with pytest.raises(ValueError, match=r"eta must be one finite real number in \[0"):
        mo.ascents.adaptive(RHO, eta)


@pytest.mark.parametrize("ratio", [0, -1.0, np.nan, np.inf, None, "0.1"])
def test_a_limit_that_is_no_ratio_is_refused_when_built(ratio):
    with pytest.raises(ValueError, match=r"max_ratio must be one finite real number"):
        mo.ascents.clip_by_weight_norm(ratio)


def test_adaptive_ascent_asks_for_missing_params():
    ascent = mo.ascents.adaptive(RHO)
    with pytest.raises(ValueError, match="params were None: call update"):
        ascent.update(DIRECTION, ascent.init(DIRECTION))


@all_ascents
def test_complex_parameters_are_refused_and_told_what_to_do(name):
    params = {"w": jnp.ones((2, 2), jnp.complex64)}
    with pytest.raises(ValueError, match="hold the real and the imaginary part"):
        mo.sharpness_aware_gradient(ASCENTS[name]).init(params)
    with pytest.raises(ValueError, match="hold the real and the imaginary part"):
        mo.msam(0.1, rho=0.3).init(params)


@pytest.mark.parametrize("value", [None, "0.1", jnp.ones(3)])
def test_a_schedule_that_returns_no_number_is_refused(value):
    ascent = mo.ascents.normalized(lambda step: value)
    with pytest.raises(ValueError, match="What a schedule returns must be"):
        ascent.update(jnp.ones(3), ascent.init(jnp.ones(3)))


# --- Random draws ---------------------------------------------------------------------


def test_draws_outside_of_jit_are_compiled_once():
    traces = []

    def draw(key: jax.Array, leaf: jax.Array) -> jax.Array:
        traces.append(leaf.shape)
        return jax.random.normal(key, leaf.shape)

    tree, key = [jnp.ones(3), jnp.ones(2)], jax.random.key(0)
    first = draws_like(tree, key, jnp.int32(0), draw)
    once = list(traces)
    again = draws_like(tree, key, jnp.int32(1), draw)
    assert traces == once
    chex.assert_trees_all_equal(first, again)


def test_the_draws_made_together_are_those_of_one_after_the_other():
    shapes = [(3, 4), (), (4,), (3, 4), (0, 2), (4,)]
    tree = [jnp.ones(shape) for shape in shapes] + [jnp.ones((3, 4), jnp.float16)]
    key = jax.random.fold_in(jax.random.key(7), 0)  # seed 7, step 0
    keys = jax.random.split(key, len(tree))

    def one_by_one(draw):
        return [draw(k, x) for k, x in zip(keys, tree, strict=True)]

    def chosen(by_coordinate):
        shape = jnp.shape if by_coordinate else lambda x: ()
        drawn = one_by_one(lambda k, x: jax.random.bernoulli(k, 0.5, shape(x)))
        return [jnp.broadcast_to(d, x.shape) for d, x in zip(drawn, tree, strict=True)]

    for by_coordinate in (False, True):
        ascent = mo.ascents.stochastic(RHO, 0.5, seed=7, by_coordinate=by_coordinate)
        drawn = jax.tree.map(lambda e: e != 0, epsilon_of(ascent, tree))
        chex.assert_trees_all_equal(drawn, chosen(by_coordinate))
        assert 0 < sum(map(jnp.sum, drawn)) < sum(x.size for x in tree)

    noise = one_by_one(lambda k, x: jax.random.normal(k, x.shape, x.dtype))
    expected = optax.tree.scale(RHO / np.linalg.norm(flat(noise)), noise)
    found = epsilon_of(mo.ascents.gaussian(RHO, seed=7), tree)
    chex.assert_trees_all_equal_dtypes(found, tree)
    chex.assert_trees_all_close(found, expected, rtol=2e-3)
    chex.assert_trees_all_close(found[:6], expected[:6], rtol=1e-6)
