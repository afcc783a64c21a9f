"""Every entry point calls a model with what the model takes."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import msam_optax
from msam_optax.flax import linen
from msam_optax.flax._pure import as_pure
from msam_optax.flax.nnx import (
    Inputs,
    init_nnx,
    nnx_loss,
    nnx_update,
    recalibrate_batch_stats,
)

RNG = np.random.default_rng(0)
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32),
    "other": jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32),
    "mask": jnp.asarray([1.0] * 6 + [0.0] * 2)[:, None],
}
NOISE = 0.1


def call(batch):
    """Two inputs, and a keyword that is an array."""
    return Inputs(batch["x"], batch["other"], mask=batch["mask"])


class LinenNet(nn.Module):
    """Several inputs, a keyword that is an array, a stream that is not dropout's."""

    @nn.compact
    def __call__(self, x, other, *, mask, train):
        x = mask * (nn.Dense(4)(x) + nn.Dense(4)(other))
        if train:
            x += NOISE * jax.random.normal(self.make_rng("noise"), x.shape)
        x = nn.BatchNorm(not train, use_fast_variance=False)(x)
        self.sow("losses", "size", jnp.mean(x**2))
        add: Any = jnp.add
        self.sow("total", "size", 2.0, init_fn=lambda: 0.0, reduce_fn=add)
        return x


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.second = nnx.Linear(2, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs)

    def __call__(self, x, other, *, mask, rngs):
        x = mask * (self.first(x) + self.second(other))
        return self.norm(x + NOISE * rngs.noise.normal(x.shape))


def squared(outputs):
    return jnp.mean((outputs - 1) ** 2)


def nnx_squared(model, batch, rngs):
    called = call(batch)
    return squared(model(*called.args, rngs=rngs, **called.kwargs)), {}


class Task:
    """A loss as a method, of an object that holds the streams by its own."""

    def __init__(self, rngs):
        self.rngs = rngs

    def loss(self, rngs, model, batch):
        return nnx_squared(model, batch, rngs)


def closing_twice(inner):
    """One function under two names of a closure."""
    same = inner

    def loss(model, batch):
        assert same is inner
        return same(model, batch)

    return (loss,)


# How `rngs` reaches the loss of nnx_update.
WAYS: dict[str, Any] = {
    "argument": lambda rngs: (nnx_squared, rngs),
    "keyword of a partial": lambda rngs: (functools.partial(nnx_squared, rngs=rngs),),
    "closure": lambda rngs: (lambda m, b: nnx_squared(m, b, rngs),),
    "closure of a closure": lambda rngs: (
        (lambda inner: lambda m, b: inner(m, b))(lambda m, b: nnx_squared(m, b, rngs)),
    ),
    "one function twice": lambda rngs: closing_twice(
        lambda m, b: nnx_squared(m, b, rngs)
    ),
    "default": lambda rngs: (lambda m, b, rngs=rngs: nnx_squared(m, b, rngs),),
    "partial of a method": lambda rngs: (functools.partial(Task(None).loss, rngs),),
    "tree": lambda rngs: (lambda m, b, t: nnx_squared(m, b, t["s"]), {"s": rngs}),
}


def after_nnx_update(way, tx, optimizer_class=nnx.Optimizer):
    model, rngs = NNXNet(nnx.Rngs(0)), nnx.Rngs(noise=3)
    optimizer = optimizer_class(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, rngs, batch):
        loss, *others = WAYS[way](rngs)
        return nnx_update(model, optimizer, loss, batch, *others)

    for _ in range(2):
        value, _ = step(model, optimizer, rngs, BATCH)
    return model, rngs, value


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_near(actual, expected, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol), actual, expected
    )


SAM = msam_optax.sam(optax.sgd(0.1), rho=0.1)


@functools.cache
def expected_of_sam():
    """The same by hand: both gradients with the streams' same noise."""
    model = NNXNet(nnx.Rngs(0))
    parts: Any = nnx.split(model, nnx.Param, ...)
    graphdef, params, rest = parts
    state = SAM.init(as_pure(params))
    params, rest = as_pure(params), as_pure(rest)
    for count in range(2):

        def loss(params, rest=rest, count=count):
            rngs = nnx.Rngs(noise=3)
            rngs.noise.count[...] = jnp.asarray(count, jnp.uint32)
            inside = nnx.merge(graphdef, params, rest, copy=True)
            value, _ = nnx_squared(inside, BATCH, rngs)
            return value, as_pure(nnx.state(inside, nnx.Not(nnx.Param)))

        def grad_fn(params, loss=loss):
            return jax.grad(loss, has_aux=True)(params)[0]

        value, new_rest = loss(params)
        updates, state = SAM.update(grad_fn(params), state, params, grad_fn=grad_fn)
        params, rest = optax.apply_updates(params, updates), new_rest
    return nnx.to_pure_dict(params), value


@pytest.mark.parametrize("way", WAYS)
def test_nnx_update_takes_streams_whichever_way_they_come(way):
    model, rngs, value = after_nnx_update(way, SAM)
    params, expected_value = expected_of_sam()
    assert_near(params_of(model), params)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert rngs.noise.count[...] == 2  # one draw for both gradients of a step


class OldUpdate(nnx.ModelAndOptimizer):
    """The optimizer that holds its model."""


Optimizer: Any = nnx.Optimizer  # whose update the subclasses below may narrow


class CountingUpdate(Optimizer):
    """An update that hands nothing on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = nnx.Variable(jnp.asarray(0))

    def update(self, model, grads):
        self.calls[...] += 1
        return super().update(model, grads)


class KeywordUpdate(Optimizer):
    """An update of keywords that are not the transformation's."""

    def update(self, model, grads, **metrics):
        assert not metrics
        return super().update(model, grads)


@pytest.mark.parametrize("kind", [OldUpdate, CountingUpdate, KeywordUpdate])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nnx_update_takes_an_optimizer_with_an_update_of_its_own(kind):
    model, _, _ = after_nnx_update("argument", SAM, kind)
    assert_near(params_of(model), expected_of_sam()[0])


def test_an_update_that_needs_more_is_named():
    class NeedsMore(Optimizer):
        def update(self, model, grads, metrics):
            raise AssertionError

    with pytest.raises(TypeError, match=r"that of NeedsMore takes \(model, grads, met"):
        after_nnx_update("argument", SAM, NeedsMore)


def test_nnx_update_leaves_a_teacher_alone():
    """Its parameters are no parameters, its closure no argument of the jitted step."""
    teacher, model = (nnx.Linear(3, 2, rngs=nnx.Rngs(i)) for i in (5, 6))
    optimizer = nnx.Optimizer(model, SAM, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, params_of(teacher))

    def loss(model, batch):
        return jnp.mean((model(batch) - teacher(batch)) ** 2), {}

    @nnx.jit
    def step(model, optimizer, batch):
        return nnx_update(model, optimizer, loss, batch)[0]

    values = [step(model, optimizer, BATCH["x"]) for _ in range(3)]
    assert values[2] < values[0]
    assert_near(params_of(teacher), before, atol=0)


def test_streams_that_the_step_has_not_got_are_named():
    model, rngs = NNXNet(nnx.Rngs(0)), nnx.Rngs(noise=3)
    optimizer = nnx.Optimizer(model, SAM, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        nnx_update(model, optimizer, lambda m, b: nnx_squared(m, b, rngs), BATCH)

    with pytest.raises(ValueError, match="argument of the jitted step"):
        step(model, optimizer)
    loss_fn = nnx_loss(model, lambda m, b: nnx_squared(m, b, rngs))
    with pytest.raises(ValueError, match=r"nnx_loss\(model, loss, rngs\)"):
        msam_optax.make_train_step(loss_fn, SAM)(init_nnx(model, SAM), BATCH, None)


def test_nnx_loss_takes_streams_as_nnx_update_does():
    model, rngs = NNXNet(nnx.Rngs(0)), nnx.Rngs(noise=3)
    step = msam_optax.make_train_step(nnx_loss(model, nnx_squared, rngs), SAM)
    state = init_nnx(model, SAM, rngs)
    for _ in range(2):
        old = jax.tree.map(jnp.copy, state)
        state, _ = step(state, BATCH, None)
        chex.assert_trees_all_equal_structs(state, old)
    nnx.update(model, state.params)
    nnx.update((model, rngs), state.model_state)
    assert_near(params_of(model), expected_of_sam()[0])
    assert rngs.noise.count[...] == 2


def exact_mean(model, params):
    """Of the first statistics, without the noise, whose mean is near 0."""
    x = BATCH["x"] @ params[0]["kernel"] + BATCH["other"] @ params[1]["kernel"]
    return (BATCH["mask"] * x).mean(0)


def test_nnx_recalibration_takes_what_the_module_takes():
    model, rngs = NNXNet(nnx.Rngs(0)), nnx.Rngs(noise=3)
    recalibrate_batch_stats(model, [BATCH] * 100, inputs=call, rngs=rngs)
    params = params_of(model)
    expected = exact_mean(model, [params["first"], params["second"]])
    # The noise of 100 batches of 8: drawn anew for each.
    np.testing.assert_allclose(model.norm.mean[...], expected, atol=0.02)
    assert rngs.noise.count[...] == 0
    by_keywords = NNXNet(nnx.Rngs(0))
    recalibrate_batch_stats(
        by_keywords,
        [Inputs(BATCH["x"], BATCH["other"])] * 100,
        mask=BATCH["mask"],
        rngs=nnx.Rngs(noise=3),
    )
    np.testing.assert_array_equal(by_keywords.norm.mean[...], model.norm.mean[...])


def loss_with_sown(outputs, batch, sown):
    return squared(outputs) + 10 * sum(jax.tree.leaves(sown["losses"])), sown


def linen_run(loss, steps=3, **kwargs):
    model = LinenNet()
    state = linen.init_linen(model, SAM, jax.random.key(0), call(BATCH), train=True)
    loss_fn = linen.linen_loss(
        model, loss, inputs=call, rngs=("noise",), train=True, **kwargs
    )
    step, all_metrics = msam_optax.make_train_step(loss_fn, SAM, donate=False), []
    first = state
    for i in range(steps):
        state, metrics = step(state, BATCH, jax.random.key(i))
        chex.assert_trees_all_equal_structs(state, first)
        all_metrics.append(metrics)
    return model, state, all_metrics


def test_linen_entry_points_take_what_the_module_takes():
    model, state, _ = linen_run(lambda outputs, batch: (squared(outputs), {}))
    assert list(state.model_state) == ["batch_stats"]
    new = linen.recalibrate_batch_stats(
        model,
        state.params,
        state.model_state,
        [BATCH] * 100,
        inputs=call,
        rngs=("noise",),
        train=True,
    )
    dense = [state.params[f"Dense_{i}"] for i in range(2)]
    expected = exact_mean(model, dense) + BATCH["mask"].mean() * sum(
        layer["bias"] for layer in dense
    )
    np.testing.assert_allclose(
        new["batch_stats"]["BatchNorm_0"]["mean"], expected, atol=0.02
    )


def test_a_sown_loss_is_of_one_step_and_is_trained_on():
    _, state, metrics = linen_run(loss_with_sown, sown=("losses", "total"))
    sizes = [float(each.aux["losses"]["size"][0]) for each in metrics]
    # At first batch norm's outputs have a mean square of 1, less epsilon's part.
    np.testing.assert_allclose(sizes[0], 1, rtol=0.01)
    assert sizes[2] < 0.5
    for each in metrics:
        assert each.aux["total"]["size"] == 2.0  # and not the sum over the steps
    assert list(state.model_state) == ["batch_stats"]


def test_sown_collections_in_a_state_are_named():
    model = LinenNet()
    variables = dict(
        model.init(jax.random.key(0), *call(BATCH).args, mask=1, train=False)
    )
    params = variables.pop("params")
    assert {"losses", "total"} < set(variables)

    def loss(outputs, batch, sown=None):
        return squared(outputs), {}

    for sown in ((), ("losses",)):
        loss_fn = linen.linen_loss(model, loss, inputs=call, sown=sown, train=False)
        with pytest.raises(ValueError, match="losses of model_state is sown"):
            loss_fn(params, variables, BATCH, None)
    with pytest.raises(ValueError, match=r"sown=\(\"losses\",\)"):
        linen.linen_loss(model, loss, sown="losses")


class Sowing(nnx.Module):
    def __init__(self, kind):
        self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.kind = kind

    def __call__(self, x):
        x = self.layer(x)
        self.sow(self.kind, "size", jnp.mean(x**2))
        return x


class OwnLoss(nnx.Variable):
    """Sown, but as no Intermediate."""


def sowing_loss(model, batch):
    outputs = model(batch)
    sown = nnx.pop(model, (nnx.Intermediate, OwnLoss))
    return squared(outputs) + sum(jax.tree.leaves(sown)), {}


def sowing_loss_that_leaves_it(model, batch):
    return squared(model(batch)), {}


@pytest.mark.filterwarnings("ignore:.*sow:DeprecationWarning")
@pytest.mark.parametrize("loss", [sowing_loss, sowing_loss_that_leaves_it])
def test_what_an_nnx_module_sows_is_not_carried_on(loss):
    model, batch = Sowing(nnx.Intermediate), BATCH["x"]
    model(batch)  # the state has something sown from the start
    state = init_nnx(model, SAM)
    step = msam_optax.make_train_step(nnx_loss(model, loss), SAM, donate=False)
    optimizer = nnx.Optimizer(model, SAM, wrt=nnx.Param)
    update = nnx.jit(lambda m, o: nnx_update(m, o, loss, batch)[0])
    for _ in range(2):
        new, metrics = step(state, batch, None)
        chex.assert_trees_all_equal_structs(new, state)
        state = new
        value = update(model, optimizer)
        np.testing.assert_allclose(value, metrics.loss, rtol=1e-5)
        assert not jax.tree.leaves(nnx.state(model, nnx.Intermediate))


@pytest.mark.filterwarnings("ignore:.*sow:DeprecationWarning")
def test_state_that_a_pass_adds_to_an_nnx_module_is_named():
    model, batch = Sowing(OwnLoss), BATCH["x"]
    optimizer = nnx.Optimizer(model, SAM, wrt=nnx.Param)
    with pytest.raises(ValueError, match="can't carry on: size"):
        nnx_update(model, optimizer, sowing_loss_that_leaves_it, batch)
    step = msam_optax.make_train_step(nnx_loss(model, sowing_loss_that_leaves_it), SAM)
    with pytest.raises(ValueError, match="can't carry on: size"):
        step(init_nnx(model, SAM), batch, None)
    nnx_update(model, optimizer, sowing_loss, batch)  # which pops it


@pytest.mark.parametrize("model_state", [None, (), {}])
def test_a_linen_loss_takes_a_state_of_nothing(model_state):
    model, batch = nn.Dense(1), (jnp.ones((4, 3)), jnp.zeros((4, 1)))
    params = model.init(jax.random.key(0), batch[0])["params"]
    loss_fn = linen.linen_loss(model, lambda outputs, batch: (squared(outputs), {}))
    state = msam_optax.TrainState(params, SAM.init(params), model_state)
    new, _ = msam_optax.make_train_step(loss_fn, SAM)(state, batch, None)
    assert new.model_state == model_state
    assert linen.recalibrate_batch_stats(model, params, model_state, []) is model_state
