"""Measures what optimizers cost: time, memory and FLOPs, over their base optimizer.

python benchmarks/step_cost.py
python benchmarks/step_cost.py --peers /path/to/a/python/with/torch
python benchmarks/step_cost.py --full
python benchmarks/step_cost.py --quick --out /tmp/step_cost
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import msam_optax
from benchmarks import arguments
from benchmarks.costs import timing
from benchmarks.costs.methods import (
    ACCELERATOR_BARS,
    CPU_BARS,
    METHODS,
    NO_BARS,
    TIMED,
    Bars,
    Method,
)
from benchmarks.costs.programs import Program, compile_program
from benchmarks.reports import report, tables
from benchmarks.reports.step_costs import (
    Measured,
    PeerCost,
    StepCost,
    UpdateCost,
    print_report,
    save,
)
from benchmarks.tasks import workloads

# Every branch of every optimizer but the one that never employs runs in these.
_WARM_UP_STEPS = 5
# Of the update alone: many more bytes than caches hold, in several tensors.
_PARAMETERS = {"quick": 10_000, "cpu": 30_000_000, "full": 100_000_000}
_UPDATE_ROUNDS = {"quick": 2, "cpu": 30, "full": 100}
_TENSORS = 10
_UPDATES = tuple(name for name in TIMED if METHODS[name].update_alone)


class Trial:
    """One optimizer in training.

    Attributes:
      state_bytes: of the optimizer's state.
      employs: whether the optimizer takes its extra gradient on some steps only.
      programs: what it runs.
      flops: of a step without the extra gradient, and of one with it.
    """

    def __init__(
        self, problem: workloads.Problem, method: Method, total_steps: int
    ) -> None:
        optimizer = method.build(total_steps)
        self._calls = method.calls
        self._batches = itertools.cycle(problem.batches)
        self._key = jax.random.key(1)
        self._step = msam_optax.make_train_step(problem.loss_fn, optimizer)
        self._state = problem.start(optimizer)
        self.state_bytes = _size(self._state.opt_state)
        self.employs = any(
            isinstance(node, msam_optax.EmployState)
            for node in jax.tree.leaves(
                self._state.opt_state,
                is_leaf=lambda x: isinstance(x, msam_optax.EmployState),
            )
        )
        args = self._state, next(self._batches), self._key
        self.programs = _compiled(self._step, *args)
        self.flops = _flops(self.programs)
        if self.employs and "step" in self.programs:
            # XLA counts the dearest branch of a conditional: take the branches apart.
            apart = msam_optax.make_train_step(
                problem.loss_fn, optimizer, dispatch="host"
            )
            self.flops = _flops(_compiled(apart, *args))

    def run(self, steps: int) -> list[timing.Sample]:
        """Takes training steps, and waits for each as a user that reads it would."""
        samples = []
        for _ in range(steps):
            batch = next(self._batches)
            start = time.perf_counter()
            for _ in range(self._calls):
                self._state, metrics = self._step(self._state, batch, self._key)
            jax.block_until_ready((self._state, metrics))
            seconds = time.perf_counter() - start
            employed = bool(metrics.employed) if self.employs else True
            samples.append(timing.Sample(seconds, employed))
        return samples


def _compiled(step: msam_optax.TrainStep, *args: Any) -> dict[str, Program]:
    start = time.process_time()
    programs = step.lower(*args).programs
    seconds = (time.process_time() - start) / len(programs)
    return {
        name: compile_program(lowered, seconds)[0] for name, lowered in programs.items()
    }


def _flops(programs: dict[str, Program]) -> tuple[float, float]:
    if "step" in programs:
        return programs["step"].flops, programs["step"].flops
    decide, plain, employed = (
        programs[name].flops for name in ("decide", "plain", "employed")
    )
    return decide + plain, decide + employed


def measure_steps(
    workload: workloads.Workload,
    progress: Callable[[str], None],
    names: Sequence[str] = TIMED,
) -> list[StepCost]:
    """Compiles and times the whole training step of optimizers and their bases."""
    problem = workloads.problem(workload)
    total_steps = _WARM_UP_STEPS + workload.rounds * workload.steps
    trials = {}
    for name in names:
        progress(f"{workload.model}: compiling {name}")
        trials[name] = Trial(problem, METHODS[name], total_steps)
        trials[name].run(_WARM_UP_STEPS)
    progress(f"{workload.model}: {workload.rounds} rounds")
    turns = {
        name: lambda trial=trial: trial.run(workload.steps)
        for name, trial in trials.items()
    }
    rounds = timing.interleave(turns, workload.rounds)
    return [
        _step_cost(workload.model, name, trial, rounds, _size(problem.params))
        for name, trial in trials.items()
    ]


def _step_cost(
    model: str,
    name: str,
    trial: Trial,
    rounds: Sequence[timing.Round],
    params_bytes: int,
) -> StepCost:
    method = METHODS[name]
    fraction = timing.employed_fraction(rounds, name)

    plain, employed = trial.flops
    programs = trial.programs.values()
    return StepCost(
        model=model,
        name=name,
        base=method.base,
        time_ratio=timing.ratio(rounds, name, method.base),
        seconds=timing.seconds(rounds, name),
        employed_fraction=fraction if trial.employs else None,
        gradients=method.calls * (1 + fraction * method.extra_gradients),
        flops=method.calls * ((1 - fraction) * plain + fraction * employed),
        temporary_bytes=max(program.temporary_bytes for program in programs),
        argument_bytes=max(program.argument_bytes for program in programs),
        state_bytes=trial.state_bytes,
        params_bytes=params_bytes,
        trace_seconds=sum(program.trace_seconds for program in programs),
        compile_seconds=sum(program.compile_seconds for program in programs),
    )


def measure_updates(
    parameters: int,
    rounds: int,
    progress: Callable[[str], None],
    names: Sequence[str] = _UPDATES,
) -> list[UpdateCost]:
    """Compiles and times the update alone of optimizers and their bases.

    One program takes params, state and gradient, and gives the new ones in the same
    memory. An extra gradient is that of a quadratic loss, an addition; an optimizer
    that employs takes none.
    """
    size = parameters // _TENSORS
    keys = jax.random.split(jax.random.key(0), _TENSORS)
    grads = {f"{i}": jax.random.normal(key, (size,)) for i, key in enumerate(keys)}
    programs, turns = {}, {}
    for name in names:
        progress(f"update alone: compiling {name}")
        programs[name], turns[name] = _update(METHODS[name].build(rounds), grads)
    progress(f"update alone: {rounds} rounds")
    for turn in turns.values():
        turn()
    measured = timing.interleave(turns, rounds)
    return [
        UpdateCost(
            name=name,
            base=METHODS[name].base,
            time_ratio=timing.ratio(measured, name, METHODS[name].base),
            seconds=timing.seconds(measured, name),
            temporary_bytes=program.temporary_bytes,
            accessed_bytes=program.accessed_bytes,
            params_bytes=_size(grads),
        )
        for name, program in programs.items()
    ]


def _update(
    optimizer: optax.GradientTransformation, grads: dict[str, jax.Array]
) -> tuple[Program, Callable[[], list[timing.Sample]]]:
    tx = optax.with_extra_args_support(optimizer)

    def update(params, state, grads):
        def grad_fn(params):
            return optax.tree.add(params, grads)

        updates, state = tx.update(
            grads, state, params, grad_fn=grad_fn, employed=False
        )
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(update, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, grads)
    state = tx.init(params)
    program, _ = compile_program(jitted.lower(params, state, grads), 0.0)

    def turn():
        nonlocal params, state
        start = time.perf_counter()
        params, state = jax.block_until_ready(jitted(params, state, grads))
        return [timing.Sample(time.perf_counter() - start)]

    return program, turn


def measure_peers(
    python: str,
    chosen: Sequence[workloads.Workload],
    progress: Callable[[str], None],
) -> tuple[list[PeerCost], dict[str, str]]:
    """Times PyTorch's optimizers on the same models, in a process of their own.

    Returns:
      The costs, and the versions of the packages.
    """
    settings = [
        workload._asdict() for workload in chosen if workload.model in ("mlp", "cnn")
    ]
    progress("PyTorch's optimizers")
    process = subprocess.run(
        # Another interpreter, in which this project is not installed.
        [python, "-m", "benchmarks.costs.peers_torch"],
        cwd=Path(__file__).resolve().parents[1],
        input=json.dumps(settings),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = json.loads(process.stdout)
    costs = [
        PeerCost(
            **{
                **cost,
                "time_ratio": timing.Spread(*cost["time_ratio"]),
                "seconds": timing.Spread(*cost["seconds"]),
            }
        )
        for cost in result["costs"]
    ]
    return costs, result["versions"]


def _size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--full",
        dest="size",
        action="store_const",
        const="full",
        default="cpu",
        help="models of the size that an accelerator trains",
    )
    size.add_argument(
        "--quick",
        dest="size",
        action="store_const",
        const="quick",
        help="tiny models and few rounds, to see that all of it works",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=sorted({name for size in workloads.SIZES.values() for name in size}),
        metavar="NAME",
        help="what is trained (default: all that there are in that size)",
    )
    parser.add_argument(
        "--rounds",
        type=arguments.positive_integer,
        metavar="N",
        help="rounds of measurement, in the place of each model's own",
    )
    parser.add_argument(
        "--parameters",
        type=arguments.positive_integer,
        metavar="N",
        help="of the update alone (default: 3e7, or 1e8 with --full)",
    )
    parser.add_argument(
        "--peers",
        metavar="PYTHON",
        help="also measure PyTorch's optimizers, with an interpreter that has torch "
        "and pytorch_optimizer",
    )
    arguments.add_out(parser, Path("runs/step_cost"))
    return parser


def _chosen(
    parser: arguments.Parser, args: argparse.Namespace
) -> list[workloads.Workload]:
    available = workloads.SIZES[args.size]
    names = args.models or list(available)
    for name in names:
        if name not in available:
            parser.error(
                f"argument --models: there is no {name} of this size: choose from "
                f"{', '.join(available)}."
            )
    rounds = {"rounds": args.rounds} if args.rounds else {}
    return [available[name]._replace(**rounds) for name in names]


def _bars(size: str) -> Bars:
    if size == "quick":
        return NO_BARS
    return CPU_BARS if jax.default_backend() == "cpu" else ACCELERATOR_BARS


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and saves; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    chosen = _chosen(parser, args)
    parameters = args.parameters or _PARAMETERS[args.size]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {args.out} is no folder to write to ({error}).")

    provenance = report.provenance("step_cost.py", argv)
    console = Console(width=max(Console().width, tables.WIDTH))
    # A line for each stage, and not a bar: a bar is redrawn while the clock runs.
    peers: list[PeerCost] = []
    if args.peers:
        try:
            peers, versions = measure_peers(args.peers, chosen, print)
        except (OSError, subprocess.CalledProcessError) as error:
            parser.error(f"argument --peers: {args.peers} failed ({error}).")
        provenance["versions"] |= versions
    steps = [cost for workload in chosen for cost in measure_steps(workload, print)]
    updates = measure_updates(
        parameters, args.rounds or _UPDATE_ROUNDS[args.size], print
    )
    settings = {
        "workloads": [workload._asdict() for workload in chosen],
        "update_parameters": parameters,
    }
    measured = Measured(steps, updates, peers, _bars(args.size))
    print_report(console, measured)
    for path in save(args.out, measured, settings, provenance):
        console.print(f"Written: {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
