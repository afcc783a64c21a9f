"""What the methods cost in gradients and in state."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo
from tests.against_recursions import MU, along_last_gradient, around_sgd, lr, ramp
from tests.every_method import sgd


class Counter:
    """Counts how often the gradient of a loss is executed, not traced."""

    def __init__(self) -> None:
        self.count = 0

    def tick(self, *_: Any) -> None:
        self.count += 1

    def loss_fn(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        loss = jnp.sum(jnp.cos(params["w"] * batch))
        jax.debug.callback(self.tick, loss)
        return loss, (model_state, ())


@pytest.mark.parametrize("dispatch", ["host", "in_graph"])
@pytest.mark.parametrize(
    "build, gradients",
    [
        (lambda: mo.looksam(optax.sgd(0.1), 0.1, k=5), 60),
        (lambda: mo.looksam(optax.sgd(0.1), 0.1, k=2), 75),
        (lambda: mo.ae_looksam(optax.sgd(0.1), 0.1, total_steps=50), None),
        (lambda: mo.ae_looksam(optax.sgd(0.1), 0.1, total_steps=50, k=3), None),
    ],
    ids=["looksam k=5", "looksam k=2", "ae_looksam", "ae_looksam k=3"],
)
def test_looksam_runs_the_gradients_of_its_refreshes_alone(build, gradients, dispatch):
    tx, counter, params = build(), Counter(), {"w": jnp.linspace(-1.0, 2.0, 6)}
    step = mo.make_train_step(counter.loss_fn, tx, dispatch=dispatch, donate=False)
    state = mo.TrainState(params, tx.init(params))
    for t in range(50):
        state, _ = step(state, jnp.float32(1 + 0.1 * (t % 7)), None)
    jax.effects_barrier()
    refreshes = int(state.opt_state[0].employed_steps)
    assert counter.count == 50 + refreshes
    if gradients is None:
        assert 0 < refreshes < 50
    else:
        assert counter.count == gradients  # at k = 5, 1.2 a step


# Trees like the parameters, and scalars, beyond the base optimizer's, as documented.
STATES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "looksam": (lambda: mo.looksam(sgd(), 0.1), 1, 5),
    "looksam, rho schedule": (lambda: mo.looksam(sgd(), ramp), 1, 6),
    "ae_looksam": (lambda: mo.ae_looksam(sgd(), 0.1, 9), 1, 8),
    "ae_looksam, k": (lambda: mo.ae_looksam(sgd(), 0.1, 9, k=2), 1, 8),
    "ae_looksam, rho schedule": (lambda: mo.ae_looksam(sgd(), ramp, 9), 1, 9),
    "esam": (lambda: mo.esam(sgd()), 0, 3),
    "gsam": (lambda: mo.gsam(sgd()), 0, 2),
    "gsam, rho schedule": (lambda: mo.gsam(sgd(), ramp), 0, 3),
    "gradient_norm_penalty": (lambda: mo.gradient_norm_penalty(sgd()), 0, 2),
    "wsam": (lambda: mo.wsam(sgd()), 0, 2),
    "wsam decoupled": (lambda: mo.wsam(sgd(), learning_rate=0.1), 0, 2),
    "wsam, schedules": (lambda: mo.wsam(sgd(), ramp, learning_rate=lr), 0, 4),
    "friendly_sam": (lambda: mo.friendly_sam(sgd()), 1, 3),
    "friendly_sam, rho schedule": (lambda: mo.friendly_sam(sgd(), ramp), 1, 4),
    "fisher_sam": (lambda: mo.fisher_sam(sgd()), 0, 2),
    "msam, unnormalised": (lambda: around_sgd(mo.ascents.unnormalized(0.1)), 1, 1),
    "msam, last gradient": (lambda: along_last_gradient(0.1), 2, 1),
}


@pytest.mark.parametrize("name", STATES)
def test_the_state_is_as_large_as_documented(name):
    build, trees, scalars = STATES[name]
    # MSAM's perturbation of a bfloat16 tensor is float32: see its own tests.
    short = jnp.float32 if "msam," in name else jnp.bfloat16
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4, short)}

    def sizes(tx: Any) -> tuple[int, int]:
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
        arrays = sum(x.size * x.dtype.itemsize for x in leaves if x.ndim)
        return arrays, sum(x.ndim == 0 for x in leaves)

    # The variants of MSAM stand around SGD with a schedule, which has a counter.
    base = optax.sgd(lr, MU) if "msam," in name else sgd()
    ours, theirs = sizes(build()), sizes(base)
    assert ours[0] - theirs[0] == trees * (12 * 4 + 4 * jnp.dtype(short).itemsize)
    assert ours[1] - theirs[1] == (scalars if "msam," not in name else 0)


def deep_losses(seen: list[int], params: Any, model_state: Any, batch: Any, key: Any):
    seen.append(batch.shape[0])
    features = batch
    for kernel in params[:-1]:
        features = jnp.tanh(features @ kernel)
    return jnp.sum((features @ params[-1]) ** 2, axis=-1), (model_state, ())


def train_step_of(tx: Any, batch: int) -> tuple[Any, list[int]]:
    """A compiled step of a deep network, and the batches that its loss was given."""
    seen: list[int] = []
    step = mo.make_train_step(functools.partial(deep_losses, seen), tx)
    params = [jnp.ones((64, 64))] * 5
    state = jax.eval_shape(lambda: mo.TrainState(params, tx.init(params)))
    inputs = jax.ShapeDtypeStruct((batch, 64), jnp.float32)
    return jax.jit(step).lower(state, inputs, None), seen


@pytest.mark.parametrize(
    "batch, gamma, kept", [(64, 0.5, 32), (10, 0.37, 3), (100, 0.29, 29), (7, 1.0, 7)]
)
def test_esam_runs_its_second_gradient_on_the_samples_kept(batch, gamma, kept):
    _, seen = train_step_of(mo.esam(sgd(), gamma=gamma), batch)
    # The pass over the whole batch is traced once, for both points.
    assert seen == [batch, kept]


def test_esam_costs_less_than_sam():
    def flops(tx: Any) -> float:
        lowered, _ = train_step_of(tx, 256)
        return lowered.compile().cost_analysis()["flops"]

    base, whole = flops(sgd()), flops(mo.sam(sgd()))
    half, fifth = (flops(mo.esam(sgd(), gamma=gamma)) for gamma in (0.5, 0.2))
    assert whole / base == pytest.approx(2, abs=0.05)
    # A gradient is a forward pass and about two backward: of SAM's 3 + 3, ESAM leaves
    # 3 + 1 + 3 gamma.
    assert half / whole < 0.95
    assert half / whole == pytest.approx(5.5 / 6, abs=0.03)
    assert fifth / whole == pytest.approx(4.6 / 6, abs=0.03)
    print(
        f"ESAM's step in units of SAM's: {half / whole:.3f} at gamma=0.5, "
        f"{fifth / whole:.3f} at 0.2; SAM's of SGD's: {whole / base:.3f}"
    )
