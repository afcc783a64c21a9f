"""Several processes train as one does, by every kind of dispatch and of starter."""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import arguments, compare, distributed
from benchmarks.tasks import data, models, training

BENCHMARKS = pathlib.Path(distributed.__file__).parent
PROCESSES = 2
COMPARE = ["--dataset", "digits", "--epochs", "1", "--seeds", "1"]
COMPARE += ["--optimizers", "sgd", "ae_sam", "--label-noise", "0.2"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def of_jax(process: int, port: int) -> dict[str, str]:
    """The variables that a user sets."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(PROCESSES),
        "JAX_PROCESS_ID": str(process),
    }


def of_slurm(process: int, port: int) -> dict[str, str]:
    """What Slurm's srun sets, all on this machine."""
    return {
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(PROCESSES),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


def launch(
    starter: Callable[[int, int], dict[str, str]],
    script: str,
    *args: str,
    **variables: str,
) -> list[str]:
    """Runs a script of the benchmarks in all processes, and returns what they print."""
    # Neither a proxy nor a cluster around the tests has a part in this.
    strange = ("proxy", "slurm", "jax_", "ompi", "kubernetes")
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not any(word in key.lower() for word in strange)
    }
    # Compiling takes nearly all of the time.
    common = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    port, deadline = free_port(), time.monotonic() + 600
    command = [sys.executable, "-W", "error", str(BENCHMARKS / script), *args]
    children = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**inherited, **common, **variables, **starter(process, port)},
        )
        for process in range(PROCESSES)
    ]

    def finish(child: subprocess.Popen[str]) -> tuple[str, str]:
        try:
            return child.communicate(timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            # It waits for one that failed: what that one said matters.
            child.kill()
            return child.communicate()

    try:
        printed = [finish(child) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert all(child.returncode == 0 for child in children), printed
    return [out for out, _ in printed]


# An example: each process loads its own part of the batch.


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[Any]]:
    """What the processes print, and what they hold."""
    out = tmp_path_factory.mktemp("distributed")
    printed = launch(of_jax, "distributed.py", "--out", str(out), JAX_ENABLE_X64="1")
    return printed, [np.load(out / f"{i}.npz") for i in range(PROCESSES)]


@pytest.mark.parametrize("name", distributed.METHODS)
def test_processes_train_as_one_does(example, name, x64):
    first, _ = example[1]
    method = distributed.METHODS[name]
    one = distributed.train(method, Mesh(np.array(jax.devices("cpu")[:1]), ("data",)))
    np.testing.assert_array_equal(first[f"{name}: employed"], one.employed)
    assert set(one.employed) == ({True, False} if "ae_sam" in name else {False})
    # In double precision: only the order of the sums over the batch differs.
    np.testing.assert_allclose(first[f"{name}: losses"], one.losses, rtol=1e-12)
    assert one.losses[-1] < 0.5 * one.losses[0]
    for key, weights in one.weights.items():
        assert weights.dtype == np.float64
        np.testing.assert_allclose(first[f"{name}: {key}"], weights, atol=1e-12)


def test_processes_hold_the_same(example):
    first, second = example[1]
    assert first.files == second.files
    assert len(first.files) == 6 * len(distributed.METHODS)
    for key in first.files:
        np.testing.assert_array_equal(first[key], second[key])


def test_the_first_process_alone_tells(example):
    told, silent = example[0]
    lines = [line for line in told.splitlines() if "Gloo" not in line]
    assert [line.partition(":")[0] for line in lines] == list(distributed.METHODS)
    assert all("on 2 devices of 2 processes" in line for line in lines)
    assert [line for line in silent.splitlines() if "Gloo" not in line] == []


# The comparison.


def test_compare_finds_the_same_in_two_processes(tmp_path):
    def results(folder: str) -> dict[str, Any]:
        return json.loads((tmp_path / folder / "results.json").read_text())

    assert compare.main([*COMPARE, "--out", str(tmp_path / "one")]) == 0
    # Were the second to write as well, this folder would be made in its own place.
    out = str(tmp_path / "two")
    told, silent = launch(
        of_slurm, "compare.py", *COMPARE, "--distributed", "--out", out
    )
    assert "ae_sam" in told and "Figure: " in told
    assert [line for line in silent.splitlines() if "Gloo" not in line] == []
    one, two = results("one"), results("two")
    added = {"processes": PROCESSES, "devices": PROCESSES}
    assert two["settings"] == {**one["settings"], **added}
    assert len(one["runs"]) == len(two["runs"]) == 2
    for alone, together in zip(one["runs"], two["runs"], strict=True):
        for key in ("contender", "seed", "gradients", "sam_fraction", "diverged"):
            assert alone[key] == together[key]
        # In single precision: an example on the border may fall to the other side.
        for key in ("test_accuracies", "train_accuracy", "clean_train_accuracy"):
            np.testing.assert_allclose(alone[key], together[key], atol=0.003)
        for key in ("test_loss", "sharpness"):
            assert alone[key] == pytest.approx(together[key], rel=1e-4)
    assert 0 < one["runs"][1]["sam_fraction"] < 1


def test_the_devices_share_out_the_batches_and_nothing_else():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    settings: dict[str, Any] = {"label_noise": 0.0, "epochs": 1, "batch_size": 512}
    model = models.build("mlp", 10, widths=(4,))
    task = training.Task(data.load("digits"), model, **settings, mesh=mesh)
    found: list[Any] = []

    def look(*step: Any) -> None:
        state, batch, _ = step
        found.append([{x.sharding for x in jax.tree.leaves(y)} for y in (state, batch)])

    (epoch,) = training.Trainer(task, optax.sgd(0.1, 0.9)).epochs(0, look)
    everywhere = NamedSharding(mesh, PartitionSpec())
    assert found == [[{everywhere}, {NamedSharding(mesh, PartitionSpec("data"))}]] * 2
    weights, images = task.weights(epoch.state), task.test_images
    assert {x.sharding for x in jax.tree.leaves((weights, images))} == {everywhere}


# What says how to connect.


@pytest.fixture
def initialised(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of jax.distributed.initialize, which does nothing else."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs)
    )
    for variable in of_jax(0, 1):
        monkeypatch.delenv(variable, raising=False)
    return calls


def test_the_variables_are_handed_on(initialised, monkeypatch):
    for variable, value in of_jax(1, 1).items():
        monkeypatch.setenv(variable, value)
    assert distributed.connect().axis_names == ("data",)
    assert initialised == [{"num_processes": PROCESSES, "process_id": 1}]


def test_the_cluster_is_asked_for_what_is_not_set(initialised):
    distributed.connect()
    assert initialised == [{"num_processes": None, "process_id": None}]


def test_what_is_missing_is_said_in_a_sentence(monkeypatch, capsys):
    def initialise(**_: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialise)
    for main, argv in (
        (compare.main, [*COMPARE, "--distributed"]),
        (distributed.main, []),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(argv)
        assert exit_info.value.code == 2
        printed = capsys.readouterr()
        assert "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES" in printed.err
        assert printed.err.count("\n") == 1 and printed.out == ""


def test_a_batch_that_the_devices_cannot_share_is_refused(capsys):
    parser = arguments.Parser("")
    arguments.add_task_arguments(parser, seeds=1)
    args: argparse.Namespace = parser.parse_args(["--dataset", "digits"])
    three = Mesh(np.array(jax.devices()[:1] * 3), ("data",))
    with pytest.raises(SystemExit):
        arguments.load_task(parser, args, mesh=three)
    message = "argument --batch-size: 128 was given, but 3 devices cannot share"
    assert message in capsys.readouterr().err
