"""Problems whose loss is a mean over samples, and how they are trained."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.problems import (
    STEPS,
    mlp,
    named,
    quadratic,
)


class Samples:
    """A problem whose loss is a mean over the samples of a batch.

    Attributes:
      params: the start, a tree of numpy arrays.
      losses: ``losses(params, batch)``, one loss for each sample.
      batches: a pair of arrays whose first axis is the step.
    """

    def __init__(self, name: str, params: Any, losses: Any, batches: Any):
        self.name, self.params, self.losses = name, params, losses
        self.batches = batches

        def mean_loss(params: Any, batch: Any) -> jax.Array:
            return jnp.mean(losses(params, batch))

        self._losses = jax.jit(losses)
        self._grad = jax.jit(jax.grad(mean_loss))

    def __repr__(self) -> str:
        return self.name

    def batch(self, t: int) -> Any:
        return jax.tree.map(lambda x: x[t], self.batches)

    def tree(self, weights: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(self.params), weights.values())

    def named_losses(self, weights: Any, t: int) -> np.ndarray:
        return np.asarray(self._losses(self.tree(weights), self.batch(t)))

    def named_grad(self, weights: Any, t: int, samples: Any) -> dict[str, np.ndarray]:
        batch = jax.tree.map(lambda x: x[samples], self.batch(t))
        return named(self._grad(self.tree(weights), batch))


BATCH = 10


@functools.cache
def classes() -> Samples:
    """The network of ``mlp`` with the loss of each sample."""
    rng = np.random.default_rng(5)
    inputs = rng.normal(size=(STEPS, BATCH, 5))
    labels = np.argmax(np.sin(inputs @ rng.normal(size=(5, 3))), axis=-1)

    def losses(params: Any, batch: Any) -> jax.Array:
        inputs, labels = batch
        hidden, output = params["hidden"], params["output"]
        features = jnp.tanh(inputs @ hidden["kernel"] + hidden["bias"][None])
        logits = features @ output["kernel"] + output["bias"][None]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    return Samples("classes", mlp().params, losses, (inputs, labels))


@functools.cache
def squares() -> Samples:
    """Least squares in a matrix and a vector."""
    rng = np.random.default_rng(6)
    inputs = rng.normal(size=(STEPS, BATCH, 17)) / np.sqrt(17)
    targets = rng.normal(size=(STEPS, BATCH))

    def losses(params: Any, batch: Any) -> jax.Array:
        inputs, targets = batch
        w = jnp.concatenate([jnp.ravel(params["matrix"]), params["vector"]])
        return 0.5 * (inputs @ w - targets) ** 2

    return Samples("squares", quadratic().params, losses, (inputs, targets))


on_both_samples = pytest.mark.parametrize("samples", [classes(), squares()], ids=repr)


def train(tx: Any, samples: Samples, steps: int = STEPS) -> list[Any]:
    """The params after each step of ``make_train_step``."""

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        return samples.losses(params, batch), (model_state, ())

    step = mo.make_train_step(loss_fn, tx, donate=False)
    params = jax.tree.map(jnp.asarray, samples.params)
    state = mo.TrainState(params, tx.init(params))
    trajectory = []
    for t in range(steps):
        state, _ = step(state, samples.batch(t), None)
        trajectory.append(state.params)
    return jax.device_get(trajectory)
