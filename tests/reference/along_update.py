"""MSAM along the base optimizer's own last update, and small base optimizers for it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.reference.recursions import Gradient, Schedule, Tree, Weights, at, unit

# base(g, w, memory, t) -> (u, memory)
Base = Callable[[Tree, Tree, Any, int], tuple[Tree, Any]]


def msam_along_update(
    grad: Gradient, w0: Weights, steps: int, *, base: Base, rho: Schedule
) -> tuple[list[Tree], list[Tree]]:
    """The perturbed iterates, then the clean ones: w + rho u/|u|."""
    w = perturbed = Tree(w0)
    memory, iterates = None, []
    for t in range(steps):
        u, memory = base(Tree(grad(perturbed, t)), w, memory, t)
        w = w + u
        perturbed = w + at(rho, t) * unit(u)
        iterates.append((perturbed, w))
    return [p for p, _ in iterates], [w for _, w in iterates]


def sgd(lr: Schedule, momentum: float = 0.0, decay: float = 0.0) -> Base:
    """SGD; the weight decay joins the gradient, in front of the momentum."""

    def base(g: Tree, w: Tree, v: Any, t: int) -> tuple[Tree, Any]:
        v = g + decay * w + momentum * (0.0 * g if v is None else v)
        return -at(lr, t) * v, v

    return base


def rmsprop(lr: Schedule, momentum: float, decay: float = 0.9) -> Base:
    """RMSProp as Optax has it: the momentum stands behind the learning rate."""

    def base(g: Tree, w: Tree, memory: Any, t: int) -> tuple[Tree, Any]:
        nu, steps = memory or (0.0 * g, 0.0 * g)
        nu = decay * nu + (1 - decay) * g**2
        root = Tree({name: np.sqrt(x + 1e-8) for name, x in nu.items()})
        scaled = Tree({name: x / root[name] for name, x in g.items()})
        steps = -at(lr, t) * scaled + momentum * steps
        return steps, (nu, steps)

    return base


def lion(lr: Schedule, decay: float, b1: float = 0.9, b2: float = 0.99) -> Base:
    """Lion, whose step is a sign and not its momentum."""

    def base(g: Tree, w: Tree, m: Any, t: int) -> tuple[Tree, Any]:
        m = 0.0 * g if m is None else m
        mixed = b1 * m + (1 - b1) * g
        sign = Tree({name: np.sign(x) for name, x in mixed.items()})
        return -at(lr, t) * (sign + decay * w), b2 * m + (1 - b2) * g

    return base
