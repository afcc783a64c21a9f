"""What the tests against recursions share: a base optimizer, schedules, distances."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.problems import STEPS, Problem, mlp, quadratic
from tests.reference import family
from tests.reference.recursions import Tree

MU, RHO, DECAY = 0.9, 0.2, 0.05


on_both = pytest.mark.parametrize("problem", [mlp(), quadratic()], ids=repr)


def lr(t: Any) -> Any:
    """A learning-rate schedule for the library and for the recursions alike."""
    return 0.1 / (1 + 0.05 * t)


def ramp(t: Any) -> Any:
    """A rho schedule that changes on every step."""
    return 0.02 * (t + 1) / (1 + 0.01 * t * t)


SGD: dict[str, Any] = dict(lr=lr, momentum=MU)


DECAYED_SGD: dict[str, Any] = dict(**SGD, weight_decay=DECAY)


def decayed_sgd(**options: Any) -> optax.GradientTransformation:
    """SGD with the weight decay where the recursions have it."""
    options = {"learning_rate": lr, "momentum": MU, **options}
    return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(**options))


def distance(iterates: Any, others: Any) -> float:
    """The largest difference between two trajectories, at any step, in any entry."""

    def tensors(tree: Any) -> list[np.ndarray]:
        return list(tree.values()) if isinstance(tree, Tree) else jax.tree.leaves(tree)

    assert len(iterates) == len(others) > 0
    differences = [
        np.max(np.abs(x - y))
        for tree, other in zip(iterates, others, strict=True)
        for x, y in zip(tensors(tree), tensors(other), strict=True)
    ]
    return float(np.max(differences))


def recur(recursion: Callable, problem: Problem, **options: Any) -> Any:
    """A recursion's iterates on a problem."""
    return recursion(problem.named_grad, problem.named_params, STEPS, **options)


def by_tensor(x: Tree) -> Tree:
    """Each tensor divided by its own norm."""
    return Tree({name: tensor / np.linalg.norm(tensor) for name, tensor in x.items()})


x64 = pytest.mark.usefixtures("x64")


# Decisions with both of these thresholds change often, early and late.
ADAPTIVE: dict[str, Any] = dict(total_steps=40, delta=0.5, lambda_1=-0.2, lambda_2=0.2)


def adaptive(**options: Any) -> mo.policies.Policy:
    return mo.policies.adaptive(**(options or ADAPTIVE))


def element(ascent: Any, combine: Any = None, **options: Any) -> Any:
    return mo.sharpness_aware_gradient(ascent, combine, **options)


def composed(policy: mo.policies.Policy, combine: Any = None) -> Any:
    sharpness_aware = element(mo.ascents.normalized(ramp), combine)
    return optax.chain(mo.employ(policy, sharpness_aware), decayed_sgd())


def around_sgd(ascent: Any, **options: Any) -> optax.GradientTransformation:
    return mo.momentum_perturbation(optax.sgd(lr, MU), ascent=ascent, **options)


def along_last_gradient(rho: float) -> optax.GradientTransformation:
    inner = optax.chain(optax.trace(0.0), optax.sgd(lr, MU))
    return mo.momentum_perturbation(
        inner, rho, momentum_fn=lambda state: state[0].trace
    )


Direction = Callable[[Tree, Tree, Tree, int], Tree]


def along(epsilon: Direction, problem: Problem) -> tuple[list[Tree], list[Tree]]:
    return recur(family.msam_along, problem, lr=lr, momentum=MU, epsilon=epsilon)
