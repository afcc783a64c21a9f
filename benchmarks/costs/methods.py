"""The optimizers whose cost is measured, and the bars they have to meet.

Those of `tasks/optimizers.py` decay the weights and the learning rate; here they are
bare, so that the base is as cheap as it can be and the ratio to it as high.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import msam_optax
from benchmarks.tasks.optimizers import MOMENTUM

_LEARNING_RATE = 0.01
_ADAM_LEARNING_RATE = 1e-4
_SAM_RHO = 0.05
_MSAM_RHO = 0.3
_ESAM_GAMMA = 0.5


class Method(NamedTuple):
    """An optimizer, and what is known of its cost.

    Attributes:
      build: makes the optimizer, given the number of steps it will take.
      base: name of the optimizer that it is measured against.
      extra_gradients: how many a step takes beside the clean one, or an employed step
        for an optimizer that employs.
      calls: how many calls of the training step make one step of the method.
      update_alone: whether its update can be had without a model.
      timed: whether `step_cost.py` trains with it; the others are compiled only.
    """

    build: Callable[[int], optax.GradientTransformation]
    base: str
    extra_gradients: float = 0.0
    calls: int = 1
    update_alone: bool = True
    timed: bool = True


def _sgd(nesterov: bool = False) -> optax.GradientTransformation:
    return optax.sgd(_LEARNING_RATE, MOMENTUM, nesterov)


def _ae_sam(steps: int) -> optax.GradientTransformation:
    return msam_optax.ae_sam(_sgd(), _SAM_RHO, steps)


def _ae_sam_never(steps: int) -> optax.GradientTransformation:
    # The policy does all its work, but its threshold is out of reach.
    return msam_optax.ae_sam(_sgd(), _SAM_RHO, steps, lambda_1=1e6, lambda_2=1e6)


def _optax_sam(opaque: bool) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.sam`, as `make_train_step` calls it."""
    tx = optax.contrib.sam(
        _sgd(),
        optax.chain(optax.contrib.normalize(), optax.sgd(_SAM_RHO)),
        opaque_mode=opaque,
    )

    def init(params):
        # In transparent mode its state is the params themselves: two donations of one
        # piece of memory.
        return tx.init(jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None, *, grad_fn, **extra_args):
        # It refuses extra arguments, and hands grad_fn the number of the ascent step.
        del extra_args
        return tx.update(updates, state, params, grad_fn=lambda p, _: grad_fn(p))

    return optax.GradientTransformationExtraArgs(init, update)


def _around_sgd(method: Callable[..., optax.GradientTransformation]) -> Method:
    """A method of SAM's family that is compiled only."""
    return Method(lambda _: method(_sgd(), _SAM_RHO), "sgd", 1.0, timed=False)


METHODS: dict[str, Method] = {
    "sgd": Method(lambda _: _sgd(), "sgd"),
    # The same once more: how far it is from 1 is what the measurement can't resolve.
    "sgd, control": Method(lambda _: _sgd(), "sgd"),
    "nag": Method(lambda _: _sgd(nesterov=True), "sgd"),
    "msam": Method(
        lambda _: msam_optax.msam(_LEARNING_RATE, MOMENTUM, rho=_MSAM_RHO), "sgd"
    ),
    "momentum_perturbation(sgd)": Method(
        lambda _: msam_optax.momentum_perturbation(_sgd(), _MSAM_RHO), "sgd"
    ),
    "sam": Method(lambda _: msam_optax.sam(_sgd(), _SAM_RHO), "sgd", 1.0),
    "ae_sam": Method(_ae_sam, "sgd", 1.0),
    "ae_sam, never employed": Method(_ae_sam_never, "sgd", 1.0),
    "looksam, k=5": Method(
        lambda _: msam_optax.looksam(_sgd(), _SAM_RHO, k=5), "sgd", 1.0
    ),
    "esam": Method(
        lambda _: msam_optax.esam(_sgd(), _SAM_RHO, gamma=_ESAM_GAMMA),
        "sgd",
        _ESAM_GAMMA,
        update_alone=False,
    ),
    "optax.contrib.sam, opaque": Method(lambda _: _optax_sam(opaque=True), "sgd", 1.0),
    "optax.contrib.sam, transparent": Method(
        lambda _: _optax_sam(opaque=False), "sgd", calls=2, update_alone=False
    ),
    "adamw": Method(lambda _: optax.adamw(_ADAM_LEARNING_RATE), "adamw"),
    "adamw_msam": Method(
        lambda _: msam_optax.adamw_msam(_ADAM_LEARNING_RATE, rho=_MSAM_RHO), "adamw"
    ),
    "momentum_perturbation(adamw)": Method(
        lambda _: msam_optax.momentum_perturbation(
            optax.adamw(_ADAM_LEARNING_RATE), _MSAM_RHO
        ),
        "adamw",
    ),
    **{
        method.__name__: _around_sgd(method)
        for method in (
            *(msam_optax.asam, msam_optax.fisher_sam, msam_optax.friendly_sam),
            *(msam_optax.gsam, msam_optax.gradient_norm_penalty, msam_optax.ss_sam),
            msam_optax.wsam,
        )
    },
    "ae_looksam": Method(
        lambda steps: msam_optax.ae_looksam(_sgd(), _SAM_RHO, steps),
        "sgd",
        1.0,
        timed=False,
    ),
}
# What `step_cost.py` measures
TIMED = tuple(name for name, method in METHODS.items() if method.timed)


class Bars(NamedTuple):
    """How far above the base a method may be on some hardware.

    Attributes:
      models: those that the bars of a whole step are for.
      step: of a whole step, over that of the base; for "ae_sam" times 1 + f for the
        fraction f of employed steps.
      update: of the update alone, likewise.
    """

    models: tuple[str, ...]
    step: dict[str, float]
    update: dict[str, float]


CPU_BARS = Bars(
    models=("cnn", "wrn"),
    step={
        "msam": 1.02,
        "sam": 2.03,
        "ae_sam": 1.04,
        "ae_sam, never employed": 1.02,
        "looksam, k=5": 1.27,
    },
    update={
        "msam": 1.45,
        "adamw_msam": 1.35,
        "momentum_perturbation(sgd)": 2.0,
        "momentum_perturbation(adamw)": 2.0,
    },
)
# Nothing can be said of tiny models.
NO_BARS = Bars((), {}, {})
ACCELERATOR_BARS = Bars(
    models=("wrn", "vit"),
    step={"msam": 1.01, "sam": 2.0, "ae_sam": 1.02},
    update={"msam": 8 / 6},
)
