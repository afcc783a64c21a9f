"""The optimizers that the benchmarks compare.

To add one, add an entry to `METHODS`.
"""

import importlib
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optax

import msam_optax
from benchmarks.tasks.search import Hyperparameters, Space, axis

RESULTS = Path(__file__).resolve().parents[1] / "results"

MOMENTUM = 0.9
# Where it was not tuned
WEIGHT_DECAY = 5e-4
# What the search draws from at first; the learning rates three and then ten times the
# first, the rest 1, 2, 5, 10 times.
SGD_RATES = axis(0.001, 0.3, (1, 3))
ADAM_RATES = axis(3e-5, 0.01, (1, 3))
DECAYS = axis(0.001, 0.1)
SAM_RHOS = axis(0.05, 1.0)
ASAM_RHOS = axis(0.5, 10.0)
MSAM_RHOS = axis(0.2, 5.0)
SGD = Space(SGD_RATES, DECAYS)
SAM = Space(SGD_RATES, DECAYS, SAM_RHOS)
ASAM = SAM._replace(rho=ASAM_RHOS)
MSAM = SAM._replace(rho=MSAM_RHOS)
ADAM = Space(ADAM_RATES, axis(1e-5, 0.01))
# AdamW's decay is multiplied with its small learning rate.
ADAMW = Space(ADAM_RATES, axis(0.05, 10.0))


class Setting(NamedTuple):
    """What an optimizer is built from.

    Attributes:
      learning_rate: at the first step; it falls to 0 along a cosine.
      rho: radius of the perturbation; no matter for a method without one.
      weight_decay: lambda; decoupled in AdamW, part of the gradient elsewhere.
      total_steps: number of steps of the whole training.
      momentum: of SGD, and the decay of Adam's first moment.
      seed: of what an optimizer draws.
    """

    learning_rate: float
    rho: float
    weight_decay: float
    total_steps: int
    momentum: float = MOMENTUM
    seed: int = 0

    @property
    def schedule(self) -> optax.Schedule:
        return optax.cosine_decay_schedule(self.learning_rate, self.total_steps)


Build = Callable[[Setting], optax.GradientTransformation]


class Method(NamedTuple):
    """A way to train.

    Attributes:
      build: makes the optimizer.
      default: rho where it was not tuned, or the learning rate of a method without
        one.
      space: what `tune.py` draws its hyper-parameters from.
      base: the method whose learning rate this one takes over where it was not tuned;
        a method without one has no rho.
      extra_gradient: of how much of the batch the second gradient is, where there is
        one; ESAM's forward pass over the whole batch is not counted.
    """

    build: Build
    default: float
    space: Space
    base: str | None = None
    extra_gradient: float = 1.0


def sgd(setting: Setting, nesterov: bool = False) -> optax.GradientTransformation:
    """SGD with weight decay in the gradient."""
    return optax.chain(
        optax.add_decayed_weights(setting.weight_decay),
        optax.sgd(setting.schedule, setting.momentum, nesterov),
    )


def _around_sgd(
    method: Callable[..., optax.GradientTransformation],
) -> Build:
    """A method as it comes, around SGD."""
    return lambda setting: method(sgd(setting), setting.rho)


def _msam(setting: Setting) -> optax.GradientTransformation:
    # Outside of msam, as here, the decay acts on the perturbed weights, as in the
    # authors' code.
    return optax.chain(
        optax.add_decayed_weights(setting.weight_decay),
        msam_optax.msam(setting.schedule, setting.momentum, rho=setting.rho),
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


def _lion(setting: Setting) -> optax.GradientTransformation:
    return optax.lion(
        setting.schedule, setting.momentum, weight_decay=setting.weight_decay
    )


def _muon(setting: Setting) -> optax.GradientTransformation:
    # Muon's matrices and AdamW's other tensors share rate and decay.
    return optax.contrib.muon(
        setting.schedule,
        weight_decay=setting.weight_decay,
        adam_weight_decay=setting.weight_decay,
    )


def _along(base: Build, direction: Literal["momentum", "update"]) -> Build:
    """MSAM around a base, along its momentum or along its last update."""
    return lambda setting: msam_optax.momentum_perturbation(
        base(setting), setting.rho, along=direction
    )


def _ae_looksam(setting: Setting) -> optax.GradientTransformation:
    return msam_optax.ae_looksam(sgd(setting), setting.rho, setting.total_steps)


def _gsam(setting: Setting) -> optax.GradientTransformation:
    # As in the paper, rho follows the learning rate, down to a tenth.
    rho = msam_optax.rho_like_learning_rate(
        setting.schedule,
        rho_max=setting.rho,
        rho_min=setting.rho / 10,
        learning_rate_max=setting.learning_rate,
    )
    return msam_optax.gsam(sgd(setting), rho)


def _wsam_decoupled(setting: Setting) -> optax.GradientTransformation:
    return msam_optax.wsam(sgd(setting), setting.rho, learning_rate=setting.schedule)


def _ae_sam(setting: Setting) -> optax.GradientTransformation:
    return msam_optax.ae_sam(sgd(setting), setting.rho, setting.total_steps)


def _with(
    ascent: Callable[[Setting], optax.GradientTransformation], combine: Any = None
) -> Callable[[Setting], optax.GradientTransformation]:
    """A sharpness-aware gradient in front of SGD."""
    return lambda s: optax.chain(
        msam_optax.sharpness_aware_gradient(ascent(s), combine), sgd(s)
    )


def _normalized(setting: Setting) -> optax.GradientTransformation:
    return msam_optax.ascents.normalized(setting.rho)


def _loss_equated(setting: Setting) -> optax.GradientTransformation:
    # As in the paper, the budget falls along a cosine over the last fifth. What is
    # tuned is the budget; the limit is one that SAM's best radii stay below.
    last = max(setting.total_steps // 5, 1)
    sigma = optax.join_schedules(
        [
            optax.constant_schedule(setting.rho),
            optax.cosine_decay_schedule(setting.rho, last),
        ],
        [setting.total_steps - last],
    )
    return msam_optax.ascents.loss_equated(sigma, rho_max=1.0)


def _noise(setting: Setting) -> optax.GradientTransformation:
    falling = optax.cosine_decay_schedule(setting.rho, setting.total_steps)
    return msam_optax.ascents.gaussian(
        lambda step: setting.rho - falling(step), setting.seed, filterwise=True
    )


def _sampa(setting: Setting) -> optax.GradientTransformation:
    return msam_optax.sampa(sgd(setting), setting.schedule, setting.rho)


def _bsam(setting: Setting) -> optax.GradientTransformation:
    # Its step is over the precision, of about the damping's size, so that SGD's
    # learning rates serve. N is that of the main job.
    return msam_optax.bsam(
        setting.schedule,
        num_examples=4000,
        rho=setting.rho,
        b1=setting.momentum,
        weight_decay=setting.weight_decay,
        seed=setting.seed,
    )


_MUON = Space(axis(1e-3, 0.1, (1, 3)), axis(0.05, 2.0))
_MUON_MSAM = _MUON._replace(rho=MSAM_RHOS)
_ADAMW_ALONG = ADAMW._replace(rho=MSAM_RHOS)

METHODS: dict[str, Method] = {
    "sgd": Method(sgd, 0.1, SGD),
    "nag": Method(lambda s: sgd(s, nesterov=True), 0.1, SGD),
    "adam": Method(_adam, 1e-3, ADAM),
    "adamw": Method(_adamw, 1e-3, ADAMW),
    "sam": Method(_around_sgd(msam_optax.sam), 0.1, SAM, "sgd"),
    "asam": Method(_around_sgd(msam_optax.asam), 1.0, ASAM, "sgd"),
    "fisher_sam": Method(_around_sgd(msam_optax.fisher_sam), 0.1, SAM, "sgd"),
    "friendly_sam": Method(_around_sgd(msam_optax.friendly_sam), 0.1, SAM, "sgd"),
    "gsam": Method(_gsam, 0.1, SAM, "sgd"),
    "gradient_norm_penalty": Method(
        _around_sgd(msam_optax.gradient_norm_penalty), 0.1, SAM, "sgd"
    ),
    "wsam": Method(_around_sgd(msam_optax.wsam), 0.05, SAM, "sgd"),
    "wsam_decoupled": Method(_wsam_decoupled, 0.05, SAM, "sgd"),
    "ss_sam": Method(_around_sgd(msam_optax.ss_sam), 0.1, SAM, "sgd"),
    "ae_sam": Method(_ae_sam, 0.1, SAM, "sgd"),
    "looksam": Method(_around_sgd(msam_optax.looksam), 0.1, SAM, "sgd"),
    "ae_looksam": Method(_ae_looksam, 0.1, SAM, "sgd"),
    "esam": Method(_around_sgd(msam_optax.esam), 0.1, SAM, "sgd", 0.5),
    "sam_renormalized": Method(
        _with(_normalized, msam_optax.combine.renormalize), 0.1, SAM, "sgd"
    ),
    "le_sam": Method(_with(_loss_equated), 0.1, SAM, "sgd"),
    "spectral_sam": Method(
        _with(lambda s: msam_optax.ascents.spectral(s.rho, s.rho)), 0.02, SAM, "sgd"
    ),
    "filter_noise": Method(_with(_noise), 0.1, SAM, "sgd", 0.0),
    "sampa": Method(_sampa, 0.1, SAM, "sgd"),
    "bsam": Method(_bsam, 0.05, SAM, "sgd"),
    "msam": Method(_msam, 1.0, MSAM, "sgd"),
    "adamw_msam": Method(_adamw_msam, 1.0, _ADAMW_ALONG, "adamw"),
    "msam_along_update": Method(_along(sgd, "update"), 1.0, MSAM, "sgd"),
    "adamw_along_update": Method(_along(_adamw, "update"), 1.0, _ADAMW_ALONG, "adamw"),
    "lion": Method(_lion, 1e-4, ADAMW),
    "lion_along_momentum": Method(_along(_lion, "momentum"), 1.0, _ADAMW_ALONG, "lion"),
    "lion_along_update": Method(_along(_lion, "update"), 1.0, _ADAMW_ALONG, "lion"),
    "muon": Method(_muon, 1e-2, _MUON),
    "muon_along_momentum": Method(_along(_muon, "momentum"), 1.0, _MUON_MSAM, "muon"),
    "muon_along_update": Method(_along(_muon, "update"), 1.0, _MUON_MSAM, "muon"),
}


@cache
def find(name: str) -> Method:
    """A method by its name, or one of your own by `module:function`.

    The function makes the optimizer of a :class:`Setting`, as `Method.build` does. The
    module is looked for in the folder that the command runs in, too.

    Raises:
      ValueError: if there is none.
    """
    if name in METHODS:
        return METHODS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(
            f"no optimizer is called {name!r}: choose from {', '.join(METHODS)}, or "
            "give one of your own as module:function."
        )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} can't be imported ({error}).") from error
    return Method(build, 0.0, SAM, "sgd")


def _around_adamw(
    method: Callable[..., optax.GradientTransformation],
) -> Build:
    return lambda setting: method(_adamw(setting), setting.rho)


def _adamw_ae_sam(setting: Setting) -> optax.GradientTransformation:
    return msam_optax.ae_sam(_adamw(setting), setting.rho, setting.total_steps)


def _adamw_tail(setting: Setting) -> optax.GradientTransformation:
    # SAM on the last quarter of the steps, where alone the learning rate falls.
    quarter = setting.total_steps, 0.25
    ascent = msam_optax.ascents.normalized(setting.rho)
    sam = msam_optax.sharpness_aware_gradient(ascent)
    late = msam_optax.employ(msam_optax.policies.tail(*quarter), sam)
    rate = msam_optax.hold_then_decay(setting.learning_rate, *quarter)
    adamw = optax.adamw(rate, setting.momentum, weight_decay=setting.weight_decay)
    return optax.chain(late, adamw)


_ADAMW_SAM = ADAMW._replace(rho=axis(0.02, 0.5))
_ADAMW_MSAM = ADAMW._replace(rho=axis(0.02, 0.5))

# For a transformer: the optimizer and what its hyper-parameters are drawn from.
AROUND_ADAMW: dict[str, tuple[Build, Space]] = {
    "adamw": (_adamw, ADAMW),
    "adamw_msam": (_adamw_msam, _ADAMW_MSAM),
    "sam": (_around_adamw(msam_optax.sam), _ADAMW_SAM),
    "ae_sam": (_adamw_ae_sam, _ADAMW_SAM),
    "sam, tail": (_adamw_tail, _ADAMW_SAM),
    "muon": (_muon, _MUON),
    "muon, msam": (_along(_muon, "momentum"), _MUON._replace(rho=axis(0.02, 0.5))),
    "muon, msam along the update": (
        _along(_muon, "update"),
        _MUON._replace(rho=axis(0.02, 0.5)),
    ),
    "adamw, msam along the update": (_along(_adamw, "update"), _ADAMW_MSAM),
}


# What `tune.py` tuned, by dataset and model, as compare.py trains them.
_STUDIES = {("mnist5k", "mlp"): "digits"}


def load_studied(dataset: str, model: str) -> tuple[dict[str, Hyperparameters], str]:
    """The hyper-parameters that `tune.py` chose, and in words where they come from.

    Returns:
      Hyper-parameters by method, empty if untuned; and their source.
    """
    study = _STUDIES.get((dataset, model))
    chosen = chosen_by(study) if study else {}
    if not chosen:
        return {}, "defaults, not tuned on this task"
    return chosen, f"studies/{study}, tuned with label noise 0.4 and 30 epochs"


def chosen_by(study: str) -> dict[str, Hyperparameters]:
    """What a study of `tune.py` chose, by method; empty if it was not run."""
    path = RESULTS / "studies" / study / "chosen.json"
    if not path.is_file():
        return {}
    methods = json.loads(path.read_text(encoding="utf-8"))["methods"]
    return {
        method: Hyperparameters(**found["chosen"]) for method, found in methods.items()
    }


def untuned(name: str) -> Hyperparameters:
    """A method's hyper-parameters where it was not tuned."""
    method = find(name)
    if method.base is None:
        return Hyperparameters(method.default, None, WEIGHT_DECAY)
    # One of your own has no rho unless it is given.
    return Hyperparameters(
        find(method.base).default, method.default or None, WEIGHT_DECAY
    )
