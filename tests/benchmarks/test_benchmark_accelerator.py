"""Tests of benchmarks/accelerator.py: pieces, their record, and long programs."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator
from benchmarks.reports import accelerators
from benchmarks.tasks import data, large, models, optimizers, pieces, training
from benchmarks.tasks.augmentation import crop_and_flip
from benchmarks.tasks.records import OutOfTime


def test_pieces_are_kept_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run", "--quick", "--kinds", "program", "--out", str(tmp_path)]
    assert accelerator.main(command) == 0
    path = tmp_path / "pieces.jsonl"
    sgd, sam = map(json.loads, path.read_text().splitlines())
    assert (sgd["method"], sam["method"]) == ("sgd", "sam")
    assert 1 < sam["instructions"] / sgd["instructions"] < 4
    assert sam["opcodes"]["dot"] > sgd["opcodes"]["dot"] > 0
    assert "| sam | 4 |" in (tmp_path / "table.md").read_text(encoding="utf-8")
    monkeypatch.setattr(pieces.growth, "compiled", None)
    assert accelerator.main(command) == 0
    assert len(path.read_text().splitlines()) == 2


def test_what_would_not_end_in_time_is_left(tmp_path: Path) -> None:
    command = ["run", "--kinds", "images", "--minutes", "0.01", "--out", str(tmp_path)]
    assert accelerator.main(command) == 3
    assert not list(tmp_path.iterdir())


def test_teller_stops_a_piece_by_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0.0, 10.0)
    monkeypatch.setattr(pieces.time, "monotonic", lambda: next(now))
    tell = pieces.Teller("a piece", deadline=100.0)
    # The first share has compiling in it, the second took 10 seconds: 80 are left.
    tell("", 0.1)
    tell("", 0.2)
    slow = pieces.Teller("a piece", deadline=100.0)
    slow("", 0.1)
    with pytest.raises(OutOfTime):
        slow("", 0.15)


def test_pack_puts_files_and_commit_into_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load", lambda *_: None)
    source, folder = tmp_path / "source", tmp_path / "carried"
    source.mkdir()
    (source / "train-labels-idx1-ubyte.gz").write_bytes(b"labels")
    command = ["pack", str(folder), "--data-dir", str(source)]
    assert accelerator.main(command) == 0
    assert (folder / "train-labels-idx1-ubyte.gz").read_bytes() == b"labels"
    assert (folder / "commit.txt").is_file()


def test_every_kind_has_pieces() -> None:
    found = list(pieces.pieces(pieces.FULL, 2, None))
    assert {piece.key["kind"] for piece in found} == {*pieces.KINDS}
    trained = [piece.key for piece in found if piece.key["kind"] == "images"]
    # Methods, with and without noise, seeds
    assert len(trained) == len(large.IMAGES) * 2 * 2
    assert {(key["label_noise"], key["seed"]) for key in trained} == {
        (noise, seed) for noise in (0.0, 0.2) for seed in (0, 1)
    }


# Long programs.


def test_stops_do_not_change_a_run() -> None:
    task = training.Task(
        data.load("digits"),
        models.build("mlp", 10, widths=(8,)),
        label_noise=0.2,
        epochs=2,
        batch_size=256,
    )
    of = large.images(task)
    setting = large.IMAGES["ae_sam"]._replace(learning_rate=0.05)

    def run(stops: int) -> list[large.Stop]:
        runner = large.Runner(of, optimizers.METHODS["ae_sam"].build)
        return list(runner.stops(setting, of.inputs(3), stops))

    (whole,), parts = run(1), run(5)
    assert [stop.share for stop in parts] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert parts[-1].loss == pytest.approx(whole.loss, rel=1e-4)
    assert parts[-1].scores == pytest.approx(whole.scores, abs=0.01)
    assert parts[-1].sam_fraction == whole.sam_fraction > 0
    assert parts[-1].loss < parts[0].loss


def test_images_are_moved_and_mirrored() -> None:
    image = np.arange(1.0, 17.0).reshape(4, 4)
    images = jnp.broadcast_to(jnp.asarray(image)[..., None], (64, 4, 4, 1))
    found = np.asarray(crop_and_flip(images, jax.random.key(0)))[..., 0]
    padded = np.pad(image, 2, mode="edge")
    views = {
        (row, column, flip): padded[row : row + 4, column : column + 4][:, ::flip]
        for row in range(5)
        for column in range(5)
        for flip in (1, -1)
    }
    seen = set()
    for view in found:
        match = [place for place, v in views.items() if np.array_equal(v, view)]
        assert match
        seen |= {*match}
    assert {flip for *_, flip in seen} == {1, -1}
    assert len({place[:2] for place in seen}) > 10


# The tables.


def test_radius_is_chosen_on_validation(tmp_path: Path) -> None:
    def row(method: str, rho: Any, validation: float, test: float) -> dict[str, Any]:
        setting = {"learning_rate": 1e-3, "rho": rho, "weight_decay": 0.1}
        ran = {"sam_fraction": 0.0, "train_seconds": 1.0, "seed": 0}
        losses = {"validation_loss": validation, "test_loss": test}
        return {"kind": "characters", "method": method, **setting, **ran, **losses}

    rows = [
        row("adamw", None, 2.0, 2.1),
        row("adamw_msam", 0.1, 1.7, 1.9),
        row("adamw_msam", 0.3, 1.8, 1.5),
        row("adamw_msam", 1.0, None, None),  # type: ignore[arg-type]  # diverged
    ]
    machine = {"command": "x", "commit": "c", "machine": {}, "versions": {}}
    accelerators.save(tmp_path, rows, machine)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| adamw_msam | 0.001 | 0.1 | 0.1 | 1.9000 | +0.2000 |" in table
