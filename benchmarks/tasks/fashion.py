"""Clothes, and a small residual network with batch norm: convolutions on a CPU.

For each seed other 1,000 of Fashion-MNIST's 60,000 training images, as many of each
class, randomly cropped and mirrored, and other 2,000 to validate. They are few, and the
network has 20,000 weights, so that SGD overfits wrong labels in 2,000 steps, a quarter
of a minute of one core.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.model_selection import train_test_split

from benchmarks.tasks import data, problems, runs
from benchmarks.tasks.augmentation import crop_and_flip
from benchmarks.tasks.losses import cross_entropy

_PAD = 1
# Evaluated at once; divides all parts.
_CHUNK = 500


class SmallResNet(nn.Module):
    """Two pre-activation blocks of two 3x3 convolutions, on 7x7 and 4x4 places.

    Its batch statistics are those of the last batch that it was trained on.

    Attributes:
      num_classes: number of logits.
      widths: channels of each block; the later ones halve height and width.
    """

    num_classes: int
    widths: tuple[int, ...] = (16, 32)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.0)
        conv = partial(nn.Conv, use_bias=False)
        x = conv(self.widths[0], (7, 7), 4)(images)
        for number, width in enumerate(self.widths):
            stride = 1 if number == 0 else 2
            y = nn.relu(norm()(x))
            if number > 0:
                x = conv(width, (1, 1), stride)(y)
            y = conv(width, (3, 3), stride)(y)
            x = x + conv(width, (3, 3))(nn.relu(norm()(y)))
        return nn.Dense(self.num_classes)(nn.relu(norm()(x)).mean(axis=(1, 2)))


def fashion(
    label_noise: float,
    images: int = 1000,
    steps: int = 2000,
    validating: int = 2000,
    dataset: str = "fashion_mnist",
    batch_size: int = 64,
    width: int = 16,
) -> runs.Problem:
    """The problem; what validates is of the training part, too, and not trained on."""
    loaded = data.load(dataset)
    model = SmallResNet(loaded.num_classes, (width, 2 * width))

    def inputs(seed: int, validation: bool) -> runs.Inputs:
        chosen, others = train_test_split(
            np.arange(len(loaded.train_labels)),
            train_size=images,
            test_size=validating,
            random_state=seed,
            stratify=loaded.train_labels,
        )
        shown = loaded.train_images[chosen]
        labels = data.add_label_noise(
            loaded.train_labels[chosen], label_noise, loaded.num_classes, seed
        )
        held_out = (
            (loaded.train_images[others], loaded.train_labels[others])
            if validation
            else (loaded.test_images, loaded.test_labels)
        )
        rng = np.random.default_rng([seed, 1])
        order: list[np.ndarray] = []
        while len(order) < steps:
            order.extend(data.batches(images, batch_size, rng))
        return runs.Inputs(
            seed=np.int32(seed),
            order=np.stack(order[:steps]).astype(np.int32),
            train=(shown, labels, shown),
            held_out=(*held_out, shown),
        )

    return problems.classification(model, inputs, steps)._replace(
        gather=_gather, evaluate=partial(_evaluate, model), from_host=True
    )


def _gather(train: Any, indices: Any, key: Any) -> Any:
    images, labels, _ = train
    return crop_and_flip(images[indices], key), labels[indices]


def _evaluate(model: nn.Module, params: Any, examples: Any) -> Any:
    """At batch statistics of its own, for those that were trained with are of others.

    MSAM's training passes, for instance, see perturbed weights alone.
    """
    images, labels, seen = examples
    _, statistics = model.apply(
        {"params": params}, seen, train=True, mutable=["batch_stats"]
    )

    def of_chunk(images: Any) -> Any:
        return model.apply({"params": params, **statistics}, images, train=False)

    chunk = _CHUNK if len(labels) % _CHUNK == 0 else len(labels)
    chunks = images.reshape(-1, chunk, *images.shape[1:])
    logits: Any = jax.lax.map(of_chunk, chunks)
    logits = logits.reshape(len(labels), -1)
    hits = jnp.argmax(logits, axis=-1) == labels
    return hits.mean(), cross_entropy(logits, labels).mean()
