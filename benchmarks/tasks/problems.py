"""The problems that are studied with every method, as `runs.make_run` takes them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from benchmarks.tasks import data, models, text
from benchmarks.tasks.losses import cross_entropy
from benchmarks.tasks.runs import Inputs, Problem
from msam_optax.flax.linen import init_linen, linen_loss


def digits(
    epochs: int = 30,
    dataset: str = "mnist5k",
    label_noise: float = 0.4,
    batch_size: int = 128,
    width: int = 256,
) -> Problem:
    """Images with wrong labels and an MLP of two hidden layers.

    As compare.py trains it. The validation part is a fifth of the training part, for
    each seed another one: what is chosen is not what one part of 800 images likes.
    """
    loaded = data.load(dataset)
    model = models.build("mlp", loaded.num_classes, widths=(width, width))

    def inputs(seed: int, validation: bool) -> Inputs:
        part = data.hold_out(loaded, seed=seed) if validation else loaded
        labels = data.add_label_noise(
            part.train_labels, label_noise, part.num_classes, seed
        )
        rng = np.random.default_rng([seed, 1])
        order = [
            list(data.batches(len(labels), batch_size, rng)) for _ in range(epochs)
        ]
        return Inputs(
            seed=np.int32(seed),
            order=np.concatenate(order).astype(np.int32),
            train=(part.train_images, labels),
            held_out=(part.test_images, part.test_labels),
        )

    steps = epochs * (len(loaded.train_labels) // batch_size)
    return classification(model, inputs, total_steps=steps)


def classification(
    model: nn.Module,
    inputs: Callable[[int, bool], Inputs],
    total_steps: int,
    init: Callable[..., Any] | None = None,
) -> Problem:
    """The problem of a Linen model whose data begins with its inputs and labels."""
    return Problem(
        init=init or _init(model, lambda train: train[0][:1]),
        loss_fn=_loss(model),
        gather=lambda train, indices, key: (train[0][indices], train[1][indices]),
        evaluate=partial(_evaluate, model),
        inputs=inputs,
        total_steps=total_steps,
    )


def characters(
    steps: int = 1000,
    length: int = 32,
    batch: int = 32,
    width: int = 32,
    depth: int = 2,
    heads: int = 2,
) -> Problem:
    """The next character of the reference of the Python language, and a transformer.

    Causal blocks, `depth` of them. The loss is in nats a character. The
    validation and the test part are of the same kind as the training part: of twenty
    blocks of the text, two and two.
    """
    parts = text.load()
    model = models.CharacterTransformer(len(text.ALPHABET), width, depth, heads)
    offsets = np.arange(length + 1)

    def windows(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = np.arange(0, len(part) - length, length)
        cut = part[starts[:, None] + offsets].astype(np.int32)
        return cut[:, :-1], cut[:, 1:]

    # What was trained on is evaluated on its first part only.
    seen = windows(parts.train[: len(parts.test) // 4])

    def inputs(seed: int, validation: bool) -> Inputs:
        rng = np.random.default_rng([seed, 1])
        starts = rng.integers(len(parts.train) - length, size=(steps, batch))
        return Inputs(
            seed=np.int32(seed),
            order=starts.astype(np.int32),
            train=(*seen, parts.train.astype(np.int32)),
            held_out=windows(parts.validation if validation else parts.test),
        )

    def gather(train: Any, starts: Any, key: Any) -> Any:
        del key
        cut = train[2][starts[:, None] + offsets]
        return cut[:, :-1], cut[:, 1:]

    return classification(model, inputs, steps)._replace(gather=gather)


def _init(model: nn.Module, example: Callable[[Any], Any]) -> Callable[..., Any]:
    def init(optimizer, key, train):
        return init_linen(model, optimizer, key, example(train), train=False)

    return init


def _loss(model: nn.Module) -> Callable[..., Any]:
    def losses(logits, batch):
        return cross_entropy(logits, batch[1]).mean(), {}

    return linen_loss(model, losses, train=True)


def _evaluate(model: nn.Module, params: Any, examples: Any) -> Any:
    inputs, labels, *_ = examples
    logits: Any = model.apply({"params": params}, inputs, train=False)
    hits = jnp.argmax(logits, axis=-1) == labels
    return hits.mean(), cross_entropy(logits, labels).mean()
