"""What the installed JAX can't do, as marks of the tests that need it."""

import jax
import optax
import pytest

needs_meshes = pytest.mark.skipif(
    not hasattr(jax.lax, "pcast"),
    reason=f"JAX {jax.__version__} lacks jax.set_mesh, jax.shard_map or jax.lax.pcast",
)
needs_no_temporaries = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2),
    reason="what is said of temporary memory holds from JAX 0.10.2 on",
)
needs_microbatching = pytest.mark.skipif(
    not hasattr(optax, "microbatching"),
    reason=f"Optax {optax.__version__} lacks optax.microbatching",
)
