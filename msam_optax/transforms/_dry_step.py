"""Steps of an optimizer on a stand-in: on which side its momentum and its update are.

A field's name says that it holds a momentum, but not whether that is a sum of gradients
or, behind the learning rate, of steps. One step tells: a sum of gradients points
against it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax._base.trees import is_masked

# pair(state, updates, gradients, params) -> two trees like the parameters
Pair = Callable[[Any, Any, Any, Any], tuple[Any, Any]]

# Where the first steps change nothing (a warm-up, optax.MultiSteps) more are taken.
MOST_STEPS = 64
# A partition's step takes a time that is quadratic in its groups.
MOST_PARTS = 16


def sides(
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    parts: Mapping[str, Mapping[int, Any]],
    pair: Pair,
) -> dict[str, float]:
    """The sign of the inner product of two trees after a step, for each part of them.

    The step is taken on the parameters' structure with one of each part's parameters,
    of at most two entries along each axis, in the place of all; the others are masked
    out, as by `optax.masked`. It is computed at once, also where ``init`` is traced,
    and costs some milliseconds whatever the parameters' size.

    Args:
      inner: an optimizer.
      params: its parameters; only their structure and shapes are looked at.
      parts: for each part its leaves by their position among the parameters'.
      pair: the two trees, of the optimizer's state, updates, gradients and parameters.

    Returns:
      -1.0 or 1.0 for each part; 0.0 where it can't be told: the optimizer does not run
      on the stand-in or does not move in 64 steps, or there are more than 16 parts.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    chosen = {}
    for name, part in parts.items():
        full = [i for i, x in part.items() if x is not None and 0 not in shapes[i]]
        if full:
            chosen[name] = full[0]
    if len(chosen) > MOST_PARTS:
        return dict.fromkeys(parts, 0.0)
    for places in (set(chosen.values()), set(range(len(shapes)))):
        try:
            return dict.fromkeys(parts, 0.0) | _run(
                inner, jax.tree.structure(params), shapes, places, chosen, pair
            )
        # What an optimizer raises on a stand-in is not known; on the parameters
        # themselves it will say so again.
        except Exception:
            continue
    return dict.fromkeys(parts, 0.0)


def _run(
    inner: optax.GradientTransformationExtraArgs,
    structure: Any,
    shapes: Sequence[tuple[int, ...]],
    places: set[int],
    chosen: Mapping[str, int],
    pair: Pair,
) -> dict[str, float]:
    def standing_in(values: list[float]) -> Any:
        return jax.tree.unflatten(
            structure,
            [
                _small(shape, values) if i in places else optax.MaskedNode()
                for i, shape in enumerate(shapes)
            ],
        )

    found = {}
    with (
        jax.ensure_compile_time_eval(),
        jax.transfer_guard("allow"),
        jax.disable_jit(),  # Muon's loop would be compiled at each call
    ):
        # Small beside the gradient, so that weight decay decides nothing.
        weights = standing_in([1e-3])
        grads = standing_in([1.0, -0.5, 0.75, -0.25])
        extra: dict[str, Any] = {
            "value": jnp.ones([]),
            "grad": grads,
            "value_fn": lambda _: jnp.ones([]),
            "grad_fn": lambda _: grads,
        }
        state = inner.init(weights)
        for _ in range(MOST_STEPS):
            updates, state = inner.update(grads, state, weights, **extra)
            first, second = (
                jax.tree.leaves(tree, is_leaf=is_masked)
                for tree in pair(state, updates, grads, weights)
            )
            found = {
                name: float(np.sign(np.vdot(first[i], second[i])))
                for name, i in chosen.items()
            }
            if all(found.values()):
                break
    return found


def _small(shape: tuple[int, ...], values: list[float]) -> jax.Array:
    short = [min(n, 2) for n in shape]
    return jnp.asarray(np.resize(np.asarray(values, np.float32), short))


def descends(transform: optax.GradientTransformationExtraArgs, params: Any) -> bool:
    """Whether updates go against the gradient, whichever sign it has.

    It is tried at parameters of one entry a leaf. Two steps, since a learning rate may
    start at 0; both signs, since noise that a transformation adds may outweigh one.
    """

    def signs(sign: int) -> list[bool]:
        start, gradient = _tiny_like(params, 0), _tiny_like(params, sign)
        updates = _second_updates(transform, start, gradient)
        return [sign * float(jnp.sum(x)) < 0 for x in updates]

    try:
        with jax.ensure_compile_time_eval():
            found = signs(1) + signs(-1)
    except Exception:  # it needs more than this, a value that is traced for instance
        return False
    return bool(found) and all(found)


def _second_updates(
    transform: optax.GradientTransformationExtraArgs, params: Any, gradient: Any
) -> list[Any]:
    """The leaves of the second step's updates, by the same gradient at each step."""
    state = transform.init(params)
    for _ in range(2):
        updates, state = transform.update(
            gradient, state, params, grad_fn=lambda params: gradient, value=0.0
        )
    return jax.tree.leaves(updates)


def _tiny_like(params: Any, entry: float) -> Any:
    return jax.tree.map(
        lambda p: jnp.full((1,) * jnp.ndim(p), entry, jnp.result_type(p)), params
    )


def left_alone(
    transform: optax.GradientTransformationExtraArgs, params: optax.Params
) -> bool:
    """Whether some parameters get no update while others do, in its first two steps."""

    def standing_in(values: list[float]) -> Any:
        return jax.tree.map(lambda p: _small(jnp.shape(p), values), params)

    try:
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
            # Entries that differ, or a gradient less its mean would be none.
            start, gradient = standing_in([1e-3]), standing_in([1.0, -0.5, 0.75, -0.25])
            updates = _second_updates(transform, start, gradient)
            moved = [bool(np.any(x)) for x in updates if jnp.size(x)]
    except Exception:  # it needs more than this, a value that is traced for instance
        return False
    return any(moved) and not all(moved)


def check_ascent(ascent: optax.GradientTransformation, params: Any) -> None:
    """Raises ValueError for an optimizer in the place of an ascent."""
    # This package's own climb, or were told not to by a negative rho.
    own = getattr(ascent.update, "__module__", "").startswith("msam_optax.")
    if not own and descends(ascent, params):
        raise ValueError(
            "An ascent makes a perturbation along the gradient, but what was given "
            "goes against it, as a whole optimizer does: for optax.contrib.sam's "
            "adv_optimizer, chain(normalize(), sgd(rho)), give "
            "msam_optax.ascents.normalized(rho); else turn the sign, for instance by "
            "optax.scale(-1) at the end of the chain. To go down on purpose write it "
            "as msam_optax.ascents.make(rho, perturb)."
        )
