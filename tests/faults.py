"""One step for the fault tests: by any method, with whatever gradients it is given."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.every_method import MSAM
from tests.resuming import build, sgd


def tree() -> dict[str, np.ndarray]:
    """A matrix, a vector, a scalar and a leaf of size zero, of three dtypes."""
    return {
        "matrix": np.linspace(-1.0, 2.0, 6, dtype=np.float32).reshape(2, 3),
        "vector": np.linspace(0.5, 1.0, 3).astype(jnp.bfloat16),
        "scalar": np.asarray(0.7, np.float16),
        "hollow": np.zeros((0, 2), np.float32),
    }


def gradients(t: float = 0.0) -> dict[str, np.ndarray]:
    """Gradients like the tree, of about unit size."""
    return jax.tree.map(lambda x: (1.5 * np.cos(3 * x + t)).astype(x.dtype), tree())


def poisoned(value: float, leaf: str) -> dict[str, np.ndarray]:
    """Gradients with one entry that is not finite."""
    bad = gradients()
    first = np.arange(bad[leaf].size).reshape(bad[leaf].shape) == 0
    return {**bad, leaf: np.where(first, np.asarray(value, bad[leaf].dtype), bad[leaf])}


# Pairs of the clean and the perturbed gradient of a step.
HEALTHY = [(gradients(t), gradients(t + 0.3)) for t in range(10)]
POISONS = [(np.nan, "matrix"), (np.inf, "scalar"), (-np.inf, "vector")]


def one_step(tx: Any, p: Any, state: Any, clean: Any, perturbed: Any) -> Any:
    """The next parameters and state, for parameters of any structure."""

    def per_example_loss_fn(p: Any, indices: Any) -> Any:
        products = jax.tree.map(
            lambda g, x: jnp.sum(g * x, dtype=jnp.float32), perturbed, p
        )
        size = 4 if indices is None else len(indices)
        return jnp.full(size, optax.tree.sum(products))

    updates, state = tx.update(
        clean,
        state,
        p,
        grad_fn=lambda p: perturbed,
        per_example_losses=jnp.zeros(4),
        per_example_loss_fn=per_example_loss_fn,
    )
    return optax.apply_updates(p, updates), state


@functools.cache
def step_of(tx: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(one_step, tx))


def run(tx: Any, *pairs: Any) -> list[Any]:
    """The parameters and states at the start and after each pair of gradients."""
    carries = [(tree(), tx.init(tree()))]
    for clean, perturbed in pairs:
        carries.append(step_of(tx)(*carries[-1], clean, perturbed))
    return jax.device_get(carries)


@functools.cache
def method(name: str) -> Any:
    return build(name)


@functools.cache
def guarded(name: str) -> Any:
    """A method that refuses clean gradients which are not finite.

    Where it makes another gradient of them, its optimizer refuses that one too.
    """
    if name in MSAM:
        return optax.apply_if_finite(build(name), 9)
    return optax.apply_if_finite(build(name, optax.apply_if_finite(sgd(), 9)), 9)
