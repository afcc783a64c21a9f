"""Training runs of the benchmarks, and what is measured at their end."""

import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import msam_optax
from benchmarks.tasks import data
from benchmarks.tasks.losses import classified, cross_entropy
from msam_optax.flax.linen import init_linen, linen_loss, recalibrate_batch_stats
from msam_optax.sharpness import hessian_eigenvalues

# Forward passes without gradients, bounded so that large datasets fit into memory.
_EVALUATION_BATCH = 1000
# Batches that batch statistics are averaged over.
_CALIBRATION_BATCHES = 32
# The largest eigenvalue stands far from the others.
_LANCZOS_STEPS = 12


class Weights(NamedTuple):
    """What is evaluated.

    Attributes:
      params: the unperturbed parameters.
      model_state: batch statistics at these parameters, where the model has any.
    """

    params: Any
    model_state: Any


class Evaluation(NamedTuple):
    """Of some examples.

    Attributes:
      accuracy: share of right predictions.
      loss: mean cross-entropy.
    """

    accuracy: float
    loss: float


class Epoch(NamedTuple):
    """Where a run stands after an epoch.

    Attributes:
      state: valid until the run goes on, since the next step takes its memory.
      labels: int[n], those that the run trains on.
      loss: training loss at the last step.
      gradients: how many gradients of a batch were evaluated so far.
      sam_fraction: share of the steps so far that took a second gradient.
      seconds: that the training steps took so far.
    """

    state: msam_optax.TrainState
    labels: jax.Array
    loss: float
    gradients: int
    sam_fraction: float
    seconds: float


class Task:
    """A model and the data it learns, in the same way for every optimizer.

    The data is on the device; with a mesh, on each of its devices, which share out
    the batches.

    Attributes:
      model: a Linen module of `models.py`.
      train_images: float32[n, height, width, channels].
      clean_labels: int32[n], the training labels without noise.
      test_images: float32[m, height, width, channels].
      test_labels: int32[m].
      num_classes: labels are in [0, num_classes).
      label_noise: share of the training labels that are random.
      epochs: passes over the training part.
      batch_size: examples in a step.
      steps_per_epoch: number of full batches in an epoch.
      total_steps: number of steps of a run.
      replicated: where all but the batches are; None without a mesh.
      split: where the batches are; None without a mesh.
    """

    def __init__(
        self,
        dataset: data.Dataset,
        model: nn.Module,
        *,
        label_noise: float,
        epochs: int,
        batch_size: int,
        mesh: Mesh | None = None,
    ) -> None:
        self.replicated = self.split = None
        if mesh is not None:
            self.replicated = NamedSharding(mesh, PartitionSpec())
            self.split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self.model = model
        self.train_images = self._placed(dataset.train_images)
        self.clean_labels = self._placed(dataset.train_labels)
        self.test_images = self._placed(dataset.test_images)
        self.test_labels = self._placed(dataset.test_labels)
        self.num_classes = dataset.num_classes
        self.label_noise = label_noise
        self.epochs = epochs
        self.batch_size = batch_size
        self.steps_per_epoch = len(dataset.train_labels) // batch_size
        self.total_steps = epochs * self.steps_per_epoch

    def labels(self, seed: int) -> jax.Array:
        """The training labels of a seed, with its noise."""
        clean = np.asarray(self.clean_labels)
        return self._placed(
            data.add_label_noise(clean, self.label_noise, self.num_classes, seed)
        )

    def _placed(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self.replicated)

    def weights(self, state: msam_optax.TrainState) -> Weights:
        """The weights to evaluate: unperturbed, with batch statistics of their own."""
        params = msam_optax.eval_params(state.opt_state, state.params)
        images = self.train_images
        rng = np.random.default_rng(0)
        indices = list(data.batches(len(images), self.batch_size, rng))
        batches = (images[i] for i in indices[:_CALIBRATION_BATCHES])
        model_state = recalibrate_batch_stats(
            self.model, params, state.model_state, batches, train=True
        )
        return Weights(params, model_state)


# before_step(state, batch, key): what a step is about to be taken from
BeforeStep = Callable[[msam_optax.TrainState, Any, jax.Array], None]


class Trainer:
    """Trains on a task with one optimizer, compiled once for all seeds.

    Attributes:
      loss_fn: the loss that is trained on, as `make_train_step` takes it.
    """

    def __init__(
        self,
        task: Task,
        optimizer: optax.GradientTransformation,
        extra_gradient: float = 1.0,
    ) -> None:
        self.loss_fn = linen_loss(task.model, classified, train=True)
        self._task = task
        self._extra_gradient = extra_gradient
        self._step = msam_optax.make_train_step(self.loss_fn, optimizer)
        self._init = jax.jit(
            partial(init_linen, task.model, optimizer, train=False),
            out_shardings=task.replicated,
        )
        self._gather = jax.jit(_gather, out_shardings=task.split)

    def warm_up(self) -> None:
        """Compiles all that a run needs, so that its seconds are of training alone.

        A policy's steps with and without a second gradient are compiled apart: it
        takes as many epochs as the policy needs to choose both.
        """
        for epoch in self.epochs(seed=0):
            if not _has_policy(epoch.state) or 0 < epoch.sam_fraction < 1:
                return

    def epochs(
        self,
        seed: int,
        before_step: BeforeStep = lambda *_: None,
        **hyperparams: float,
    ) -> Iterator[Epoch]:
        """Trains, and stops after each epoch for a look.

        Args:
          seed: decides label noise, initial parameters, order of the examples and
            dropout.
          before_step: is shown the state, the batch and the random key of each step;
            the state is valid until it returns.
          **hyperparams: in the place of those that the optimizer was built with, which
            must be made by `optax.inject_hyperparams`; nothing is compiled anew.

        Yields:
          An :class:`Epoch`.
        """
        task = self._task
        images, labels = task.train_images, task.labels(seed)
        # Its own stream: the label noise is drawn from the seed as it is.
        rng = np.random.default_rng([seed, 1])
        init_key, key = jax.random.split(jax.random.key(seed))
        state = self._init(init_key, images[:1])
        if hyperparams:
            values = {name: jnp.float32(value) for name, value in hyperparams.items()}
            opt_state = optax.tree.set(state.opt_state, **values)
            state = state._replace(opt_state=opt_state)
        seconds, steps = 0.0, 0
        for _ in range(task.epochs):
            key, epoch_key = jax.random.split(key)
            keys = list(jax.random.split(epoch_key, task.steps_per_epoch))
            indices = data.batches(len(labels), task.batch_size, rng)
            jax.block_until_ready((state, keys))
            start = time.perf_counter()
            for step_key, chosen in zip(keys, indices, strict=True):
                batch = self._gather(images, labels, chosen)
                before_step(state, batch, step_key)
                state, metrics = self._step(state, batch, step_key)
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start
            steps += task.steps_per_epoch
            sam_fraction = float(metrics.employed_fraction)
            yield Epoch(
                state=state,
                labels=labels,
                loss=float(metrics.loss),
                gradients=steps + round(self._extra_gradient * steps * sam_fraction),
                sam_fraction=sam_fraction,
                seconds=seconds,
            )


def evaluate(
    model: nn.Module, weights: Weights, images: jax.Array, labels: jax.Array
) -> Evaluation:
    """Accuracy and loss, without dropout and with the batch statistics as they are."""
    hits, losses = [], []
    for chunk in _chunks(len(labels)):
        hit, loss = _hits_and_losses(model, weights, images[chunk], labels[chunk])
        hits.append(hit)
        losses.append(loss)
    return Evaluation(
        accuracy=float(np.concatenate(hits).mean()),
        loss=float(np.concatenate(losses).mean(dtype=np.float64)),
    )


def sharpness(
    model: nn.Module,
    weights: Weights,
    images: jax.Array,
    labels: jax.Array,
    radius: float,
) -> float:
    """L(w + radius g / |g|) - L(w), with L and its gradient g over all examples."""
    gradient = optax.tree.zeros_like(weights.params)
    for chunk in _chunks(len(labels)):
        gradient = optax.tree.add(
            gradient, _loss_gradient(model, weights, images[chunk], labels[chunk])
        )
    ascent = msam_optax.ascents.normalized(radius)
    epsilon, _ = ascent.update(gradient, ascent.init(weights.params), weights.params)
    ascended = weights._replace(params=optax.tree.add(weights.params, epsilon))
    return (
        evaluate(model, ascended, images, labels).loss
        - evaluate(model, weights, images, labels).loss
    )


def largest_eigenvalue(
    model: nn.Module, weights: Weights, images: jax.Array, labels: jax.Array
) -> float:
    """Of the Hessian over the first 1000 examples; NaN where it is not finite."""
    first = slice(_EVALUATION_BATCH)
    batch = images[first], labels[first], weights.model_state
    try:
        top = hessian_eigenvalues(
            _mean_loss(model),
            weights.params,
            [batch],
            1,
            jax.random.key(0),
            num_matvecs=_LANCZOS_STEPS,
        )
    except ValueError:
        return math.nan
    return float(top.values[0])


def _gather(images: jax.Array, labels: jax.Array, indices: Any) -> tuple[Any, Any]:
    """A batch of data that is on the device, without a copy from the host."""
    return images[indices], labels[indices]


def _has_policy(state: msam_optax.TrainState) -> bool:
    return bool(optax.tree.get_all_with_path(state.opt_state, "EmployState"))


def _chunks(count: int) -> list[slice]:
    starts = range(0, count, _EVALUATION_BATCH)
    return [slice(start, start + _EVALUATION_BATCH) for start in starts]


def _logits(model, weights, images):
    variables = {"params": weights.params, **weights.model_state}
    return model.apply(variables, images, train=False)


@cache
def _mean_loss(model: nn.Module) -> Callable[[Any, Any], jax.Array]:
    def loss(params, batch):
        images, labels, model_state = batch
        logits = _logits(model, Weights(params, model_state), images)
        return cross_entropy(logits, labels).mean()

    return loss


@partial(jax.jit, static_argnums=0)
def _hits_and_losses(model, weights, images, labels):
    logits = _logits(model, weights, images)
    return jnp.argmax(logits, axis=-1) == labels, cross_entropy(logits, labels)


@partial(jax.jit, static_argnums=0)
def _loss_gradient(model, weights, images, labels):
    def loss(params):
        logits = _logits(model, weights._replace(params=params), images)
        return cross_entropy(logits, labels).sum()

    return jax.grad(loss)(weights.params)
