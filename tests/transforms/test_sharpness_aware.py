"""sharpness_aware_gradient: combine, the second order, its state and its errors."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.problems import Problem, mlp, quadratic

RHO = 0.3

x64 = pytest.mark.usefixtures("x64")


def start(problem: Problem) -> Any:
    return jax.tree.map(jnp.asarray, problem.params)


def call(element: Any, grad_fn: Callable[[Any], Any], params: Any) -> tuple[Any, Any]:
    """The gradient that the element hands on, and its state after."""
    state = element.init(params)
    return jax.jit(lambda p: element.update(grad_fn(p), state, p, grad_fn=grad_fn))(
        params
    )


def grad_fn_of(problem: Problem) -> Callable[[Any], Any]:
    return lambda p: problem.grad(p, jnp.int32(3))


def perturbed_point(ascent: Any, grad_fn: Any, params: Any) -> Any:
    epsilon, _ = ascent.update(grad_fn(params), ascent.init(params), params)
    return optax.tree.add(params, epsilon)


ASCENTS = {
    "normalized": mo.ascents.normalized(RHO),
    "p = 3": mo.ascents.normalized(RHO, p=3),
    "adaptive": mo.ascents.adaptive(RHO, eta=0.01),
    "unnormalized": mo.ascents.unnormalized(RHO),
}
on_problems = pytest.mark.parametrize(
    "problem, name", [(mlp(), "normalized"), *((quadratic(), name) for name in ASCENTS)]
)


@x64
@on_problems
def test_the_gradient_is_that_at_the_perturbed_point(problem, name):
    params, grad_fn = start(problem), grad_fn_of(problem)
    gradient, _ = call(mo.sharpness_aware_gradient(ASCENTS[name]), grad_fn, params)
    expected = grad_fn(perturbed_point(ASCENTS[name], grad_fn, params))
    chex.assert_trees_all_close(gradient, expected, rtol=1e-12)


@x64
@on_problems
def test_the_second_order_is_the_gradient_through_the_perturbation(problem, name):
    params, grad_fn = start(problem), grad_fn_of(problem)

    def perturbed_loss(p: Any) -> Any:
        return problem.loss(perturbed_point(ASCENTS[name], grad_fn, p), jnp.int32(3))

    element = mo.sharpness_aware_gradient(ASCENTS[name], second_order=True)
    gradient, _ = call(element, grad_fn, params)
    expected = jax.jit(jax.grad(perturbed_loss))(params)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-9, atol=1e-12)
    first, _ = call(mo.sharpness_aware_gradient(ASCENTS[name]), grad_fn, params)
    gap = optax.tree.norm(optax.tree.sub(gradient, first))
    assert gap > 1e-3 * optax.tree.norm(first)


def test_the_second_order_is_finite_at_a_stationary_point():
    def grad_fn(p: Any) -> Any:
        return jax.grad(lambda w: jnp.sum(w**2))(p)

    element = mo.sharpness_aware_gradient(mo.ascents.normalized(RHO), second_order=True)
    gradient, _ = call(element, grad_fn, jnp.zeros(3))
    np.testing.assert_array_equal(gradient, np.zeros(3))


# --- combine --------------------------------------------------------------------------


@x64
def test_combine_gets_the_clean_gradient_first():
    params, grad_fn = start(mlp()), grad_fn_of(mlp())
    clean = grad_fn(params)
    perturbed = grad_fn(perturbed_point(ASCENTS["normalized"], grad_fn, params))
    element = mo.sharpness_aware_gradient(
        ASCENTS["normalized"],
        combine=lambda clean, perturbed: jax.tree.map(
            lambda g, p: 2.0 * g - 5.0 * p, clean, perturbed
        ),
    )
    expected = jax.tree.map(lambda g, p: 2.0 * g - 5.0 * p, clean, perturbed)
    chex.assert_trees_all_close(call(element, grad_fn, params)[0], expected, rtol=1e-12)


@x64
def test_combine_gets_the_second_order_gradient():
    params, grad_fn = start(mlp()), grad_fn_of(mlp())
    plain = mo.sharpness_aware_gradient(ASCENTS["normalized"], second_order=True)
    combined = mo.sharpness_aware_gradient(
        ASCENTS["normalized"],
        combine=lambda clean, perturbed: optax.tree.scale(3.0, perturbed),
        second_order=True,
    )
    chex.assert_trees_all_close(
        call(combined, grad_fn, params)[0],
        optax.tree.scale(3.0, call(plain, grad_fn, params)[0]),
        rtol=1e-12,
    )


# --- Masked ascents, number formats, state --------------------------------------------


def test_what_a_masked_ascent_masks_out_is_not_perturbed():
    params = start(mlp())
    seen = []

    def grad_fn(p: Any) -> Any:
        seen.append(p)
        return jax.tree.map(jnp.ones_like, p)

    mask = {"hidden": True, "output": {"kernel": False, "bias": True}}
    ascent = optax.masked(mo.ascents.normalized(RHO), mask)
    element = mo.sharpness_aware_gradient(ascent)
    _, state = element.update(
        grad_fn(params), element.init(params), params, grad_fn=grad_fn
    )
    perturbed = seen[-1]
    chex.assert_trees_all_equal(
        perturbed["output"]["kernel"], params["output"]["kernel"]
    )
    epsilon = optax.tree.sub(perturbed, params)
    assert optax.tree.norm(epsilon) == pytest.approx(RHO, rel=1e-5)
    assert all(x.all() for x in jax.tree.leaves(epsilon["hidden"]))
    assert state.perturbation_norm == pytest.approx(RHO, rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_grad_fn_is_called_with_parameters_of_their_own_dtype(dtype):
    params = {"w": jnp.ones(3, dtype), "v": jnp.ones(2, jnp.float32)}

    def grad_fn(p: Any) -> Any:
        chex.assert_trees_all_equal_shapes_and_dtypes(p, params)
        return jax.grad(lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["v"] ** 2))(p)

    element = mo.sharpness_aware_gradient(mo.ascents.normalized(RHO))
    gradient, state = call(element, grad_fn, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
    chex.assert_type(state.perturbation_norm, jnp.float32)


def test_the_second_order_keeps_the_dtype_of_gradients_that_are_wider():
    params = {"w": jnp.ones(3, jnp.bfloat16)}

    def grad_fn(p: Any) -> Any:
        return {"w": 2 * p["w"].astype(jnp.float32)}

    element = mo.sharpness_aware_gradient(mo.ascents.normalized(RHO), second_order=True)
    gradient, _ = call(element, grad_fn, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, grad_fn(params))


@x64
@pytest.mark.parametrize(
    "ascent, expected",
    [
        (mo.ascents.normalized(RHO), RHO),
        (mo.ascents.normalized(-RHO), RHO),
        (mo.ascents.normalized(RHO, p=np.inf), RHO * np.sqrt(17)),
        (mo.ascents.normalized(0.0), 0.0),
        (mo.ascents.normalized(lambda t: 0.7 - t), 0.7),
    ],
    ids=["2-norm", "negative", "largest entry", "zero", "schedule"],
)
def test_the_state_tells_the_length_of_the_perturbation(ascent, expected):
    element = mo.sharpness_aware_gradient(ascent)
    params = start(quadratic())
    assert element.init(params).perturbation_norm == 0
    _, state = call(element, grad_fn_of(quadratic()), params)
    assert state.perturbation_norm == pytest.approx(expected, rel=1e-5)


def test_grad_fn_is_called_once_and_twice_with_the_second_order():
    for second_order, calls in ((False, 1), (True, 2)):
        count = 0

        def grad_fn(p: Any) -> Any:
            nonlocal count
            count += 1
            return p

        element = mo.sharpness_aware_gradient(
            mo.ascents.normalized(RHO), second_order=second_order
        )
        params = jnp.ones(3)
        element.update(params, element.init(params), params, grad_fn=grad_fn)
        assert count == calls


# --- Bad input ------------------------------------------------------------------------

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


def loss(p: Any) -> Any:
    return jnp.sum(p["w"] ** 2) + jnp.sum(p["b"])


def update(**given: Any) -> Any:
    element = mo.sharpness_aware_gradient(mo.ascents.normalized(RHO))
    options: dict[str, Any] = {"params": PARAMS, "grad_fn": jax.grad(loss)}
    options |= given
    return element.update(jax.grad(loss)(PARAMS), element.init(PARAMS), **options)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(params=None), r"params were None: call update\(updates, state, params\)"),
        (dict(grad_fn=None), "needs the keyword grad_fn, .* but got a NoneType"),
        (dict(grad_fn=PARAMS), "needs the keyword grad_fn"),
        (
            dict(grad_fn=jax.value_and_grad(loss)),
            "did you pass jax.value_and_grad, or .* has_aux=True",
        ),
        (
            dict(grad_fn=jax.grad(lambda p: (loss(p), {}), has_aux=True)),
            "did you pass jax.value_and_grad, or .* has_aux=True",
        ),
        (
            dict(grad_fn=lambda p: {"w": p["w"]}),
            r"like the updates, but it has nothing at \['b'\] where float32\[3\] is",
        ),
        (
            dict(grad_fn=lambda p: {"w": p["w"], "b": p["b"][:2]}),
            r"it has float32\[2\] at \['b'\] where float32\[3\] is needed",
        ),
        (
            dict(grad_fn=lambda p: {"w": p["w"], "b": p["b"].astype(jnp.bfloat16)}),
            r"it has bfloat16\[3\] at \['b'\] where",
        ),
        (dict(grad_fn=lambda p: loss(p)), "did you pass the loss and not"),
        (dict(grad_fn=lambda p: None), "it has nothing at"),
    ],
    ids=[
        "no params",
        "no grad_fn",
        "a gradient",
        "value_and_grad",
        "has_aux",
        "structure",
        "shape",
        "dtype",
        "the loss",
        "nothing",
    ],
)
def test_bad_input_is_told_what_is_needed(given, message):
    with pytest.raises(ValueError, match=message):
        update(**given)


def test_a_missing_grad_fn_is_told_how_to_be_given_through_a_chain():
    tx = mo.sam(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"grad_fn=jax\.grad\(loss\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


# What no type checker lets pass.
train_step: Any = mo.make_train_step
sharpness_aware: Any = mo.sharpness_aware_gradient


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: mo.sharpness_aware_gradient(0.05), "ascent must be .* but 0.05"),
        (lambda: mo.sam(0.1), "optimizer must be .* but 0.1 was given"),
        (lambda: mo.wsam(0.1, learning_rate=0.1), "optimizer must be .* but 0.1"),
        (
            lambda: mo.employ(mo.policies.every(2), "sam"),
            "transform must be .* but 'sam'",
        ),
        (lambda: mo.momentum_perturbation(0.1, rho=0.1), "inner must be .* but 0.1"),
        (lambda: train_step(print, 0.1), "optimizer must be .* but 0.1"),
        (lambda: train_step(1, optax.sgd(0.1)), "loss_fn must be a function"),
        (
            lambda: sharpness_aware(mo.ascents.normalized(0.1), 0.5),
            "combine must be a function .* but 0.5",
        ),
    ],
)
def test_what_is_no_transformation_is_refused_when_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "ascent",
    [mo.ascents.normalized(0.1, p=3), mo.ascents.filterwise(0.1)],
    ids=["p=3", "filterwise"],
)
def test_second_order_terms_survive_zeros(ascent):
    # The last filter is zero, and so is its gradient.
    params = jnp.array([[1.0, 2.0, 0.0], [3.0, -1.0, 0.0]])
    tx = mo.sharpness_aware_gradient(ascent, second_order=True)
    grad_fn = jax.grad(lambda w: jnp.sum(w**4))
    gradient, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    assert bool(jnp.all(jnp.isfinite(gradient)))


DESCENDING = optax.chain(optax.contrib.normalize(), optax.sgd(0.5))


@pytest.mark.parametrize(
    "build",
    [
        lambda: mo.sharpness_aware_gradient(DESCENDING),
        lambda: mo.remembered_gradient(DESCENDING),
        lambda: mo.selected_gradient(DESCENDING, 0.5),
        lambda: mo.decoupled_sharpness(optax.sgd(0.1), DESCENDING, 1.0, 0.1),
        lambda: mo.alternating_ascent(optax.sgd(0.1), DESCENDING),
        lambda: mo.momentum_perturbation(optax.sgd(0.1, 0.9), ascent=DESCENDING),
    ],
)
def test_an_optimizer_in_the_place_of_an_ascent_is_refused(build):
    with pytest.raises(ValueError, match="An ascent makes a perturbation along"):
        build().init({"a": jnp.ones((2, 3)), "b": jnp.ones(3)})


@pytest.mark.parametrize(
    "ascent",
    [
        optax.chain(optax.contrib.normalize(), optax.scale(0.5)),
        optax.chain(DESCENDING, optax.scale(-1.0)),
        mo.ascents.normalized(-0.2),
        optax.chain(mo.ascents.normalized(0.2), mo.ascents.clip_by_weight_norm(0.1)),
        optax.inject_hyperparams(mo.ascents.normalized, static_args="p")(rho=0.2),
    ],
)
def test_what_climbs_is_taken_for_an_ascent(ascent):
    mo.sharpness_aware_gradient(ascent).init({"a": jnp.ones((2, 3)), "b": jnp.ones(3)})
