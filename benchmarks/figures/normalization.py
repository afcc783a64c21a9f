"""What of MSAM is not Nesterov's momentum (MSAM paper, figure A.1 and appendix A.2).

Both take the gradient at w + ε with ε against the momentum v. From MSAM to Nesterov's
accelerated gradient it is two steps:

    normalised      ε = -ρ v/|v|     MSAM
    unnormalised    ε = -ρ v         shrinks with the gradients
    scaled by η     ε = -ρ η μ v     shrinks with the learning rate η, too; with ρ = 1
                                     w + ε is where the momentum, of decay μ, carries
                                     w by itself: Nesterov

η is that of the step whose gradient is taken at w + ε. The accuracy at the end is shown
against each one's own ρ, with SGD and `optax.sgd(nesterov=True)` as level lines. These
two are evaluated at the parameters in use, which for NAG are w + ε; the variants at w.
The learning rates are those of accuracy_against_rho.py.

Reference: Becker, Altrock and Risse, "Momentum-SAM", arXiv 2401.12033.

    python benchmarks/figures/normalization.py --quick
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import optax
from matplotlib.figure import Figure

import msam_optax
from benchmarks.figures import common, over_rho
from benchmarks.tasks import optimizers


class Variant(NamedTuple):
    """A length of the perturbation.

    Attributes:
      ascent: what is perturbed along the momentum, for a setting.
      rhos: that are compared, at a learning rate.
    """

    ascent: Callable[[optimizers.Setting], optax.GradientTransformation]
    rhos: Callable[[float], Sequence[float]]


def _normalised(setting: optimizers.Setting) -> optax.GradientTransformation:
    return msam_optax.ascents.normalized(setting.rho)


def _unnormalised(setting: optimizers.Setting) -> optax.GradientTransformation:
    return msam_optax.ascents.unnormalized(setting.rho)


def _scaled(setting: optimizers.Setting) -> optax.GradientTransformation:
    def rho(step):
        # The perturbation made in a step is that of the next step's gradient.
        return setting.rho * setting.momentum * setting.schedule(step + 1)

    return msam_optax.ascents.unnormalized(rho)


def _scaled_rhos(rate: float) -> list[float]:
    """Nesterov's, and those whose ρη is of the size of the unnormalised ρ."""
    return list(dict.fromkeys([1.0, *(round(r / rate, 1) for r in (0.1, 0.2, 0.4))]))


VARIANTS = {
    "normalised": Variant(_normalised, lambda rate: (0.3, 0.7, 1.4, 2.0)),
    "unnormalised": Variant(_unnormalised, lambda rate: (0.1, 0.2, 0.4, 0.6)),
    "scaled by η": Variant(_scaled, _scaled_rhos),
}


def build(variant: str, setting: optimizers.Setting) -> optax.GradientTransformation:
    """The optimizer of a variant; weight decay acts on the perturbed weights."""
    return optax.chain(
        optax.add_decayed_weights(setting.weight_decay),
        msam_optax.momentum_perturbation(
            optax.sgd(setting.schedule, setting.momentum),
            ascent=VARIANTS[variant].ascent(setting),
        ),
    )


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row for each seed, learning rate, variant and ρ."""
    return over_rho.compute(
        study,
        {
            name: over_rho.Sweep(
                study.adjustable_trainer("msam", partial(build, name)), variant.rhos
            )
            for name, variant in VARIANTS.items()
        },
    )


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A column for each variant; for each learning rate a row of test accuracies above
    one of training accuracies."""
    panels = common.grouped(rows, "learning_rate")
    figure, axes = common.panels(2 * len(panels), len(VARIANTS), alike=True)
    for pair, (rate, chosen) in zip(
        axes.reshape(len(panels), 2, -1), panels.items(), strict=True
    ):
        for column, variant in zip(pair.T, VARIANTS, strict=True):
            shown = [
                row for row in chosen if row["method"] in (*over_rho.BASES, variant)
            ]
            over_rho.draw(shown, "test", column[0])
            over_rho.draw(shown, "train", column[1])
            column[0].set_title(f"{variant}, learning rate {rate:g}")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw)


if __name__ == "__main__":
    sys.exit(main())
