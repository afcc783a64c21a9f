"""What of MSAM is not Nesterov's momentum (MSAM paper, figure A.1 and appendix A.2).

Both take the gradient at w + ε with ε against the momentum v. From MSAM to Nesterov's
accelerated gradient it is two steps:

    normalised      ε = -ρ v/|v|     MSAM
    unnormalised    ε = -ρ v         shrinks with the gradients
    scaled by η     ε = -ρ η μ v     shrinks with the learning rate η, too; with ρ = 1
                                     w + ε is where the momentum, of decay μ, carries
                                     w by itself: Nesterov

η is that of the step whose gradient is taken at w + ε. The accuracy at the end on a
validation part is shown against each one's own ρ, with SGD and
`optax.sgd(nesterov=True)` as level lines. These two stand at their own tuned learning
rate and weight decay, the variants at MSAM's. They are evaluated at the parameters in
use, which for NAG are w + ε; the variants at w.

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
      rhos: that are compared.
    """

    ascent: Callable[[optimizers.Setting], optax.GradientTransformation]
    rhos: Sequence[float]


def _normalised(setting: optimizers.Setting) -> optax.GradientTransformation:
    return msam_optax.ascents.normalized(setting.rho)


def _unnormalised(setting: optimizers.Setting) -> optax.GradientTransformation:
    return msam_optax.ascents.unnormalized(setting.rho)


def _scaled(setting: optimizers.Setting) -> optax.GradientTransformation:
    def rho(step):
        # The perturbation made in a step is that of the next step's gradient.
        return setting.rho * setting.momentum * setting.schedule(step + 1)

    return msam_optax.ascents.unnormalized(rho)


VARIANTS = {
    "normalised": Variant(_normalised, (0.2, 0.5, 1.0, 2.0)),
    "unnormalised": Variant(_unnormalised, (0.1, 0.2, 0.5, 1.0, 2.0)),
    # The first is Nesterov's.
    "scaled by η": Variant(_scaled, (1.0, 3.0, 10.0, 30.0, 100.0)),
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
    """One row for each seed, variant and ρ."""
    return over_rho.compute(
        study,
        {
            name: over_rho.sweep(study, "msam", variant.rhos, partial(build, name))
            for name, variant in VARIANTS.items()
        },
    )


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A column for each variant: validation accuracies above training accuracies."""
    figure, axes = common.panels(2, len(VARIANTS), alike=True)
    for column, variant in zip(axes.T, VARIANTS, strict=True):
        shown = [row for row in rows if row["method"] in (*over_rho.BASES, variant)]
        for ax, part in zip(column, ("validation", "train"), strict=True):
            over_rho.draw(shown, part, ax)
            ax.set_xscale("log")
        column[0].set_title(variant)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw, part="validation")


if __name__ == "__main__":
    sys.exit(main())
