"""SAM in balls of other norms: p = 1, 2 and infinity (SAM paper, section 2 and B.2).

ε is the point of the ball of radius ρ in the p-norm where the linearised loss is
highest: all of ρ on the largest entry of the gradient (p = 1), along the gradient
(p = 2), ρ times its signs (p = ∞). The paper finds no norm better than p = 2. All are
trained at SAM's learning rate and weight decay, each at its own best ρ on validation
data.

Reference: Foret et al., "Sharpness-Aware Minimization", arXiv 2010.01412.

    python benchmarks/figures/p_norms.py --quick
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import optax

import msam_optax
from benchmarks.figures import chosen, common
from benchmarks.tasks import optimizers, runs

# Of 269,000 weights: an ε of length 0.5 with all entries alike has entries of 0.001.
RHOS = {
    1: (0.2, 0.5, 1.0, 2.0, 5.0),
    2: (0.1, 0.2, 0.5, 1.0),
    math.inf: (5e-4, 1e-3, 2e-3, 5e-3),
}


def build(p: float, setting: optimizers.Setting) -> optax.GradientTransformation:
    """SAM around SGD in a p-norm."""
    ascent = msam_optax.ascents.normalized(setting.rho, p=p)
    return optax.chain(
        msam_optax.sharpness_aware_gradient(ascent), optimizers.sgd(setting)
    )


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a norm, ρ, part and seed."""
    variants = {
        f"p = {'∞' if p == math.inf else p}": chosen.Variant(
            partial(runs.make_run, build=partial(build, p)), rhos
        )
        for p, rhos in RHOS.items()
    }
    return chosen.compute(study, "sam", variants)


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    draw = partial(chosen.draw, xlabel="ρ, in the p-norm")
    return common.run(__file__, __doc__, argv, compute, draw)


if __name__ == "__main__":
    sys.exit(main())
