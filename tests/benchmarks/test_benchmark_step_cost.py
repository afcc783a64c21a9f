"""Tests of benchmarks/step_cost.py, scaling.py, and what they stand on."""

import json
from pathlib import Path

import pytest

from benchmarks import scaling, step_cost
from benchmarks.costs import growth, networks, sharding, timing
from benchmarks.costs.methods import TIMED
from benchmarks.costs.timing import Sample
from benchmarks.tasks import records


def test_ratio_is_taken_within_each_round() -> None:
    # The machine is ten times slower in the second round.
    rounds = [
        {"base": [Sample(1.0)], "other": [Sample(2.0)]},
        {"base": [Sample(10.0)], "other": [Sample(20.0)]},
    ]
    assert timing.ratio(rounds, "other", "base") == (2.0, 2.0, 2.0)
    assert timing.seconds(rounds, "base").median == 5.5


def test_kinds_of_steps_are_combined_with_their_shares() -> None:
    plain, employed = Sample(1.0, employed=False), Sample(2.0, employed=True)
    rounds = [{"base": [Sample(1.0)], "other": [plain, plain, plain, employed]}] * 3
    assert timing.employed_fraction(rounds, "other") == 0.25
    # The median over all steps would be 1.
    assert timing.ratio(rounds, "other", "base").median == 1.25


def test_all_take_their_turn_in_every_round() -> None:
    order: list[str] = []

    def turn(name: str) -> list[Sample]:
        order.append(name)
        return [Sample(float(len(order)))]

    turns = {name: lambda name=name: turn(name) for name in "abc"}
    rounds = timing.interleave(turns, 20)
    assert len(rounds) == 20
    taken = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert {"".join(sorted(names)) for names in taken} == {"abc"}
    assert len(set(taken)) > 1, "the order changes"


def test_quick_step_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step_cost.main(["--quick", "--models", "mlp", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    steps = {cost["name"]: cost for cost in result["steps"]}
    assert list(steps) == list(TIMED)
    markdown = (tmp_path / "table.md").read_text()
    for name in TIMED:
        assert name in out and f"| {name} |" in markdown
    assert result["command"].startswith("python benchmarks/step_cost.py --quick")
    assert result["command"] in markdown

    for name, cost in steps.items():
        ratio = cost["time_ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"], name
        assert (cost["employed_fraction"] is None) == (
            not name.startswith(("ae_sam", "looksam"))
        )
    assert steps["msam"]["gradients"] == 1
    assert steps["sam"]["gradients"] == 2
    assert steps["ae_sam, never employed"]["gradients"] == 1
    assert steps["optax.contrib.sam, transparent"]["gradients"] == 2
    assert {cost["name"] for cost in result["updates"]} < set(TIMED)
    assert (tmp_path / "ratios.png").stat().st_size > 0


def test_quick_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["tensors", "devices"]
    argv = [*parts, "--quick", "--out", str(tmp_path)]
    assert scaling.main(argv) == 0
    assert "Number of tensors" in capsys.readouterr().out
    rows = {
        part: records.Record(tmp_path / f"{part}.jsonl", ["method"]).rows
        for part in parts
    }
    all_reduced = {
        (row["layout"], row["method"]): row["all-reduce bytes / P"]
        for row in rows["devices"]
    }
    assert all_reduced["data parallel", "sgd"] == 1
    assert all_reduced["data parallel", "msam"] == 1
    assert all_reduced["data parallel", "sam"] == 2
    assert all_reduced["m-sharpness", "sam"] == 1
    few, many = (
        {row["method"]: row for row in rows["tensors"] if row["tensors"] == count}
        for count in (4, 8)
    )
    assert few["sgd"]["instructions"] < many["sgd"]["instructions"]
    assert few["sgd"]["instructions"] < few["sam"]["instructions"]
    assert (tmp_path / "tensors.png").stat().st_size > 0
    # What was measured is kept.
    table = (tmp_path / "table.md").read_text()
    assert scaling.main(argv) == 0
    assert "tensors sgd 4" not in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == table


def test_a_gradient_is_a_temporary_of_the_parameters_size() -> None:
    network = networks.chain(4, width=128)
    sgd, sam = (
        growth.compiled(name, network)[0].temporary_bytes / (4 * network.parameters)
        for name in ("sgd", "sam")
    )
    assert 0.5 < sgd < 1.1
    assert sgd < sam < 2.2


def test_a_scanned_network_has_the_parameters_of_one_that_is_not() -> None:
    plain, scanned = (networks.gpt(3, 8, scanned=s) for s in (False, True))
    assert plain.parameters == scanned.parameters
    assert plain.tensors > scanned.tensors


def test_collectives_are_counted_in_tuples_and_without_scalars() -> None:
    program = """
  %a = (f32[], f32[8,4]{1,0}, /*index=2*/f32[4]{0}) all-reduce(%x, %y, %z), to_apply=%s
  %b = f32[] all-reduce(%w), to_apply=%s
  %all-gather = f32[8]{0} all-gather(%p), dimensions={0}
  %c = f32[8]{0} fusion(%all-gather), kind=kLoop
"""
    found = sharding.collectives(program)
    assert found["all-reduce"] == ([4 * (32 + 4)], 1)
    assert found["all-gather"] == ([4 * 8], 0)
    assert found["reduce-scatter"] == ([], 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--quick", "--models", "vit"], "there is no vit of this size"),
        (["--quick", "--full"], "not allowed with argument"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_bad_arguments_are_one_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        step_cost.main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
