"""Every method lowers for the accelerators, without one at hand."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import pytest

from tests.every_method import METHODS, method, one_step, start

PLATFORMS = ("cuda", "rocm", "tpu")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_lowers_for_every_accelerator(name):
    step = jax.jit(functools.partial(one_step, method(name)))
    carry = jax.eval_shape(lambda: start(method(name)))
    t = jax.ShapeDtypeStruct((), jnp.int32)
    exported = jax.export.export(step, platforms=PLATFORMS)(*carry, t)
    assert exported.platforms == PLATFORMS
    # All that the step is given arrives, and all that it makes comes out.
    assert len(exported.in_avals) == len(jax.tree.leaves(carry)) + 1
    assert [x.shape for x in exported.out_avals] == [
        x.shape for x in jax.tree.leaves(carry)
    ]
