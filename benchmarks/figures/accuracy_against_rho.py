"""Validation and training accuracy over ρ of both signs (MSAM paper, figure 2A, B).

MSAM and SAM are trained with each ρ. A positive ρ is the method as it is, along -v in
MSAM and along the gradient in SAM; a negative one perturbs the other way. SGD and NAG,
that have no ρ, are level lines. The training accuracy is on the labels that were
trained on, with the random ones among them.

Learning rate and weight decay of each method are those of its study, tuned together
with its ρ there, and the same at every ρ here. With ρ = 0 both are SGD at the method's
rate and decay, which is not SGD's own.

Reference: Becker, Altrock and Risse, "Momentum-SAM", arXiv 2401.12033.

    python benchmarks/figures/accuracy_against_rho.py --quick
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.figures import common, over_rho

RHOS = {
    "msam": (-0.5, -0.2, 0.0, 0.2, 0.5, 1.0, 2.0),
    "sam": (-0.2, 0.0, 0.1, 0.2, 0.5, 1.0),
}


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row for each seed, method and ρ."""
    sweeps = {
        method: over_rho.sweep(study, method, rhos) for method, rhos in RHOS.items()
    }
    return over_rho.compute(study, sweeps)


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation accuracy beside training accuracy."""
    figure, ((left, right),) = common.panels(1, 2)
    over_rho.draw(rows, "validation", left)
    over_rho.draw(rows, "train", right)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw, part="validation")


if __name__ == "__main__":
    sys.exit(main())
