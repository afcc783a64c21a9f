"""The search for the momentum: linear in the state."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo


def calls(function: Callable[[], Any]) -> int:
    """How many Python and C functions a call of `function` calls."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def groups(n: int) -> tuple[optax.GradientTransformation, Any, Any, int]:
    """A partition into n groups, its parameters, state and number of nodes."""
    params = {f"{i:03d}": {"kernel": jnp.ones((2, 2))} for i in range(n)}
    tx = mo.momentum_perturbation(
        optax.partition(
            {name: optax.adam(0.1) for name in params}, {name: name for name in params}
        ),
        rho=0.1,
    )
    state = tx.init(params)
    nodes: list[Any] = []

    def count(node: Any) -> bool:
        nodes.append(node)
        return False

    jax.tree.leaves(state, is_leaf=count)
    return tx, params, state, len(nodes)


@pytest.mark.parametrize(
    "look",
    [
        lambda state, params: mo.find_momentum(state.inner_state, params),
        mo.eval_params,
    ],
    ids=["find_momentum", "eval_params"],
)
def test_the_search_is_linear_in_the_state(look):
    """Each group masks the other groups' parameters: 4 times as many, 16 the nodes."""
    shares = []
    for n in (12, 48):
        _, params, state, nodes = groups(n)
        look(state, params)  # nothing is compiled below
        shares.append(calls(lambda: look(state, params)) / nodes)  # noqa: B023
    few, many = shares
    assert many < 1.1 * few
    assert many < 40
