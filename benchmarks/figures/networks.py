"""Networks that a figure's methods train, and the loss that is measured at them."""

from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax

from benchmarks.figures import common
from benchmarks.tasks.losses import cross_entropy
from msam_optax.sharpness import filter_normalized_direction, mean_gradient

# Examples at once, so that large data sets fit into memory.
_BATCH = 1000


class Network(NamedTuple):
    """A network in training, and the loss of its training part around it.

    The labels are those trained on, noise included; there is no dropout, and batch
    statistics are those at the weights, wherever the loss is taken.

    Attributes:
      columns: which one it is: columns of the figure's rows.
      weights: w, without the perturbation.
      momentum: v, of the SGD inside the method: the sum of gradients that the last
        step went down along.
      loss: ``loss(params, batch)``, the same function for all networks of a study.
      batches: the training part, or as many of its first examples as the study's
        setting `examples` says.
      batch: one batch of the size that is trained on.
      gradients: of a batch, that the training took so far.
    """

    columns: dict[str, Any]
    weights: Any
    momentum: Any
    loss: Callable[[Any, Any], jax.Array]
    batches: list[Any]
    batch: Any
    gradients: int

    def key(self) -> jax.Array:
        """A random key of the network's seed: all methods meet the same directions."""
        return jax.random.fold_in(jax.random.key(1), self.columns["seed"])

    def gradient(self) -> Any:
        """The gradient g of one batch at w."""
        return mean_gradient(self.loss, self.weights, [self.batch])

    def directions(self) -> dict[str, Any]:
        """Directions of length 1: the batch's gradient, the momentum, a random one.

        The random one has filters in proportion to those of the weights.
        """
        found = {
            "gradient": self.gradient(),
            "momentum": self.momentum,
            "random": filter_normalized_direction(self.key(), self.weights),
        }
        return {name: unit(direction) for name, direction in found.items()}


def unit(direction: Any) -> Any:
    """The direction at length 1."""
    return optax.tree.scale(1 / optax.tree.norm(direction), direction)


def networks(
    study: common.Study,
    methods: Sequence[str],
    epochs: Container[int] | None = None,
) -> Iterator[Network]:
    """Trains, with a progress bar, and stops for the networks to be measured.

    Args:
      study: what is trained.
      methods: by which methods of `optimizers.METHODS`, each at its own setting.
      epochs: after which epochs to stop, from 1; after the last one if None.

    Yields:
      A :class:`Network`, valid until the next one.
    """
    task = study.task
    stops = (task.epochs,) if epochs is None else epochs
    trainers = {method: study.trainer(method) for method in methods}
    loss = partial(_loss, task.model)
    for columns, epoch in common.trained(study, trainers):
        if columns["epoch"] in stops:
            weights = task.weights(epoch.state)
            data = task.train_images, epoch.labels, weights.model_state
            yield Network(
                columns=columns,
                weights=weights.params,
                momentum=common.momentum_of(epoch.state.opt_state),
                loss=loss,
                batches=_batches(*data, study.settings["examples"]),
                batch=_batches(*data, task.batch_size)[0],
                gradients=epoch.gradients,
            )


def _batches(
    images: jax.Array, labels: jax.Array, model_state: Any, count: int
) -> list[Any]:
    """The first `count` examples, with the batch statistics that belong to them."""
    ends = min(count, len(labels))
    chunks = [slice(i, min(i + _BATCH, ends)) for i in range(0, ends, _BATCH)]
    return [(images[chunk], labels[chunk], model_state) for chunk in chunks]


def _loss(model: nn.Module, params: Any, batch: Any) -> jax.Array:
    images, labels, model_state = batch
    logits: Any = model.apply({"params": params, **model_state}, images, train=False)
    return cross_entropy(logits, labels).mean()
