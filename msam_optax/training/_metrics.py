"""What a training step tells."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.numerics import global_norm, safe_divide
from msam_optax.training._gradients import CleanPass
from msam_optax.training._state import TrainState
from msam_optax.transforms._employ import EmployState
from msam_optax.transforms._eval_params import perturbation_norm
from msam_optax.transforms._find_momentum import find_states
from msam_optax.transforms._perturbed_states import PERTURBED
from msam_optax.transforms._sharpness_aware import SharpnessAwareState


class PerturbationMetrics(NamedTuple):
    """What an optimizer's state tells about its perturbation.

    Attributes:
      perturbation_norm: scalar, l2 norm of epsilon: SAM's on the last step (0 where not
        employed), MSAM's as it is on the parameters now.
      relative_perturbation: scalar, perturbation_norm over the parameters' l2 norm. A
        radius is too large long before this comes near 1.
      employed: boolean scalar, whether the last step took an extra gradient.
      employed_fraction: scalar, the share of such steps so far. A policy whose
        total_steps is far from the run's shows here: near 0, or near 1.
      sharpness: scalar, L(w + epsilon) - L(w) of the batch, by the last step that took
        an extra gradient; 0 before, without one, and where the optimizer was not handed
        both losses.
    """

    perturbation_norm: jax.Array
    relative_perturbation: jax.Array
    employed: jax.Array
    employed_fraction: jax.Array
    sharpness: jax.Array


class StepMetrics(NamedTuple):
    """What a training step tells.

    Attributes:
      loss: scalar, the clean loss of the batch, at the parameters before the step.
      grad_norm: scalar, l2 norm of the clean gradient.
      perturbation_norm: as in :class:`PerturbationMetrics`. What it is relative to the
        parameters' norm :func:`step_metrics` tells when it is asked, since it takes a
        pass over all of them.
      employed: boolean scalar, whether this step took an extra gradient.
      employed_fraction: scalar, the share of such steps so far.
      sharpness: scalar, L(w + epsilon) - L(w) of the batch where this step took an
        extra gradient; else the last one's.
      skipped: boolean scalar, whether this step was not finite and changed nothing;
        never without a `LossScaling`. Then the four above are of the last step that was
        not skipped.
      aux: the loss function's own.
    """

    loss: jax.Array
    grad_norm: jax.Array
    perturbation_norm: jax.Array
    employed: jax.Array
    employed_fraction: jax.Array
    sharpness: jax.Array
    skipped: jax.Array
    aux: Any


def step_metrics(state: optax.OptState, params: optax.Params) -> PerturbationMetrics:
    """What an optimizer's last step did, for a training loop of your own.

    Under ``jit`` like the step itself. What :func:`msam_optax.make_train_step` tells is
    made of it.

    Args:
      state: any optimizer's state.
      params: the parameters that belong to it, as the step left them.

    Returns:
      A :class:`PerturbationMetrics`. All zeros where the optimizer perturbs nothing.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> tx, params = msam_optax.msam(0.1, rho=0.2), jnp.array([3.0, 4.0])
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jax.grad(jnp.sum)(params), state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> metrics = msam_optax.step_metrics(state, params)
    >>> print(f"{metrics.perturbation_norm:.3f} {metrics.relative_perturbation:.3f}")
    0.200 0.043
    """
    if isinstance(state, TrainState):
        raise ValueError(
            "step_metrics(state, params) needs the optimizer's state, but got a whole "
            "TrainState: step_metrics(state.opt_state, state.params)."
        )
    asked = list(_asked(state, jnp.asarray(True), jnp.asarray(1.0)))
    # What employs something else than an extra gradient, clipping say, does not count;
    # unless it is all there is: an extra gradient of the user's own make.
    ascending = [one for one in asked if one.ascents] or asked
    employed, fraction = jnp.asarray(False), jnp.asarray(0.0)
    norm, sharpness = perturbation_norm(state, params), jnp.asarray(0.0)
    if ascending:
        employed = jnp.any(jnp.stack([one.employed for one in ascending]))
        fraction = jnp.max(jnp.stack([one.fraction for one in ascending]))
    ascents = [(one.employed, ascent) for one in ascending for ascent in one.ascents]
    for taken, ascent in ascents:
        norm = jnp.hypot(norm, jnp.where(taken, ascent.perturbation_norm, 0))
    if ascents:
        sharpness = jnp.max(jnp.stack([ascent.sharpness for _, ascent in ascents]))
    relative = jnp.zeros_like(norm)
    if ascents or find_states(state, PERTURBED):
        relative = safe_divide(norm, global_norm(params))
    return PerturbationMetrics(norm, relative, employed, fraction, sharpness)


class _Asked(NamedTuple):
    """A place of an optimizer that is employed or not, and the ascents that are there.

    The place outside of all `employ` is always employed.
    """

    employed: jax.Array
    fraction: jax.Array
    ascents: list[SharpnessAwareState]


def _asked(node: Any, employed: jax.Array, fraction: jax.Array) -> Iterator[_Asked]:
    """The places of an optimizer's state, with what holds on the way to them."""
    ascents, inside = [], []

    def look(node: Any) -> None:
        if isinstance(node, SharpnessAwareState):
            ascents.append(node)
        elif isinstance(node, EmployState):
            inside.append(node)
        else:
            for child in jax.tree.leaves(node, is_leaf=lambda x: x is not node):
                if child is not node:
                    look(child)

    look(node)
    if ascents:
        yield _Asked(employed, fraction, ascents)
    for state in inside:
        here = employed & state.employed
        share = fraction * state.employed_steps / jnp.maximum(state.step, 1)
        below = list(_asked(state.inner_state, here, share))
        yield from below or [_Asked(here, share, [])]


def metrics_of(state: TrainState, clean: CleanPass, skipped: jax.Array) -> StepMetrics:
    """The metrics of a step from its new state and its clean pass."""
    perturbation = step_metrics(state.opt_state, state.params)._asdict()
    # What nobody asks for is not computed.
    del perturbation["relative_perturbation"]
    return StepMetrics(
        loss=clean.loss,
        grad_norm=global_norm(clean.grads),
        **perturbation,
        skipped=skipped,
        aux=clean.aux,
    )
