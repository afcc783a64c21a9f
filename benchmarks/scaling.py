"""Measures how the cost of optimizers scales with devices, parameters and batch.

python benchmarks/scaling.py
python benchmarks/scaling.py --quick --out /tmp/scaling
"""

import itertools
import math
import multiprocessing
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from rich.console import Console

import msam_optax
from benchmarks import arguments, step_cost
from benchmarks.costs import timing
from benchmarks.costs.methods import METHODS
from benchmarks.reports import report, tables
from benchmarks.tasks import optimizers, workloads

_DEVICES = {"quick": (8,), "cpu": (1, 2, 4, 8)}
_PARAMETERS = {"quick": (100_000, 1_000_000), "cpu": (10**5, 10**6, 10**7, 10**8)}
_BATCH_SIZES = {"quick": (8, 16), "cpu": (8, 32, 128, 512)}
_ROUNDS = {"quick": 2, "cpu": 20}
_METHODS = ("sgd", "msam", "sam", "adamw", "adamw_msam")
_UPDATES = tuple(name for name in _METHODS if name != "sam")
_LAYOUTS = {"data parallel": _METHODS, "FSDP": _METHODS, "m-sharpness": ("sam",)}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
_ITEM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
# Okabe and Ito's, told apart whatever the colour vision.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")


class Sharding(NamedTuple):
    """A step compiled for several devices.

    Attributes:
      layout: how the work is shared out.
      optimizer: name of the optimizer.
      devices: how many there are.
      collectives: how many bytes each kind of collective gives, in units of the
        parameters' size.
      operations: how many collectives of each kind the program has, but for scalars.
      argument_bytes: of the program, on each device.
      temporary_bytes: of the program, on each device.
    """

    layout: str
    optimizer: str
    devices: int
    collectives: dict[str, float]
    operations: dict[str, int]
    argument_bytes: int
    temporary_bytes: int


class Point(NamedTuple):
    """A ratio to the base optimizer at some size.

    Attributes:
      optimizer: name of the optimizer.
      size: parameters, or examples in a batch.
      time_ratio: its time over the base's.
      seconds: its time.
    """

    optimizer: str
    size: int
    time_ratio: timing.Spread
    seconds: timing.Spread


def collectives(program: str) -> dict[str, list[int]]:
    """The bytes that each collective of a compiled program gives, scalars left out."""
    found: dict[str, list[int]] = {kind: [] for kind in _COLLECTIVES}
    # `%name = f32[8,4]{1,0} all-reduce(...)`, or a tuple of such results
    pattern = re.compile(rf" = (.*?) ({'|'.join(_COLLECTIVES)})\(")
    for line in program.splitlines():
        if match := pattern.search(line):
            results, kind = match.groups()
            sizes = [
                _ITEM_BYTES[dtype] * math.prod(map(int, shape.split(",")))
                for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", results)
            ]
            if sizes:
                found[kind].append(sum(sizes))
    return found


def compile_sharded(size: str) -> list[Sharding]:
    """Compiles steps for 1 to 8 simulated devices; for a process of its own."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(_DEVICES[size]))
    problem = workloads.problem(workloads.SIZES[size]["mlp"])
    result = []
    for layout, names in _LAYOUTS.items():
        for name, devices in itertools.product(names, _DEVICES[size]):
            mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
            if layout == "m-sharpness":
                lowered = _m_sharpness(problem, mesh)
            else:
                lowered = _partitioned(problem, name, mesh, layout == "FSDP")
            result.append(_sharding(layout, name, mesh, lowered, problem.params))
    return result


def _partitioned(
    problem: workloads.Problem, name: str, mesh: Mesh, shard_state: bool
) -> jax.stages.Lowered:
    """The step of `make_train_step` with its batch, and maybe its state, sharded."""
    optimizer = METHODS[name].build(1)
    step = msam_optax.make_train_step(problem.loss_fn, optimizer, dispatch="in_graph")

    def place(leaf):
        spec = _first_axis_that_divides(leaf, mesh) if shard_state else PartitionSpec()
        return _like(leaf, mesh, spec)

    state = jax.tree.map(place, jax.eval_shape(lambda: problem.start(optimizer)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    # The new state lies as the old one did, so that steps can follow each other.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(state, _sharded_batch(problem, mesh), jax.random.key(0))


def _m_sharpness(problem: workloads.Problem, mesh: Mesh) -> jax.stages.Lowered:
    """SAM whose devices each ascend along the gradient of their own examples."""
    sam = msam_optax.sharpness_aware_gradient(msam_optax.ascents.normalized(0.05))
    sgd = METHODS["sgd"].build(1)

    def device_gradient(params, batch):
        # Varying from device to device, or each gradient would be summed over them.
        params = jax.lax.pcast(params, "data", to="varying")

        def loss(params):
            losses, _ = problem.loss_fn(
                params, problem.model_state, batch, jax.random.key(0)
            )
            return jnp.mean(losses)

        grad_fn = jax.grad(loss)
        gradient, _ = sam.update(
            grad_fn(params), sam.init(params), params, grad_fn=grad_fn
        )
        return jax.lax.pmean(gradient, "data")

    def step(params, state, batch):
        gradient = jax.shard_map(
            device_gradient,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
        )(params, batch)
        updates, state = sgd.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def place(leaf):
        return _like(leaf, mesh, PartitionSpec())

    params, state = jax.tree.map(
        place, (problem.params, jax.eval_shape(sgd.init, problem.params))
    )
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, state, _sharded_batch(problem, mesh))


def _sharded_batch(problem: workloads.Problem, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf: _like(leaf, mesh, PartitionSpec("data")), problem.batches[0]
    )


def _like(leaf: Any, mesh: Mesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    )


def _first_axis_that_divides(leaf: Any, mesh: Mesh) -> PartitionSpec:
    for axis, size in enumerate(leaf.shape):
        if size % mesh.size == 0:
            return PartitionSpec(*[None] * axis, "data")
    return PartitionSpec()


def _sharding(
    layout: str, name: str, mesh: Mesh, lowered: jax.stages.Lowered, params: Any
) -> Sharding:
    compiled: Any = lowered.compile()
    params_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    found = collectives(compiled.as_text())
    memory = compiled.memory_analysis()
    return Sharding(
        layout=layout,
        optimizer=name,
        devices=mesh.size,
        collectives={kind: sum(sizes) / params_bytes for kind, sizes in found.items()},
        operations={kind: len(sizes) for kind, sizes in found.items()},
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and saves; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    size = "quick" if args.quick else "cpu"
    # The simulated devices would share out the cores of the steps that are timed.
    spawn = multiprocessing.get_context("spawn")
    print("compiling for several devices")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        shardings = pool.submit(compile_sharded, size).result()

    updates, steps = [], []
    for parameters in _PARAMETERS[size]:
        for cost in step_cost.measure_updates(
            parameters, _ROUNDS[size], print, _UPDATES
        ):
            updates.append(Point(cost.name, parameters, cost.time_ratio, cost.seconds))
    for batch_size in _BATCH_SIZES[size]:
        workload = workloads.SIZES[size]["mlp"]
        workload = workload._replace(batch_size=batch_size, rounds=_ROUNDS[size])
        for step in step_cost.measure_steps(workload, print, _METHODS):
            steps.append(Point(step.name, batch_size, step.time_ratio, step.seconds))

    measured = Measured(shardings, updates, steps)
    provenance = report.provenance("scaling.py", argv)
    console = Console(width=max(Console().width, tables.WIDTH))
    for table in tables_of(measured):
        tables.show(console, table)
    for note in _NOTES:
        console.print(note, highlight=False)
    for path in save(args.out, measured, provenance):
        console.print(f"Written: {path}", soft_wrap=True)
    return 0


def _parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny models and few rounds, to see that all of it works",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=optimizers.RESULTS / "scaling",
        help="folder to write to (default: %(default)s)",
    )
    return parser


class Measured(NamedTuple):
    """All of a run: programs for several devices, and times of one."""

    shardings: list[Sharding]
    updates: list[Point]
    steps: list[Point]


_NOTES = (
    "Collectives: bytes that those of the compiled step give on each device, in units "
    "of the parameters' size P, and in brackets how many there are. Scalars are left "
    "out. XLA for CPU has an all-reduce where others have FSDP's reduce-scatter.",
    "Time: median and quartiles, over the base (SGD, or AdamW) in the same round.",
)


def tables_of(measured: Measured) -> list[tables.Table]:
    """One table of collectives, one of updates, one of steps."""
    rows = [
        (
            sharding.layout,
            sharding.optimizer,
            f"{sharding.devices}",
            *(
                f"{sharding.collectives[kind]:.2f} ({sharding.operations[kind]})"
                for kind in _COLLECTIVES
            ),
            f"{sharding.argument_bytes / 1e6:.3f}",
            f"{sharding.temporary_bytes / 1e6:.3f}",
        )
        for sharding in measured.shardings
    ]
    headers = (
        "layout", "optimizer", "devices", *(f"{kind} / P" for kind in _COLLECTIVES),
        "args. MB / device", "temp. MB / device",
    )  # fmt: skip
    return [
        tables.Table("Collectives of a step", headers, rows),
        _table("Update alone", "parameters", measured.updates),
        _table("Whole step", "batch", measured.steps),
    ]


def _table(title: str, size: str, points: Sequence[Point]) -> tables.Table:
    rows = [
        (
            point.optimizer,
            f"{point.size:,}",
            tables.ratio(point.time_ratio),
            f"{1e3 * point.seconds.median:.3f}",
        )
        for point in points
    ]
    return tables.Table(title, ("optimizer", size, "time / base", "ms"), rows)


def save(out: Path, measured: Measured, provenance: dict[str, Any]) -> list[Path]:
    """Writes the tables in Markdown, everything as JSON, and the figure."""
    markdown, json, figure = (
        out / name for name in ("table.md", "results.json", "scaling.png")
    )
    tables.write_markdown(
        markdown, "Cost as it scales", tables_of(measured), _NOTES, provenance
    )
    report.write_json(
        json,
        {
            **provenance,
            **{
                key: [tables.flat(row) for row in rows]
                for key, rows in measured._asdict().items()
            },
        },
    )
    _figure(measured).savefig(figure)
    return [markdown, json, figure]


def _figure(measured: Measured) -> Figure:
    """Time over the base's against the number of parameters and the batch's size."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    panels = (
        ("parameters, update alone", measured.updates),
        ("examples in a batch, whole step", measured.steps),
    )
    for axes, (label, points) in zip(figure.subplots(1, 2), panels, strict=True):
        for color, name in zip(_COLORS, _METHODS, strict=True):
            own = [point for point in points if point.optimizer == name]
            if METHODS[name].base == name or not own:
                continue
            low, median, high = np.transpose([point.time_ratio for point in own])
            axes.errorbar(
                [point.size for point in own],
                median,
                [median - low, high - median],
                fmt="o-",
                color=color,
                capsize=3,
                label=name,
            )
        axes.axhline(1, color="black", lw=1)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("time / base optimizer's")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
