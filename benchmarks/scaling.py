"""Measures how the cost of optimizers scales: tensors, layers, devices, memory, time.

    python benchmarks/scaling.py
    python benchmarks/scaling.py tensors shapes
    python benchmarks/scaling.py --quick --out /tmp/scaling

Each cell is written down when it ends, and the same command goes on where it was cut
off. Seconds of compiling are the processor's; to measure again remove the part's file.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks import arguments, step_cost
from benchmarks.costs import growth, networks, sharding
from benchmarks.reports import report, scalings, tables
from benchmarks.tasks import workloads
from benchmarks.tasks.records import Record

_FEW = ("sgd", "msam", "sam", "adamw", "adamw_msam")
_BASES = ("sgd", "optax.contrib.sam, opaque", "adamw")
_ALL = (
    *_BASES,
    *("msam", "momentum_perturbation(sgd)", "adamw_msam", "sam", "asam", "ae_sam"),
    *("gsam", "looksam, k=5", "wsam", "friendly_sam", "fisher_sam", "ss_sam"),
    *("gradient_norm_penalty", "ae_looksam", "esam"),
)
_SOME = ("sgd", "sam", "msam", *_BASES[1:], "adamw_msam", "ae_sam", "gsam")

Row = dict[str, Any]
# A row's key, and what measures the rest of it
Cell = tuple[Row, Callable[[], Row]]


class Part(NamedTuple):
    """One axis.

    Attributes:
      key: columns that name a cell.
      cells: `cells(quick)`, in the order in which they are measured.
    """

    key: tuple[str, ...]
    cells: Callable[[bool], Iterator[Cell]]


def _tensors(quick: bool) -> Iterator[Cell]:
    # What tells the growth first
    counts = (4, 8) if quick else (100, 400, 10, 1600, 25, 200, 50, 800)
    for count in counts:
        for name in ("sgd", "sam") if quick else _ALL:
            key = {"method": name, "tensors": count}
            yield key, partial(growth.start, name, networks.chain(count))


def _shapes(quick: bool) -> Iterator[Cell]:
    if quick:
        chosen = {"GPT": lambda: networks.gpt(1, 8, scanned=False)}
    else:
        chosen = networks.SHAPES
    # Of the deepest all methods, of the others a few, method by method
    names = ("sgd", "sam") if quick else (*_SOME, *_ALL)
    for name in dict.fromkeys(names):
        for shape, build in chosen.items():
            if name in _SOME or shape == scalings.DEEPEST:
                yield (
                    {"method": name, "shape": shape},
                    partial(_shape, name, build),
                )


def _shape(name: str, build: Callable[[], networks.Network]) -> Row:
    network = build()
    program, _ = growth.compiled(name, network)
    return {"tensors": network.tensors, **growth.columns(program)}


def _memory(quick: bool) -> Iterator[Cell]:
    for count in (4,) if quick else (10, 200):
        for parameters in (10**4,) if quick else (10**7, 10**8):
            width = round((parameters / count) ** 0.5)
            network = networks.chain(count, width)
            for name in ("sgd", "sam") if quick else _ALL:
                key = {"method": name, "parameters": parameters, "tensors": count}
                yield key, partial(_bytes, name, network)


def _bytes(name: str, network: networks.Network) -> Row:
    program, _ = growth.compiled(name, network)
    size = 4 * network.parameters
    return {
        "temporary / P": program.temporary_bytes / size,
        "argument / P": program.argument_bytes / size,
    }


def _devices(quick: bool) -> Iterator[Cell]:
    network = networks.chain(4, width=64, examples=64)
    layouts = {"data parallel": _FEW, "FSDP": _FEW, "m-sharpness": ("sam",)}
    for layout, names in layouts.items():
        for name in names:
            for devices in (8,) if quick else (1, 2, 4, 8):
                key = {"method": name, "layout": layout, "devices": devices}
                yield key, partial(sharding.compiled, network, **_renamed(key))


def _many_devices(quick: bool) -> Iterator[Cell]:
    # From the fewest to the most: each process compiles for as many as it starts with.
    sizes = ((16, 10**7),) if quick else ((64, 10**8), (256, 10**9), (1024, 10**9))
    for devices, parameters in sizes:
        for name in (
            ("sgd", "msam") if quick else (*_BASES, "msam", "adamw_msam", "sam")
        ):
            key = {"method": name, "devices": devices, "parameters": parameters}
            yield key, partial(_large, name, devices, parameters)


def _large(name: str, devices: int, parameters: int) -> Row:
    network = sharding.large_gpt(parameters, devices)
    start = time.process_time()
    row = sharding.compiled(network, name, "FSDP", devices)
    seconds = time.process_time() - start
    return {**row, "tensors": network.tensors, "seconds": seconds}


def _renamed(key: Row) -> Row:
    return {("name" if k == "method" else k): value for k, value in key.items()}


def _updates(quick: bool) -> Iterator[Cell]:
    for parameters in (10**5,) if quick else (10**5, 10**6, 10**7, 10**8):
        names = tuple(name for name in _FEW if name != "sam")
        measure = partial(
            step_cost.measure_updates, parameters, 2 if quick else 20, names=names
        )
        yield {"size": parameters}, partial(_times, measure)


def _steps(quick: bool) -> Iterator[Cell]:
    for examples in (8,) if quick else (8, 32, 128, 512):
        workload = workloads.SIZES["quick" if quick else "cpu"]["mlp"]
        workload = workload._replace(batch_size=examples, rounds=2 if quick else 20)
        measure = partial(step_cost.measure_steps, workload, names=_FEW)
        yield {"size": examples}, partial(_times, measure)


def _times(measure: Callable[..., Sequence[Any]]) -> Row:
    """Of all methods at once: they take turns."""
    costs = measure(progress=lambda text: None)
    return {
        cost.name: {
            "ratio": list(cost.time_ratio),
            "milliseconds": 1e3 * cost.seconds.median,
        }
        for cost in costs
    }


PARTS = {
    "tensors": Part(("method", "tensors"), _tensors),
    "shapes": Part(("method", "shape"), _shapes),
    "memory": Part(("method", "parameters", "tensors"), _memory),
    "devices": Part(("method", "layout", "devices"), _devices),
    "many_devices": Part(("method", "devices", "parameters"), _many_devices),
    "updates": Part(("size",), _updates),
    "steps": Part(("size",), _steps),
}
# The devices that these want would share out the cores of what is timed, and can't be
# made once there are others.
_SIMULATED = ("devices", "many_devices")


def measure(part: str, quick: bool, out: Path, commit: str, most: int = 0) -> bool:
    """Measures the cells of a part that are not in its file yet.

    Args:
      part: its name.
      quick: a tiny one.
      out: folder of the file.
      commit: of the code.
      most: stop before a cell of more devices, and 0 for no bound.

    Returns:
      Whether all cells are there.
    """
    key, cells = PARTS[part]
    record = Record(out / f"{part}.jsonl", key)
    for columns, row in cells(quick):
        if record.find(columns):
            continue
        if most and columns["devices"] > most:
            return False
        print(part, *columns.values(), flush=True)
        record.append({**columns, **row(), "commit": commit})
    return True


def _measure_simulated(
    part: str, quick: bool, out: Path, commit: str, devices: int
) -> bool:
    """`measure` in a process of so many devices."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=spawn, initializer=sharding.simulate, initargs=(devices,)
    ) as pool:
        return pool.submit(measure, part, quick, out, commit, devices).result()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and saves; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    provenance = report.provenance("scaling.py", argv)
    for part in args.parts or PARTS:
        told = part, args.quick, args.out, provenance["commit"]
        if part not in _SIMULATED:
            measure(*told)
            continue
        for devices in (8, 64, 256, 1024):
            if _measure_simulated(*told, devices):
                break
    rows = {
        part: Record(args.out / f"{part}.jsonl", entry.key).rows
        for part, entry in PARTS.items()
    }
    console = Console(width=max(Console().width, tables.WIDTH))
    for table in scalings.tables_of(rows):
        tables.show(console, table)
    for path in scalings.save(args.out, rows, provenance):
        console.print(f"Written: {path}", soft_wrap=True)
    return 0


def _parser() -> arguments.Parser:
    parser = arguments.Parser((__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "parts",
        nargs="*",
        choices=[[], *PARTS],
        metavar="PART",
        help=f"what is measured, of {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny models and few rounds, to see that all of it works",
    )
    arguments.add_out(parser, Path("runs/scaling"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
