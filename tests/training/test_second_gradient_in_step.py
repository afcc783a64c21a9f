"""The second gradient in make_train_step: what may stand where, and what it tells."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo

RHO = 0.1
SGD = optax.sgd(0.1, momentum=0.9)
NORMALIZED = mo.ascents.normalized(RHO)
SAM = mo.sharpness_aware_gradient(NORMALIZED)
CLIP = optax.clip_by_global_norm(1.0)


def losses(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    hidden = jnp.tanh(batch @ params["hidden"])
    return (hidden @ params["out"] - 1) ** 2, (model_state, {})


def mean_loss(*args: Any) -> Any:
    values, others = losses(*args)
    return jnp.mean(values), others


def problem() -> tuple[Any, jax.Array]:
    rng = np.random.default_rng(0)
    params = {"hidden": rng.normal(size=(3, 5)), "out": rng.normal(size=5)}
    as_arrays = jax.tree.map(jnp.asarray, (params, 9.0 * rng.normal(size=(4, 8, 3))))
    return as_arrays


def train(tx: Any, loss_fn: Any = mean_loss, steps: int = 2, **kwargs: Any) -> Any:
    params, batches = problem()
    scaling = kwargs.get("loss_scaling")
    step = mo.make_train_step(loss_fn, tx, donate=False, **kwargs)
    loss_scale = () if scaling is None else scaling.init()
    state = mo.TrainState(params, tx.init(params), loss_scale=loss_scale)
    seen = []
    for batch in batches[:steps]:
        before = state
        state, metrics = step(state, batch, None)
        seen.append((before, batch, metrics))
    return state, seen


# --- What stands before it ------------------------------------------------------------

BEFORE = {
    "clip": CLIP,
    "clip by value": optax.clip(1.0),
    "zero_nans": optax.zero_nans(),
    "weight decay": optax.add_decayed_weights(0.1),
    "freeze": optax.transforms.freeze({"hidden": True, "out": False}),
    "centralize": optax.centralize(),
    "ema": optax.ema(0.9),
    "scale": optax.scale(-1.0),
    "noise": optax.add_noise(0.1, 0.5, jax.random.key(0)),
    "another second gradient": SAM,
    "clip of a part": optax.masked(CLIP, {"hidden": True, "out": False}),
}
METHODS = {
    "sam": mo.sam(SGD, RHO),
    "ae_sam": mo.ae_sam(SGD, RHO, total_steps=9),
    "looksam": mo.looksam(SGD, RHO),
    "esam": mo.esam(SGD, RHO),
}


@pytest.mark.parametrize("before", BEFORE)
def test_what_stands_before_a_second_gradient_is_refused(before):
    tx = optax.chain(BEFORE[before], METHODS["sam"])
    with pytest.raises(ValueError, match="no longer the clean one: something stands"):
        train(tx)


@pytest.mark.parametrize("dispatch", ["in_graph", "host"])
@pytest.mark.parametrize("name", METHODS)
def test_it_is_refused_before_every_method(name, dispatch):
    tx = optax.chain(CLIP, METHODS[name])
    with pytest.raises(ValueError, match="no longer the clean one: something stands"):
        train(tx, losses, dispatch=dispatch)


AROUND = {
    "in a wrapper": optax.inject_hyperparams(
        lambda rho: optax.chain(CLIP, mo.sam(SGD, rho))
    )(rho=RHO),
    "masked": optax.masked(
        optax.chain(CLIP, mo.sam(SGD, RHO)), {"hidden": True, "out": False}
    ),
    "in a group": optax.partition(
        {"a": optax.chain(CLIP, mo.sam(SGD, RHO)), "b": SGD},
        {"hidden": "a", "out": "b"},
    ),
    "decoupled": optax.chain(CLIP, mo.wsam(SGD, RHO, learning_rate=0.1)),
    "employed": optax.chain(
        mo.employ(mo.policies.always(), optax.chain(CLIP, SAM)), SGD
    ),
}


@pytest.mark.parametrize("around", AROUND)
def test_wherever_it_stands(around):
    with pytest.raises(ValueError, match="no longer the clean one: something stands"):
        train(AROUND[around])


RIGHT = {
    "behind": mo.sam(optax.chain(CLIP, SGD), RHO),
    "nothing before": optax.chain(optax.identity(), mo.sam(SGD, RHO)),
    "in the ascent": optax.chain(
        mo.sharpness_aware_gradient(optax.chain(CLIP, NORMALIZED)), SGD
    ),
    "before what is no second gradient": optax.chain(CLIP, mo.msam(0.1, rho=RHO)),
    "before another employ": optax.chain(
        mo.employ(mo.policies.every(2), SAM), mo.employ(mo.policies.every(3), CLIP), SGD
    ),
    "MultiSteps behind": optax.chain(
        SAM, optax.MultiSteps(SGD, 2).gradient_transformation()
    ),
    "inject_hyperparams": optax.inject_hyperparams(lambda rho: mo.sam(SGD, rho))(RHO),
    "named_chain": optax.named_chain(("sam", SAM), ("sgd", SGD)),
    "masked": optax.masked(mo.sam(SGD, RHO), {"hidden": True, "out": False}),
    "partition": optax.partition(
        {"a": mo.sam(SGD, RHO), "b": mo.asam(SGD)}, {"hidden": "a", "out": "b"}
    ),
    "guarded inside": mo.sam(optax.apply_if_finite(SGD, 3), RHO),
    "lookups of the learning rate": optax.chain(
        mo.sam(SGD, RHO), optax.contrib.reduce_on_plateau()
    ),
    "conditionally": optax.chain(
        optax.conditionally_transform(SAM, lambda step: step % 2 == 0), SGD
    ),
}


@pytest.mark.parametrize("right", RIGHT)
def test_what_stands_where_it_should_is_not(right):
    state, seen = train(RIGHT[right])
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert seen[-1][-1].loss < seen[0][-1].loss * 100


@pytest.mark.parametrize(
    "kwargs",
    [
        {"microbatches": 2},
        {"loss_scaling": mo.LossScaling(4.0)},
        {"microbatches": 2, "loss_scaling": mo.LossScaling(4.0), "dispatch": "host"},
    ],
)
def test_what_the_step_itself_does_to_the_gradient_is_clean(kwargs):
    tx = mo.ss_sam(SGD, RHO, probability=1.0)
    state, _ = train(tx, **kwargs)
    plain, _ = train(tx)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        state.params,
        plain.params,
    )


@pytest.mark.parametrize("kwargs", [{}, {"loss_scaling": mo.LossScaling(4.0)}])
def test_accumulation_around_is_refused(kwargs):
    tx = optax.MultiSteps(METHODS["ae_sam"], 2).gradient_transformation()
    with pytest.raises(ValueError, match=r"MultiSteps stands around .* accumulate beh"):
        train(tx, **kwargs)


def test_a_guard_around_is_refused_where_nothing_else_guards():
    tx = optax.apply_if_finite(mo.sam(SGD, RHO), 3)
    with pytest.raises(ValueError, match=r"put it inside, sam\(optax.apply_if_finite"):
        train(tx)
    train(tx, loss_scaling=mo.LossScaling(1.0, factor=1.0))


@pytest.mark.parametrize("guard", ["inside", "loss scaling"])
def test_a_second_gradient_alone_that_is_not_finite_reaches_no_weight(guard):
    """Steep enough that only the perturbed loss overflows."""

    def steep(params, model_state, batch, key):
        return jnp.sum(jax.tree.leaves(params)[0] ** 4), (model_state, {})

    wide = 1e20
    inside = mo.sam(optax.apply_if_finite(SGD, 3), wide)
    scaling = mo.LossScaling(1.0, factor=1.0)
    if guard == "inside":
        state, seen = train(inside, steep)
    else:
        state, seen = train(mo.sam(SGD, wide), steep, loss_scaling=scaling)
    for before, _, metrics in seen:
        assert jnp.isfinite(metrics.loss)
        np.testing.assert_array_equal(before.params["out"], state.params["out"])
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.params))


# --- What it tells: the sharpness of the batch ----------------------------------------

TELLING = {
    "sam": mo.sam(SGD, RHO),
    "gsam": mo.gsam(SGD, RHO),
    "wsam": mo.wsam(SGD, RHO, learning_rate=0.1),
    "every 2": optax.chain(mo.employ(mo.policies.every(2), SAM), SGD),
    "looksam": mo.looksam(SGD, RHO, k=2),
    "second order": optax.chain(
        mo.sharpness_aware_gradient(NORMALIZED, second_order=True), SGD
    ),
}


@pytest.mark.parametrize("kwargs", [{}, {"dispatch": "host"}, {"microbatches": 2}])
@pytest.mark.parametrize("name", TELLING)
def test_the_sharpness_is_the_rise_of_the_batchs_loss(x64, name, kwargs):
    _, seen = train(TELLING[name], steps=4, **kwargs)
    taken = []
    for before, batch, metrics in seen:

        def loss(params, batch=batch):
            return mean_loss(params, (), batch, None)[0]

        w, g = before.params, jax.grad(loss)(before.params)
        ascended = optax.tree.add_scale(w, RHO / optax.tree.norm(g), g)
        if metrics.employed:
            expected = loss(ascended) - loss(w)
            taken.append(float(expected))
        np.testing.assert_allclose(metrics.sharpness, taken[-1], rtol=1e-9)
    assert len(taken) == (2 if name in ("every 2", "looksam") else 4)
    assert min(taken) > 1e-3


def test_the_sharpness_of_selected_samples_is_that_of_all(x64):
    _, ((before, batch, metrics), *_) = train(mo.esam(SGD, RHO, beta=1.0), losses)
    w = before.params
    g = jax.grad(lambda p: mean_loss(p, (), batch, None)[0])(w)
    ascended = optax.tree.add_scale(w, RHO / optax.tree.norm(g), g)
    rise = mean_loss(ascended, (), batch, None)[0] - mean_loss(w, (), batch, None)[0]
    np.testing.assert_allclose(metrics.sharpness, rise, rtol=1e-9)


@pytest.mark.parametrize("tx", [SGD, mo.msam(0.1, rho=RHO)], ids=["sgd", "msam"])
def test_without_a_second_gradient_it_is_zero(tx):
    with jax.debug_nans(True):
        _, seen = train(tx)
    assert {float(metrics.sharpness) for *_, metrics in seen} == {0.0}


def test_a_run_of_policies_holds_no_nan():
    with jax.debug_nans(True):
        train(optax.chain(mo.employ(mo.policies.between(1), SAM), SGD))


@pytest.mark.parametrize("name", ["sam", "gsam"])
def test_the_sharpness_costs_no_pass(name):
    tx = TELLING[name]

    def silent(updates, state, params, *, value, value_and_grad_fn, **extra_args):
        return tx.update(updates, state, params, **extra_args)

    params = {
        "hidden": jax.ShapeDtypeStruct((64, 64), jnp.float32),
        "out": jax.ShapeDtypeStruct((64,), jnp.float32),
    }
    batch = jax.ShapeDtypeStruct((128, 64), jnp.float32)
    state = mo.TrainState(params, jax.eval_shape(tx.init, params))

    def flops(optimizer):
        step = mo.make_train_step(mean_loss, optimizer)
        program = step.lower(state, batch, None).compile().programs["step"]
        analysis = program.cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    without = optax.GradientTransformationExtraArgs(tx.init, silent)
    assert 0.995 < flops(tx) / flops(without) < 1.005
