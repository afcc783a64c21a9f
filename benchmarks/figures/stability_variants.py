"""Variants of MSAM that keep its perturbation in bounds, and runs of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import msam_optax
from benchmarks.tasks import data, training
from benchmarks.tasks.losses import classified
from msam_optax.flax.linen import init_linen, linen_loss

# How much of the training goes without a perturbation in "zero in warm-up".
WARM_UP_SHARE = 0.2
# How long the perturbation may be in "clipped", as a share of the weights' norm.
CLIP_SHARE = 0.04


class Point(NamedTuple):
    """Hyper-parameters of a run.

    Attributes:
      learning_rate: at the first step; it falls to 0 along a cosine.
      momentum: of SGD.
      rho: radius of the perturbation.
    """

    learning_rate: float
    momentum: float
    rho: float


class Base(NamedTuple):
    """What a variant is built from.

    Attributes:
      sgd: the optimizer whose momentum is perturbed along.
      decay: the schedule of its learning rate, as a share of the first.
      total_steps: of the training.
      weights_norm: l2 norm of the initial parameters.
    """

    sgd: optax.GradientTransformation
    decay: optax.Schedule
    total_steps: int
    weights_norm: jax.Array


Run = Callable[..., msam_optax.TrainState]


def _constant(base: Base, rho: Any) -> optax.GradientTransformation:
    return msam_optax.momentum_perturbation(base.sgd, rho)


def _zero_in_warm_up(base: Base, rho: Any) -> optax.GradientTransformation:
    start = round(WARM_UP_SHARE * base.total_steps)
    return msam_optax.momentum_perturbation(
        base.sgd, lambda step: rho * (step >= start)
    )


def _ramp(base: Base, rho: Any) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(0.0, rho, base.total_steps)
    return msam_optax.momentum_perturbation(base.sgd, schedule)


def _like_learning_rate(base: Base, rho: Any) -> optax.GradientTransformation:
    schedule = msam_optax.rho_like_learning_rate(
        base.decay, rho_max=rho, rho_min=0.0, learning_rate_max=1.0
    )
    return msam_optax.momentum_perturbation(base.sgd, schedule)


def _clipped(base: Base, rho: Any) -> optax.GradientTransformation:
    ascent = optax.chain(
        msam_optax.ascents.normalized(rho),
        msam_optax.ascents.clip_by_weight_norm(CLIP_SHARE),
    )
    return msam_optax.momentum_perturbation(base.sgd, ascent=ascent)


def _layerwise(base: Base, rho: Any) -> optax.GradientTransformation:
    # Relative to all weights, so that rho has the unit that it has elsewhere.
    ascent = msam_optax.ascents.layerwise(rho / base.weights_norm)
    return msam_optax.momentum_perturbation(base.sgd, ascent=ascent)


def _adaptive(base: Base, rho: Any) -> optax.GradientTransformation:
    ascent = msam_optax.ascents.weight_scaled(rho)
    return msam_optax.momentum_perturbation(base.sgd, ascent=ascent)


VARIANTS: dict[str, Callable[[Base, Any], optax.GradientTransformation]] = {
    "constant": _constant,
    "zero in warm-up": _zero_in_warm_up,
    "ramp": _ramp,
    "like learning rate": _like_learning_rate,
    "clipped": _clipped,
    "layer-wise": _layerwise,
    "adaptive": _adaptive,
}


def compiled(model: nn.Module, variant: str, weight_decay: float) -> Run:
    """The training of a variant, compiled once for all points, seeds and data sets.

    All steps are one `lax.scan`. On CPU that suits models without convolutions only,
    whose gradients XLA runs very slowly in a loop there.

    Args:
      model: a Linen module of `models.py`.
      variant: of `VARIANTS`.
      weight_decay: of the perturbed weights, as in the authors' code.

    Returns:
      What `final_state` needs.
    """
    loss_fn = linen_loss(model, classified, train=True)

    def run(point, key, images, labels, indices):
        total_steps = len(indices)
        decay = optax.cosine_decay_schedule(1.0, total_steps)
        init_key, key = jax.random.split(key)
        example = images[:1]
        params = model.init(init_key, example, train=False)["params"]
        base = Base(
            sgd=optax.sgd(
                lambda step: point.learning_rate * decay(step), point.momentum
            ),
            decay=decay,
            total_steps=total_steps,
            weights_norm=optax.tree.norm(params),
        )
        optimizer = optax.chain(
            optax.add_decayed_weights(weight_decay), VARIANTS[variant](base, point.rho)
        )
        train_step = msam_optax.make_train_step(loss_fn, optimizer, donate=False)

        def step(state, step_input):
            chosen, step_key = step_input
            batch = images[chosen], labels[chosen]
            return train_step(state, batch, step_key)[0], None

        state = init_linen(model, optimizer, init_key, example, train=False)
        keys = jax.random.split(key, total_steps)
        return jax.lax.scan(step, state, (indices, keys))[0]

    return jax.jit(run)


def final_state(
    run: Run, task: training.Task, point: Point, seed: int
) -> msam_optax.TrainState:
    """The end of a run, of the initial weights and batches of `training.Trainer`.

    Args:
      run: as `compiled` has it.
      task: the data.
      point: hyper-parameters.
      seed: decides label noise, initial parameters, order of the examples and dropout.
    """
    rng = np.random.default_rng([seed, 1])
    epochs = [
        np.stack(list(data.batches(len(task.clean_labels), task.batch_size, rng)))
        for _ in range(task.epochs)
    ]
    return run(
        Point(*map(jnp.float32, point)),
        jax.random.key(seed),
        task.train_images,
        task.labels(seed),
        np.concatenate(epochs),
    )
