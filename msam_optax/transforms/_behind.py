"""Where in an optimizer a momentum perturbation stands, seen in its state.

The parameters in use must be those that MSAM made: nothing may change its update on the
way to them. What does so can be told by what surrounds MSAM's state.
"""

from collections import OrderedDict
from typing import Any

import jax
import optax

from msam_optax.transforms._perturbed_states import PERTURBED

# Wrappers that move the parameters themselves, by more or less than the update that the
# wrapped optimizer returns.
MOVERS = (
    optax.LookaheadState,
    optax.contrib.MechanicState,
    optax.contrib.SAMState,
    optax.contrib.ScheduleFreeState,
)

# The states of optax.chain and optax.named_chain, in its order.
CHAINS = (tuple, OrderedDict)


def check_placement(state: optax.OptState) -> None:
    """Raises ValueError where the parameters in use may not be those that MSAM made.

    It looks at the structure alone, and so works while tracing too.
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda node: isinstance(node, PERTURBED)
    )
    for path, node in nodes:
        if isinstance(node, PERTURBED):
            _check_path(state, path)


def _check_path(node: Any, path: tuple[Any, ...]) -> None:
    for key in path:
        if isinstance(node, MOVERS):
            raise ValueError(
                f"MSAM stands inside a {type(node).__name__.removesuffix('State')}, "
                "which moves the parameters itself, so that they are not those that "
                "MSAM made and its perturbation can't be taken off. Leave out one of "
                "the two, or turn them round: "
                'momentum_perturbation(wrapper(optimizer), rho, along="update").'
            )
        children, _ = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x, node=node: x is not node
        )
        keys = [child_path[0] for child_path, _ in children]
        here = keys.index(key)
        if type(node) in CHAINS and here < len(keys) - 1:
            raise ValueError(
                "Something stands behind MSAM in its chain: what it changes of the "
                "update (clipping, scaling, freezing, weight decay) MSAM can't know, "
                "and its perturbation can't be taken off. Put it inside, "
                "momentum_perturbation(optax.chain(optimizer, ...), rho), or before. "
                "If it changes nothing, give MSAM's own state alone, "
                "for instance eval_params(state[0], params)."
            )
        node = children[here][1]
