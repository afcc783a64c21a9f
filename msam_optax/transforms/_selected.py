"""The gradient at the perturbed point on the samples that it hurts most."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import check_real, check_transformation, static_value
from msam_optax._base.trees import check_params, check_state
from msam_optax.transforms._second_gradient import TAKEN_AT, check_clean, whole_params
from msam_optax.transforms._sharpness_aware import (
    SharpnessAwareState,
    ascend,
    initial_state,
)


def selected_gradient(
    ascent: optax.GradientTransformation, gamma: float
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient at :math:`w + \varepsilon` on the samples that it hurts most.

    Of the batch's B samples the :math:`\lfloor\gamma B\rfloor` with the largest
    :math:`\ell_i(w + \varepsilon) - \ell_i(w)` are kept, exactly, and the gradient is
    that of their mean loss.

    *Cost*: one forward pass over the batch at :math:`w + \varepsilon` and a gradient
    over the samples kept. *State*: the ascent's, and two scalars. *Position*: first in
    a chain.

    Args:
      ascent: what makes epsilon of the gradient.
      gamma: share of the samples kept, in (0, 1]. Static, since shapes follow from it.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`. In place of ``grad_fn`` its
      ``update`` needs the keywords ``per_example_losses``, an array [B] of the losses
      at params, and ``per_example_loss_fn(params, indices) -> losses``, where indices
      is None for the whole batch or an integer array of samples.
      :func:`msam_optax.make_train_step` hands both on where its loss function returns
      one loss for each example.

    Raises:
      ValueError: if gamma is outside (0, 1], and in ``update``, if ``params`` or a
        keyword is missing, the losses are not of shape [B], or B is less than 1/gamma.

    References:
      Du et al., `Efficient Sharpness-Aware Minimization for Improved Training of Neural
      Networks <https://arxiv.org/abs/2110.03141>`_, ICLR 2022. The authors' code
      compares with > and keeps one sample fewer.
    """
    check_real("gamma", gamma, low=0.0, high=1.0, excluded=0.0)
    if static_value(gamma) is None:
        raise ValueError(
            "gamma decides shapes and must be a Python number, but "
            f"{gamma!r} was given. Under optax.inject_hyperparams name it in "
            "static_args."
        )
    ascent = check_transformation("ascent", ascent)

    def init_fn(params: Any) -> Any:
        return initial_state(ascent, params)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        per_example_losses: Any = None,
        per_example_loss_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        check_state(state, SharpnessAwareState)
        check_params(TAKEN_AT, params)
        check_clean(updates, extra_args)
        whole = whole_params(params, extra_args)
        count = _number_to_keep(per_example_losses, per_example_loss_fn, gamma)
        ascended, state_after = ascend(ascent, updates, state, params, extra_args)
        size = per_example_losses.shape[0]

        def losses(params: Any, indices: Any, expected: Any) -> Any:
            given = per_example_loss_fn(whole(params), indices)
            if jnp.shape(given) != (expected,):
                raise ValueError(
                    "per_example_loss_fn must return one loss for each sample asked "
                    f"for, an array of shape ({expected},), but returned shape "
                    f"{jnp.shape(given)}."
                )
            return given

        rise = losses(ascended, None, size) - per_example_losses
        _, indices = jax.lax.top_k(rise, count)
        gradient = jax.grad(lambda p: jnp.mean(losses(p, indices, count)))(ascended)
        return gradient, state_after(jnp.mean(rise))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _number_to_keep(losses: Any, loss_fn: Any, gamma: float) -> int:
    """How many samples to keep, once what selects them is there."""
    if losses is None or not callable(loss_fn):
        raise ValueError(
            "Selecting samples needs the keywords per_example_losses and "
            "per_example_loss_fn: call update(updates, state, params, "
            "per_example_losses=losses, per_example_loss_fn=loss_fn), or give "
            "make_train_step a loss function that returns one loss for each example."
        )
    if jnp.ndim(losses) != 1:
        raise ValueError(
            "per_example_losses must have shape [batch], one loss for each example, "
            f"but has shape {jnp.shape(losses)}: leave the mean to the optimizer."
        )
    size = jnp.shape(losses)[0]
    # 0.29 * 100 is 28.999999999999996 in floating point.
    count = math.floor(gamma * size + 1e-9)
    if count == 0:
        raise ValueError(
            f"gamma={gamma} keeps none of a batch of {size}: it needs at least "
            f"{math.ceil(1 / gamma)} examples."
        )
    return count
