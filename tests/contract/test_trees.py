"""Parameters of any structure, and ensembles of them."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax as mo
from tests.every_method import (
    MSAM,
    Carry,
    all_methods,
    compiled_step,
    leaves,
    method,
    one_step,
    params,
)


@all_methods
def test_an_ensemble_under_vmap_is_a_loop_over_its_members(name):
    tx = method(name)
    members = [jax.tree.map(lambda x, k=k: x * (1 + k) - k, params()) for k in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    step = jax.jit(jax.vmap(functools.partial(one_step, tx), in_axes=(0, 0, None)))

    ensemble = Carry(stacked, jax.vmap(tx.init)(stacked))
    loop = [Carry(p, tx.init(p)) for p in members]
    for t in range(4):
        ensemble = Carry(*step(*ensemble, jnp.int32(t)))
        loop = [Carry(*compiled_step(name)(*c, jnp.int32(t))) for c in loop]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *loop)
    chex.assert_trees_all_close(ensemble, expected, rtol=2e-4, atol=1e-5)
    if name in MSAM:
        chex.assert_trees_all_close(
            jax.vmap(mo.eval_params)(ensemble.state, ensemble.params),
            jax.tree.map(
                lambda *x: jnp.stack(x),
                *[mo.eval_params(c.state, c.params) for c in loop],
            ),
            rtol=2e-4,
            atol=1e-5,
        )


# --- Trees of any shape ---------------------------------------------------------------


class Named(NamedTuple):
    """Parameters whose names are those of optimizers' states."""

    mu: Any
    trace: Any


SHAPES: dict[str, Any] = {
    "an array": (3, 2),
    "a scalar": (),
    "scalars and arrays": {"a": (), "b": (2,), "c": [(1, 1), ()]},
    "leaves of size zero": {"a": (0,), "b": (2, 0), "c": (3,)},
    "only a leaf of size zero": {"a": (0, 3)},
    "nothing": {},
    "nothing inside": {"a": {}, "b": (2,), "c": ({}, [])},
    "None leaves": {"a": None, "b": (2, 2), "c": [None, (1,)]},
    "fields called mu and trace": Named(mu=(2, 2), trace=(3,)),
    "nested fields called mu and trace": Named(mu=Named((2,), ()), trace={"mu": (2,)}),
    "keys called mu and trace": {"mu": {"mu": (2,), "nu": (2,)}, "trace": {"mu": (3,)}},
}


def is_shape(x: Any) -> bool:
    return type(x) is tuple and all(isinstance(n, int) for n in x)


def tree_of(shapes: Any) -> Any:
    sizes = iter(range(100))
    return jax.tree.map(
        lambda shape: jnp.full(shape, 0.3 + 0.2 * next(sizes)), shapes, is_leaf=is_shape
    )


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    "name",
    [
        "adamw_msam",
        "momentum_perturbation, adaptive",
        "ae_sam",
    ],
)
def test_the_structure_of_the_parameters_does_not_matter(name, shapes):
    tx, tree = method(name), tree_of(SHAPES[shapes])
    flat = {f"{i:02}": leaf for i, leaf in enumerate(leaves(tree))}

    @jax.jit
    def run(tree: Any) -> tuple[Carry, Any]:
        carry = Carry(tree, tx.init(tree))
        for t in range(2):
            carry = Carry(*one_step(tx, *carry, t))
        return carry, mo.eval_params(carry.state, carry.params)

    (carry, clean), (expected, expected_clean) = run(tree), run(flat)
    chex.assert_trees_all_equal_shapes_and_dtypes(carry.params, tree)
    for x, y in ((carry.params, expected.params), (clean, expected_clean)):
        chex.assert_trees_all_close(leaves(x), leaves(y), rtol=1e-5, atol=1e-6)
    chex.assert_tree_all_finite(carry)
    for x, y in zip(leaves(carry.params), leaves(tree), strict=True):
        assert x.size == 0 or not np.array_equal(x, y)
