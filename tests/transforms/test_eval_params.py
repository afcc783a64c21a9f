"""Clean weights and back: where they can be had, and where that is refused."""

import copy
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo

LR, RHO = 0.1, 0.3


def msam() -> Any:
    return mo.msam(LR, rho=RHO)


def tree() -> Any:
    return {"a": jnp.asarray([1.0, -2.0]), "b": jnp.full((2, 2), 10.0)}


def trained(tx: Any, params: Any, steps: int = 3) -> tuple[Any, Any]:
    """Parameters and state after some steps on half the squared norm."""
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(params, state, params, value=jnp.ones([]))
        params = optax.apply_updates(params, updates)
    return params, state


# --- What stands where ----------------------------------------------------------------

BEHIND: dict[str, Callable[[], Any]] = {
    "freeze": lambda: optax.transforms.freeze({"a": False, "b": True}),
    "scale": lambda: optax.scale(0.5),
    "clip": lambda: optax.clip_by_global_norm(1.0),
    "decay": lambda: optax.add_decayed_weights(0.1),
    "ema": lambda: optax.ema(0.9),
    "plateau": lambda: optax.contrib.reduce_on_plateau(),
    "nonnegative": lambda: optax.keep_params_nonnegative(),
}


@pytest.mark.parametrize("name", BEHIND)
@pytest.mark.parametrize("chain", ["chain", "named chain", "chains"])
def test_what_stands_behind_in_the_chain_is_refused(name, chain):
    behind = BEHIND[name]()
    tx = {
        "chain": lambda: optax.chain(msam(), behind),
        "named chain": lambda: optax.named_chain(("z", msam()), ("a", behind)),
        "chains": lambda: optax.chain(optax.chain(optax.identity(), msam()), behind),
    }[chain]()
    state = tx.init(tree())
    for call in (mo.eval_params, mo.train_params):
        with pytest.raises(ValueError, match=r"stands behind MSAM .* Put it inside"):
            call(state, tree())
    with pytest.raises(ValueError, match="stands behind MSAM"):
        jax.eval_shape(mo.eval_params, state, tree())
    if chain == "chain":  # whoever knows better
        chex.assert_trees_all_equal(mo.eval_params(state[0], tree()), tree())


AROUND: dict[str, Callable[[], Any]] = {
    "schedule_free": lambda: optax.contrib.schedule_free(msam(), LR),
    "mechanize": lambda: optax.contrib.mechanize(msam()),
    "sam": lambda: optax.contrib.sam(msam(), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_moves_the_parameters_itself_is_refused_around(name):
    state = AROUND[name]().init(tree())
    with pytest.raises(ValueError, match=r"stands inside a .* moves the parameters"):
        mo.eval_params(state, tree())


def test_lookahead_is_refused_by_its_name():
    params = optax.LookaheadParams.init_synced(tree())
    state = optax.lookahead(msam(), 5, 0.5).init(params)
    for given in (params, params.fast):
        with pytest.raises(ValueError, match="stands inside a Lookahead"):
            mo.eval_params(state, given)


FINE: dict[str, Callable[[Any], Any]] = {
    "before": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "before, named": lambda tx: optax.named_chain(
        ("z", optax.clip_by_global_norm(1.0)), ("a", tx)
    ),
    "alone": lambda tx: optax.chain(tx),
    "finite": lambda tx: optax.apply_if_finite(tx, 2),
    "steps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": True}),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda t: t < 2),
    "flatten": optax.flatten,
    "split": optax.contrib.split_real_and_imaginary,
}


@pytest.mark.parametrize("make", [msam, lambda: mo.adamw_msam(LR, rho=RHO)])
@pytest.mark.parametrize("name", FINE)
def test_elsewhere_the_perturbation_is_taken_off_and_put_on(name, make):
    params, state = trained(FINE[name](make()), tree())
    weights = mo.eval_params(state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(weights, params)
    epsilon = optax.tree.norm(optax.tree.sub(params, weights))
    assert float(epsilon) == pytest.approx(RHO, rel=1e-5)
    back = mo.train_params(state, weights)
    chex.assert_trees_all_close(back, params, rtol=1e-6)


def test_frozen_inside_they_are_not_moved():
    inner = optax.partition(
        {"train": optax.adamw(LR), "freeze": optax.set_to_zero()},
        {"a": "train", "b": "freeze"},
    )
    params, state = trained(mo.momentum_perturbation(inner, RHO), tree())
    np.testing.assert_array_equal(mo.eval_params(state, params)["b"], tree()["b"])


# --- Layouts --------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_optax_flatten_gives_the_same_weights(stored):
    def make() -> Any:
        if not stored:
            return msam()
        return mo.momentum_perturbation(optax.sgd(LR), RHO, along="update")

    plain, flat = trained(make(), tree()), trained(optax.flatten(make()), tree())
    chex.assert_trees_all_close(
        mo.eval_params(*reversed(flat)), mo.eval_params(*reversed(plain)), rtol=1e-6
    )


@pytest.mark.parametrize("stored", [False, True])
def test_complex_parameters_in_two_parts(stored):
    tx = mo.momentum_perturbation(optax.sgd(LR, 0.9), RHO)
    if stored:
        tx = mo.momentum_perturbation(optax.sgd(LR), RHO, along="update")
    params = {"c": jnp.asarray([1 + 2j, 3 - 1j]), "r": jnp.ones(2)}
    params, state = trained(optax.contrib.split_real_and_imaginary(tx), params, 1)
    weights = mo.eval_params(state, params)
    expected = {"c": 0.9 * jnp.asarray([1 + 2j, 3 - 1j]), "r": jnp.full(2, 0.9)}
    chex.assert_trees_all_close(weights, expected, rtol=1e-6)
    assert not jnp.allclose(params["c"], weights["c"])


@pytest.mark.parametrize("make", [msam, lambda: mo.adamw_msam(LR, rho=RHO)])
def test_an_equinox_model_is_given_whole_or_filtered(make):
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    params, state = trained(make(), eqx.filter(model, eqx.is_array))
    trained_model = eqx.combine(params, model)
    whole = mo.eval_params(state, trained_model)
    assert whole.activation is model.activation
    filtered = mo.eval_params(state, params)
    chex.assert_trees_all_equal(eqx.filter(whole, eqx.is_array), filtered)
    epsilon = optax.tree.norm(optax.tree.sub(params, filtered))
    assert float(epsilon) == pytest.approx(RHO, rel=1e-5)
    jax.eval_shape(eqx.filter_jit(whole), jnp.ones(2))


# --- Resuming -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [msam, lambda: mo.momentum_perturbation(optax.sgd(LR), RHO, along="update")],
    ids=["msam", "along the update"],
)
def test_weights_are_loaded_into_a_run_by_train_params(make):
    tx = make()
    params, state = trained(tx, tree())
    weights = mo.eval_params(state, params)

    def next_weights(params: Any) -> Any:
        updates, after = tx.update(tree(), state, params)
        return mo.eval_params(after, optax.apply_updates(params, updates))

    goes_on = next_weights(params)
    chex.assert_trees_all_close(
        next_weights(mo.train_params(state, weights)), goes_on, rtol=1e-6
    )
    # The way that looks right leaves a perturbation in the weights.
    off = optax.tree.norm(optax.tree.sub(next_weights(weights), goes_on))
    assert float(off) == pytest.approx(RHO, rel=1e-4)


def test_a_run_starts_anew_where_it_is():
    tx = msam()
    params, state = trained(tx, tree())
    weights = mo.eval_params(state, params)
    params = copy.copy(weights)
    state = tx.init(params)
    chex.assert_trees_all_equal(mo.eval_params(state, params), weights)


def test_without_a_perturbation_both_are_the_parameters():
    state = optax.adam(0.1).init(tree())
    params = tree()
    assert mo.train_params(state, params) is params


@pytest.mark.parametrize("steps", [4, 6])
def test_a_rho_that_ends_at_zero_brings_the_parameters_to_the_weights(steps):
    tx = mo.msam(LR, rho=optax.cosine_decay_schedule(RHO, 3))
    params, state = trained(tx, tree(), steps)
    chex.assert_trees_all_close(params, mo.eval_params(state, params), rtol=1e-6)
    assert float(state.scale) == pytest.approx(0, abs=1e-7)


def test_of_lookahead_inside_all_parameters_are_evaluated():
    inner = optax.lookahead(optax.sgd(0.1, 0.9), 3, 0.5)
    tx = mo.momentum_perturbation(inner, 0.2, along="update")
    params = optax.LookaheadParams.init_synced(jnp.array([1.0, -2.0]))
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(params.fast, state, params)
        params = optax.apply_updates(params, updates)
    weights = mo.eval_params(state, params)
    epsilon = optax.tree.sub(params, weights)
    chex.assert_trees_all_close(epsilon, state.perturbation, atol=1e-6)
    assert optax.tree.norm(epsilon) > 0.1
