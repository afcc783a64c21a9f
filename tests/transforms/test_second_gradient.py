"""What second gradients take from the caller, and what is refused while tracing."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from msam_optax.transforms._placement import check_wrappers

RHO = 0.3
PARAMS = {"w": jnp.linspace(-1.0, 2.0, 6).reshape(2, 3), "b": jnp.array([0.5, -1.0])}


def loss(p: Any, scale: Any = 1.0) -> Any:
    return jnp.sum(jnp.cos(p["w"] * scale)) * jnp.sum(p["b"] ** 2) + jnp.sum(p["b"])


GRADS = jax.grad(loss)(PARAMS)


def sam_gradient(rho: Any = RHO) -> optax.GradientTransformationExtraArgs:
    return mo.sharpness_aware_gradient(mo.ascents.normalized(rho))


def update(tx: Any, updates: Any = GRADS, **extra_args: Any) -> tuple[Any, Any]:
    """One update at the parameters, with what our own training step hands in."""
    return tx.update(updates, tx.init(PARAMS), PARAMS, **extra_args)


ASCENDED = optax.tree.add_scale(PARAMS, RHO / optax.tree.norm(GRADS), GRADS)
PERTURBED = jax.grad(loss)(ASCENDED)
RISE = float(loss(ASCENDED) - loss(PARAMS))


# --- The three sources ----------------------------------------------------------------

SOURCES: dict[str, dict[str, Any]] = {
    "grad_fn": dict(grad_fn=jax.grad(loss)),
    "value_fn": dict(value_fn=loss),
    "value_and_grad_fn": dict(value_and_grad_fn=jax.value_and_grad(loss)),
    "the first that is there": dict(
        value_and_grad_fn=jax.value_and_grad(loss), grad_fn=len, value_fn=len
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_gives_the_gradient_at_the_perturbed_point(source):
    found, state = update(sam_gradient(), **SOURCES[source], value=loss(PARAMS))
    chex.assert_trees_all_close(found, PERTURBED, rtol=1e-5)
    known = source != "grad_fn"
    np.testing.assert_allclose(state.sharpness, RISE if known else 0, rtol=1e-4)
    assert RISE > 0


def test_without_the_clean_loss_the_sharpness_is_not_known():
    _, state = update(sam_gradient(), value_fn=loss)
    assert state.sharpness == 0


def test_a_value_fn_takes_what_else_it_names_as_in_optax_line_searches():
    twice = jax.grad(loss)(PARAMS, 2.0)
    found, _ = update(sam_gradient(), twice, value_fn=loss, scale=2.0, other=3)
    expected, _ = update(
        sam_gradient(), twice, grad_fn=lambda p: jax.grad(loss)(p, 2.0)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_sam_stands_before_a_line_search():
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    tx = mo.sam(optax.chain(optax.sgd(1.0), search), RHO)
    updates, _ = update(tx, value=loss(PARAMS), grad=GRADS, value_fn=loss)
    assert loss(optax.apply_updates(PARAMS, updates)) < loss(PARAMS)


def test_the_sharpness_of_the_last_employed_step_stays():
    tx = mo.employ(mo.policies.every(2), sam_gradient())
    state, seen = tx.init(PARAMS), []
    for scale in (1.0, 1.5, 0.5):
        loss_at = functools.partial(loss, scale=scale)
        value, grads = jax.value_and_grad(loss_at)(PARAMS)
        _, state = tx.update(grads, state, PARAMS, value=value, value_fn=loss_at)
        seen.append(float(state.inner_state.sharpness))
    assert seen[0] == seen[1] == pytest.approx(RISE, rel=1e-4)
    assert seen[2] != seen[1]


def test_esam_tells_the_sharpness_too():
    def losses(p, indices=None):
        x = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
        return jnp.cos((x if indices is None else x[indices]) @ p)

    p = jnp.array([1.0, -2.0, 0.5])
    tx = mo.selected_gradient(mo.ascents.normalized(RHO), gamma=0.5)
    grads = jax.grad(lambda p: losses(p).mean())(p)
    _, state = tx.update(
        grads,
        tx.init(p),
        p,
        per_example_losses=losses(p),
        per_example_loss_fn=losses,
    )
    ascended = p + RHO * grads / jnp.linalg.norm(grads)
    rise = jnp.mean(losses(ascended)) - jnp.mean(losses(p))
    np.testing.assert_allclose(state.sharpness, rise, rtol=1e-5)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {},
            "grad_fn, .* a NoneType: .*make_train_step .*LinenTrainState and .*nnx",
        ),
        (dict(value_fn=3.0), "needs the keyword value_fn, .* but got a float"),
        (dict(grad_fn=lambda p, _: p), r"takes \(p, _\).*optax.contrib.sam"),
        (dict(grad_fn=lambda: PARAMS), r"parameters alone, but it takes \(\)"),
        (
            dict(value_fn=lambda p, batch: loss(p)),
            r"takes \(p, batch\): give",
        ),
        (dict(value_fn=lambda p: (loss(p), {})), "value_fn must return the loss, one"),
        (dict(value_fn=lambda p: p["b"]), r"returned \(2,\) \(in shapes\)"),
        (dict(value_and_grad_fn=jax.grad(loss)), r"must return \(loss, gradient\)"),
        (
            dict(
                value_and_grad_fn=jax.value_and_grad(
                    lambda p: (loss(p), {}), has_aux=True
                )
            ),
            r"must return \(loss, gradient\)",
        ),
        (
            dict(value_and_grad_fn=lambda p: (loss(p), {"w": p["w"]})),
            "value_and_grad_fn must return a gradient like the updates",
        ),
    ],
)
def test_what_gives_no_gradient_is_told_how(given, message):
    with pytest.raises(ValueError, match=message):
        update(sam_gradient(), **given)


# --- Parameters that a wrapper hides --------------------------------------------------

MASK = {"w": True, "b": False}
BASE = optax.sgd(0.1)
MSAM = mo.momentum_perturbation(optax.sgd(0.1, momentum=0.9), RHO)

# Each trains "w" by SAM, with a perturbation of "w" alone.
HIDING: dict[str, Callable[[Any], Any]] = {
    "masked": lambda inner: optax.masked(inner, MASK),
    "masked by a function": lambda inner: optax.masked(
        inner, lambda p: {"w": True, "b": False}
    ),
    "partition": lambda inner: optax.partition(
        {"sam": inner, "plain": BASE}, {"w": "sam", "b": "plain"}
    ),
    "selective_transform": lambda inner: optax.transforms.selective_transform(
        inner, freeze_mask={"w": False, "b": True}
    ),
}

ELEMENTS: dict[str, Callable[[], Any]] = {
    "sam": lambda: mo.sam(BASE, RHO),
    "ae_sam": lambda: mo.ae_sam(BASE, RHO, total_steps=9),
    "looksam": lambda: mo.looksam(BASE, RHO),
    "wsam, decoupled": lambda: mo.wsam(BASE, RHO, gamma=0.5, learning_rate=0.1),
}

all_hiding = pytest.mark.parametrize("hiding", HIDING)


@all_hiding
@pytest.mark.parametrize("name", ELEMENTS)
def test_hidden_parameters_are_filled_in_from_all_of_them(name, hiding):
    tx = HIDING[hiding](ELEMENTS[name]())
    updates, _ = update(tx, grad_fn=jax.grad(loss), all_params=PARAMS, clean_grad=GRADS)
    g = GRADS["w"]
    at = {**PARAMS, "w": PARAMS["w"] + RHO * g / jnp.linalg.norm(g)}
    chex.assert_trees_all_close(
        updates["w"], -0.1 * jax.grad(loss)(at)["w"], rtol=1e-5, atol=1e-7
    )


@all_hiding
def test_a_loss_never_runs_on_a_part_of_the_parameters(hiding):
    def sums_over_leaves(p):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    with pytest.raises(ValueError, match=r"masked out here .* all_params=params"):
        update(HIDING[hiding](mo.sam(BASE)), grad_fn=jax.grad(sums_over_leaves))


def test_esam_fills_hidden_parameters_in_too():
    def losses(p, indices=None):
        x = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
        return jnp.cos((x if indices is None else x[indices]) @ (p["w"] @ p["b"]))

    p = {"w": jnp.ones((2, 3)) * 0.3, "b": jnp.array([1.0, -2.0, 0.5])}
    grads = jax.grad(lambda p: losses(p).mean())(p)
    given = dict(per_example_losses=losses(p), per_example_loss_fn=losses)
    tx = optax.masked(mo.esam(BASE, RHO, beta=1.0, gamma=1.0), MASK)
    updates, _ = tx.update(grads, tx.init(p), p, **given, all_params=p)
    ascended = p["w"] + RHO * grads["w"] / jnp.linalg.norm(grads["w"])
    expected = jax.grad(lambda p: losses(p).mean())({**p, "w": ascended})["w"]
    chex.assert_trees_all_close(updates["w"], -0.1 * expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="masked out here"):
        tx.update(grads, tx.init(p), p, **given)


def test_other_parameters_in_the_place_of_all_are_refused():
    with pytest.raises(ValueError, match="all_params must be the parameters as"):
        update(
            optax.masked(mo.sam(BASE), MASK),
            grad_fn=jax.grad(loss),
            all_params={"w": jnp.ones(3), "b": PARAMS["b"]},
        )


# --- What comes in is the clean gradient ----------------------------------------------

BEFORE: dict[str, Any] = {
    "clip": optax.clip_by_global_norm(1e9),
    "freeze": optax.transforms.freeze({"w": False, "b": True}),
    "zero_nans": optax.zero_nans(),
    "weight decay": optax.add_decayed_weights(1e-4),
    "scale": optax.scale(1.0),
    "noise": optax.add_noise(0.1, 0.5, 0),
}


@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.parametrize("inside", [lambda x: x, jax.jit], ids=["eager", "jit"])
def test_what_stands_before_a_second_gradient_is_seen(name, inside):
    tx = optax.chain(BEFORE[name], mo.sam(BASE))

    @inside
    def step(grads):
        return update(tx, grads, grad_fn=jax.grad(loss), clean_grad=grads)[0]

    with pytest.raises(ValueError, match="no longer the clean one: something stands"):
        step(GRADS)


def test_what_accumulates_around_a_second_gradient_is_seen():
    tx = optax.MultiSteps(mo.sam(BASE), 2).gradient_transformation()
    with pytest.raises(ValueError, match="no longer the clean one"):
        update(tx, grad_fn=jax.grad(loss), clean_grad=GRADS)


AROUND: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda tx: tx,
    "identity before": lambda tx: optax.chain(optax.identity(), tx),
    "named_chain": lambda tx: optax.named_chain(("sam", tx)),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: True),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": True}),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rho: mo.sam(BASE, rho)
    )(rho=RHO),
    "employ": lambda tx: optax.chain(
        mo.employ(mo.policies.always(), sam_gradient()), BASE
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_leaves_the_gradient_alone_is_let_pass(name):
    tx = AROUND[name](mo.sam(BASE, RHO))

    @jax.jit
    def step(grads):
        return update(tx, grads, grad_fn=jax.grad(loss), clean_grad=grads)[0]

    chex.assert_trees_all_close(
        step(GRADS), optax.tree.scale(-0.1, PERTURBED), rtol=1e-5
    )


def test_a_guard_around_a_second_gradient_is_seen_in_the_state():
    inside = mo.sam(optax.apply_if_finite(BASE, 5)).init(PARAMS)
    check_wrappers(inside)
    check_wrappers(optax.apply_if_finite(mo.msam(0.1, rho=0.3), 5).init(PARAMS))
    around = optax.apply_if_finite(mo.ae_sam(BASE, RHO, 9), 5)
    with pytest.raises(ValueError, match=r"put it inside, sam\(optax.apply_if_finite"):
        check_wrappers(jax.eval_shape(optax.chain(around).init, PARAMS))


def test_msam_on_some_steps_of_a_wrapper_is_seen_in_the_state():
    def on_even(tx):
        return optax.conditionally_transform(tx, lambda step: step % 2 == 0)

    check_wrappers(on_even(sam_gradient()).init(PARAMS))
    check_wrappers(optax.conditionally_mask(MSAM, lambda step: True).init(PARAMS))
    with pytest.raises(ValueError, match="conditionally_transform stands around MSAM"):
        check_wrappers(on_even(MSAM).init(PARAMS))


def test_a_guard_inside_skips_what_only_the_second_gradient_shows():
    tx = mo.sam(optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 5), RHO)
    updates, _ = update(
        tx, grad_fn=lambda p: optax.tree.scale(jnp.nan, jax.grad(loss)(p))
    )
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(PARAMS))


# --- Swapped arguments ----------------------------------------------------------------

METHODS: dict[str, Callable[[], Any]] = {
    **ELEMENTS,
    "esam": lambda: mo.esam(BASE, RHO),
    "sharpness_aware_gradient": sam_gradient,
    "employ": lambda: mo.employ(mo.policies.every(2), sam_gradient()),
    "selected_gradient": lambda: mo.selected_gradient(mo.ascents.normalized(0.1), 0.5),
    "remembered_gradient": lambda: mo.remembered_gradient(mo.ascents.normalized(0.1)),
}


@pytest.mark.parametrize("name", METHODS)
def test_swapped_state_and_params_are_told(name):
    tx = METHODS[name]()
    with pytest.raises(ValueError, match="were state and params swapped"):
        tx.update(GRADS, PARAMS, tx.init(PARAMS), grad_fn=jax.grad(loss))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_tree_of_parameters_is_refused_at_init(name):
    tx = METHODS[name]()
    for wrong in (BASE, tx.init(PARAMS), mo.TrainState(PARAMS, ()), [PARAMS, tx]):
        with pytest.raises(ValueError, match=r"init\(params\) needs the parameters"):
            tx.init(wrong)


# --- A whole optimizer where a part of one belongs ------------------------------------

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sam": lambda: mo.sam(BASE),
    "gsam": lambda: mo.gsam(optax.adamw(1e-3)),
    "looksam": lambda: mo.looksam(BASE),
    "wsam, decoupled": lambda: mo.wsam(BASE, learning_rate=0.1),
    "msam": lambda: mo.msam(0.1, rho=0.3),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "lamb": lambda: optax.lamb(1e-3),
    "warm-up from 0": lambda: optax.sgd(optax.linear_schedule(0.0, 0.1, 10)),
    "a chain": lambda: optax.chain(sam_gradient(), optax.sgd(0.1)),
    "guarded": lambda: optax.apply_if_finite(mo.sam(BASE), 5),
}

PARTS: dict[str, Callable[[], Any]] = {
    "sam": sam_gradient,
    "trace": lambda: optax.trace(0.9),
    "adam": optax.scale_by_adam,
    "clip": lambda: optax.clip_by_global_norm(0.1),
    "noise": lambda: optax.add_noise(100.0, 0.5, 7),
    "a schedule": lambda: optax.chain(sam_gradient(), optax.scale_by_schedule(abs)),
    "weight decay": lambda: optax.add_decayed_weights(0.1),
    "esam": lambda: mo.selected_gradient(mo.ascents.normalized(0.1), 0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_whole_optimizer_is_not_employed(name):
    tx = mo.employ(mo.policies.every(2), OPTIMIZERS[name]())
    for init in (tx.init, jax.jit(tx.init)):
        with pytest.raises(ValueError, match=r"employ .* a whole optimizer"):
            init(PARAMS)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_an_optimizer_is_employed(name):
    mo.employ(mo.policies.every(2), PARTS[name]()).init(PARAMS)


def test_a_whole_optimizer_is_employed_where_the_other_steps_are_spelled_out():
    tx = mo.employ(
        mo.policies.every(2), BASE, otherwise=lambda u, _: optax.tree.zeros_like(u)
    )
    state = tx.init(PARAMS)
    _, state = tx.update(GRADS, state, PARAMS)
    updates, _ = tx.update(GRADS, state, PARAMS)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(PARAMS))


def test_m_sharpness_takes_no_whole_optimizer_either():
    with pytest.raises(ValueError, match="m_sharpness needs a transformation of the"):
        mo.m_sharpness(mo.sam(BASE), shards=2).init(PARAMS)
