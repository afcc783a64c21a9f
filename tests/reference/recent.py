"""Methods of 2023 to 2026 as numpy recursions in float64, as in ``recursions``."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from tests.reference.recursions import Gradient, Schedule, Tree, Weights, at, norm, unit


def renormalized(g: Tree, s: Tree) -> Tree:
    """The perturbed gradient s at the clean one's length."""
    return norm(g) * unit(s)


def loss_equated_direction(g: Tree, sigma: float, rho_max: float) -> Tree:
    """min(sigma/‖g‖, rho_max) g/‖g‖."""
    return min(sigma / norm(g), rho_max) * unit(g)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five steps of Muon's iteration towards the nearest orthogonal matrix."""
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def spectral_direction(g: Tree, rho: float, rho_other: float) -> Tree:
    """rho Ortho(g) in matrices, and rho_other times the unit vector of the rest."""
    rest = unit(Tree({k: x for k, x in g.items() if x.ndim < 2}))
    return Tree(
        {
            k: rho * newton_schulz(x) if x.ndim == 2 else rho_other * rest[k]
            for k, x in g.items()
        }
    )


def filter_noise(n: Tree, w: Tree) -> Tree:
    """n_j ‖w_j‖/√d for each column j of d entries, and zero in vectors."""
    return Tree(
        {
            k: n[k] * np.linalg.norm(x, axis=0) / math.sqrt(x.shape[0])
            if x.ndim == 2
            else 0 * x
            for k, x in w.items()
        }
    )


def sampa(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    lr: Schedule,
    rho: Schedule,
    lambda_: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> list[Tree]:
    """SAMPa with the bracket of its last line as the gradient of SGD."""
    x, v, iterates = Tree(w0), 0.0 * Tree(w0), []
    at_y = 0.0 * x
    for t in range(steps):
        ascended, y = x + at(rho, t) * unit(at_y), x - at(lr, t) * at_y
        at_y = Tree(grad(y, t))
        bracket = (1 - lambda_) * Tree(grad(ascended, t)) + lambda_ * at_y
        v = momentum * v + (bracket + weight_decay * x)
        x = x - at(lr, t) * v
        iterates.append(x)
    return iterates


def bsam(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    draws: Sequence[Tree],
    lr: Schedule,
    rho: Schedule,
    num_examples: int,
    b1: float,
    b2: float,
    weight_decay: float,
    damping: float,
    deviation: Callable[[Tree, int], Tree] = lambda s, n: 1.0 * (n * s) ** -0.5,
) -> list[Tree]:
    """bSAM with the standard normal numbers that were drawn."""
    w, m, s, iterates = Tree(w0), 0.0 * Tree(w0), 0.0 * Tree(w0), []
    s = Tree({k: x + 1.0 for k, x in s.items()})
    for t in range(steps):
        g = Tree(grad(w + deviation(s, num_examples) * draws[t], t))
        there = Tree(grad(w + at(rho, t) * g / s, t))
        m = b1 * m + (1 - b1) * (there + weight_decay * w)
        size = s**0.5 * (g**2) ** 0.5
        prior = Tree({k: 0 * x + weight_decay + damping for k, x in s.items()})
        s = b2 * s + (1 - b2) * (size + prior)
        w = w - at(lr, t) * m / s
        iterates.append(w)
    return iterates
