"""Compares methods, each at its own tuned setting: a search, then fresh test seeds.

One protocol for every method, base optimizers included: the search of `tasks/search.py`
over learning rate, weight decay and rho, on a part held out of the training part, with
as many runs for each; then the chosen setting on the test part, with seeds that the
search did not see. Nothing is chosen on the test part.

    python benchmarks/tune.py digits
    python benchmarks/tune.py policies-25 --methods coin every
    python benchmarks/tune.py characters --quick

Each run is written down when it ends, and the same command goes on where it was cut
off. A method's tests follow its search, so that what there is is complete.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks import arguments
from benchmarks.reports import report, studies
from benchmarks.tasks import optimizers, policies, problems, runs
from benchmarks.tasks.fashion import fashion
from benchmarks.tasks.fine_tuning import fine_tuning
from benchmarks.tasks.policies import SHARES
from benchmarks.tasks.records import OutOfTime, Record
from benchmarks.tasks.search import (
    Found,
    Hyperparameters,
    Plan,
    Space,
    axis,
    search,
)

# Seeds of the search start at 0: with these no test run has a seed of it.
FIRST_TEST_SEED = 100


class Contender(NamedTuple):
    """A method as a study has it.

    Attributes:
      build: makes the optimizer.
      space: what its hyper-parameters are drawn from.
      base: the contender that its gain is over, itself for a base; None for the
        study's first.
    """

    build: optimizers.Build
    space: Space
    base: str | None = None


class Study(NamedTuple):
    """What is compared on what.

    Attributes:
      problem: makes the problem.
      quick: what the problem is made with in a quick run.
      contenders: by name.
      plan: of the search.
      seeds: how many test runs each gets.
      score: what is tuned for, "accuracy" or "loss".
    """

    problem: Callable[..., runs.Problem]
    quick: Mapping[str, Any]
    contenders: Mapping[str, Contender]
    plan: Plan
    seeds: int
    score: str


def _methods(names: Sequence[str], **spaces: Space) -> dict[str, Contender]:
    return {
        name: Contender(
            optimizers.METHODS[name].build,
            spaces.get(name, optimizers.METHODS[name].space),
        )
        for name in names
    }


def _with_own_base(names: Sequence[str]) -> dict[str, Contender]:
    """Each compared with what it is built around."""
    return {
        name: contender._replace(base=optimizers.METHODS[name].base or name)
        for name, contender in _methods(names).items()
    }


_CLOTHES = Space(axis(0.01, 0.3, (1, 3)), axis(0.0005, 0.01))
_CLOTHES_SAM = _CLOTHES._replace(rho=axis(0.05, 0.5))


def _fashion(label_noise: float) -> Study:
    """A residual network with batch norm; a short search, for its steps are slow."""
    sam = dict.fromkeys(("sam", "ae_sam", "looksam"), _CLOTHES_SAM)
    msam = _CLOTHES._replace(rho=axis(0.2, 2.0))
    return Study(
        problem=partial(fashion, label_noise),
        quick={"images": 64, "steps": 4, "validating": 100, "dataset": "digits"},
        contenders=_methods(
            ["sgd", "msam", "sam", "nag", "ae_sam", "looksam"],
            **dict.fromkeys(("sgd", "nag"), _CLOTHES),
            msam=msam,
            **sam,
        ),
        plan=Plan(first=6, near=(2,), rungs=((2, 2),), moves=1),
        seeds=5,
        score="accuracy",
    )


_DIGITS = Study(
    problem=problems.digits,
    quick={"epochs": 1, "dataset": "digits"},
    contenders=_methods(
        [
            *("sgd", "msam", "sam", "ae_sam", "looksam", "nag", "adam", "adamw"),
            *("adamw_msam", "ss_sam", "asam", "friendly_sam", "gsam"),
        ]
    ),
    plan=Plan(),
    seeds=30,
    score="accuracy",
)

# SAM's direction used again does best with less weight decay.
_REUSING = Space(axis(0.01, 0.1, (1, 3)), axis(0.002, 0.02), axis(0.1, 0.5))


def _policies(
    name: str, task: Study, space: Space, **spaces: Space
) -> dict[str, Study]:
    """On a study's task all policies at each share of SAM steps, over a coin.

    Args:
      name: what the studies' names begin with.
      task: the study whose problem and plan it is.
      space: around what is good for SAM on some steps.
      **spaces: of the policies whose best lies elsewhere.
    """
    return {
        f"{name}-{100 * share:.0f}": task._replace(
            contenders={
                policy: Contender(build, spaces.get(policy, space))
                for policy, build in policies.at_share(share).items()
            },
            seeds=30,
        )
        for share in SHARES
    }


STUDIES = {
    "digits": _DIGITS,
    "directions": _DIGITS._replace(
        contenders=_with_own_base(
            [
                *("adamw", "adamw_msam", "adamw_along_update"),
                *("lion", "lion_along_momentum", "lion_along_update"),
            ]
        ),
        plan=Plan(first=10, near=(4,), rungs=((3, 3),), moves=1),
        seeds=20,
    ),
    # A short search: a step of Muon takes twenty times that of AdamW here.
    "directions-muon": _DIGITS._replace(
        contenders=_with_own_base(["muon", "muon_along_momentum", "muon_along_update"]),
        plan=Plan(first=5, near=(2,), rungs=((2, 2),), moves=0),
        seeds=5,
    ),
    **_policies(
        "policies",
        _DIGITS._replace(plan=Plan(first=8, near=(3,), rungs=((3, 3),), moves=2)),
        Space(axis(0.01, 0.1, (1, 3)), axis(0.01, 0.05), axis(0.2, 1.0)),
        **dict.fromkeys(("looksam", "ae_looksam"), _REUSING),
    ),
    "fine-tuning": Study(
        problem=fine_tuning,
        quick={"epochs": 1, "start_epochs": 1},
        contenders=_methods(["sgd", "msam", "sam", "ae_sam", "nag", "adam"]),
        plan=Plan(),
        seeds=30,
        score="accuracy",
    ),
    "fashion-0": _fashion(0.0),
    "fashion-20": _fashion(0.2),
    **_policies(
        "fashion-policies",
        _fashion(0.2),
        Space(axis(0.1, 0.3, (1, 3)), axis(0.0005, 0.005), axis(0.1, 0.5)),
    ),
    "characters": Study(
        problem=problems.characters,
        quick={"steps": 20, "length": 8, "batch": 4},
        contenders={
            # What is around Muon is compared with Muon, all else with AdamW.
            name: Contender(build, space, "muon" if name.startswith("muon,") else None)
            for name, (build, space) in optimizers.AROUND_ADAMW.items()
        },
        plan=Plan(first=8, near=(3,), rungs=((2, 3),), moves=2),
        seeds=8,
        score="loss",
    ),
}

_QUICK_PLAN = Plan(first=2, near=(1,), rungs=((1, 2),), moves=0)


class Runner:
    """Runs of a study's contenders, remembered in files.

    Attributes:
      validation: rows of the search.
      test: rows of the chosen settings.
    """

    def __init__(
        self, study: Study, quick: bool, out: Path, commit: str, deadline: float
    ) -> None:
        key = ("method", *Hyperparameters._fields, "seed")
        self.validation = Record(out / "validation.jsonl", key)
        self.test = Record(out / "test.jsonl", key)
        self._study, self._commit, self._deadline = study, commit, deadline
        self._problem = study.problem(**(study.quick if quick else {}))
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._inputs: dict[tuple[int, bool], runs.Inputs] = {}

    def row(
        self, name: str, setting: Hyperparameters, seed: int, validation: bool
    ) -> dict[str, Any]:
        """The row of a run, from the file or of a run that is made now."""
        record = self.validation if validation else self.test
        columns = {"method": name, **setting._asdict(), "seed": seed}
        return record.find(columns) or record.append(
            {
                **columns,
                **self._train(name, setting, seed, validation),
                "commit": self._commit,
            }
        )

    def score(self, name: str, setting: Hyperparameters, seed: int) -> float:
        """The validation score of a run; larger is better."""
        return studies.score(
            self.row(name, setting, seed, validation=True), self._study.score
        )

    def _train(
        self, name: str, setting: Hyperparameters, seed: int, validation: bool
    ) -> dict[str, float]:
        if time.monotonic() > self._deadline:
            raise OutOfTime
        if name not in self._compiled:
            build = self._study.contenders[name].build
            self._compiled = {name: runs.compiled(self._problem, build)}
        if (seed, validation) not in self._inputs:
            self._inputs[seed, validation] = self._problem.inputs(seed, validation)
        start = time.perf_counter()
        traced = runs.traced(setting)
        outcome, _ = self._compiled[name](traced, self._inputs[seed, validation])
        found = {key: float(value) for key, value in outcome._asdict().items()}
        return {**found, "seconds": round(time.perf_counter() - start, 2)}


def _parser() -> arguments.Parser:
    parser = arguments.Parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("study", choices=STUDIES, help="what is compared")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="some of the study's (default: all)",
    )
    parser.add_argument(
        "--seeds", type=arguments.positive_integer, metavar="N", help="of the test runs"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small problem and few runs: minutes"
    )
    parser.add_argument(
        "--minutes",
        type=arguments.positive,
        default=1e9,
        metavar="M",
        help="stop after the run that ends later; the same command goes on",
    )
    arguments.add_out(parser, told="runs/studies/<study>")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Searches, tests and writes the table; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    study = STUDIES[args.study]
    names = args.methods or list(study.contenders)
    for name in names:
        if name not in study.contenders:
            known = ", ".join(study.contenders)
            parser.error(f"argument --methods: {name!r} is none of {known}.")
    out = args.out or Path("runs/studies") / args.study
    plan, seeds = (_QUICK_PLAN, 2) if args.quick else (study.plan, study.seeds)
    console = Console()
    provenance = report.provenance("tune.py", argv)
    deadline = time.monotonic() + 60 * args.minutes
    runner = Runner(study, args.quick, out, provenance["commit"], deadline)
    found: dict[str, Found] = {}
    code = 0
    try:
        for name in names:
            contender = study.contenders[name]
            found[name] = search(contender.space, partial(runner.score, name), plan)
            console.print(f"{name}: {found[name]}", highlight=False, soft_wrap=True)
            for seed in range(args.seeds or seeds):
                setting = found[name].chosen
                runner.row(name, setting, FIRST_TEST_SEED + seed, validation=False)
            bases = {name: own.base for name, own in study.contenders.items()}
            studies.save(
                out, study.score, plan, found, bases, runner.test.rows, provenance
            )
    except OutOfTime:
        console.print(f"Stopped after {args.minutes:g} minutes.")
        code = 3
    console.print(f"Written: {out}", soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
