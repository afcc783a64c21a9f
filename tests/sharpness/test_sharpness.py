"""Sharpness and curvature against dense Hessians and closed forms. About 30 s."""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import msam_optax as mo
from msam_optax import sharpness
from tests.problems import quadratic_matrix

SIZES = (6, 2, 6)  # of the batches; one of them weighs as its examples do


# --- Networks whose Hessian is small enough to be written down ------------------------


class Network(NamedTuple):
    """A network, its loss and its data in float64, where all of them are numpy's."""

    params: Any
    loss: Callable[[Any, Any], jax.Array]
    batches: list[Any]

    @property
    def whole(self) -> Any:
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *self.batches)


@functools.cache
def dense_hessian(name: str) -> np.ndarray:
    """The Hessian over all examples; call it in float64."""
    net = network(name)
    w, unravel = ravel_pytree(net.params)
    hessian = jax.jit(jax.hessian(lambda w: net.loss(unravel(w), net.whole)))
    return np.asarray(hessian(w))


def cross_entropy(logits: jax.Array, labels: Any) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp_loss(params: Any, batch: Any) -> jax.Array:
    hidden = jnp.tanh(batch[0] @ params["hidden"] + params["bias"][None])
    return cross_entropy(hidden @ params["output"], batch[1])


def cnn_loss(params: Any, batch: Any) -> jax.Array:
    features = jax.lax.conv_general_dilated(
        batch[0],
        params["conv"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    pooled = jnp.tanh(features + params["bias"][None, None, None]).mean((1, 2))
    return cross_entropy(pooled @ params["output"], batch[1])


@functools.cache
def network(name: str) -> Network:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]]
    inputs: tuple[int, ...]
    if name == "mlp":
        loss: Any = mlp_loss
        inputs = (5,)
        shapes = {"hidden": (5, 6), "bias": (6,), "output": (6, 3)}
    else:
        loss, inputs = cnn_loss, (6, 6, 2)
        shapes = {"conv": (3, 3, 2, 4), "bias": (4,), "output": (4, 3)}
    batches = [
        (rng.normal(size=(size, *inputs)), rng.integers(0, 3, size)) for size in SIZES
    ]
    params = {key: rng.normal(size=shape) / 2 for key, shape in shapes.items()}
    return Network(params, loss, batches)


networks = pytest.mark.parametrize("name", ["mlp", "cnn"])


# --- The quadratic ½ wᵀAw -------------------------------------------------------------


def quadratic_loss(params: Any, batch: Any) -> jax.Array:
    """½ wᵀAw, where A is the mean of the batch's matrices."""
    w = jnp.concatenate([jnp.ravel(params["matrix"]), params["vector"]])
    return jnp.mean(jnp.einsum("i,bij,j->b", w, batch, w)) / 2


def tree_of(w: Any) -> Any:
    return {"matrix": np.reshape(w[:12], (3, 4)), "vector": np.asarray(w[12:])}


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


def quadratic_batches(matrix: np.ndarray) -> list[np.ndarray]:
    """Batches of matrices whose mean over all examples is the one given."""
    noise = np.random.default_rng(3).normal(size=(sum(SIZES), *matrix.shape))
    noise += noise.mT
    examples = matrix + noise - noise.mean(axis=0)
    return np.split(examples, np.cumsum(SIZES)[:-1])


RHO = 0.7
MATRIX = quadratic_matrix()
W = np.random.default_rng(4).normal(size=17)
EPSILON = np.random.default_rng(5).normal(size=17)
BATCHES = quadratic_batches(MATRIX)


# --- Means over batches ---------------------------------------------------------------


@networks
def test_all_examples_count_equally(x64, name):
    net = network(name)
    loss = sharpness.mean_loss(net.loss, net.params, net.batches)
    np.testing.assert_allclose(loss, net.loss(net.params, net.whole), rtol=1e-12)

    gradient = sharpness.mean_gradient(net.loss, net.params, net.batches)
    expected = jax.jit(jax.grad(net.loss))(net.params, net.whole)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-13), gradient, expected
    )


def test_sums_lose_nothing_over_many_batches():
    # In float32 the small terms would be rounded against the large one, each alike.
    batches = [np.array([1e4], np.float32)] + 999 * [np.array([1e-3], np.float32)]
    exact = np.mean(np.concatenate(batches), dtype=np.float64)

    def loss(w: Any, batch: Any) -> jax.Array:
        return jnp.mean(w * batch)

    for mean in (sharpness.mean_loss, sharpness.mean_gradient):
        np.testing.assert_allclose(mean(loss, 1.0, batches), exact, rtol=2e-7)


def test_a_small_rise_of_a_large_loss_survives_in_float32():
    rise = 2.0**-9  # a sum of the losses in float32 would round it away
    batches = 100 * [np.full(2, 1e4, np.float32)]

    def loss(w: Any, batch: Any) -> jax.Array:
        return jnp.mean(batch + w)

    assert sharpness.sharpness_along(loss, 0.0, rise, batches) == rise


# --- Closed forms ---------------------------------------------------------------------


def test_sharpness_and_curvature_of_a_quadratic(x64):
    params, epsilon = tree_of(W), tree_of(EPSILON)
    rise = sharpness.sharpness_along(quadratic_loss, params, epsilon, BATCHES)
    expected = EPSILON @ MATRIX @ W + EPSILON @ MATRIX @ EPSILON / 2
    np.testing.assert_allclose(rise, expected, rtol=1e-12)

    curvature = sharpness.curvature_along(quadratic_loss, params, epsilon, BATCHES)
    expected = EPSILON @ MATRIX @ EPSILON / (EPSILON @ EPSILON)
    np.testing.assert_allclose(curvature, expected, rtol=1e-12)


@networks
def test_curvature_is_that_of_the_dense_hessian(x64, name):
    net = network(name)
    gradient = sharpness.mean_gradient(net.loss, net.params, net.batches)
    u = flat(gradient)
    np.testing.assert_allclose(
        sharpness.curvature_along(net.loss, net.params, gradient, net.batches),
        u @ dense_hessian(name) @ u / (u @ u),
        rtol=1e-10,
    )


def test_the_worst_case_of_a_quadratic_is_found(x64):
    # e is the maximiser if A(w + e) = c e with c above A's largest eigenvalue.
    e = RHO * EPSILON / np.linalg.norm(EPSILON)
    w = np.linalg.solve(MATRIX, 6.0 * e) - e
    worst = sharpness.worst_case_sharpness(
        quadratic_loss, tree_of(w), BATCHES, RHO, steps=60
    )
    np.testing.assert_allclose(flat(worst.perturbation), e, atol=1e-7)
    np.testing.assert_allclose(worst.value, e @ MATRIX @ (w + e / 2), rtol=1e-12)


@networks
def test_the_first_step_of_the_worst_case_is_that_of_sam(x64, name):
    net = network(name)
    one = sharpness.worst_case_sharpness(
        net.loss, net.params, net.batches, RHO, steps=1
    )
    gradient = jax.jit(jax.grad(net.loss))(net.params, net.whole)
    ascent = mo.ascents.normalized(RHO)
    epsilon, _ = ascent.update(gradient, ascent.init(net.params), net.params)
    np.testing.assert_allclose(flat(one.perturbation), flat(epsilon), atol=1e-13)
    assert one.value == sharpness.sharpness_along(
        net.loss, net.params, one.perturbation, net.batches
    )

    more = sharpness.worst_case_sharpness(net.loss, net.params, net.batches, RHO)
    assert more.value > 1.001 * one.value
    assert np.linalg.norm(flat(more.perturbation)) <= RHO * (1 + 1e-12)


def test_the_worst_case_is_the_start_where_the_ascent_finds_nothing_better(x64):
    def hill(w: Any, batch: Any) -> jax.Array:
        return jnp.mean(batch) - jnp.sum(w**2)

    # The gradient points to the top, but the step leads far beyond it.
    worst = sharpness.worst_case_sharpness(hill, np.array([0.1]), [np.ones(2)], 5.0)
    assert worst.value == 0.0
    np.testing.assert_array_equal(worst.perturbation, 0)


# --- Eigenvalues ----------------------------------------------------------------------


def vector_of(top: sharpness.HessianEigenvalues, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], top.vectors)


@networks
def test_the_largest_eigenvalues_are_those_of_the_dense_hessian(x64, name):
    net, k = network(name), 5
    top = sharpness.hessian_eigenvalues(
        net.loss, net.params, net.batches, k, jax.random.key(1)
    )
    hessian = dense_hessian(name)
    np.testing.assert_allclose(
        top.values, np.linalg.eigvalsh(hessian)[: -k - 1 : -1], rtol=1e-6
    )
    vectors = np.stack([flat(vector_of(top, i)) for i in range(k)])
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(
        vectors @ hessian, top.values[:, None] * vectors, atol=1e-3
    )


@networks
def test_the_errors_of_few_products_are_the_residuals(x64, name):
    net, k = network(name), 3
    top = sharpness.hessian_eigenvalues(
        net.loss, net.params, net.batches, k, jax.random.key(2), num_matvecs=6
    )
    hessian = dense_hessian(name)
    for i in range(k):
        v = flat(vector_of(top, i))
        residual = np.linalg.norm(hessian @ v - top.values[i] * v)
        np.testing.assert_allclose(top.errors[i], residual, rtol=1e-6)
        distance = np.min(np.abs(np.linalg.eigvalsh(hessian) - top.values[i]))
        assert distance <= top.errors[i]
    assert np.all(top.errors > 1e-6)  # six products are too few, and it shows


@pytest.mark.parametrize(
    "spectrum",
    [
        np.ones(17),
        np.zeros(17),
        np.repeat([3.0, 1.0, 0.0], [2, 3, 12]),
        np.concatenate([-5.0 - np.arange(12), [0.5, 1.0, 2.0, 2.0, 4.0]]),
    ],
    ids=["identity", "zeros", "repeated", "negative"],
)
def test_an_exhausted_krylov_space_still_gives_the_whole_spectrum(x64, spectrum):
    basis, _ = np.linalg.qr(np.random.default_rng(6).normal(size=(17, 17)))
    batches = quadratic_batches((basis * spectrum) @ basis.T)
    top = sharpness.hessian_eigenvalues(
        quadratic_loss, tree_of(W), batches, 17, jax.random.key(0)
    )
    np.testing.assert_allclose(top.values, np.sort(spectrum)[::-1], atol=1e-12)


def test_float32_eigenvalues_keep_five_digits():
    top = sharpness.hessian_eigenvalues(
        quadratic_loss, tree_of(W), BATCHES, 3, jax.random.key(0)
    )
    np.testing.assert_allclose(
        top.values, np.linalg.eigvalsh(MATRIX)[:-4:-1], rtol=1e-5
    )


# --- Trace ----------------------------------------------------------------------------


@networks
def test_the_trace_is_within_its_error_of_the_dense_one(x64, name):
    net = network(name)
    hessian = dense_hessian(name)
    exact, off_diagonal = np.trace(hessian), hessian - np.diag(np.diag(hessian))
    expected_error = np.sqrt(2 * np.sum(off_diagonal**2) / 30)
    scores = []
    for seed in range(4):
        value, error = sharpness.hessian_trace(
            net.loss, net.params, net.batches, jax.random.key(seed)
        )
        np.testing.assert_allclose(error, expected_error, rtol=0.4)
        scores.append((value - exact) / error)
    assert np.all(np.abs(scores) < 3)
    assert np.std(scores) > 0.1  # the keys give different samples


def test_the_stated_error_of_the_trace_is_right(x64):
    # Four samples: without Bessel's correction the square would be 25% too small.
    samples, keys = 4, jax.random.split(jax.random.key(7), 250)
    batches = [MATRIX[None]]
    estimates = np.array(
        [
            sharpness.hessian_trace(
                quadratic_loss, tree_of(W), batches, key, num_samples=samples
            )
            for key in keys
        ]
    )
    off_diagonal = MATRIX - np.diag(np.diag(MATRIX))
    variance = 2 * np.sum(off_diagonal**2) / samples
    values, errors = estimates.T
    np.testing.assert_allclose(np.mean(errors**2), variance, rtol=0.12)
    np.testing.assert_allclose(np.var(values), variance, rtol=0.2)
    assert abs(np.mean(values) - np.trace(MATRIX)) < 3 * np.sqrt(variance / len(keys))


# --- Random directions ----------------------------------------------------------------


def test_each_filter_of_a_direction_is_as_long_as_that_of_the_weights(x64):
    rng = np.random.default_rng(8)
    params = {
        "conv": rng.normal(size=(3, 3, 2, 4)) * np.array([1.0, 0.0, 10.0, 1e-3]),
        "dense": rng.normal(size=(6, 4)),
        "again": rng.normal(size=(6, 4)),
        "bias": np.ones(4),
        "scale": np.ones(()),
    }
    direction = sharpness.filter_normalized_direction(jax.random.key(0), params)
    for name in ("conv", "dense", "again"):
        lengths, expected = (
            np.linalg.norm(np.reshape(tree[name], (-1, 4)), axis=0)
            for tree in (direction, params)
        )
        np.testing.assert_allclose(lengths, expected, rtol=1e-12)
    np.testing.assert_array_equal(direction["bias"], np.zeros(4))
    np.testing.assert_array_equal(direction["scale"], 0)
    cosine = np.sum(direction["dense"] * direction["again"]) / (
        np.linalg.norm(direction["dense"]) * np.linalg.norm(direction["again"])
    )
    assert abs(cosine) < 0.7  # leaves of one shape have their own noise


# --- Precision ------------------------------------------------------------------------


def test_parameters_of_low_precision_are_measured_in_float32():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree_of(np.ones(17)))
    epsilon = tree_of(np.full(17, 1e-4, np.float32))  # lost if added in bfloat16
    batches = [np.eye(17, dtype=np.float32)[None]]
    measure = functools.partial(sharpness.sharpness_along, quadratic_loss, params)
    np.testing.assert_allclose(measure(epsilon, batches), 17e-4, rtol=1e-2)

    worst = sharpness.worst_case_sharpness(quadratic_loss, params, batches, 0.01)
    np.testing.assert_allclose(worst.value, 0.01 * 17**0.5 + 0.005 * 0.01, rtol=1e-4)
    top = sharpness.hessian_eigenvalues(
        quadratic_loss, params, batches, 1, jax.random.key(0)
    )
    trees = (
        sharpness.mean_gradient(quadratic_loss, params, batches),
        sharpness.filter_normalized_direction(jax.random.key(0), params),
        worst.perturbation,
        top.vectors,
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trees))
    numbers = (
        sharpness.mean_loss(quadratic_loss, params, batches),
        measure(epsilon, batches),
        sharpness.curvature_along(quadratic_loss, params, epsilon, batches),
        worst.value,
        *sharpness.hessian_trace(quadratic_loss, params, batches, jax.random.key(0)),
    )
    assert all(type(number) is float for number in numbers)


def test_float64_parameters_give_float64(x64):
    params = tree_of(W) | {"vector": np.asarray(W[12:], np.float32)}
    gradient = sharpness.mean_gradient(quadratic_loss, params, BATCHES)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(gradient))


def test_zero_directions_give_zero_and_not_nan():
    params, zeros = tree_of(W), tree_of(np.zeros(17))
    assert sharpness.sharpness_along(quadratic_loss, params, zeros, BATCHES) == 0
    assert sharpness.curvature_along(quadratic_loss, params, zeros, BATCHES) == 0
    worst = sharpness.worst_case_sharpness(quadratic_loss, zeros, BATCHES, RHO)
    assert worst.value == 0
    np.testing.assert_array_equal(flat(worst.perturbation), 0)


# --- Data in batches ------------------------------------------------------------------

MEASURES: dict[str, tuple[Callable[..., Any], int]] = {
    "mean_loss": (sharpness.mean_loss, 1),
    "mean_gradient": (sharpness.mean_gradient, 1),
    "sharpness_along": (
        lambda loss, w, batches, **kw: sharpness.sharpness_along(
            loss, w, w, batches, **kw
        ),
        1,
    ),
    "curvature_along": (
        lambda loss, w, batches, **kw: sharpness.curvature_along(
            loss, w, w, batches, **kw
        ),
        1,
    ),
    "worst_case_sharpness": (
        functools.partial(sharpness.worst_case_sharpness, rho=RHO, steps=3),
        6,
    ),
    "hessian_eigenvalues": (
        lambda loss, w, batches, **kw: sharpness.hessian_eigenvalues(
            loss, w, batches, 1, jax.random.key(0), num_matvecs=4, **kw
        ),
        4,
    ),
    "hessian_trace": (
        lambda loss, w, batches, **kw: sharpness.hessian_trace(
            loss, w, batches, jax.random.key(0), num_samples=5, **kw
        ),
        5,
    ),
}
measures = pytest.mark.parametrize("name", MEASURES)


class Stream:
    """Batches that are made when they are asked for; counts those still alive."""

    def __init__(self, number: int):
        self.number, self.most_alive = number, 0
        self.refs: list[weakref.ref] = []

    def __iter__(self) -> Iterator[jax.Array]:
        for _ in range(self.number):
            batch = jnp.asarray(MATRIX[None])
            self.refs.append(weakref.ref(batch))
            alive = sum(ref() is not None for ref in self.refs)
            self.most_alive = max(self.most_alive, alive)
            yield batch


@measures
def test_one_batch_is_held_at_a_time_and_each_is_told(name):
    measure, passes = MEASURES[name]
    stream, calls = Stream(5), []
    measure(quadratic_loss, tree_of(W), stream, on_batch=lambda: calls.append(1))
    assert len(calls) == passes * 5
    assert len(stream.refs) == passes * 5
    assert stream.most_alive <= 3  # one is in use, one comes, one is just left


@measures
def test_a_loss_function_is_traced_once_for_all_calls_and_batches(name):
    traces = []

    def loss(params: Any, batch: Any) -> jax.Array:
        traces.append(1)
        return quadratic_loss(params, batch)

    measure, _ = MEASURES[name]
    batches = [MATRIX[None]] * 2
    measure(loss, tree_of(W), batches)
    after_one = len(traces)
    measure(loss, tree_of(EPSILON), batches)
    assert len(traces) == after_one <= 2  # the worst case takes losses and gradients


# --- What is wrong with a call --------------------------------------------------------


@measures
@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "empty"),
        (iter([MATRIX[None]]), "iterator"),
        ([np.ones((0, 17, 17))], "leading axis"),
        ([np.ones(())], "leading axis"),
        ([()], "leading axis"),
    ],
    ids=["none", "iterator", "no examples", "scalar", "no leaves"],
)
def test_batches_that_cannot_be_averaged_are_refused(name, batches, message):
    with pytest.raises(ValueError, match=message):
        MEASURES[name][0](quadratic_loss, tree_of(W), batches)


@measures
@pytest.mark.parametrize("output", [lambda x: (x, {}), lambda x: x[None]])
def test_a_loss_that_is_not_a_number_is_refused(name, output):
    def loss(params: Any, batch: Any) -> Any:
        return output(quadratic_loss(params, batch))

    with pytest.raises(ValueError, match="loss_fn must return"):
        MEASURES[name][0](loss, tree_of(W), BATCHES)


@pytest.mark.parametrize(
    "tree", [W, {"matrix": W[:12].reshape(4, 3), "vector": W[12:]}, {"vector": W[12:]}]
)
def test_a_tree_unlike_the_parameters_is_refused(tree):
    for name in ("sharpness_along", "curvature_along"):
        with pytest.raises(ValueError, match="tree like the parameters"):
            getattr(sharpness, name)(quadratic_loss, tree_of(W), tree, BATCHES)


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan"), float("inf")])
def test_a_radius_that_is_not_positive_is_refused(rho):
    with pytest.raises(ValueError, match="rho must be"):
        sharpness.worst_case_sharpness(quadratic_loss, tree_of(W), BATCHES, rho)


def test_an_ascent_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="steps must be"):
        sharpness.worst_case_sharpness(
            quadratic_loss, tree_of(W), BATCHES, RHO, steps=0
        )


@pytest.mark.parametrize("k, num_matvecs", [(18, None), (0, None), (3, 2), (3, 18)])
def test_eigenvalues_that_cannot_be_had_are_refused(k, num_matvecs):
    with pytest.raises(ValueError, match="number of parameters, 17"):
        sharpness.hessian_eigenvalues(
            quadratic_loss,
            tree_of(W),
            BATCHES,
            k,
            jax.random.key(0),
            num_matvecs=num_matvecs,
        )


def test_a_trace_without_an_error_is_refused():
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        sharpness.hessian_trace(
            quadratic_loss, tree_of(W), BATCHES, jax.random.key(0), num_samples=1
        )


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        sharpness.hessian_eigenvalues(
            quadratic_loss, tree_of(W), [BATCHES[0] * np.nan], 1, jax.random.key(0)
        )


def test_one_batch_in_the_place_of_batches_is_refused():
    batches = np.ones((4, 3)), np.ones(4)
    with pytest.raises(ValueError, match=r"give \[batch\]"):
        sharpness.mean_loss(lambda w, batch: jnp.sum(w), jnp.ones(2), batches)
