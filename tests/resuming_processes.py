"""What the tests of checkpoints can't do in their own process.

``python -m tests.resuming_processes TASK DIRECTORY`` trains on simulated devices, or is
killed.
"""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.resuming import (
    ALIASES,
    SAVED,
    STEPS,
    Training,
    batch,
    digest,
    params,
    restore,
    save,
    training,
)

DEVICES = 4


def simulate(directory: pathlib.Path) -> dict[str, Any]:
    """Every method on simulated devices, uninterrupted and resumed."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    assert mesh.size == DEVICES

    def place(x: Any, *axes: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def start(run: Training) -> Any:
        p = params()
        state = run.start(
            {
                "kernel": place(p["kernel"], "devices"),
                "bias": place(p["bias"]),
                "output": place(p["output"], None, "devices"),
            }
        )

        def settle(x: jax.Array) -> jax.Array:
            # What is not made of parameters, such as a scalar, has no place yet. Once
            # restored it has one, the device that it happened to be on: not the mesh.
            axes = ["devices"] if x.shape == (DEVICES,) else []  # m_sharpness's shards
            return x if x.committed else place(x, *axes)

        return jax.tree.map(settle, state)

    def shardings(tree: Any) -> list[str]:
        return [str(tuple(x.sharding.spec)) for x in jax.tree.leaves(tree)]

    report = {}
    for name in ALIASES:
        run = training(name)
        state = start(run)
        for t in range(SAVED):
            state, _ = run.step(state, place(batch(t), "devices"), np.float32(t))
        save(directory / name, SAVED, state)
        kept = shardings(state)
        restored = restore(directory / name, start(run))
        found: dict[str, Any] = dict(saved=digest(state), restored=digest(restored))
        found["shardings"] = [kept, shardings(restored)]
        for which, s in (("uninterrupted", state), ("resumed", restored)):
            digests = []
            for t in range(SAVED, STEPS):
                s, _ = run.step(s, place(batch(t), "devices"), np.float32(t))
                digests.append(digest(s))
            found[which] = digests
        report[name] = found
    return {
        "methods": report,
        "damage": damage(directory / "msam", start(training("msam"))),
    }


def damage(directory: pathlib.Path, like: Any) -> dict[str, int]:
    """What becomes of a checkpoint where one of its files is lost or cut off."""
    good = digest(restore(directory, like))
    outcomes: collections.Counter[str] = collections.Counter()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for left in (None, b"", whole[: len(whole) // 2]):
            path.unlink()
            if left is not None:
                path.write_bytes(left)
            try:
                same = digest(restore(directory, like)) == good
            except Exception:  # Orbax and TensorStore raise many kinds
                outcomes["refused"] += 1
            else:
                outcomes["restored" if same else "wrong"] += 1
            path.write_bytes(whole)
    return outcomes


def train_and_save(
    directory: pathlib.Path, names: list[str], watch: Callable[[int], None]
) -> None:
    """Trains several methods at once, and saves on every second step meanwhile."""
    states = {name: training(name).start(params()) for name in names}
    with ocp.CheckpointManager(directory) as checkpoints:
        for t in range(STEPS):
            for name in names:
                step = training(name).step
                states[name], _ = step(states[name], batch(t), np.float32(t))
            watch(t)
            if t % 2:
                checkpoints.save(t + 1, args=ocp.args.StandardSave(states))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


KILLED_IN_A_STEP = ["ss_sam", "ae_sam", "friendly_sam", "adamw_msam"]
KILLED_IN_A_SAVE = ["ae_sam", "msam"]


def killed_in_a_step(directory: pathlib.Path) -> None:
    """Dies while step 5 runs, and perhaps while the save after the last still does."""
    train_and_save(directory, KILLED_IN_A_STEP, lambda t: die() if t == 5 else None)


def killed_in_a_save(directory: pathlib.Path) -> None:
    """Dies in the save after six steps, when all is written but not yet committed.

    Before each change that the save after four steps makes to a file or a directory,
    the whole run is copied: a process killed at this moment would leave behind that.
    """
    run, moments, copying = directory / "run", itertools.count(), threading.RLock()
    busy = False

    def on_change(event: str, args: Any) -> None:
        nonlocal busy
        changed = event in ("os.mkdir", "os.rename", "os.remove")
        if not changed and not (event == "open" and args[1] == "w"):
            return
        path = pathlib.Path(str(args[0]))
        if run not in path.parents:
            return
        with copying:
            if busy:  # copying itself
                return
            step = path.relative_to(run).parts[0].partition(".")[0]
            if step == "4":
                busy = True
                with contextlib.suppress(shutil.Error):  # files that went meanwhile
                    shutil.copytree(run, directory / f"moments/{next(moments):02}")
                busy = False
            if step == "6" and event == "os.rename" and path.parent == run:
                die()

    sys.addaudithook(on_change)
    train_and_save(run, KILLED_IN_A_SAVE, lambda t: None)


def run_task(task: str, directory: pathlib.Path) -> Any:
    """Runs one of the tasks above in a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", __name__, task, str(directory)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
        cwd=pathlib.Path(__file__).parents[1],
    )


TASKS = {task.__name__: task for task in (simulate, killed_in_a_step, killed_in_a_save)}

if __name__ == "__main__":
    _, chosen, where = sys.argv
    if chosen == "simulate":  # which is about shardings, and compiles a lot
        jax.config.update("jax_num_cpu_devices", DEVICES)
        jax.config.update("jax_disable_most_optimizations", True)
    print(json.dumps(TASKS[chosen](pathlib.Path(where))))
