"""Replaces the gradient at w by the gradient at a perturbed point w + epsilon."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import check_transformation
from msam_optax._base.numerics import global_norm, is_short, statistics_dtype
from msam_optax._base.trees import check_init, check_params, check_state
from msam_optax.ascents._make import perturbation
from msam_optax.combine import Combine
from msam_optax.transforms._dry_step import check_ascent
from msam_optax.transforms._second_gradient import (
    TAKEN_AT,
    for_the_ascent,
    second_gradient,
)


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware_gradient`.

    Attributes:
      ascent_state: state of the ascent.
      perturbation_norm: float32 scalar, l2 norm of the last epsilon; where weights have
        fewer than 32 bits, of what rounding left of it.
      sharpness: float32 scalar, L(w + epsilon) - L(w) of the batch at the last epsilon;
        0 where the two losses were not handed in.
    """

    ascent_state: optax.OptState
    perturbation_norm: jax.Array
    sharpness: jax.Array


def sharpness_aware_gradient(
    ascent: optax.GradientTransformation,
    combine: Combine | None = None,
    second_order: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient at the perturbed point, :math:`\nabla L(w + \varepsilon(w))`.

    The updates that come in are the clean gradient :math:`g = \nabla L(w)`; the ascent
    makes :math:`\varepsilon` of it, and one call of ``grad_fn`` gives

    .. math::
      \tilde g = \nabla L(w + \varepsilon), \qquad
      \text{out} = \operatorname{combine}(g, \tilde g).

    *Cost*: one extra gradient. *State*: the ascent's, and two scalars. *Position*:
    first in a chain, since it replaces the gradient: clipping, weight decay or a guard
    against NaNs before it would steer the ascent and be lost from the step, and
    ``optax.apply_if_finite`` or ``optax.MultiSteps`` around it does not see the
    gradient that is taken inside. They belong behind it.

    Args:
      ascent: what makes epsilon of the gradient, for instance
        :func:`msam_optax.ascents.normalized`.
      combine: makes one gradient of the clean and the perturbed one, by default the
        perturbed one.
      second_order: differentiate through epsilon too, that is return the gradient of
        :math:`w \mapsto L(w + \varepsilon(w))`, which costs three extra gradients.
        The paper reports that it does worse.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose ``update`` needs ``params``
      and the keyword ``grad_fn``, a function from params to the gradient of the same
      loss on the same batch with the same random key as the updates. In its place
      serves ``value_and_grad_fn``, a function to loss and gradient, or ``value_fn`` to
      the loss, which Optax's line searches and other libraries' loops hand in; with
      one of these two and ``value``, the clean loss, the state tells the sharpness.
      Where a wrapper masks parameters out, ``all_params`` are all of them. Given
      ``clean_grad``, the updates are refused unless they are that gradient itself.

    Raises:
      ValueError: if ascent is no transformation or combine no function; by ``init``, if
        the ascent goes against the gradient, as an optimizer does; in ``update``,
        if ``params`` or ``grad_fn`` is missing, ``grad_fn`` returns something else than
        a gradient like the updates, parameters are hidden, or the updates are not the
        clean gradient.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> grad_fn = jax.grad(lambda w: jnp.sum(w**4))
    >>> tx = optax.chain(
    ...     msam_optax.sharpness_aware_gradient(msam_optax.ascents.normalized(rho=0.1)),
    ...     optax.sgd(0.1, momentum=0.9),
    ... )
    >>> params = jnp.array([1.0, 0.5])
    >>> state = tx.init(params)
    >>> updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    >>> print(optax.apply_updates(params, updates).round(3))
    [0.469 0.446]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021. The authors' code
      perturbs along each accelerator's own gradient; here that choice is ``grad_fn``'s.
    """
    ascent = check_transformation("ascent", ascent)
    if combine is not None and not callable(combine):
        raise ValueError(
            "combine must be a function (clean, perturbed) -> gradient or None, but "
            f"{combine!r} was given."
        )

    def init_fn(params: Any) -> Any:
        return initial_state(ascent, params)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_state(state, SharpnessAwareState)
        check_params(TAKEN_AT, params)
        loss_and_gradient = second_gradient(updates, params, extra_args)
        ascended, state_after = ascend(ascent, updates, state, params, extra_args)
        loss, perturbed = loss_and_gradient(ascended)
        if second_order:

            def epsilon(w: Any) -> Any:
                clean, others = loss_and_gradient(w)[1], for_the_ascent(extra_args)
                return perturbation(ascent, clean, state.ascent_state, w, **others)[0]

            # d/dw L(w + epsilon(w)) = (I + d epsilon/dw)^T grad L(w + epsilon)
            _, vjp = jax.vjp(epsilon, params)
            (through_epsilon,) = vjp(perturbed)
            perturbed = optax.tree.add(perturbed, through_epsilon)
        gradient = perturbed if combine is None else combine(updates, perturbed)
        return gradient, state_after(loss_rise(loss, extra_args, state))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def chained(
    transform: optax.GradientTransformation, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The chain of a transformation of the gradient and a whole optimizer."""
    chain = optax.chain(transform, check_transformation("optimizer", optimizer))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        # A chain would take a dictionary of two parameters for its state.
        check_state(state, tuple)
        return chain.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def initial_state(
    ascent: optax.GradientTransformation, params: optax.Params
) -> SharpnessAwareState:
    """The state before the first ascent."""
    check_init(params)
    check_ascent(ascent, params)
    dtype = statistics_dtype(params)
    # Two arrays and not one twice, or the state could not be donated.
    return SharpnessAwareState(
        ascent_state=ascent.init(params),
        perturbation_norm=jnp.zeros([], dtype),
        sharpness=jnp.zeros([], dtype),
    )


def loss_rise(loss: Any, extra_args: dict[str, Any], state: SharpnessAwareState) -> Any:
    """L(w + epsilon) - L(w); the state's last one where a loss is not known."""
    clean_loss = extra_args.get("value")
    if loss is None or clean_loss is None:
        return state.sharpness
    return loss - clean_loss


def ascend(
    ascent: optax.GradientTransformation,
    direction: optax.Updates,
    state: SharpnessAwareState,
    params: optax.Params,
    extra_args: dict[str, Any],
) -> tuple[optax.Params, Callable[[Any], SharpnessAwareState]]:
    """The point to which the ascent leads from params.

    Returns:
      ``(ascended, state_after)``; ``state_after(rise)`` is the state, once it is known
      how far the loss rose.
    """
    epsilon, norm, ascent_state = perturbation(
        ascent, direction, state.ascent_state, params, **for_the_ascent(extra_args)
    )
    ascended = optax.apply_updates(params, epsilon)

    if norm is None or any(map(is_short, jax.tree.leaves(params))):
        # As it came about, for rounding takes some or all of it from short weights.
        # Both are there anyway, while of epsilon itself XLA would keep a copy, and
        # another of its square.
        norm = global_norm(optax.tree.sub(ascended, params))

    def state_after(rise: Any) -> SharpnessAwareState:
        dtype = statistics_dtype(params)
        return SharpnessAwareState(
            ascent_state, norm.astype(dtype), jnp.asarray(rise, dtype)
        )

    return ascended, state_after
