"""Fixtures of the whole suite."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

if not hasattr(jax, "enable_x64"):  # new in JAX 0.8
    from jax.experimental import enable_x64  # type: ignore[attr-defined]

    jax.enable_x64 = enable_x64

# The suite's time is that of compiling, and arrays as small as its own gain nothing
# from LLVM's optimizations, from splitting the work among threads or from the second
# set of emitters that JAX 0.11 has no switch for: together 0.57 s for nine steps that
# took 3.3. What XLA fuses, and in how much memory, is the same.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

# Traces and programs are kept, millions of objects, so that a collection takes long and
# finds little.
gc.set_threshold(50_000, 20, 100)

TESTS = Path(__file__).parent
# Of all kinds, under 90 seconds together: `pytest -m fast`.
FAST = [
    "ascents/test_ascent.py",
    "contract/test_extra_arguments.py",
    "contract/test_lowering.py",
    "contract/test_tracing.py",
    "policies/test_policy.py",
    "project/test_public_api.py",
    "project/test_release.py",
]

# Folders whose losses are written as users write them, a bias added to a batch. The
# step of `every_method` promotes no rank there either.
PROMOTING = ["benchmarks", "contract", "project"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    fast = {TESTS / path for path in FAST}
    for path in fast:
        assert path.exists(), f"{path} is in FAST, but not there"
    for item in items:
        if item.path in fast:
            item.add_marker(pytest.mark.fast)


@pytest.fixture(autouse=True)
def no_rank_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """What promotes a rank in silence may as well be a mistake."""
    promotes = request.path.parent.name in PROMOTING
    with jax.numpy_rank_promotion("allow" if promotes else "raise"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test; the rest of the suite stays in float32."""
    with jax.enable_x64(True):
        yield
