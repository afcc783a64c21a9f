"""Runs a transformation only on the steps that a policy chooses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import check_transformation, training_step
from msam_optax._base.trees import check_init, check_state
from msam_optax.policies import Policy
from msam_optax.transforms._placement import check_is_no_optimizer

# otherwise(updates, inner_state) -> updates
Otherwise = Callable[[optax.Updates, optax.OptState], optax.Updates]


class EmployState(NamedTuple):
    """State of `employ`.

    Attributes:
      step: int32 scalar, how many steps were taken; the only counter in here.
      employed: boolean scalar, the policy's last decision.
      employed_steps: int32 scalar, on how many steps the policy said yes.
      policy_state: state of the policy.
      inner_state: state of the transformation, as it left it when last employed.
    """

    step: jax.Array
    employed: jax.Array
    employed_steps: jax.Array
    policy_state: Any
    inner_state: optax.OptState


def employ(
    policy: Policy,
    transform: optax.GradientTransformation,
    otherwise: Otherwise | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs `transform` where `policy` says so, and `otherwise` on the other steps.

    The step not taken costs nothing: the branches stand under ``lax.cond``, so a
    gradient inside is computed only where it is used; outside of ``jit`` the decision
    is read instead. Under ``vmap`` both branches run, because there a ``cond`` becomes
    a ``select``; and on CPU a convolution's gradient is very slow inside a ``cond``,
    which is what the ``dispatch`` of :func:`msam_optax.make_train_step` is for.

    With ``every(k)`` it equals :func:`optax.conditionally_transform` with
    ``lambda step: step % k == 0``; other policies see the gradients, which that one's
    condition does not.

    *Cost*: the policy's, and the transformation's where employed. *State*: both
    states, and three scalars. *Position*: before the optimizer, where the
    transformation would stand; never around a whole optimizer, since the raw gradient
    would be the update on the other steps.

    Args:
      policy: asked once a step, with the updates that come in.
      transform: run where the policy says so. Both receive ``step``, the number of
        steps taken so far, as an extra argument (unless the caller gives one), so that
        the schedules of an ascent follow the training and not the steps that happened
        to be employed.
      otherwise: ``otherwise(updates, inner_state) -> updates`` elsewhere, by default
        the updates as they are. ``inner_state`` does not change.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`. Its ``update`` accepts the
      keyword ``employed``, a Python bool that replaces ``lax.cond`` by a static choice:
      only that branch is compiled, while the state still records the policy's own
      decision, so the caller must run the branch that the policy chose.

    Raises:
      ValueError: if policy is not a :class:`msam_optax.policies.Policy`, transform no
        transformation or, without otherwise, a whole optimizer, or ``employed`` not a
        bool; in ``update``, if the policy returns something else than a decision and
        its state.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> sam = msam_optax.sharpness_aware_gradient(msam_optax.ascents.normalized(0.1))
    >>> employed = msam_optax.employ(msam_optax.policies.every(3), sam)
    >>> tx = optax.chain(employed, optax.sgd(0.1))
    >>> grad_fn = jax.grad(lambda w: jnp.sum(w**4))
    >>> params = jnp.array([1.0, 0.5])
    >>> state = tx.init(params)
    >>> for _ in range(6):
    ...     grads = grad_fn(params)
    ...     updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    ...     params = optax.apply_updates(params, updates)
    >>> print(state[0].employed_steps, "of", state[0].step)
    2 of 6
    """
    if not isinstance(policy, Policy):
        raise ValueError(
            f"employ needs a Policy first, for instance every(2), but got {policy!r}."
        )
    transform = check_transformation("transform", transform)

    def init_fn(params: Any) -> Any:
        check_init(params)
        inner_state = transform.init(params)
        if otherwise is None:
            check_is_no_optimizer("employ", transform, inner_state, params)
        return EmployState(
            step=jnp.zeros([], jnp.int32),
            employed=jnp.zeros([], bool),
            employed_steps=jnp.zeros([], jnp.int32),
            policy_state=policy.init(params),
            inner_state=inner_state,
        )

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        employed: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        check_state(state, EmployState)
        if employed is not None and not isinstance(employed, bool):
            raise ValueError(
                "employed chooses a branch while tracing: it must be a Python bool or "
                f"None, but {employed!r} was given."
            )
        extra_args = {**extra_args, "step": training_step(state.step, extra_args)}
        decision, policy_state = _decided(
            policy.decide(updates, state.policy_state, params, **extra_args)
        )

        # The updates are closed over and no operands, so that whoever is inside finds
        # the clean gradient by its identity.
        def run(inner_state: Any) -> Any:
            return transform.update(updates, inner_state, params, **extra_args)

        def skip(inner_state: Any) -> Any:
            if otherwise is not None:
                return otherwise(updates, inner_state), inner_state
            return updates, inner_state

        traced = any(isinstance(x, jax.core.Tracer) for x in (state.step, decision))
        if employed is None and not traced:
            # Outside of jit, where a cond would be compiled anew at every step. What
            # the transformation needs is asked for all the same, once.
            employed = bool(decision)
            if not employed and state.step == 0:
                jax.eval_shape(run, state.inner_state)
        if employed is None:
            new_updates, inner_state = jax.lax.cond(
                decision, run, skip, state.inner_state
            )
        else:
            branch = run if employed else skip
            new_updates, inner_state = branch(state.inner_state)
        return new_updates, EmployState(
            step=optax.safe_increment(state.step),
            employed=decision,
            employed_steps=state.employed_steps + decision.astype(jnp.int32),
            policy_state=policy_state,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _decided(result: Any) -> tuple[jax.Array, Any]:
    """What a policy decided; ValueError if it is no decision and state."""
    pair = isinstance(result, tuple) and len(result) == 2
    if not (pair and jax.tree_util.all_leaves(result[:1])):
        raise ValueError(
            "A policy's decide must return (decision, state), the decision a boolean "
            f"scalar, but it returned {result!r}."
        )
    decision, state = result
    if jnp.shape(decision) != () or jnp.issubdtype(
        jnp.result_type(decision), jnp.inexact
    ):
        raise ValueError(
            "A policy's decision must be a boolean scalar, but it has shape "
            f"{jnp.shape(decision)} and dtype {jnp.result_type(decision)}: reduce it "
            "by jnp.any, draw by a probability."
        )
    return jnp.asarray(decision, bool), state  # a policy may say True
