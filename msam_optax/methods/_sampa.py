"""SAMPa: both gradients of a step at once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import (
    ScalarOrSchedule,
    check_real,
    check_scalar_or_schedule,
    init_schedule,
    read_schedule,
)
from msam_optax._base.numerics import add_scaled, global_norm
from msam_optax._base.trees import check_params, check_state
from msam_optax.combine import interpolate
from msam_optax.transforms._second_gradient import TAKEN_AT, second_gradient
from msam_optax.transforms._sharpness_aware import (
    SharpnessAwareState,
    ascend,
    chained,
    initial_state,
    loss_rise,
)


class SampaState(NamedTuple):
    """State of the gradient of `sampa`.

    Attributes:
      sharpness_aware_state: state of the ascent, and the length of the last one.
      auxiliary: tree like the parameters, the last finite gradient at y; zeros before
        the first.
      learning_rate_state: counter of the learning rate's schedule, empty for a
        constant.
    """

    sharpness_aware_state: SharpnessAwareState
    auxiliary: optax.Updates
    learning_rate_state: Any


def sampa(
    optimizer: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    rho: ScalarOrSchedule = 0.1,
    lambda_: float = 0.2,
    *,
    sharding: jax.sharding.NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM whose two gradients do not wait for one another.

    The ascent follows the gradient of the step before at an auxiliary point y:

    .. math::
      \begin{align*}
        \tilde x_t &= x_t + \rho\, \nabla f(y_t) / \|\nabla f(y_t)\|, \qquad
          y_{t+1} = x_t - \eta_t \nabla f(y_t), \\
        x_{t+1} &= x_t - \eta_t \big[ (1-\lambda) \nabla f(\tilde x_t)
          + \lambda \nabla f(y_{t+1}) \big],
      \end{align*}
      \qquad \nabla f(y_0) := 0 .

    The bracket goes into the optimizer, whose step it is.

    *Cost*: two gradients in one batch of two, by ``vmap``. The clean gradient that
    comes in is not used, and a ``jit`` in which nothing else asks for it leaves it out:
    as many gradients as SAM. On one device they take SAM's time; on two, one
    gradient's, see ``sharding``. *State*: the optimizer's, one tree like the parameters
    and two scalars, one more for each schedule. *Position*: ``update`` needs ``params``
    and ``grad_fn``, which must allow ``vmap``.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      learning_rate: eta, the optimizer's own, for y; a float or a schedule.
      rho: radius; a float or a schedule.
      lambda_: share of the gradient at y, in [0, 1]; 0 is the paper's plain SAMPa.
      sharding: where the two gradients are taken: ``NamedSharding(mesh, P("pair"))``
        with the name of an axis of two devices (or groups of devices) puts one on each.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if ``lambda_`` is outside [0, 1], learning_rate is no finite number
        and no schedule, or sharding no NamedSharding of one axis of size two; else as
        :func:`msam_optax.sharpness_aware_gradient`.

    >>> import msam_optax, optax
    >>> tx = msam_optax.sampa(optax.sgd(0.1, momentum=0.9), learning_rate=0.1)

    References:
      Xie, Pethick and Cevher, `SAMPa: Sharpness-aware Minimization Parallelized
      <https://arxiv.org/abs/2410.10683>`_, NeurIPS 2024. Two things differ from their
      code: it takes the gradient at :math:`\tilde x_t` on the *previous* batch, the one
      of :math:`\nabla f(y_t)`, where here both gradients are of this step's batch; and
      its y takes the base optimizer's whole step, with momentum and decay, where here
      it is the formula's.
    """
    check_real("lambda_", lambda_, low=0, high=1)
    check_scalar_or_schedule("learning_rate", learning_rate)
    ascent = ascents.normalized(rho)
    combine = interpolate(1 - lambda_)
    place = _placement(sharding)

    def init_fn(params: optax.Params) -> SampaState:
        return SampaState(
            sharpness_aware_state=initial_state(ascent, params),
            auxiliary=optax.tree.zeros_like(params),
            learning_rate_state=init_schedule(learning_rate),
        )

    def update_fn(
        updates: optax.Updates, state: SampaState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, SampaState]:
        check_state(state, SampaState)
        check_params(TAKEN_AT, params)
        loss_and_gradient = second_gradient(updates, params, extra_args)
        before = state.sharpness_aware_state
        ascended, state_after = ascend(
            ascent, state.auxiliary, before, params, extra_args
        )
        eta, learning_rate_state = read_schedule(
            learning_rate, state.learning_rate_state, extra_args
        )
        ahead = add_scaled(params, -eta, state.auxiliary)
        both = jax.tree.map(lambda *pair: place(jnp.stack(pair)), ascended, ahead)
        losses, gradients = jax.vmap(loss_and_gradient, axis_size=2)(both)
        perturbed, auxiliary = (
            jax.tree.map(lambda g, i=i: g[i], gradients) for i in (0, 1)
        )
        # A gradient that is no number would make all further ones none.
        finite = jnp.isfinite(global_norm(auxiliary))
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old).astype(old.dtype),
            auxiliary,
            state.auxiliary,
        )
        loss = None if losses is None else losses[0]
        return combine(auxiliary, perturbed), SampaState(
            state_after(loss_rise(loss, extra_args, before)),
            kept,
            learning_rate_state,
        )

    transform = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return chained(transform, optimizer)


def _placement(sharding: jax.sharding.NamedSharding | None) -> Any:
    """What puts one of two stacked points on each side of a mesh's axis."""
    if sharding is None:
        return lambda pair: pair
    named = isinstance(sharding, jax.sharding.NamedSharding)
    axes = list(sharding.spec) if named else []
    if len(axes) != 1 or sharding.mesh.shape.get(axes[0]) != 2:
        raise ValueError(
            "sharding must be NamedSharding(mesh, PartitionSpec(axis)) with an axis of "
            f"size 2, but {sharding!r} was given."
        )
    spec, free = jax.sharding.PartitionSpec, jax.sharding.PartitionSpec.UNCONSTRAINED

    def place(pair: jax.Array) -> jax.Array:
        whole = spec(axes[0], *[free] * (pair.ndim - 1))
        return jax.lax.with_sharding_constraint(
            pair, jax.sharding.NamedSharding(sharding.mesh, whole)
        )

    return place
