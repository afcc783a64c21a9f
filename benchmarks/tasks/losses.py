"""The loss of all that is classified here."""

from typing import Any

import jax
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """One loss for each example."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def classified(logits: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, Any]]:
    """The losses of a batch of inputs and labels, as `linen_loss` takes them."""
    return cross_entropy(logits, batch[1]), {}
