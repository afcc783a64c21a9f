"""SAM with a perturbation for each m examples of a batch (SAM paper, section 4.1).

A batch of 128 is cut into shards of m examples. Each is perturbed along its own
gradient, and the gradients there are averaged. The paper finds that a smaller m
generalises better. All are trained at SAM's learning rate and weight decay, each at its
own best ρ on validation data.

Reference: Foret et al., "Sharpness-Aware Minimization", arXiv 2010.01412.

    python benchmarks/figures/m_sharpness.py --quick
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import msam_optax
from benchmarks.figures import chosen, common
from benchmarks.tasks import optimizers, runs

BATCH = 128
EXAMPLES = (128, 32, 8)
RHOS = (0.05, 0.1, 0.2, 0.5, 1.0)


def make_run(problem: runs.Problem, examples: int) -> runs.Run:
    """As `runs.make_run`, by SAM on shards of so many examples."""

    def gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: problem.loss_fn(p, {}, batch, None)[0].mean())(params)

    def run(hyperparameters: Any, inputs: runs.Inputs) -> Any:
        rate, rho, decay = hyperparameters
        setting = optimizers.Setting(rate, rho, decay, problem.total_steps)
        sgd = optimizers.sgd(setting)
        sam = msam_optax.m_sharpness(
            msam_optax.sharpness_aware_gradient(msam_optax.ascents.normalized(rho)),
            shards=BATCH // examples,
        )
        key, _ = jax.random.split(jax.random.key(inputs.seed))
        start = problem.init(sgd, key, inputs.train)

        def body(carry: Any, indices: Any) -> Any:
            params, sam_state, sgd_state = carry
            batch = problem.gather(inputs.train, indices, None)
            found, sam_state = sam.gradient(gradient, sam_state, params, batch)
            updates, sgd_state = sgd.update(found, sgd_state, params)
            return (optax.apply_updates(params, updates), sam_state, sgd_state), None

        first = start.params, sam.init(start.params), start.opt_state
        (params, *_), _ = jax.lax.scan(body, first, inputs.order)
        outcome = runs.Outcome(
            *problem.evaluate(params, inputs.held_out),
            *problem.evaluate(params, inputs.train),
            jnp.float32(1),
        )
        return outcome, params

    return run


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row for each m, ρ, part and seed."""
    variants = {
        f"m = {m}": chosen.Variant(partial(make_run, examples=m), RHOS)
        for m in EXAMPLES
    }
    return chosen.compute(study, "sam", variants)


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, chosen.draw)


if __name__ == "__main__":
    sys.exit(main())
