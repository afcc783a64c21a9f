"""Gauss-Newton, least eigenvalues, densities against dense matrices; curves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from msam_optax import plotting, sharpness
from msam_optax.plotting import Estimates

RNG = np.random.default_rng(0)
SHAPES = {"hidden": (4, 3), "bias": (3,), "output": (3, 3)}
PARAMS = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
SIZE = 24
# Of unlike sizes: all examples count alike, and not all batches.
BATCHES = [
    (RNG.normal(size=(n, 4)), RNG.integers(0, 3, n), RNG.normal(size=(n, 3)))
    for n in (6, 2)
]
WHOLE: Any = jax.tree.map(lambda *x: np.concatenate(x), *BATCHES)


def outputs_fn(params, batch):
    hidden = jnp.tanh(batch[0] @ params["hidden"] + params["bias"][None])
    return hidden @ params["output"]


def cross_entropy(outputs, batch):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, batch[1])
    return losses.mean()


def squared_error(outputs, batch):
    return jnp.mean(jnp.sum((outputs - batch[2]) ** 2, axis=-1))


def tree_outputs(params, batch):
    outputs = outputs_fn(params, batch)
    return {"first": outputs[:, :1], "rest": outputs[:, 1:]}


def tree_loss(outputs, batch):
    joined = jnp.concatenate([outputs["first"], outputs["rest"]], axis=1)
    return squared_error(joined, batch)


LOSSES = {
    "cross_entropy": sharpness.GaussNewton(outputs_fn, cross_entropy),
    "squared_error": sharpness.GaussNewton(outputs_fn, squared_error),
    "tree": sharpness.GaussNewton(tree_outputs, tree_loss),
}


def hessian_loss(params, batch):
    return cross_entropy(outputs_fn(params, batch), batch)


@functools.cache
def dense(name: str) -> np.ndarray:
    """The matrix over all examples, in float64."""
    w, unravel = ravel_pytree(PARAMS)
    if name == "hessian":
        return np.asarray(jax.hessian(lambda w: hessian_loss(unravel(w), WHOLE))(w))
    loss = LOSSES[name]
    shape, flat = outputs_fn(PARAMS, WHOLE).shape, squared_error
    flat = cross_entropy if name == "cross_entropy" else squared_error

    def outputs(w):
        return outputs_fn(unravel(w), WHOLE).ravel()

    jacobian = np.asarray(jax.jacobian(outputs)(w))
    inner = jax.hessian(lambda f: flat(f.reshape(shape), WHOLE))(outputs(w))
    assert loss(PARAMS, WHOLE) == flat(outputs(w).reshape(shape), WHOLE)
    return jacobian.T @ np.asarray(inner) @ jacobian


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_the_gauss_newton_matrix_is_the_dense_one(x64, name):
    matrix, loss, key = dense(name), LOSSES[name], jax.random.key(0)
    found = sharpness.hessian_eigenvalues(
        loss, PARAMS, BATCHES, 3, key, num_matvecs=SIZE
    )
    expected = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(found.values, expected[: -3 - 1 : -1], rtol=1e-6)
    least = sharpness.hessian_eigenvalues(
        loss, PARAMS, BATCHES, 2, key, which="smallest", num_matvecs=SIZE
    )
    # Positive semi-definite, which the Hessian of this network is not.
    assert np.all(least.values > -1e-12)
    assert np.linalg.eigvalsh(dense("hessian"))[0] < -1e-3
    direction = jax.tree.map(np.ones_like, PARAMS)
    curvature = sharpness.curvature_along(loss, PARAMS, direction, BATCHES)
    np.testing.assert_allclose(curvature, matrix.sum() / SIZE, rtol=1e-6)
    samples = [
        flat(optax.tree.random_like(k, PARAMS, jax.random.rademacher))
        for k in jax.random.split(key, 30)
    ]
    trace = sharpness.hessian_trace(loss, PARAMS, BATCHES, key)
    by_hand = np.mean([s @ matrix @ s for s in samples])
    np.testing.assert_allclose(trace.value, by_hand, rtol=1e-6)
    assert abs(trace.value - np.trace(matrix)) < 4 * trace.standard_error


def test_a_gauss_newton_loss_is_a_loss_everywhere():
    loss = LOSSES["cross_entropy"]
    value = sharpness.mean_loss(loss, PARAMS, BATCHES)
    assert value == sharpness.mean_loss(hessian_loss, PARAMS, BATCHES)
    gradients = [
        sharpness.mean_gradient(f, PARAMS, BATCHES) for f in (loss, hessian_loss)
    ]
    by_parts, whole = map(flat, gradients)
    np.testing.assert_allclose(by_parts, whole, rtol=1e-5, atol=1e-7)


def test_the_smallest_eigenvalues_are_the_most_negative_ones(x64):
    expected = np.linalg.eigvalsh(dense("hessian"))
    found = sharpness.hessian_eigenvalues(
        hessian_loss,
        PARAMS,
        BATCHES,
        3,
        jax.random.key(0),
        which="smallest",
        num_matvecs=SIZE,
    )
    np.testing.assert_allclose(found.values, expected[:3], atol=1e-9)
    vectors = np.asarray(jax.vmap(lambda v: ravel_pytree(v)[0])(found.vectors))
    np.testing.assert_allclose(
        dense("hessian") @ vectors.T, vectors.T * found.values, atol=1e-8
    )
    wrong: Any = "largest magnitude"
    with pytest.raises(ValueError, match='which must be "largest" or "smallest"'):
        sharpness.hessian_eigenvalues(
            hessian_loss, PARAMS, BATCHES, 1, jax.random.key(0), which=wrong
        )


@pytest.mark.parametrize("name", ["hessian", "cross_entropy"])
def test_the_spectral_density_is_that_of_the_dense_matrix(x64, name):
    """In as many dimensions as parameters the quadrature is exact for any function."""
    matrix, key = dense(name), jax.random.key(3)
    loss = hessian_loss if name == "hessian" else LOSSES[name]
    spectrum = sharpness.spectral_density(loss, PARAMS, BATCHES, key, num_samples=2)
    values, vectors = np.linalg.eigh(matrix)
    samples = np.stack(
        [
            flat(optax.tree.random_like(k, PARAMS, jax.random.rademacher))
            for k in jax.random.split(key, 2)
        ]
    )
    grid, width = np.linspace(-1, 3, 41), 0.1
    bells = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2)
    bells /= width * np.sqrt(2 * np.pi)
    shares = ((samples @ vectors) ** 2).mean(0) / SIZE
    np.testing.assert_allclose(
        spectrum.on_grid(grid, width), bells @ shares, rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(spectrum.weights.sum(1), 1, rtol=1e-12)


def test_a_few_products_have_the_moments_and_the_trace(x64):
    """m of them those of the matrix' powers below 2 m."""
    matrix, key = dense("hessian"), jax.random.key(3)
    spectrum = sharpness.spectral_density(
        hessian_loss, PARAMS, BATCHES, key, num_samples=4, num_matvecs=3
    )
    assert spectrum.values.shape == spectrum.weights.shape == (4, 3)
    samples = [
        flat(optax.tree.random_like(k, PARAMS, jax.random.rademacher))
        for k in jax.random.split(key, 4)
    ]
    for power in range(7):
        moments = (spectrum.weights * spectrum.values**power).sum(1)
        exact = [s @ np.linalg.matrix_power(matrix, power) @ s / SIZE for s in samples]
        if power < 6:
            np.testing.assert_allclose(moments, exact, rtol=1e-6)
        else:
            assert np.max(np.abs(moments / exact - 1)) > 1e-4
    trace = sharpness.hessian_trace(hessian_loss, PARAMS, BATCHES, key, num_samples=4)
    mean = (spectrum.weights * spectrum.values).sum(1).mean()
    np.testing.assert_allclose(SIZE * mean, trace.value, rtol=1e-6)


def test_a_matrix_of_few_eigenvalues_exhausts_the_space():
    """Wrong: weights of the directions in which the iteration goes on."""

    def loss(w, batch):
        return 0.5 * jnp.mean((batch @ w) ** 2)

    data = jnp.diag(jnp.array([4.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    spectrum = sharpness.spectral_density(
        loss, jnp.ones(6), [data], jax.random.key(0), num_samples=3
    )
    heavy = spectrum.weights > 1e-6
    assert heavy.sum() == 6
    np.testing.assert_allclose(spectrum.values[heavy], [0, 16 / 6] * 3, atol=1e-5)
    np.testing.assert_allclose(spectrum.weights[heavy], [5 / 6, 1 / 6] * 3, rtol=1e-5)


def test_the_loss_is_compiled_once_for_all_products():
    traces: list[None] = []

    def loss(params, batch):
        traces.append(None)
        return hessian_loss(params, batch)

    batches = [BATCHES[0]] * 3
    sharpness.spectral_density(
        loss, PARAMS, batches, jax.random.key(0), num_samples=2, num_matvecs=4
    )
    first = len(traces)
    sharpness.spectral_density(
        loss, PARAMS, batches, jax.random.key(1), num_samples=3, num_matvecs=4
    )
    sharpness.hessian_eigenvalues(
        loss, PARAMS, batches, 1, jax.random.key(1), which="smallest", num_matvecs=4
    )
    assert len(traces) == first <= 2


def test_what_makes_no_spectrum_is_named():
    kwargs: Any
    for kwargs in ({"num_samples": 0}, {"num_matvecs": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            sharpness.spectral_density(
                hessian_loss, PARAMS, BATCHES, jax.random.key(0), **kwargs
            )
    spectrum = sharpness.SpectralDensity(np.zeros((1, 1)), np.ones((1, 1)))
    with pytest.raises(ValueError, match="width must be positive"):
        spectrum.on_grid([0.0], 0.0)


def test_the_figure_of_a_spectrum_shows_single_eigenvalues():
    grid = np.linspace(-1, 10, 200)
    values = np.concatenate([np.zeros((1, 99)), [[8.0]]], axis=1)
    spectrum = sharpness.SpectralDensity(values, np.full((1, 100), 0.01))
    density = spectrum.on_grid(grid, 0.1)
    np.testing.assert_allclose(density.sum() * (grid[1] - grid[0]), 1, rtol=1e-6)
    ax = plotting.plot_spectrum({"msam": Estimates(grid, density)})
    (line,) = ax.get_lines()
    drawn = np.asarray(line.get_ydata())
    assert np.min(drawn) == ax.get_ylim()[0] == 1e-5
    assert drawn[np.searchsorted(grid, 8.0)] > 100 * 1e-5
    with pytest.raises(ValueError, match="floor must be positive"):
        plotting.plot_spectrum({}, floor=0.0)


# --- Between two solutions ------------------------------------------------------------

END = jax.tree.map(lambda x: x[::-1].copy(), PARAMS)
BEND = jax.tree.map(lambda x: 0.5 * x + 1.0, PARAMS)
PLACES = [0.0, 0.25, 0.7, 1.0]


@pytest.mark.parametrize("bend", [None, BEND], ids=["line", "curve"])
def test_the_loss_on_a_curve_is_that_of_its_points(x64, bend):
    def by_hand(t):
        def at(a, b, c=None):
            if c is None:
                return a + t * (b - a)
            # De Casteljau: the line between two lines.
            return (a + t * (c - a)) * (1 - t) + t * (c + t * (b - c))

        trees = (PARAMS, END) if bend is None else (PARAMS, END, bend)
        return float(hessian_loss(jax.tree.map(at, *trees), WHOLE))

    expected = [by_hand(t) for t in PLACES]
    losses = sharpness.loss_on_curve(
        hessian_loss, PARAMS, END, PLACES, BATCHES, bend=bend
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    points = [sharpness.point_on_curve(PARAMS, END, t, bend) for t in PLACES]
    at_points = [sharpness.mean_loss(hessian_loss, p, BATCHES) for p in points]
    np.testing.assert_allclose(at_points, expected, rtol=1e-12)


def test_a_bend_in_the_middle_is_the_line():
    middle = sharpness.point_on_curve(PARAMS, END, 0.5)
    bent = sharpness.point_on_curve(PARAMS, END, 0.3, middle)
    np.testing.assert_allclose(
        flat(bent), flat(sharpness.point_on_curve(PARAMS, END, 0.3)), rtol=1e-5
    )


def test_curves_between_unlike_trees_are_refused():
    short = {**END, "bias": np.zeros(2)}
    with pytest.raises(ValueError, match="end must be a tree like the parameters"):
        sharpness.loss_on_curve(hessian_loss, PARAMS, short, PLACES, BATCHES)
    with pytest.raises(ValueError, match="bend must be a tree like the parameters"):
        sharpness.loss_on_curve(hessian_loss, PARAMS, END, PLACES, BATCHES, bend=short)
    with pytest.raises(ValueError, match="ts must be one axis"):
        sharpness.loss_on_curve(hessian_loss, PARAMS, END, 0.5, BATCHES)
