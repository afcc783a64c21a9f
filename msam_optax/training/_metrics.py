"""What a training step tells."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msam_optax._base.numerics import global_norm
from msam_optax.training._gradients import CleanPass
from msam_optax.training._state import TrainState
from msam_optax.transforms._employ import EmployState
from msam_optax.transforms._eval_params import perturbation_norm
from msam_optax.transforms._find_momentum import find_states
from msam_optax.transforms._sharpness_aware import SharpnessAwareState


class StepMetrics(NamedTuple):
    """What a training step tells.

    Attributes:
      loss: scalar, the clean loss of the batch, at the parameters before the step.
      grad_norm: scalar, l2 norm of the clean gradient.
      perturbation_norm: scalar, l2 norm of epsilon: SAM's on this step (0 where not
        employed), MSAM's as it is on the parameters that the step returns.
      employed: boolean scalar, whether this step took an extra gradient.
      employed_fraction: scalar, the share of such steps so far.
      skipped: boolean scalar, whether this step was not finite and changed nothing;
        never without a `LossScaling`. Then perturbation_norm and the two above are of
        the last step that was not skipped.
      aux: the loss function's own.
    """

    loss: jax.Array
    grad_norm: jax.Array
    perturbation_norm: jax.Array
    employed: jax.Array
    employed_fraction: jax.Array
    skipped: jax.Array
    aux: Any


def step_metrics(
    state: TrainState, clean: CleanPass, skipped: jax.Array
) -> StepMetrics:
    """The metrics of a step from its new state and its clean pass."""
    ascents = find_states(state.opt_state, SharpnessAwareState)
    employs = find_states(state.opt_state, EmployState)
    if employs:
        employed = jnp.any(jnp.stack([e.employed for e in employs]))
        fraction = jnp.max(
            jnp.stack([e.employed_steps / jnp.maximum(e.step, 1) for e in employs])
        )
    else:
        employed = jnp.asarray(bool(ascents))
        fraction = employed.astype(jnp.float32)
    norm = perturbation_norm(state.opt_state, state.params)
    for ascent in ascents:
        norm = jnp.hypot(norm, jnp.where(employed, ascent.perturbation_norm, 0))
    return StepMetrics(
        loss=clean.loss,
        grad_norm=global_norm(clean.grads),
        perturbation_norm=norm,
        employed=employed,
        employed_fraction=fraction,
        skipped=skipped,
        aux=clean.aux,
    )
