"""SAM with and without the terms of second order (SAM paper, section 4.4 and C.4).

SAM descends along ∇L at w + ε(w). The gradient of w -> L(w + ε(w)) has a further term,
through ε, which the method leaves out, for its cost; the paper reports that with it the
accuracy falls. Both are trained at SAM's learning rate and weight decay, each at its
own best ρ on validation data.

Reference: Foret et al., "Sharpness-Aware Minimization", arXiv 2010.01412.

    python benchmarks/figures/second_order.py --quick
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import optax

import msam_optax
from benchmarks.figures import chosen, common
from benchmarks.tasks import optimizers, runs

RHOS = (0.1, 0.2, 0.5, 1.0)
ORDERS = {"first order": False, "second order": True}


def build(
    second_order: bool, setting: optimizers.Setting
) -> optax.GradientTransformation:
    """SAM around SGD, with or without the gradient through ε."""
    sam = msam_optax.sharpness_aware_gradient(
        msam_optax.ascents.normalized(setting.rho), second_order=second_order
    )
    return optax.chain(sam, optimizers.sgd(setting))


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a variant, ρ, part and seed."""
    variants = {
        name: chosen.Variant(
            partial(runs.make_run, build=partial(build, second_order)), RHOS
        )
        for name, second_order in ORDERS.items()
    }
    return chosen.compute(study, "sam", variants)


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, chosen.draw)


if __name__ == "__main__":
    sys.exit(main())
