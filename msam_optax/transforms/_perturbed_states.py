"""The two states of a momentum perturbation."""

from typing import NamedTuple

import jax
import optax


class MomentumPerturbationState(NamedTuple):
    """State of `momentum_perturbation` with rho: the inner state and one scalar.

    Attributes:
      inner_state: state of the inner optimizer, which holds the momentum v.
      scale: float32 scalar; the parameters in use are w - scale v. It is no length:
        that is scale times the momentum's norm.
      rho_state: counter of rho's schedule, empty for a constant.
    """

    inner_state: optax.OptState
    scale: jax.Array
    rho_state: optax.OptState


class StoredPerturbationState(NamedTuple):
    """State of `momentum_perturbation` where the perturbation itself is kept.

    With an ascent, a momentum_fn or along="update"; and where parameters have fewer
    than 32 bits.

    Attributes:
      inner_state: state of the inner optimizer.
      perturbation: tree like the parameters; those in use are w + perturbation.
      ascent_state: state of the ascent.
    """

    inner_state: optax.OptState
    perturbation: optax.Updates
    ascent_state: optax.OptState


PERTURBED = (MomentumPerturbationState, StoredPerturbationState)
