"""SAM on a given share of the steps, by every policy that there is: equal cost."""

from collections.abc import Callable
from functools import partial

import optax

import msam_optax
from benchmarks.tasks.optimizers import Build, Setting, sgd
from msam_optax import ascents, combine, policies

SHARES = (0.1, 0.25, 0.5)

# AE-SAM's thresholds, lambda_1 = shift - 1 and lambda_2 = shift + 1, at which about
# these shares of the steps took the second gradient at the settings that are best for
# `digits`; see results/studies/shares. On another task the share is what comes out.
SHIFTS = {0.1: 1.5, 0.25: 0.7, 0.5: -0.2}


def _sam(setting: Setting) -> optax.GradientTransformationExtraArgs:
    ascent = ascents.normalized(setting.rho)
    return msam_optax.sharpness_aware_gradient(ascent)


def _employed(
    policy: Callable[[Setting, float], policies.Policy], share: float
) -> Build:
    def build(setting: Setting) -> optax.GradientTransformation:
        chosen = msam_optax.employ(policy(setting, share), _sam(setting))
        return optax.chain(chosen, sgd(setting))

    return build


def _coin(setting: Setting, share: float) -> policies.Policy:
    return policies.bernoulli(share, seed=setting.seed)


def _every(setting: Setting, share: float) -> policies.Policy:
    return policies.every(round(1 / share))


def _first(setting: Setting, share: float) -> policies.Policy:
    return policies.between(0, round(share * setting.total_steps))


def _last(setting: Setting, share: float) -> policies.Policy:
    return policies.tail(setting.total_steps, share)


def _adaptive(setting: Setting, share: float) -> policies.Policy:
    shift = SHIFTS[share]
    return policies.adaptive(
        setting.total_steps, lambda_1=shift - 1, lambda_2=shift + 1
    )


def _tail(share: float, setting: Setting) -> optax.GradientTransformation:
    """As `last`, and the learning rate falls on those steps alone."""
    rate = msam_optax.hold_then_decay(setting.learning_rate, setting.total_steps, share)
    return optax.chain(
        msam_optax.employ(_last(setting, share), _sam(setting)),
        optax.add_decayed_weights(setting.weight_decay),
        optax.sgd(rate, setting.momentum),
    )


def _looksam(share: float, setting: Setting) -> optax.GradientTransformation:
    return msam_optax.looksam(sgd(setting), setting.rho, k=round(1 / share))


def _ae_looksam(share: float, setting: Setting) -> optax.GradientTransformation:
    shift = SHIFTS[share]
    return msam_optax.ae_looksam(
        sgd(setting),
        setting.rho,
        setting.total_steps,
        lambda_1=shift - 1,
        lambda_2=shift + 1,
    )


def _weighted(share: float, setting: Setting) -> optax.GradientTransformation:
    """Every k-th step, with what SAM adds there k-fold: SAM's gradient in the mean.

    The momentum averages over ten steps, so with SAM on a share f of them the step
    holds g + f (g_SAM - g). Weighed by 1/f it holds g_SAM, with more noise.
    """
    k = round(1 / share)
    boosted = msam_optax.sharpness_aware_gradient(
        ascents.normalized(setting.rho), combine.interpolate(float(k))
    )
    return optax.chain(msam_optax.employ(policies.every(k), boosted), sgd(setting))


def at_share(share: float) -> dict[str, Build]:
    """The optimizers by policy, around SGD."""
    return {
        "coin": _employed(_coin, share),
        "every": _employed(_every, share),
        "first": _employed(_first, share),
        "last": _employed(_last, share),
        "tail": partial(_tail, share),
        "ae_sam": _employed(_adaptive, share),
        "looksam": partial(_looksam, share),
        "ae_looksam": partial(_ae_looksam, share),
        "weighted": partial(_weighted, share),
    }
