"""Measures what waits for an accelerator, piece by piece.

    python benchmarks/accelerator.py pack carried
    python benchmarks/accelerator.py run --data carried

The first, on any machine, puts into a folder what the second needs and a repository
does not hold: Fashion-MNIST, of Debian's package dataset-fashion-mnist or of --data-dir
(30 MB), and the commit of the code. The second starts no piece that would end after
--minutes. A piece that is done is a row of `pieces.jsonl`, and the same command goes on
with the next; it exits with 3 while something is left, and with 0 when all is done.
Where the package is not installed, `PYTHONPATH=.` in front finds it.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import arguments
from benchmarks.reports import accelerators, report
from benchmarks.tasks import data
from benchmarks.tasks.pieces import FULL, KINDS, QUICK, Teller, pieces
from benchmarks.tasks.records import OutOfTime, Record

# Where `pack` keeps the commit of the code
_COMMIT = "commit.txt"


def pack(folder: Path, data_dir: Path | None) -> None:
    """Puts the images' files and the commit into a folder."""
    source = data_dir or data.DEBIAN_FASHION
    data.load("fashion_mnist", source)  # complains of what is missing or damaged
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*-ubyte*"):
        shutil.copyfile(path, folder / path.name)
    (folder / _COMMIT).write_text(report.commit() + "\n", encoding="utf-8")


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures what is left, as far as the time allows; returns the exit code."""
    size = QUICK if args.quick else FULL
    folder = "accelerator-quick" if args.quick else "accelerator"
    out = args.out or Path("runs") / folder
    deadline = time.monotonic() + 60 * args.minutes
    provenance = report.provenance("accelerator.py", argv)
    carried = args.data and args.data / _COMMIT
    if not provenance["commit"] and carried and carried.is_file():
        provenance["commit"] = carried.read_text(encoding="utf-8").strip()
    record = Record(out / "pieces.jsonl", ["piece"])
    left = 0
    for piece in pieces(size, args.seeds, None if args.quick else args.data):
        name = ", ".join(str(v) for v in piece.key.values() if v is not None)
        named = {"piece": name}
        if (args.kinds and piece.key["kind"] not in args.kinds) or record.find(named):
            continue
        begin = time.monotonic()
        if begin + (piece.seconds if size.waits else 0) > deadline:
            left += 1
            continue
        try:
            found = piece.measure(Teller(name, deadline))
        except OutOfTime:
            print(f"{name}: would not end in time")
            left += 1
            continue
        seconds = round(time.monotonic() - begin, 1)
        ran = {
            "seconds": seconds,
            "commit": provenance["commit"],
            "device": provenance["machine"]["device"],
        }
        record.append(report.finite({**named, **piece.key, **found, **ran}))
        accelerators.save(out, record.rows, provenance)
    print(f"Written: {out}; {left} pieces are left.")
    return 3 if left else 0


def _parser() -> arguments.Parser:
    parser = arguments.Parser((__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", description="Packs what is carried along.")
    packing.add_argument("folder", type=Path, help="where to")
    packing.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of Fashion-MNIST's files"
    )
    running = commands.add_parser("run", description="Measures what is left.")
    running.add_argument(
        "--data", type=Path, metavar="DIR", help="folder that was packed"
    )
    running.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        help="only these pieces (default: all)",
    )
    running.add_argument(
        "--seeds",
        type=arguments.positive_integer,
        default=1,
        metavar="N",
        help="of the trainings (default: %(default)s)",
    )
    running.add_argument(
        "--minutes",
        type=arguments.positive,
        default=9.0,
        metavar="M",
        help="in which the command ends (default: %(default)s)",
    )
    running.add_argument(
        "--quick", action="store_true", help="tiny pieces, to see that all of it works"
    )
    arguments.add_out(running, told="runs/accelerator[-quick]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Packs or runs; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.command == "pack":
            pack(args.folder, args.data_dir)
            return 0
        return run(args, argv)
    except data.DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
