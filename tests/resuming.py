"""A small training by every method, how to save and how to restore it."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import msam_optax as mo
from tests import every_method
from tests.every_method import ONE_EACH, falling

STEPS, SAVED = 8, 3


def sgd() -> optax.GradientTransformation:
    return optax.sgd(optax.cosine_decay_schedule(0.05, 2 * STEPS), momentum=0.9)


# Every method once, with whatever it may keep in its state.
METHODS = [name for name in ONE_EACH if name != "momentum_perturbation"]
METHODS += ["momentum_perturbation, stochastic", "wsam, decoupled, schedules"]


def build(name: str, base: Any = None) -> Any:
    return every_method.build(name, sgd() if base is None else base, 0.01)


# What else is saved and resumed: per-shard ascents, and a scale of the loss.
ALIASES = [*METHODS, "m_sharpness", "loss scaling"]
SCALING = mo.LossScaling(initial=64.0, growth_interval=3)  # grows in mid-run


# --- A small training -----------------------------------------------------------------


def params() -> dict[str, jax.Array]:
    """Parameters of two dtypes."""
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.normal(size=(8, 16)) / 3, jnp.float32),
        "bias": jnp.asarray(rng.normal(size=16), jnp.bfloat16),
        "output": jnp.asarray(rng.normal(size=(16, 8)) / 4, jnp.bfloat16),
    }


def batch(t: int) -> np.ndarray:
    """The batch of step t; sizes differ, so that AE-SAM decides both ways."""
    size = [1.0, 0.3, 2.0, 0.2, 1.0, 3.0, 0.3, 2.0][t % 8]
    return (size * np.random.default_rng(t).normal(size=(16, 8))).astype(np.float32)


def loss_fn(p: Any, model_state: Any, inputs: Any, key: Any) -> Any:
    """A loss for each example, and statistics of the batch."""
    hidden = jnp.tanh((inputs + 0.1 * jnp.cos(key)) @ p["kernel"] + p["bias"][None])
    losses = jnp.sum((hidden @ p["output"] - inputs) ** 2, axis=-1)
    mean = 0.9 * model_state["mean"] + 0.1 * hidden.mean(0)
    return losses, ({"mean": mean, "batches": model_state["batches"] + 1}, {})


class Training(NamedTuple):
    """How to start and how to step."""

    start: Callable[[Any], mo.TrainState]
    step: Callable[..., Any]


def train_state(p: Any, opt_state: Any) -> mo.TrainState:
    model_state = {"mean": jnp.zeros(16), "batches": jnp.zeros([], jnp.int32)}
    return mo.TrainState(p, opt_state, model_state)


@functools.cache
def training(name: str, dispatch: Any = "auto") -> Training:
    if name == "m_sharpness":
        return m_sharpness()
    scaling = SCALING if name == "loss scaling" else None
    tx = build("msam" if scaling else name)
    step = mo.make_train_step(loss_fn, tx, dispatch=dispatch, loss_scaling=scaling)

    def start(p: Any) -> mo.TrainState:
        loss_scale = scaling.init() if scaling else ()
        return train_state(p, tx.init(p))._replace(loss_scale=loss_scale)

    return Training(start, step)


def m_sharpness() -> Training:
    """Per-shard ascents, random ones so that their state matters."""
    ascent = mo.ascents.stochastic(falling, beta=0.5)
    sharded = mo.m_sharpness(mo.sharpness_aware_gradient(ascent), shards=4)
    base = sgd()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: mo.TrainState, inputs: Any, key: Any) -> Any:
        def batch_grad_fn(p: Any, samples: Any) -> Any:
            def mean_loss(p: Any) -> Any:
                return jnp.mean(loss_fn(p, state.model_state, samples, key)[0])

            return jax.grad(mean_loss)(p)

        ours, bases = state.opt_state
        gradient, ours = sharded.gradient(batch_grad_fn, ours, state.params, inputs)
        updates, bases = base.update(gradient, bases, state.params)
        p = optax.apply_updates(state.params, updates)
        return mo.TrainState(p, (ours, bases), state.model_state), {}

    return Training(lambda p: train_state(p, (sharded.init(p), base.init(p))), step)


def advance(training: Training, state: Any, start: int, stop: int) -> list[Any]:
    """The states and metrics after each of the steps start, ..., stop - 1."""
    seen = []
    for t in range(start, stop):
        state, metrics = training.step(state, batch(t), np.float32(t))
        seen.append(jax.device_get((state, metrics)))
    return seen


@functools.cache
def uninterrupted(name: str, dispatch: Any = "auto") -> list[Any]:
    run = training(name, dispatch)
    # On a device for good, as what is restored is: one compilation serves both.
    start = jax.device_put(run.start(params()), jax.local_devices()[0])
    return advance(run, start, 0, STEPS)


def save(directory: Any, step: int, state: Any) -> None:
    with ocp.CheckpointManager(directory) as checkpoints:
        checkpoints.save(step, args=ocp.args.StandardSave(state))


def restore(directory: Any, like: Any, step: int | None = None) -> Any:
    """The state of a step, by default the last, with `like`'s dtypes and shardings."""
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.CheckpointManager(directory) as checkpoints:
        return checkpoints.restore(step, args=ocp.args.StandardRestore(target))


def digest(tree: Any) -> str:
    """A hash of every leaf's path, dtype, shape and bits."""
    told = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(tree)):
        x = np.asarray(leaf)
        told.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape} ".encode())
        told.update(x.tobytes())
    return told.hexdigest()
