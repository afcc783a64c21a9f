"""The l2 norm of epsilon that an ascent knows is that of its epsilon."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from msam_optax import ascents
from msam_optax.ascents._make import TellsNorm

RHO = 0.3
PARAMS = {"w": np.array([[1.0, -2.0], [0.5, 3.0]]), "b": np.array([0.1, -0.4])}
GRADS = {"w": np.array([[0.3, 1.0], [-2.0, 0.1]]), "b": np.array([4.0, -1.0])}

KNOWN: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "normalized": lambda: ascents.normalized(RHO),
    "negative": lambda: ascents.normalized(-RHO),
    "schedule": lambda: ascents.normalized(optax.linear_schedule(RHO, 1.0, 4)),
    "loss_equated": lambda: ascents.loss_equated(0.5, rho_max=10.0),
    "loss_equated, capped": lambda: ascents.loss_equated(50.0, rho_max=RHO),
    "weight_scaled": lambda: ascents.weight_scaled(RHO),
    "friendly": lambda: ascents.friendly(RHO),
}
# Of these it is measured: at the weights, where what rounding took away does not count.
MEASURED: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adaptive": lambda: ascents.adaptive(RHO),
    "fisher": lambda: ascents.fisher(RHO),
    "p=3": lambda: ascents.normalized(RHO, p=3),
    "own": lambda: ascents.make(RHO, lambda rho, g, w: jax.tree.map(jnp.sign, g)),
    "chained": lambda: optax.chain(ascents.normalized(RHO), optax.scale(0.5)),
    "masked": lambda: optax.masked(ascents.normalized(RHO), {"w": True, "b": False}),
    "injected": lambda: optax.inject_hyperparams(ascents.normalized, "p")(RHO),
}


def as_arrays(tree: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("name", KNOWN)
def test_the_known_norm_is_that_of_epsilon(x64, name):
    params, grads = as_arrays(PARAMS), as_arrays(GRADS)
    ascent = KNOWN[name]()
    assert isinstance(ascent.update, TellsNorm)
    state = ascent.init(params)
    for factor in (1.0, 2.0, -0.1):
        direction = jax.tree.map(lambda g, f=factor: f * g, grads)
        plain, _ = ascent.update(direction, state, params)
        epsilon, norm, state = ascent.update.with_norm(direction, state, params)
        for one, other in zip(plain.values(), epsilon.values(), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(norm, optax.tree.norm(epsilon), rtol=1e-14)
        assert norm > 0


@pytest.mark.parametrize("name", KNOWN)
def test_a_zero_direction_has_an_epsilon_of_norm_zero(name):
    params = as_arrays(PARAMS)
    ascent = KNOWN[name]()
    assert isinstance(ascent.update, TellsNorm)
    zero = jax.tree.map(jnp.zeros_like, params)
    _, norm, _ = ascent.update.with_norm(zero, ascent.init(params), params)
    assert norm == 0


@pytest.mark.parametrize("name", ["normalized", "loss_equated", "friendly"])
def test_a_direction_whose_norm_overflows_has_an_epsilon_of_norm_zero(name):
    params = {"w": jnp.ones(3)}
    ascent = KNOWN[name]()
    assert isinstance(ascent.update, TellsNorm)
    large = {"w": jnp.full(3, 1e30)}
    epsilon, norm, _ = ascent.update.with_norm(large, ascent.init(params), params)
    assert norm == 0 == jnp.abs(epsilon["w"]).max()


def test_of_short_weights_is_told_what_rounding_left():
    params = {"w": jnp.full(10_000, 1.0, jnp.bfloat16)}
    tx = mo.sharpness_aware_gradient(ascents.normalized(0.1))  # entries of 0.001
    _, state = tx.update(params, tx.init(params), params, grad_fn=lambda p: p)
    assert state.perturbation_norm == 0


def test_an_update_put_in_its_place_is_not_known():
    known = ascents.normalized(RHO)
    half = known._replace(update=lambda g, s, p, **_: (jax.tree.map(jnp.sign, g), s))
    tx, params = mo.sharpness_aware_gradient(half), jnp.array([3.0, 4.0])
    _, state = tx.update(params, tx.init(params), params, grad_fn=lambda p: p)
    np.testing.assert_allclose(state.perturbation_norm, np.sqrt(2))


@pytest.mark.parametrize("name", [*KNOWN, *MEASURED])
def test_the_state_tells_how_far_the_second_gradient_was_taken(x64, name):
    """Whatever stands around an ascent that knows its norm, or in its place."""
    params, seen = as_arrays(PARAMS), []
    tx = mo.sharpness_aware_gradient((KNOWN | MEASURED)[name]())

    def grad_fn(params):
        seen.append(params)
        return as_arrays(GRADS)

    _, state = tx.update(as_arrays(GRADS), tx.init(params), params, grad_fn=grad_fn)
    moved = optax.tree.norm(optax.tree.sub(seen[-1], params))
    np.testing.assert_allclose(state.perturbation_norm, moved, rtol=1e-12)
    assert moved > 0


def test_sams_step_passes_over_the_weights_for_no_metric():
    def reductions(ascent: optax.GradientTransformation) -> int:
        tx = mo.sharpness_aware_gradient(ascent)
        params = as_arrays(PARAMS)

        jaxpr = jax.make_jaxpr(
            lambda g, s, p: tx.update(
                g, s, p, grad_fn=lambda p: jax.tree.map(jnp.sin, p)
            )
        )(params, tx.init(params), params)
        return str(jaxpr).count("reduce_sum")

    known = ascents.normalized(RHO)
    measured = optax.chain(known, optax.identity())
    tensors = len(PARAMS)
    # One for each tensor, and one for the sum of these.
    assert reductions(known) == tensors + 1
    assert reductions(measured) == 2 * (tensors + 1)
