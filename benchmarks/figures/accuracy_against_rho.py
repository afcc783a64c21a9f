"""Test and training accuracy against ρ of both signs (MSAM paper, figure 2A, B).

MSAM and SAM are trained with each ρ. A positive ρ is the method as it is, along -v in
MSAM and along the gradient in SAM; a negative one perturbs the other way. SGD and NAG,
that have no ρ, are level lines. The training accuracy is on the labels that were
trained on, with the random ones among them.

The learning rates are SGD's tuned one, and a usual, larger one with which SGD fits
random labels too. Neither is tuned for a value of ρ, nor for other numbers of epochs
than those of the tuning.

Reference: Becker, Altrock and Risse, "Momentum-SAM", arXiv 2401.12033.

    python benchmarks/figures/accuracy_against_rho.py --quick
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.figures import common, over_rho
from benchmarks.figures.over_rho import Sweep

MSAM_RHOS = (-0.3, 0.3, 0.7, 1.4, 2.0)
SAM_RHOS = (-0.1, 0.1, 0.2, 0.4)


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row for each seed, learning rate, method and ρ."""
    sweeps = {
        "msam": Sweep(study.adjustable_trainer("msam"), lambda rate: MSAM_RHOS),
        "sam": Sweep(study.adjustable_trainer("sam"), lambda rate: SAM_RHOS),
    }
    return over_rho.compute(study, sweeps)


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Test accuracy above training accuracy, a column for each learning rate."""
    panels = common.grouped(rows, "learning_rate")
    figure, axes = common.panels(2, len(panels))
    for column, (rate, chosen) in zip(axes.T, panels.items(), strict=True):
        over_rho.draw(chosen, "test", column[0])
        over_rho.draw(chosen, "train", column[1])
        column[0].set_title(f"learning rate {rate:g}")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw)


if __name__ == "__main__":
    sys.exit(main())
