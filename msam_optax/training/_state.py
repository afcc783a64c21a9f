"""What a training step changes."""

from typing import Any, NamedTuple

import optax


class TrainState(NamedTuple):
    """What a training step changes.

    Attributes:
      params: parameters; with MSAM the perturbed ones, see `eval_params`.
      opt_state: state of the optimizer.
      model_state: what else the model changes, batch statistics for instance.
      loss_scale: state of the `LossScaling`, where there is one.
    """

    params: Any
    opt_state: optax.OptState
    model_state: Any = ()
    loss_scale: Any = ()
