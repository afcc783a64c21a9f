"""Replaces the gradient at w by the gradient at a perturbed point w + epsilon."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import check_transformation
from msam_optax._base.numerics import global_norm, statistics_dtype
from msam_optax._base.trees import check_like, check_params
from msam_optax.ascents._make import perturbation
from msam_optax.combine import Combine

TAKEN_AT = "A sharpness-aware gradient is taken at params + epsilon"


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware_gradient`.

    Attributes:
      ascent_state: state of the ascent.
      perturbation_norm: float32 scalar, l2 norm of the last epsilon.
    """

    ascent_state: optax.OptState
    perturbation_norm: jax.Array


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

    *Cost*: one extra gradient. *State*: the ascent's, and one scalar. *Position*:
    first in a chain, since it replaces the gradient; weight decay before it would
    steer the ascent and be lost from the step.

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
      loss on the same batch with the same random key as the updates.

    Raises:
      ValueError: if ascent is no transformation or combine no function; in ``update``,
        if ``params`` or ``grad_fn`` is missing or ``grad_fn``
        returns something else than a gradient like the updates.

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

    def init_fn(params):
        return initial_state(ascent, params)

    def update_fn(updates, state, params=None, *, grad_fn=None, **extra_args):
        check_params(TAKEN_AT, params)
        _check_grad_fn(grad_fn)

        def ascend(clean, params):
            return perturbation(ascent, clean, state.ascent_state, params, **extra_args)

        epsilon, ascent_state = ascend(updates, params)
        ascended = optax.apply_updates(params, epsilon)
        perturbed = grad_fn(ascended)
        _check_gradient(perturbed, updates)
        if second_order:
            # d/dw L(w + epsilon(w)) = (I + d epsilon/dw)^T grad L(w + epsilon)
            _, vjp = jax.vjp(lambda w: ascend(grad_fn(w), w)[0], params)
            (through_epsilon,) = vjp(perturbed)
            perturbed = optax.tree.add(perturbed, through_epsilon)
        gradient = perturbed if combine is None else combine(updates, perturbed)
        return gradient, ascended_state(ascent_state, params, ascended)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def chained(
    transform: optax.GradientTransformation, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The chain of a transformation of the gradient and a whole optimizer."""
    return optax.chain(transform, check_transformation("optimizer", optimizer))


def initial_state(
    ascent: optax.GradientTransformation, params: optax.Params
) -> SharpnessAwareState:
    """The state before the first ascent."""
    return SharpnessAwareState(
        ascent_state=ascent.init(params),
        perturbation_norm=jnp.zeros([], statistics_dtype(params)),
    )


def ascended_state(
    ascent_state: optax.OptState, params: optax.Params, ascended: optax.Params
) -> SharpnessAwareState:
    """The state after an ascent from params to where the gradient was taken.

    The norm is that of the difference: both are there anyway, while of epsilon itself
    XLA would keep a copy, and another of its square.
    """
    norm = global_norm(optax.tree.sub(ascended, params))
    return SharpnessAwareState(ascent_state, norm.astype(statistics_dtype(params)))


def _check_grad_fn(grad_fn: Any) -> None:
    if not callable(grad_fn):
        raise ValueError(
            "A sharpness-aware gradient needs the keyword grad_fn, a function from "
            f"params to gradients, but got a {type(grad_fn).__name__}: call "
            "update(updates, state, params, grad_fn=jax.grad(loss))."
        )


def _check_gradient(gradient: Any, updates: Any) -> None:
    """Raises ValueError unless `gradient` has the updates' tree, shapes and dtypes."""
    hint = ""
    if isinstance(gradient, tuple) and not isinstance(updates, tuple):
        hint = (
            " It returned a tuple: did you pass jax.value_and_grad, or a gradient with "
            "has_aux=True? Return the gradient alone."
        )
    elif isinstance(gradient, jax.Array) and gradient.ndim == 0:
        hint = " It returned a scalar: did you pass the loss and not jax.grad(loss)?"
    needs = "grad_fn must return a gradient like the updates"
    check_like(needs, gradient, updates, dtypes=True, hint=hint)
