"""Losses that know their own weights: batches of unequally many tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax as mo
from msam_optax import sharpness


def token_losses(params: Any, batch: Any) -> jax.Array:
    inputs, targets, _ = batch
    return (jnp.sin(inputs @ params["w"]) - targets) ** 2


def weighted(params: Any, batch: Any) -> Any:
    mask = batch[2]
    return mo.WeightedMean(mask * token_losses(params, batch), mask)


def quotient(params: Any, batch: Any) -> Any:
    mask = batch[2]
    return jnp.sum(mask * token_losses(params, batch)) / jnp.sum(mask)


GAUSS_NEWTON = sharpness.GaussNewton(
    lambda params, batch: jnp.sin(batch[0] @ params["w"]),
    lambda outputs, batch: mo.WeightedMean(
        batch[2] * (outputs - batch[1]) ** 2, batch[2]
    ),
)
WHOLE_GAUSS_NEWTON = sharpness.GaussNewton(
    GAUSS_NEWTON.outputs_fn,
    lambda outputs, batch: (
        jnp.sum(batch[2] * (outputs - batch[1]) ** 2) / jnp.sum(batch[2])
    ),
)


def problem() -> tuple[Any, Any, list[Any]]:
    rng = np.random.default_rng(0)
    mask = (np.arange(6) < rng.integers(1, 7, size=(9, 1))).astype(np.int32)
    mask[3:6] = 0  # a batch without any token
    mask[6:, 1:] = 0
    whole = (rng.normal(size=(9, 6, 3)), rng.normal(size=(9, 6)), mask)
    whole = jax.tree.map(jnp.asarray, whole)
    params = {"w": jnp.asarray(rng.normal(size=3))}
    thirds = jax.tree.map(lambda x: x.reshape(3, 3, *x.shape[1:]), whole)
    return params, whole, [jax.tree.map(lambda x, i=i: x[i], thirds) for i in range(3)]


DIRECTION = {"w": np.array([0.1, -0.2, 0.3])}
MEASURES = {
    "loss": lambda loss, w, data: sharpness.mean_loss(loss, w, data),
    "gradient": lambda loss, w, data: sharpness.mean_gradient(loss, w, data)["w"],
    "rise": lambda loss, w, data: sharpness.sharpness_along(loss, w, DIRECTION, data),
    "curvature": lambda loss, w, data: sharpness.curvature_along(
        loss, w, DIRECTION, data
    ),
    "trace": lambda loss, w, data: (
        sharpness.hessian_trace(loss, w, data, jax.random.key(0), num_samples=2).value
    ),
    "eigenvalue": lambda loss, w, data: (
        sharpness.hessian_eigenvalues(loss, w, data, 1, jax.random.key(0)).values
    ),
    "line": lambda loss, w, data: sharpness.loss_on_line(
        loss, w, DIRECTION, np.array([0.0, 1.0]), data
    ),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_tokens_count_alike_in_whatever_batch(x64, measure):
    params, whole, batches = problem()
    expected = MEASURES[measure](quotient, params, [whole])
    found = MEASURES[measure](weighted, params, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_so_they_do_for_the_gauss_newton_matrix(x64):
    params, whole, batches = problem()
    expected = MEASURES["trace"](WHOLE_GAUSS_NEWTON, params, [whole])
    found = MEASURES["trace"](GAUSS_NEWTON, params, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_mean_of_quotients_is_another(x64):
    params, _, (first, _, last) = problem()
    off = sharpness.mean_loss(quotient, params, [first, last])
    right = sharpness.mean_loss(weighted, params, [first, last])
    assert abs(off - right) > 1e-2


def test_data_without_any_weight_have_no_mean():
    params, _, (_, empty, _) = problem()
    with pytest.raises(ValueError, match="All batches have weight 0"):
        sharpness.mean_loss(weighted, params, [empty, empty])


def test_one_batch_in_the_place_of_a_list_is_refused():
    batch = {"x": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="a dict was given"):
        mo.sharpness.mean_loss(lambda p, b: jnp.mean(b["x"] @ p), jnp.ones(2), batch)
