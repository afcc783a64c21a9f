"""Fixtures of the whole suite."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test; the rest of the suite stays in float32."""
    with jax.enable_x64(True):
        yield
