"""SAM where nobody hands in a second gradient: every other call of update climbs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import check_transformation
from msam_optax._base.trees import check_init, check_params, check_state
from msam_optax.ascents._make import perturbation
from msam_optax.transforms._dry_step import check_ascent
from msam_optax.transforms._perturbed_states import StoredPerturbationState


class AlternatingAscentState(NamedTuple):
    """State of `alternating_ascent`.

    Attributes:
      ascended: boolean scalar, whether the parameters in use are perturbed, and the
        next gradient is the one to step with.
      perturbed: states of the optimizer and of the ascent, and what is on the
        parameters, a tree like them; zeros where nothing is.
    """

    ascended: jax.Array
    perturbed: StoredPerturbationState


def alternating_ascent(
    optimizer: optax.GradientTransformation, ascent: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""SAM by two calls of ``update``, for loops that hand in gradients alone.

    The first call climbs, the second one steps from where the first began with the
    gradient that it is given,

    .. math::
      \tilde w = w + \varepsilon(\nabla L(w)), \qquad
      w' = w + u(\nabla L(\tilde w), w),

    with u the optimizer's updates. Only one of the two is computed in a call.

    **This is the last resort.** The two gradients are those of two batches, where the
    loop draws a new one for each call, and half of the steps that a loop counts are
    none. Where you can, hand ``grad_fn``, or ``value_fn``, to
    :func:`msam_optax.sharpness_aware_gradient`. Without a tree like the parameters it
    can't be had: what a call puts on, the next one must take off. MSAM needs neither
    the tree nor the second call, since its momentum tells both.

    *Cost*: two gradients for each step of the optimizer. *State*: the optimizer's and
    the ascent's, one tree like the parameters and one boolean. What the tree holds is
    the difference as it came out in the parameters' dtype, so that w comes back
    without drift. *Position*: outermost. Every second set of parameters is perturbed:
    evaluate and publish :func:`msam_optax.eval_params`.

    Args:
      optimizer: the whole base optimizer; its schedules count its own steps.
      ascent: what makes epsilon of the gradient.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose ``update`` needs
      ``params``.

    Raises:
      ValueError: if one of the two is no transformation; by ``init``, if the ascent
        goes against the gradient; in ``update``, without ``params``.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> ascent = msam_optax.ascents.normalized(rho=0.05)
    >>> tx = msam_optax.alternating_ascent(optax.sgd(0.1, momentum=0.9), ascent)
    >>> params = jnp.array([3.0, 4.0])
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     grads = jax.grad(lambda w: jnp.sum(w**2))(params)
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(*(f"{w:.3f}" for w in params))
    2.394 3.192

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021.
    """
    optimizer = check_transformation("optimizer", optimizer)
    ascent = check_transformation("ascent", ascent)

    def init_fn(params: Any) -> Any:
        check_init(params)
        check_ascent(ascent, params)
        return AlternatingAscentState(
            ascended=jnp.zeros([], bool),
            perturbed=StoredPerturbationState(
                inner_state=optimizer.init(params),
                perturbation=optax.tree.zeros_like(params),
                ascent_state=ascent.init(params),
            ),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_state(state, AlternatingAscentState)
        check_params("An alternating ascent moves the parameters", params)

        def climb(state: Any) -> Any:
            epsilon, _, ascent_state = perturbation(
                ascent, updates, state.ascent_state, params, **extra_args
            )
            ascended = optax.apply_updates(params, epsilon)
            applied = optax.tree.sub(ascended, params)
            return applied, StoredPerturbationState(
                state.inner_state, applied, ascent_state
            )

        def step(state: Any) -> Any:
            clean = optax.tree.sub(params, state.perturbation)
            inner_updates, inner_state = optimizer.update(
                updates, state.inner_state, clean, **extra_args
            )
            new = optax.apply_updates(clean, inner_updates)
            return optax.tree.sub(new, params), StoredPerturbationState(
                inner_state, optax.tree.zeros_like(params), state.ascent_state
            )

        if isinstance(state.ascended, jax.core.Tracer):
            new_updates, perturbed = jax.lax.cond(
                state.ascended, step, climb, state.perturbed
            )
        else:  # outside of jit a cond would be compiled anew at every step
            new_updates, perturbed = (step if state.ascended else climb)(
                state.perturbed
            )
        return new_updates, AlternatingAscentState(~state.ascended, perturbed)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
