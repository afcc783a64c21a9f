"""Any tree of parameters, and any numbers in the gradients."""

import functools
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax as mo
from tests.faults import guarded, method, one_step, run, tree
from tests.resuming import METHODS, digest

all_methods = pytest.mark.parametrize("name", METHODS)


def quick(max_examples: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


leaves = st.builds(
    jax.ShapeDtypeStruct,
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]),
)
names = st.sampled_from(["mu", "trace", "count", "w"])  # some of optimizers' own
trees = st.dictionaries(
    names,
    st.recursive(
        leaves | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=2).map(tuple)
            | st.dictionaries(names, inner, max_size=3)
        ),
        max_leaves=6,
    ),
    max_size=3,
)


@quick(60)
@hypothesis.given(name=st.sampled_from(sorted(METHODS)), abstract=trees)
def test_shapes_and_dtypes_last_for_any_tree(name, abstract):
    with jax.enable_x64(True):
        tx = method(name)
        state = jax.eval_shape(tx.init, abstract)
        p, after = jax.eval_shape(
            functools.partial(one_step, tx), abstract, state, abstract, abstract
        )
    chex.assert_trees_all_equal_shapes_and_dtypes(p, abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    # Trees like the parameters have their dtypes; scalars are single precision.
    given = {x.dtype for x in jax.tree.leaves(abstract)} | {jnp.dtype(jnp.float32)}
    kept = {x.dtype for x in jax.tree.leaves(state)}
    assert {x for x in kept if jnp.issubdtype(x, jnp.floating)} <= given


MODEST = [0.0, 1e-6, -1e-3, 1.0, -100.0]
WIDE = [*MODEST, 1e-40, -1e-30, 1e-20, 1e10, -1e10]


def numbers(entries: list[float]) -> Any:
    """Gradients like the tree, of the entries given."""

    def fill(values: list[float]) -> Any:
        if entries is WIDE:  # which float16, the last one, does not hold
            values[-1] = 0.0
        parts = np.split(np.asarray(values, np.float32), [0, 6, 9])
        order = ("hollow", "matrix", "vector", "scalar")
        return {
            leaf: part.reshape(tree()[leaf].shape).astype(tree()[leaf].dtype)
            for leaf, part in zip(order, parts, strict=True)
        }

    return st.lists(st.sampled_from(entries), min_size=10, max_size=10).map(fill)


def pairs(entries: list[float]) -> Any:
    return st.tuples(numbers(entries), numbers(entries))


@quick(12)
@hypothesis.given(
    steps=st.sampled_from([MODEST, WIDE]).flatmap(
        lambda entries: st.lists(pairs(entries), min_size=1, max_size=3)
    )
)
@all_methods
def test_finite_gradients_keep_all_finite(name, steps):
    carries = run(method(name), *steps)
    chex.assert_tree_all_finite((carries, mo.eval_params(*reversed(carries[-1]))))


@quick(12)
@hypothesis.given(
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    leaf=st.sampled_from(["matrix", "vector", "scalar"]),
    pair=pairs(MODEST),
)
@all_methods
def test_any_gradient_that_is_not_finite_is_shut_out(name, value, leaf, pair):
    clean, perturbed = pair
    bad = {**clean, leaf: np.full_like(clean[leaf], value)}
    (p, state), (after, state_after) = run(guarded(name), (bad, perturbed))
    assert digest(p) == digest(after)
    assert digest(state.inner_state) == digest(state_after.inner_state)
