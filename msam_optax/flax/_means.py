"""Means of batch statistics over batches."""

from typing import Any

import jax
import optax


def check_batches(batches: Any) -> None:
    """ValueError for an array whose examples would be taken for batches."""
    if hasattr(batches, "shape") and len(batches.shape) < 3:
        raise ValueError(
            "batches must hold the module's inputs batch by batch, but an array of "
            f"shape {batches.shape} was given: give [batch]."
        )


class Mean:
    """Mean of trees, one a batch, weighted by the examples in the batch."""

    def __init__(self) -> None:
        self._total: Any = None
        self._count = 0

    def add(self, statistics: Any, inputs: Any) -> None:
        size = jax.tree.leaves(inputs)[0].shape[0]
        weighted = jax.tree.map(lambda x: size * x, statistics)
        if self._total is None:
            self._total = weighted
        else:
            self._total = optax.tree.add(self._total, weighted)
        self._count += size

    def result(self) -> Any:
        if not self._count:
            raise ValueError("Batch statistics need at least one batch of examples.")
        return jax.tree.map(lambda x: x / self._count, self._total)
