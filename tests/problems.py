"""Two small test problems, and the loop that drives an optimizer over them.

The data are float64 numpy arrays: in a test with the ``x64`` fixture everything is
computed in float64, in any other one in float32.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 50

Loss = Callable[[optax.Params, Any], jax.Array]


class Problem:
    """A loss that differs from step to step, and where to start.

    Attributes:
      params: the start, a tree of numpy arrays.
      loss: ``loss(params, t)``, the scalar loss of step t; t may be traced.
      grad: ``grad(params, t)``, its gradient.
    """

    def __init__(self, name: str, params: optax.Params, loss: Loss):
        self.name, self.params, self.loss = name, params, loss
        self.grad = jax.grad(loss)
        self._jitted_grad = jax.jit(self.grad)

    def __repr__(self) -> str:
        return self.name

    @property
    def named_params(self) -> dict[str, np.ndarray]:
        """The start as the reference recursions take it."""
        return named(self.params)

    def named_grad(self, weights: Mapping[str, Any], t: int) -> dict[str, np.ndarray]:
        """The gradient as the reference recursions take it."""
        structure = jax.tree.structure(self.params)
        params = jax.tree.unflatten(structure, weights.values())
        return named(self._jitted_grad(params, t))


def named(tree: Any) -> dict[str, np.ndarray]:
    """A tree's leaves under their paths, in the order of the tree."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


class Run(NamedTuple):
    """What ``run`` saw.

    Attributes:
      params: the params after each step.
      observed: what ``observe(state, params)`` gave after each step.
    """

    params: list[Any]
    observed: list[Any]


def run(
    tx: optax.GradientTransformation,
    problem: Problem,
    steps: int = STEPS,
    observe: Callable[[Any, Any], Any] = lambda state, params: None,
) -> Run:
    """Drives ``tx`` over ``problem``; one step is one jitted call."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params: Any, state: Any, t: jax.Array) -> tuple[Any, Any, Any]:
        updates, state = tx.update(
            problem.grad(params, t),
            state,
            params,
            grad_fn=lambda p: problem.grad(p, t),
        )
        params = optax.apply_updates(params, updates)
        return params, state, observe(state, params)

    params = jax.tree.map(jnp.asarray, problem.params)
    state = tx.init(params)
    trajectory, observed = [], []
    for t in range(steps):
        params, state, seen = step(params, state, jnp.asarray(t))
        trajectory.append(params)
        observed.append(seen)
    return Run(*jax.device_get((trajectory, observed)))


@functools.cache
def mlp() -> Problem:
    """A tanh network 5-8-3 with biases, on random batches of one noisy teacher."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(STEPS, 16, 5))
    logits = np.sin(inputs @ rng.normal(size=(5, 3))) + 0.5 * rng.normal(
        size=(STEPS, 16, 3)
    )
    labels = np.argmax(logits, axis=-1)
    params = {
        "hidden": {
            "kernel": rng.normal(size=(5, 8)) / np.sqrt(5),
            "bias": 0.1 * rng.normal(size=8),
        },
        "output": {
            "kernel": rng.normal(size=(8, 3)) / np.sqrt(8),
            "bias": 0.1 * rng.normal(size=3),
        },
    }

    def loss(params: Any, t: Any) -> jax.Array:
        hidden, output = params["hidden"], params["output"]
        features = jnp.tanh(
            jnp.asarray(inputs)[t] @ hidden["kernel"] + hidden["bias"][None]
        )
        logits = features @ output["kernel"] + output["bias"][None]
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, jnp.asarray(labels)[t]
        ).mean()

    return Problem("mlp", params, loss)


def quadratic_matrix() -> np.ndarray:
    """The Hessian of ``quadratic``: 17 x 17, eigenvalues from 0.1 to 3."""
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.normal(size=(17, 17)))
    return (basis * np.geomspace(0.1, 3.0, 17)) @ basis.T


@functools.cache
def quadratic() -> Problem:
    """½ wᵀAw - b_tᵀw with a random b_t in each step; w is a matrix and a vector."""
    rng = np.random.default_rng(2)
    matrix, noise = quadratic_matrix(), rng.normal(size=(STEPS, 17))
    params = {"matrix": rng.normal(size=(3, 4)), "vector": rng.normal(size=5)}

    def loss(params: Any, t: Any) -> jax.Array:
        w = jnp.concatenate([jnp.ravel(params["matrix"]), params["vector"]])
        return 0.5 * w @ jnp.asarray(matrix) @ w - jnp.asarray(noise)[t] @ w

    return Problem("quadratic", params, loss)
