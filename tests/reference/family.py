"""The rest of the family as plain numpy recursions in float64, after ALGORITHMS.md.

As in ``recursions``: ``grad(w, t)`` is the gradient of step t's loss at w, and norms
and inner products go over all the tensors together.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.reference.recursions import (
    Gradient,
    Schedule,
    Tree,
    Weights,
    at,
    norm,
    sgd,
    unit,
)

Decide = Callable[[int, Tree], bool]
Epsilon = Callable[[Tree, Tree, int], Tree]


def dot(x: Tree, y: Tree) -> float:
    """The inner product over all the tensors together."""
    return sum(float(np.sum(x[k] * y[k])) for k in x)


def reject(x: Tree, y: Tree) -> Tree:
    """The part of x that is orthogonal to y."""
    return x - dot(x, y) / dot(y, y) * y


def each_tensor(rule: Callable[..., Tree], *trees: Tree) -> Tree:
    """A rule for whole trees, applied to every tensor on its own."""
    alone = {k: [Tree({k: tree[k]}) for tree in trees] for k in trees[0]}
    return Tree({k: rule(*tensors)[k] for k, tensors in alone.items()})


# --- Directions of an ascent, of length about one -------------------------------------


def p_norm_direction(g: Tree, p: float) -> Tree:
    """The point of the unit ball of the p-norm where <g, .> is largest."""
    if math.isinf(p):
        return Tree({k: np.sign(x) for k, x in g.items()})
    if p == 1:
        largest = max(float(np.max(np.abs(x))) for x in g.values())
        return Tree({k: np.sign(x) * (np.abs(x) == largest) for k, x in g.items()})
    q = p / (p - 1)
    total = sum(float(np.sum(np.abs(x) ** q)) for x in g.values())
    powers = Tree({k: np.sign(x) * np.abs(x) ** (q - 1) for k, x in g.items()})
    return powers / total ** (1 / p)


def layerwise_direction(g: Tree, w: Tree) -> Tree:
    """Each tensor of g scaled to the length of the same tensor of w."""
    return each_tensor(lambda g, w: norm(w) * unit(g), g, w)


def fisher_direction(g: Tree, eta: float) -> Tree:
    """F⁻¹g/√(gᵀF⁻¹g) with the diagonal F = 1 + eta g²."""
    natural = g / (eta * g**2 + 1.0)
    return natural / math.sqrt(dot(g, natural))


def weight_scaled_direction(v: Tree, w: Tree) -> Tree:
    """|w| v/‖|w| v‖."""
    return unit(Tree({k: np.abs(x) for k, x in w.items()}) * v)


def part_direction(v: Tree, chosen: Callable[[str], bool]) -> Tree:
    """v/‖v‖ within the chosen tensors, and zero in the others."""
    return unit(Tree({k: x if chosen(k) else 0 * x for k, x in v.items()}))


# --- Policies -------------------------------------------------------------------------


def every(k: int) -> Decide:
    """Steps 0, k, 2k, ..."""
    return lambda t, g: t % k == 0


def adaptive(
    total_steps: int,
    delta: float = 0.9,
    lambda_1: float = -1.0,
    lambda_2: float = 1.0,
) -> Decide:
    """AE-SAM's policy; the statistics take in every gradient it is shown."""
    mean = variance = 0.0

    def decide(t: int, g: Tree) -> bool:
        nonlocal mean, variance
        square = dot(g, g)
        mean = delta * mean + (1 - delta) * square
        variance = delta * variance + (1 - delta) * (square - mean) ** 2
        progress = min(t / total_steps, 1.0)
        c = progress * lambda_1 + (1 - progress) * lambda_2
        return square >= mean + c * math.sqrt(variance)

    return decide


def both(one: Decide, other: Decide) -> Decide:
    """Where both say yes; both are asked on every step."""
    return lambda t, g: all([one(t, g), other(t, g)])


def either(one: Decide, other: Decide) -> Decide:
    """Where at least one says yes; both are asked on every step."""
    return lambda t, g: any([one(t, g), other(t, g)])


# --- Methods: they replace the gradient, and SGD does the rest ------------------------


def ascend(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    epsilon: Epsilon,
    combine: Callable[[Tree, Tree], Tree] = lambda g, s: s,
    decide: Decide = lambda t, g: True,
    **sgd_options: Any,
) -> list[Tree]:
    """combine(g, s) with s the gradient at w + epsilon(g, w, t), where so decided."""

    def gradient(w: Tree, t: int) -> Tree:
        g = Tree(grad(w, t))
        if not decide(t, g):
            return g
        return combine(g, Tree(grad(w + epsilon(g, w, t), t)))

    return sgd(gradient, w0, steps, **sgd_options)


def p_norm_sam(
    *problem: Any, rho: Schedule, p: float, **sgd_options: Any
) -> list[Tree]:
    """SAM in the ball of the p-norm."""

    def epsilon(g: Tree, w: Tree, t: int) -> Tree:
        return at(rho, t) * p_norm_direction(g, p)

    return ascend(*problem, epsilon=epsilon, **sgd_options)


def fisher_sam(
    *problem: Any, rho: Schedule, eta: float, **sgd_options: Any
) -> list[Tree]:
    """SAM in the ellipsoid of the Fisher information."""

    def epsilon(g: Tree, w: Tree, t: int) -> Tree:
        return at(rho, t) * fisher_direction(g, eta)

    return ascend(*problem, epsilon=epsilon, **sgd_options)


def gsam(*problem: Any, rho: Schedule, alpha: float, **options: Any) -> list[Tree]:
    """GSAM: the perturbed gradient less alpha times what of g is orthogonal to it."""

    def epsilon(g: Tree, w: Tree, t: int) -> Tree:
        return at(rho, t) * unit(g)

    def combine(g: Tree, s: Tree) -> Tree:
        return s - alpha * reject(g, s)

    return ascend(*problem, epsilon=epsilon, combine=combine, **options)


def gradient_norm_penalty(
    *problem: Any, rho: Schedule, alpha: float, **sgd_options: Any
) -> list[Tree]:
    """The gradient-norm penalty: (1 - alpha) g + alpha s."""

    def epsilon(g: Tree, w: Tree, t: int) -> Tree:
        return at(rho, t) * unit(g)

    def combine(g: Tree, s: Tree) -> Tree:
        return (1 - alpha) * g + alpha * s

    return ascend(*problem, epsilon=epsilon, combine=combine, **sgd_options)


def coupled_wsam(*problem: Any, gamma: float, **options: Any) -> list[Tree]:
    """WSAM through the optimizer: the same with alpha = gamma/(1 - gamma)."""
    return gradient_norm_penalty(*problem, alpha=gamma / (1 - gamma), **options)


def decoupled_wsam(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    rho: Schedule,
    gamma: float,
    lr: Schedule,
    momentum: float,
    weight_decay: float = 0.0,
) -> list[Tree]:
    """WSAM beside the optimizer: the sharpness never enters the momentum."""
    alpha, w, v, iterates = gamma / (1 - gamma), Tree(w0), 0.0 * Tree(w0), []
    for t in range(steps):
        g = Tree(grad(w, t))
        s = Tree(grad(w + at(rho, t) * unit(g), t))
        v = momentum * v + (g + weight_decay * w)
        w = w - at(lr, t) * v - at(lr, t) * alpha * (s - g)
        iterates.append(w)
    return iterates


def friendly_sam(
    *problem: Any, rho: Schedule, sigma: float, decay: float, **sgd_options: Any
) -> list[Tree]:
    """Friendly SAM: along g less sigma times the running mean of the past gradients."""
    mean: Tree | None = None

    def epsilon(g: Tree, w: Tree, t: int) -> Tree:
        nonlocal mean
        d = g if mean is None else g - sigma * mean
        mean = g if mean is None else decay * mean + (1 - decay) * g
        return at(rho, t) * unit(d)

    return ascend(*problem, epsilon=epsilon, **sgd_options)


def second_order_sam(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    hessian_product: Callable[[Tree, Tree, int], Weights],
    rho: Schedule,
    **sgd_options: Any,
) -> list[Tree]:
    """The gradient of w -> L(w + rho g/‖g‖), whose Jacobian is 1 + rho/‖g‖ (1 - uuᵀ)H.

    ``hessian_product(w, x, t)`` is H x at w.
    """

    def gradient(w: Tree, t: int) -> Tree:
        g = Tree(grad(w, t))
        s = Tree(grad(w + at(rho, t) * unit(g), t))
        return s + at(rho, t) / norm(g) * Tree(hessian_product(w, reject(s, g), t))

    return sgd(gradient, w0, steps, **sgd_options)


def looksam(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    rho: Schedule,
    alpha: float,
    refresh: Decide,
    per_tensor: bool = False,
    layerwise: bool = False,
    **sgd_options: Any,
) -> list[Tree]:
    """LookSAM: SAM where it refreshes, its remembered orthogonal part elsewhere."""
    g_v = 0.0 * Tree(w0)

    def extended(g: Tree, g_v: Tree) -> Tree:
        return g + alpha * norm(g) * unit(g_v)

    def gradient(w: Tree, t: int) -> Tree:
        nonlocal g_v
        g = Tree(grad(w, t))
        if not refresh(t, g):
            return each_tensor(extended, g, g_v) if per_tensor else extended(g, g_v)
        direction = layerwise_direction(g, w) if layerwise else unit(g)
        g_s = Tree(grad(w + at(rho, t) * direction, t))
        g_v = each_tensor(reject, g_s, g) if per_tensor else reject(g_s, g)
        return g_s

    return sgd(gradient, w0, steps, **sgd_options)


def esam(
    losses: Callable[[Tree, int], np.ndarray],
    mean_grad: Callable[[Tree, int, np.ndarray], Weights],
    w0: Weights,
    steps: int,
    *,
    rho: Schedule,
    beta: float,
    gamma: float,
    masks: Sequence[Tree],
    **sgd_options: Any,
) -> list[Tree]:
    """ESAM with the masks that were drawn.

    ``losses(w, t)`` has one loss for each example, and ``mean_grad(w, t, samples)`` is
    the gradient of the mean loss of some of them.
    """

    def gradient(w: Tree, t: int) -> Weights:
        clean = losses(w, t)
        g = masks[t] * Tree(mean_grad(w, t, np.arange(clean.size)))
        there = w + at(rho, t) / beta * unit(g)
        rise = losses(there, t) - clean
        kept = np.argsort(-rise, kind="stable")[: math.floor(gamma * clean.size)]
        return mean_grad(there, t, kept)

    return sgd(gradient, w0, steps, **sgd_options)


def rho_like_learning_rate(
    lr: Schedule, rho_max: float, rho_min: float, lr_max: float, lr_min: float = 0.0
) -> Schedule:
    """GSAM's rho: linear in the learning rate."""
    slope = (rho_max - rho_min) / (lr_max - lr_min)
    return lambda t: rho_min + slope * (at(lr, t) - lr_min)


# --- MSAM's variants ------------------------------------------------------------------


def msam_along(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    lr: Schedule,
    epsilon: Callable[[Tree, Tree, Tree, int], Tree],
    momentum: float = 0.9,
) -> tuple[list[Tree], list[Tree]]:
    """MSAM with the perturbation epsilon(v, w, g, t); perturbed and clean iterates.

    v, w and g are the new momentum, the new clean weights and the last gradient.
    """
    w, v, iterates = Tree(w0), 0.0 * Tree(w0), []
    perturbed = w
    for t in range(steps):
        g = Tree(grad(perturbed, t))
        v = momentum * v + g
        w = w - at(lr, t) * v
        perturbed = w + epsilon(v, w, g, t)
        iterates.append((perturbed, w))
    return [p for p, _ in iterates], [w for _, w in iterates]
