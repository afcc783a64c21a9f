"""What a training step says to arguments that it can't take."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo

SGD = optax.sgd(0.1, momentum=0.9)
OPTIMIZERS = {"sgd": SGD, "ae_sam": mo.ae_sam(SGD, 0.1, total_steps=10)}


def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    return jnp.mean((batch @ params["w"]) ** 2), (model_state, {})


def fresh(tx: optax.GradientTransformation, model_state: Any = ()) -> mo.TrainState:
    params = {"w": jnp.ones(3)}
    return mo.TrainState(params, tx.init(params), model_state)


def step_of(tx: Any, **kwargs: Any) -> mo.TrainStep:
    return mo.make_train_step(loss_fn, tx, **kwargs)


@pytest.mark.parametrize("dispatch", ["in_graph", "host"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_given_twice_is_told_of_donate(name, dispatch):
    tx = OPTIMIZERS[name]
    step, state = step_of(tx, dispatch=dispatch), fresh(tx)
    new_state, _ = step(state, jnp.eye(3), None)
    with pytest.raises(ValueError, match=r"state\.params\['w'\] was .* donate=False"):
        step(state, jnp.eye(3), None)
    # The step itself is none the worse.
    new_state, _ = step(new_state, jnp.eye(3), None)
    chex.assert_tree_all_finite(new_state)


def test_params_that_an_earlier_step_took_are_named():
    step, state = step_of(SGD), fresh(SGD)
    step(state, jnp.eye(3), None)
    again = fresh(SGD)._replace(params=state.params)
    with pytest.raises(ValueError, match=r"state\.params\['w'\] was given to an earl"):
        step(again, jnp.eye(3), None)


def test_one_array_at_two_places_is_named_by_both():
    step, state = step_of(SGD), fresh(SGD)
    twice = state._replace(model_state={"teacher": state.params["w"]})
    both = r"state\.params\['w'\] and state\.model_state\['teacher'\] are one and the"
    with pytest.raises(ValueError, match=both):
        step(twice, jnp.eye(3), None)
    state = fresh(SGD)
    copied = state._replace(model_state={"teacher": jnp.copy(state.params["w"])})
    step(copied, jnp.eye(3), None)
    state = fresh(SGD)
    kept = step_of(SGD, donate=False)
    kept(state._replace(model_state={"teacher": state.params["w"]}), jnp.eye(3), None)


def test_an_array_that_is_state_and_batch_is_named_by_both():
    def dot(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        return jnp.sum(params["w"] * batch), (model_state, {})

    state = fresh(SGD)
    with pytest.raises(ValueError, match=r"state\.params\['w'\] and batch\['x'\]"):
        mo.make_train_step(lambda p, s, batch, key: dot(p, s, batch["x"], key), SGD)(
            state, {"x": state.params["w"]}, None
        )


MISPLACED = {
    "another optimizer's": lambda s: s._replace(opt_state=optax.adam(1.0).init(s[0])),
    "nested": lambda s: s._replace(opt_state=(s.opt_state,)),
    "of other parameters": lambda s: s._replace(opt_state=SGD.init({"v": jnp.ones(2)})),
    "the optimizer's before a wrapper": lambda s: s._replace(
        opt_state=optax.flatten(SGD).init(s.params)
    ),
}


@pytest.mark.parametrize("inside", ["", "jit"])
@pytest.mark.parametrize("misplaced", MISPLACED)
def test_a_state_of_another_optimizer_is_told_whose_it_should_be(misplaced, inside):
    step: Any = step_of(SGD)
    if inside:
        step = jax.jit(step)
    with pytest.raises(ValueError, match=r"state\.opt_state must be optimizer\.init\("):
        step(MISPLACED[misplaced](fresh(SGD)), jnp.eye(3), None)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fields_in_another_order_are_named(name):
    tx = OPTIMIZERS[name]
    params, opt_state, *_ = fresh(tx)
    with pytest.raises(ValueError, match=r"state\.opt_state must|in another order"):
        step_of(tx)(mo.TrainState(opt_state, params), jnp.eye(3), None)


@pytest.mark.parametrize(
    "arguments",
    [(jnp.eye(3), fresh(SGD), None), (None, jnp.eye(3), None), (fresh(SGD)[:2], 0, 0)],
    ids=["swapped", "none", "tuple"],
)
def test_arguments_in_another_order_are_told_the_order(arguments):
    with pytest.raises(ValueError, match=r"step\(state, batch, key\) with a msam_o"):
        step_of(SGD)(*arguments)


def test_a_loss_in_the_place_of_the_optimizer_is_told():
    swapped: Any = (SGD, loss_fn)
    with pytest.raises(ValueError, match="was given the optimizer first"):
        mo.make_train_step(*swapped)


def test_a_mistake_of_the_loss_is_left_as_it_is():
    with pytest.raises(TypeError, match="dot_general"):
        step_of(SGD)(fresh(SGD), jnp.eye(4), None)


def test_a_loss_that_returns_its_weighted_mean_alone_is_told_what_is_needed():
    step = mo.make_train_step(lambda *_: mo.WeightedMean(1.0, 2.0), SGD)
    with pytest.raises(ValueError, match=r"must return \(loss, \(model_state, aux\)\)"):
        step(fresh(SGD), None, None)


def test_step_metrics_of_a_whole_train_state_are_told():
    with pytest.raises(ValueError, match=r"step_metrics\(state\.opt_state, state\.par"):
        mo.step_metrics(fresh(SGD), fresh(SGD).params)
