"""An NNX state's plain arrays, by the name that the installed Flax has for it."""

from collections.abc import Callable
from typing import Any

from flax import nnx

# `nnx.pure` until Flax 0.12.6.
as_pure: Callable[[Any], Any] = getattr(
    nnx, "as_pure" if hasattr(nnx, "as_pure") else "pure"
)
