"""The optimizers that the benchmarks compare.

To add one, add an entry to `METHODS`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import optax

import msam_optax

RESULTS = Path(__file__).resolve().parents[1] / "results"

MOMENTUM = 0.9
# Six values each, so that all methods are tuned with the same effort. Logarithmic and
# wide: with random labels the best learning rate is far below the usual one, and the
# best rho depends on it.
SGD_LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
ADAM_LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SAM_RHOS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
ASAM_RHOS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
MSAM_RHOS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Setting(NamedTuple):
    """What an optimizer is built from.

    Attributes:
      learning_rate: at the first step; it falls to 0 along a cosine.
      rho: radius of the perturbation; no matter for a method without one.
      weight_decay: lambda; decoupled in AdamW, part of the gradient elsewhere.
      total_steps: number of steps of the whole training.
      momentum: of SGD, and the decay of Adam's first moment.
    """

    learning_rate: float
    rho: float
    weight_decay: float
    total_steps: int
    momentum: float = MOMENTUM

    @property
    def schedule(self) -> optax.Schedule:
        return optax.cosine_decay_schedule(self.learning_rate, self.total_steps)


class Method(NamedTuple):
    """A way to train, with the one hyper-parameter of it that is tuned.

    Attributes:
      build: makes the optimizer.
      default: what the tuned hyper-parameter is where it was not tuned.
      grid: the values that `tune.py` tries, in ascending order.
      base: the method whose learning rate this one takes over: then rho is what is
        tuned. Without one it is the learning rate, and the method has no rho.
      extra_gradient: of how much of the batch the second gradient is, where there is
        one; ESAM's forward pass over the whole batch is not counted.
    """

    build: Callable[[Setting], optax.GradientTransformation]
    default: float
    grid: tuple[float, ...]
    base: str | None = None
    extra_gradient: float = 1.0


def _sgd(setting: Setting, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(setting.weight_decay),
        optax.sgd(setting.schedule, setting.momentum, nesterov),
    )


def _around_sgd(
    method: Callable[..., optax.GradientTransformation],
) -> Callable[[Setting], optax.GradientTransformation]:
    """A method as it comes, around SGD."""
    return lambda setting: method(_sgd(setting), setting.rho)


def _msam(setting: Setting) -> optax.GradientTransformation:
    # Outside of msam, as here, the decay acts on the perturbed weights, as in the
    # authors' code.
    return optax.chain(
        optax.add_decayed_weights(setting.weight_decay),
        msam_optax.msam(setting.schedule, setting.momentum, setting.rho),
    )


def _adam(setting: Setting) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(setting.weight_decay),
        optax.adam(setting.schedule, setting.momentum),
    )


def _adamw(setting: Setting) -> optax.GradientTransformation:
    return optax.adamw(
        setting.schedule, setting.momentum, weight_decay=setting.weight_decay
    )


def _adamw_msam(setting: Setting) -> optax.GradientTransformation:
    return msam_optax.adamw_msam(
        setting.schedule,
        setting.momentum,
        weight_decay=setting.weight_decay,
        rho=setting.rho,
    )


def _ae_looksam(setting: Setting) -> optax.GradientTransformation:
    return msam_optax.ae_looksam(_sgd(setting), setting.rho, setting.total_steps)


def _gsam(setting: Setting) -> optax.GradientTransformation:
    # As in the paper, rho follows the learning rate, down to a tenth.
    rho = msam_optax.rho_like_learning_rate(
        setting.schedule,
        rho_max=setting.rho,
        rho_min=setting.rho / 10,
        learning_rate_max=setting.learning_rate,
    )
    return msam_optax.gsam(_sgd(setting), rho)


def _wsam_decoupled(setting: Setting) -> optax.GradientTransformation:
    return msam_optax.wsam(_sgd(setting), setting.rho, learning_rate=setting.schedule)


def _ae_sam(setting: Setting) -> optax.GradientTransformation:
    return msam_optax.ae_sam(_sgd(setting), setting.rho, setting.total_steps)


METHODS: dict[str, Method] = {
    "sgd": Method(_sgd, 0.1, SGD_LEARNING_RATES),
    "nag": Method(lambda s: _sgd(s, nesterov=True), 0.1, SGD_LEARNING_RATES),
    "adam": Method(_adam, 1e-3, ADAM_LEARNING_RATES),
    "adamw": Method(_adamw, 1e-3, ADAM_LEARNING_RATES),
    "sam": Method(_around_sgd(msam_optax.sam), 0.1, SAM_RHOS, "sgd"),
    "asam": Method(_around_sgd(msam_optax.asam), 1.0, ASAM_RHOS, "sgd"),
    "fisher_sam": Method(_around_sgd(msam_optax.fisher_sam), 0.1, SAM_RHOS, "sgd"),
    "friendly_sam": Method(_around_sgd(msam_optax.friendly_sam), 0.1, SAM_RHOS, "sgd"),
    "gsam": Method(_gsam, 0.1, SAM_RHOS, "sgd"),
    "gradient_norm_penalty": Method(
        _around_sgd(msam_optax.gradient_norm_penalty), 0.1, SAM_RHOS, "sgd"
    ),
    "wsam": Method(_around_sgd(msam_optax.wsam), 0.05, SAM_RHOS, "sgd"),
    "wsam_decoupled": Method(_wsam_decoupled, 0.05, SAM_RHOS, "sgd"),
    "ss_sam": Method(_around_sgd(msam_optax.ss_sam), 0.1, SAM_RHOS, "sgd"),
    "ae_sam": Method(_ae_sam, 0.1, SAM_RHOS, "sgd"),
    "looksam": Method(_around_sgd(msam_optax.looksam), 0.1, SAM_RHOS, "sgd"),
    "ae_looksam": Method(_ae_looksam, 0.1, SAM_RHOS, "sgd"),
    "esam": Method(_around_sgd(msam_optax.esam), 0.1, SAM_RHOS, "sgd", 0.5),
    "msam": Method(_msam, 1.0, MSAM_RHOS, "sgd"),
    "adamw_msam": Method(_adamw_msam, 1.0, MSAM_RHOS, "adamw"),
}


def tuned_path(dataset: str, model: str) -> Path:
    """Where `tune.py` writes what it chose for a dataset and a model."""
    return RESULTS / f"tuned_{dataset}_{model}.json"


def load_tuned(dataset: str, model: str) -> tuple[dict[str, dict[str, float]], str]:
    """The hyper-parameters that `tune.py` chose, and in words where they come from.

    Returns:
      Hyper-parameters by method, empty if untuned; and their source.
    """
    path = tuned_path(dataset, model)
    if not path.is_file():
        return {}, "defaults, not tuned on this task"
    results = json.loads(path.read_text(encoding="utf-8"))
    noise, epochs = (results["settings"][key] for key in ("label_noise", "epochs"))
    source = f"{path.name}, tuned with label noise {noise:g} and {epochs} epochs"
    return results["chosen"], source


def hyperparameters(
    name: str, tuned: dict[str, dict[str, float]]
) -> tuple[float, float | None]:
    """Learning rate and rho of a method: the tuned ones, or else its defaults."""
    method = METHODS[name]
    if name in tuned:
        return tuned[name]["learning_rate"], tuned[name].get("rho")
    if method.base is None:
        return method.default, None
    return hyperparameters(method.base, tuned)[0], method.default
