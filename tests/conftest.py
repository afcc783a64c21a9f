"""Fixtures of the whole suite."""

import os
from collections.abc import Iterator

import jax
import pytest

if not hasattr(jax, "enable_x64"):  # new in JAX 0.8
    from jax.experimental import enable_x64

    jax.enable_x64 = enable_x64

# The suite's time is that of compiling, and arrays as small as its own gain nothing
# from LLVM's optimizations. What XLA fuses, and in how much memory, is the same.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
)


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test; the rest of the suite stays in float32."""
    with jax.enable_x64(True):
        yield
