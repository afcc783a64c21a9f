"""Every method as a plain numpy recursion in float64, for reading beside the code.

Weights are dictionaries of named tensors. ``grad(w, t)`` gives the gradient of step t's
loss at w; ``lr`` and ``rho`` are numbers or functions of the 0-based step t. A
recursion returns its iterates w_1, ..., w_steps, without the start. Every norm is taken
over all the tensors together, and a zero direction has a zero unit vector.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Schedule = float | Callable[[int], float]


class Tree(dict[str, np.ndarray]):
    """Named tensors with elementwise arithmetic; a number acts on every tensor."""

    __array_ufunc__ = None  # a numpy number times a Tree is the Tree's business

    def _with(self, op: Callable, other: Any) -> "Tree":
        if isinstance(other, dict):
            return Tree({name: op(x, other[name]) for name, x in self.items()})
        return Tree({name: op(x, other) for name, x in self.items()})

    def __add__(self, other: Any) -> "Tree":
        return self._with(operator.add, other)

    def __sub__(self, other: Any) -> "Tree":
        return self._with(operator.sub, other)

    def __mul__(self, other: Any) -> "Tree":
        return self._with(operator.mul, other)

    def __rmul__(self, other: float) -> "Tree":
        return self._with(operator.mul, other)

    def __truediv__(self, other: Any) -> "Tree":
        return self._with(operator.truediv, other)

    def __pow__(self, power: float) -> "Tree":
        return self._with(operator.pow, power)


Gradient = Callable[[Tree, int], dict[str, np.ndarray]]
Weights = dict[str, np.ndarray]


def at(value: Schedule, t: int) -> float:
    """The value of a schedule, or of a constant, at step t."""
    return float(value(t)) if callable(value) else value


def norm(x: Tree) -> float:
    """The l2 norm over all the tensors together."""
    return math.sqrt(sum(float(np.sum(tensor**2)) for tensor in x.values()))


def unit(x: Tree) -> Tree:
    """x/‖x‖, and zero where x is zero."""
    return x / (norm(x) or 1.0)


def sgd(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    lr: Schedule,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> list[Tree]:
    """SGD; the weight decay joins the gradient, in front of the momentum."""
    w, v, iterates = Tree(w0), 0.0 * Tree(w0), []
    for t in range(steps):
        g = Tree(grad(w, t)) + weight_decay * w
        v = momentum * v + g
        w = w - at(lr, t) * (g + momentum * v if nesterov else v)
        iterates.append(w)
    return iterates


def adamw(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    lr: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Schedule = 1e-4,
    nesterov: bool = False,
) -> list[Tree]:
    """AdamW as Optax has it; it is MSAM's AdamW with no perturbation."""
    options = dict(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, nesterov=nesterov)
    return adamw_msam(grad, w0, steps, lr=lr, rho=0.0, **options)[1]  # type: ignore[arg-type]


def msam(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    lr: Schedule,
    rho: Schedule,
    momentum: float = 0.9,
    nesterov: bool = False,
    decay_of_perturbed: float = 0.0,
    decay_of_clean: float = 0.0,
) -> tuple[list[Tree], list[Tree]]:
    """MSAM over SGD: the perturbed iterates, then the clean ones.

    The authors' code decays the perturbed weights (``decay_of_perturbed``).
    """
    w, v, iterates = Tree(w0), 0.0 * Tree(w0), []
    perturbed = w
    for t in range(steps):
        decay = decay_of_perturbed * perturbed + decay_of_clean * w
        g = Tree(grad(perturbed, t)) + decay
        v = momentum * v + g
        w = w - at(lr, t) * (g + momentum * v if nesterov else v)
        perturbed = w - at(rho, t) * unit(v)
        iterates.append((perturbed, w))
    return [p for p, _ in iterates], [w for _, w in iterates]


def adamw_msam(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    lr: Schedule,
    rho: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Schedule = 1e-4,
    nesterov: bool = False,
    authors_order: bool = False,
) -> tuple[list[Tree], list[Tree]]:
    """MSAM over AdamW: the perturbed iterates, then the clean ones.

    Optax's order is w - lr (step + decay w); the authors' (w - lr step)(1 - lr decay).
    """
    w, m, s, iterates = Tree(w0), 0.0 * Tree(w0), 0.0 * Tree(w0), []
    perturbed = w
    for t in range(steps):
        g, eta, decay = Tree(grad(perturbed, t)), at(lr, t), at(weight_decay, t)
        m, s = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g**2
        m_hat, s_hat = m / (1 - b1 ** (t + 1)), s / (1 - b2 ** (t + 1))
        if nesterov:  # Dozat's: the look-ahead has the bias correction of step t + 1
            m_hat = b1 * m / (1 - b1 ** (t + 2)) + (1 - b1) * g / (1 - b1 ** (t + 1))
        step = m_hat / (s_hat**0.5 + eps)
        if authors_order:
            w = (w - eta * step) * (1 - eta * decay)
        else:
            w = w - eta * (step + decay * w)
        perturbed = w - at(rho, t) * unit(m)
        iterates.append((perturbed, w))
    return [p for p, _ in iterates], [w for _, w in iterates]


# The methods below replace the gradient; SGD, with its weight decay, does the rest.


def sam(
    grad: Gradient, w0: Weights, steps: int, *, rho: Schedule, **sgd_options: Any
) -> list[Tree]:
    """SAM: the gradient at w + rho g/‖g‖."""

    def sharpness_aware(w: Tree, t: int) -> Weights:
        return grad(w + at(rho, t) * unit(Tree(grad(w, t))), t)

    return sgd(sharpness_aware, w0, steps, **sgd_options)


def asam(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    rho: Schedule,
    eta: float,
    **sgd_options: Any,
) -> list[Tree]:
    """ASAM: the gradient at w + rho T²g/‖Tg‖.

    T is |w| + eta in tensors of at least two dimensions, and 1 elsewhere.
    """

    def sharpness_aware(w: Tree, t: int) -> Weights:
        scale = Tree(
            {k: np.abs(x) + eta if x.ndim >= 2 else 1.0 + 0 * x for k, x in w.items()}
        )
        scaled = scale * Tree(grad(w, t))
        return grad(w + at(rho, t) * scale * unit(scaled), t)

    return sgd(sharpness_aware, w0, steps, **sgd_options)


def ss_sam(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    rho: Schedule,
    decisions: Sequence[bool],
    **sgd_options: Any,
) -> list[Tree]:
    """SS-SAM: SAM on the steps that were drawn, the plain gradient on the others."""

    def drawn(w: Tree, t: int) -> Weights:
        g = Tree(grad(w, t))
        return grad(w + at(rho, t) * unit(g), t) if decisions[t] else g

    return sgd(drawn, w0, steps, **sgd_options)


def ae_sam(
    grad: Gradient,
    w0: Weights,
    steps: int,
    *,
    rho: Schedule,
    total_steps: int,
    delta: float = 0.9,
    lambda_1: float = -1.0,
    lambda_2: float = 1.0,
    **sgd_options: Any,
) -> tuple[list[Tree], list[bool]]:
    """AE-SAM: SAM where ‖g‖² stands out; the iterates, then the decisions.

    The statistics take the step's own ‖g‖² before the test; they start at zero.
    """
    mean, variance, decisions = 0.0, 0.0, []

    def adaptive(w: Tree, t: int) -> Weights:
        nonlocal mean, variance
        g = Tree(grad(w, t))
        square = norm(g) ** 2
        mean = delta * mean + (1 - delta) * square
        variance = delta * variance + (1 - delta) * (square - mean) ** 2
        progress = min(t / total_steps, 1.0)
        threshold = progress * lambda_1 + (1 - progress) * lambda_2
        decisions.append(square >= mean + threshold * math.sqrt(variance))
        return grad(w + at(rho, t) * unit(g), t) if decisions[-1] else g

    return sgd(adaptive, w0, steps, **sgd_options), decisions
