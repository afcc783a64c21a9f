"""The compiled program of a step grows with the number of tensors, not its square.

What is counted is the optimized program. A scalar over the whole tree that ends in a
select is computed again in every fusion, see `msam_optax/_base/numerics.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo
from msam_optax import ascents


def base() -> optax.GradientTransformation:
    return optax.sgd(0.1, momentum=0.9)


def around(ascent: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(mo.sharpness_aware_gradient(ascent), base())


METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sam": lambda: mo.sam(base()),
    "sam, p=1": lambda: around(ascents.normalized(0.1, p=1)),
    "sam, p=3": lambda: around(ascents.normalized(0.1, p=3)),
    "sam, clipped": lambda: around(
        optax.chain(ascents.normalized(0.1), ascents.clip_by_weight_norm(0.1))
    ),
    "asam": lambda: mo.asam(base()),
    "fisher_sam": lambda: mo.fisher_sam(base()),
    "friendly_sam": lambda: mo.friendly_sam(base()),
    "gsam": lambda: mo.gsam(base()),
    "wsam": lambda: mo.wsam(base(), learning_rate=0.1),
    "ae_sam": lambda: mo.ae_sam(base(), 0.1, 100),
    "ae_looksam": lambda: mo.ae_looksam(base(), 0.1, 100),
    "msam": lambda: mo.msam(0.1),
    "adamw_msam": lambda: mo.adamw_msam(1e-3),
}


def instructions(tx: optax.GradientTransformation, tensors: int) -> int:
    """Instructions of the optimized program of one step."""
    tx = optax.with_extra_args_support(tx)
    params = {
        f"w{i}": jax.ShapeDtypeStruct((4, 4), jnp.float32) for i in range(tensors)
    }
    state = jax.eval_shape(tx.init, params)

    def step(params, state, x):
        grad_fn = jax.grad(lambda p: sum(jnp.sum((w @ x) ** 2) for w in p.values()))
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    vector = jax.ShapeDtypeStruct((4,), jnp.float32)
    program = jax.jit(step).lower(params, state, vector).compile().as_text()
    assert program is not None
    return program.count(" = ")


def growth(tx: optax.GradientTransformation) -> float:
    """Of the instructions from 16 to 48 tensors, over the number of tensors."""
    return instructions(tx, 48) / instructions(tx, 16) / 3


@pytest.mark.parametrize("name", METHODS)
def test_the_program_grows_with_the_number_of_tensors(name):
    assert growth(METHODS[name]()) < 1.1


def test_a_norm_that_ends_in_a_select_grows_with_its_square():
    def perturb(rho, direction, params):
        squares = sum(jnp.sum(g**2) for g in jax.tree.leaves(direction))
        norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
        factor = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
        return jax.tree.map(lambda g: factor * g, direction)

    assert growth(around(ascents.make(0.1, perturb))) > 1.3
