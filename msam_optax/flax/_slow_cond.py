"""A warning where XLA for CPU would be slow in silence."""

import warnings
from collections.abc import Callable
from typing import Any

import jax

from msam_optax.training._dispatch import convolves
from msam_optax.transforms._employ import EmployState
from msam_optax.transforms._find_momentum import find_states


def warn_of_a_slow_cond(
    opt_state: Any, function: Callable[[Any], Any], params: Any, instead: str
) -> None:
    """Warns where the gradient of a convolution would stand in a `cond` on CPU.

    Args:
      opt_state: the optimizer's state, that tells whether it employs anything.
      function: of the parameters, whose program is looked at; traced only where the
        optimizer employs and the backend is CPU.
      params: the parameters.
      instead: what of this package `make_train_step` is given.
    """
    if not find_states(opt_state, EmployState) or jax.default_backend() != "cpu":
        return
    if convolves(jax.make_jaxpr(function)(params).jaxpr):
        warnings.warn(
            "The optimizer employs its second gradient on some steps only, by a "
            "lax.cond in this step's program, and XLA for CPU runs a convolution's "
            "gradient many times slower there. msam_optax.make_train_step, with "
            f"{instead}, decides from the host instead. On GPU and TPU this step is "
            "right.",
            stacklevel=3,
        )
