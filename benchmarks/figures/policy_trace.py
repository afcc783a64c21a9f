"""AE-SAM's policy at work: squared gradient norm, threshold and share of SAM steps.

After section 3 of arXiv 2304.14647, whose policy takes a SAM step where the squared
norm of the gradient is high against its running mean and deviation:

    python benchmarks/figures/policy_trace.py --quick
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import msam_optax
from benchmarks.figures import common
from benchmarks.reports.progress import progress
from benchmarks.tasks import optimizers, training
from msam_optax import plotting

# A full run has tens of thousands of steps: this many of each epoch are kept.
_STEPS_PER_EPOCH = 40


class RecordState(NamedTuple):
    """State of `recorded`.

    Attributes:
      policy_state: of the policy that is recorded.
      trace: float32[total_steps, 4], by step the squared norm of the gradient, its
        running mean, the threshold, and the decision.
    """

    policy_state: msam_optax.policies.AdaptiveState
    trace: jax.Array


def recorded(
    policy: msam_optax.policies.Policy, total_steps: int
) -> msam_optax.policies.Policy:
    """An `adaptive` policy that keeps what it saw and how it decided."""

    def init(params: Any) -> RecordState:
        return RecordState(policy.init(params), jnp.zeros((total_steps, 4)))

    def decide(
        updates: Any,
        state: RecordState,
        params: Any = None,
        *,
        step: jax.Array,
        **extra_args: Any,
    ) -> tuple[jax.Array, RecordState]:
        decision, inner = policy.decide(
            updates, state.policy_state, params, step=step, **extra_args
        )
        squared_norm = optax.tree.norm(updates, squared=True)
        row = jnp.stack([squared_norm, inner.mean, inner.threshold, decision])
        trace = state.trace.at[step].set(row)
        return decision, RecordState(inner, trace)

    return msam_optax.policies.Policy(init, decide)


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a seed and step."""
    task, setting = study.task, study.setting("ae_sam")
    total = task.total_steps
    # AE-SAM as `msam_optax.ae_sam` builds it, but for the record.
    optimizer = optax.chain(
        msam_optax.employ(
            recorded(msam_optax.policies.adaptive(total), total),
            msam_optax.sharpness_aware_gradient(
                msam_optax.ascents.normalized(setting.rho)
            ),
        ),
        optimizers.METHODS["sgd"].build(setting),
    )
    trainer = training.Trainer(task, optimizer)
    stride = max(task.steps_per_epoch // _STEPS_PER_EPOCH, 1)
    steps = np.arange(total)
    # The last step of each epoch is among those that are kept.
    kept = steps[(steps + 1) % task.steps_per_epoch % stride == 0]
    rows = []
    with progress(len(study.seeds)) as bar:
        for seed in study.seeds:
            bar.describe(f"AE-SAM, seed {seed + 1} of {len(study.seeds)}")
            *_, epoch = trainer.epochs(seed)
            bar.advance()
            trace = np.asarray(epoch.state.opt_state[0].policy_state.trace, np.float64)
            squared_norm, mean, threshold, employed = trace.T
            share = employed.reshape(task.epochs, -1).mean(1)
            columns = {
                "epoch": (steps + 1) / task.steps_per_epoch,
                "squared_norm": squared_norm,
                "mean": mean,
                "threshold": threshold,
                "employed": employed,
                "epoch_fraction": np.repeat(share, task.steps_per_epoch),
                "fraction_so_far": np.cumsum(employed) / (steps + 1),
            }
            rows += [
                {
                    "seed": seed,
                    "step": int(step),
                    "rho": setting.rho,
                    # What float32 holds: digits beyond are of no use in a file.
                    **{key: float(f"{x[step]:.7g}") for key, x in columns.items()},
                }
                for step in kept
            ]
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """The trace of the first seed; the share of SAM steps over all seeds."""
    figure, ((left, right),) = common.panels(1, 2)
    trace = [row for row in rows if row["seed"] == rows[0]["seed"]]
    columns = ("squared_norm", "mean", "threshold", "employed")
    plotting.plot_policy(*([row[key] for row in trace] for key in columns), ax=left)
    steps = [row["step"] for row in trace]
    # What is drawn are the steps that were kept.
    left.xaxis.set_major_formatter(
        lambda i, _: f"{np.interp(i, np.arange(len(steps)), steps):.0f}"
    )
    ends = [row for row in rows if row["epoch"] == round(row["epoch"])]
    shares = [
        {"share": share, "epoch": row["epoch"], "percent": 100 * row[column]}
        for share, column in (
            ("in each epoch", "epoch_fraction"),
            ("from the start", "fraction_so_far"),
        )
        for row in ends
    ]
    plotting.plot_estimates(
        common.curves(shares, "share", "epoch", "percent"),
        xlabel="epoch",
        ylabel="SAM steps (%)",
        ax=right,
    )
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw)


if __name__ == "__main__":
    sys.exit(main())
