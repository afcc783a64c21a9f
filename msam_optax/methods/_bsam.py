"""bSAM: a Gaussian posterior over the weights, learned by SAM's relaxation of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import (
    ScalarOrSchedule,
    check_integer,
    check_real,
    check_scalar_or_schedule,
    init_schedule,
    read_schedule,
    static_value,
    training_step,
)
from msam_optax._base.trees import check_init, check_params, check_state
from msam_optax.ascents._draws import draws_like, wide_normal
from msam_optax.transforms._second_gradient import TAKEN_AT, second_gradient
from msam_optax.transforms._sharpness_aware import (
    SharpnessAwareState,
    ascend,
    initial_state,
    loss_rise,
)


class BsamState(NamedTuple):
    """State of `bsam`.

    Attributes:
      sharpness_aware_state: counter of rho's schedule, empty for a constant, and the
        length of the last perturbation.
      momentum: tree like the parameters, g_m.
      precision: tree like the parameters, s, in float32 at least. The posterior's
        standard deviation is ``1 / sqrt(num_examples * s)``.
      bsam_step: int32 scalar; the draws depend on it and on the seed alone.
      learning_rate_state: counter of the learning rate's schedule, empty for a
        constant.
    """

    sharpness_aware_state: SharpnessAwareState
    momentum: optax.Updates
    precision: optax.Updates
    bsam_step: jax.Array
    learning_rate_state: Any


def bsam(
    learning_rate: ScalarOrSchedule,
    num_examples: int,
    rho: ScalarOrSchedule = 0.05,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 1e-4,
    damping: float = 0.1,
    initial_precision: float = 1.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Bayesian SAM: an optimizer like Adam that learns mean and precision of weights.

    With the mean :math:`\omega`, which is the parameters, the precision s, N examples
    and all operations by coordinate,

    .. math::
      \begin{align*}
        \theta &= \omega + n / \sqrt{N s},\quad n \sim \mathcal N(0, 1), \qquad
          g = \nabla L(\theta), \qquad \varepsilon = \rho\, g / s, \\
        m &\leftarrow \beta_1 m + (1-\beta_1)
          (\nabla L(\omega + \varepsilon) + \delta \omega), \\
        s &\leftarrow \beta_2 s + (1-\beta_2)(\sqrt s\,|g| + \delta + \gamma), \qquad
          \omega \leftarrow \omega - \eta\, m / s .
      \end{align*}

    *Cost*: two gradients one after the other, at :math:`\theta` and at
    :math:`\omega + \varepsilon`. The clean gradient that comes in is not used, and a
    ``jit`` in which nothing else asks for it leaves it out: then as many as SAM.
    *State*: two trees like the parameters, and three scalars, one more for each
    schedule. *Position*: a whole optimizer; its weight decay is the prior, so it needs
    no other. ``update`` needs ``params`` and ``grad_fn``.

    Args:
      learning_rate: eta; a float or a schedule.
      num_examples: N, the size of the training set: the larger, the less noise.
      rho: radius, over the precision; a float or a schedule.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the precision, in [0, 1).
      weight_decay: delta, the prior's precision over N, at least 0.
      damping: gamma, at least 0; 0.1 in the paper.
      initial_precision: s at the start, positive.
      seed: integer seed of the draws.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if an argument is outside of what stands above, or weight_decay and
        damping are both 0, without which s may vanish; in ``update`` as
        :func:`msam_optax.sharpness_aware_gradient`.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> tx = msam_optax.bsam(learning_rate=0.1, num_examples=1000)
    >>> params = jnp.array([1.0, 2.0])
    >>> state = tx.init(params)
    >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2))
    >>> updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    >>> params = optax.apply_updates(params, updates)
    >>> deviation = 1 / jnp.sqrt(1000 * state.precision)

    References:
      Möllenhoff and Khan, `SAM as an Optimal Relaxation of Bayes
      <https://arxiv.org/abs/2210.01620>`_, ICLR 2023, algorithm 1. The defaults of rho
      and weight_decay are ours: tune them.
    """
    check_scalar_or_schedule("learning_rate", learning_rate)
    check_integer("num_examples", num_examples, low=1)
    check_real("b1", b1, low=0, high=1, excluded=1)
    check_real("b2", b2, low=0, high=1, excluded=1)
    check_real("weight_decay", weight_decay, low=0)
    check_real("damping", damping, low=0)
    check_real("initial_precision", initial_precision, low=0, excluded=0)
    check_integer("seed", seed, low=0)
    if static_value(weight_decay) == static_value(damping) == 0:
        raise ValueError("weight_decay and damping must not both be 0.")
    ascent = ascents.unnormalized(rho)

    def init_fn(params: optax.Params) -> BsamState:
        check_init(params)
        wide = jax.tree.map(
            lambda w: jnp.full_like(
                w,
                initial_precision,
                dtype=jnp.promote_types(jnp.result_type(w), jnp.float32),
            ),
            params,
        )
        return BsamState(
            sharpness_aware_state=initial_state(ascent, params),
            momentum=optax.tree.zeros_like(params),
            precision=wide,
            bsam_step=jnp.zeros([], jnp.int32),
            learning_rate_state=init_schedule(learning_rate),
        )

    def update_fn(
        updates: optax.Updates, state: BsamState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, BsamState]:
        check_state(state, BsamState)
        check_params(TAKEN_AT, params)
        loss_and_gradient = second_gradient(updates, params, extra_args)
        step = training_step(state.bsam_step, extra_args)
        eta, learning_rate_state = read_schedule(
            learning_rate, state.learning_rate_state, extra_args
        )
        noise = draws_like(
            params,
            jax.random.fold_in(jax.random.key(seed), step),
            step,
            wide_normal,
        )
        drawn = jax.tree.map(
            lambda w, n, s: (w + n / jnp.sqrt(num_examples * s)).astype(w.dtype),
            params,
            noise,
            state.precision,
        )
        _, at_drawn = loss_and_gradient(drawn)
        direction = jax.tree.map(
            lambda g, s: (g / s).astype(g.dtype), at_drawn, state.precision
        )
        before = state.sharpness_aware_state
        ascended, state_after = ascend(ascent, direction, before, params, extra_args)
        loss, perturbed = loss_and_gradient(ascended)
        momentum = jax.tree.map(
            lambda m, g, w: (b1 * m + (1 - b1) * (g + weight_decay * w)).astype(
                m.dtype
            ),
            state.momentum,
            perturbed,
            params,
        )
        precision = jax.tree.map(
            lambda s, g: (
                b2 * s + (1 - b2) * (jnp.sqrt(s) * jnp.abs(g) + weight_decay + damping)
            ).astype(s.dtype),
            state.precision,
            at_drawn,
        )
        new_updates = jax.tree.map(
            lambda m, s: (-eta * m / s).astype(m.dtype), momentum, precision
        )
        return new_updates, BsamState(
            state_after(loss_rise(loss, extra_args, before)),
            momentum,
            precision,
            optax.safe_increment(step),
            learning_rate_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
