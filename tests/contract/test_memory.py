"""Memory: all that a step is given can be donated, and all that it keeps restored."""

import functools
import pickle
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from tests.every_method import (
    STEPS,
    Carry,
    all_methods,
    compiled_step,
    leaves,
    method,
    one_step,
    start,
    trajectory,
)


@functools.cache
def donating_step(name: str) -> Callable[..., tuple[Any, Any]]:
    return jax.jit(functools.partial(one_step, method(name)), donate_argnums=(0, 1))


@all_methods
def test_params_and_state_can_both_be_donated(name):
    tx = method(name)
    carry = start(tx)
    pointers = [x.unsafe_buffer_pointer() for x in leaves(carry)]
    assert len(set(pointers)) == len(pointers), "two arrays share their memory"

    for t in range(2):
        # A scalar that the step does not read, such as the last norm, is not donated.
        given = [x for x in leaves(carry) if x.ndim > 0]
        carry = Carry(
            *donating_step(name)(*carry, jnp.int32(t))
        )  # a warning is an error here
        assert all(x.is_deleted() for x in given)
    chex.assert_trees_all_close(carry, trajectory(name)[2], rtol=1e-5, atol=1e-6)


@all_methods
def test_a_second_init_survives_the_donation_of_the_first(name):
    tx = method(name)
    fresh = start(tx)
    donating_step(name)(*start(tx), jnp.int32(0))
    chex.assert_trees_all_equal(fresh, trajectory(name)[0])
    chex.assert_trees_all_equal(start(tx), fresh)


@all_methods
def test_a_run_resumed_from_its_arrays_continues_bit_for_bit(name):
    saved = pickle.dumps(jax.device_get(trajectory(name)[3]))
    carry = jax.tree.map(jnp.asarray, pickle.loads(saved))
    for t in range(3, STEPS):
        carry = Carry(*compiled_step(name)(*carry, jnp.int32(t)))
    chex.assert_trees_all_equal(carry, trajectory(name)[-1])
