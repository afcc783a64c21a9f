"""On four simulated devices every method does what it does on one.

Devices must be simulated before JAX starts, hence a process of its own: the tests here
read what ``python tests/test_sharding.py`` printed.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

STEPS, DEVICES = 6, 4
METHODS = ["msam", "adamw_msam", "adaptive msam", "sam", "ae_sam"]
LAYOUTS = ["data parallel", "fully sharded"]


def simulate() -> dict[str, Any]:
    """Runs every method in every layout on simulated devices, and compares."""
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)

    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import msam_optax as mo

    assert len(jax.devices()) == DEVICES

    def falling(t: Any) -> Any:
        return 0.3 / (1 + 0.3 * t)

    def sgd() -> optax.GradientTransformation:
        return optax.sgd(0.1, momentum=0.9)

    methods = {
        "msam": mo.msam(0.1, rho=falling),
        "adamw_msam": mo.adamw_msam(0.01, rho=0.3),
        "adaptive msam": mo.momentum_perturbation(
            sgd(), ascent=mo.adaptive_ascent(falling, eta=0.01)
        ),
        "sam": mo.sam(sgd(), falling),
        "ae_sam": mo.ae_sam(sgd(), 0.2, total_steps=STEPS),
    }
    assert list(methods) == METHODS

    rng = np.random.default_rng(0)
    start = {
        "kernel": rng.normal(size=(8, 16)).astype(np.float32) / 3,
        "bias": rng.normal(size=16).astype(np.float32),
        "output": rng.normal(size=(16, 8)).astype(np.float32) / 4,
    }
    sizes = np.array([1.0, 0.3, 2.0, 0.2, 1.0, 3.0])[:, None, None]
    batches = (sizes * rng.normal(size=(STEPS, 16, 8))).astype(np.float32)

    def loss(p: Any, batch: Any) -> Any:
        hidden = jnp.tanh(batch @ p["kernel"] + p["bias"])
        return jnp.mean((hidden @ p["output"] - batch) ** 2)

    mesh = Mesh(np.array(jax.devices()), ("devices",))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("devices"))

    def employed(state: Any) -> bool | None:
        found = optax.tree_utils.tree_get(state, "EmployState")
        return None if found is None else bool(found.employed)

    def run(tx: Any, params_sharding: Any, batch_sharding: Any) -> dict[str, Any]:
        @jax.jit
        def step(params: Any, state: Any, batch: Any) -> Any:
            def grad_fn(p: Any) -> Any:
                return jax.grad(loss)(p, batch)

            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
            return params, state, mo.eval_params(state, params)

        params = jax.device_put(start, params_sharding)
        state = tx.init(params)  # as sharded as the parameters, without being told
        decisions = []
        for batch in batches:
            batch = jax.device_put(batch, batch_sharding)
            params, state, clean = step(params, state, batch)
            decisions.append(employed(state))
        return dict(params=params, state=state, clean=clean, decisions=decisions)

    def distance(tree: Any, other: Any) -> float:
        gaps = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), tree, other)
        return float(max(jax.tree.leaves(gaps)))

    report: dict[str, Any] = {}
    for name, tx in methods.items():
        one = jax.device_get(run(tx, jax.devices()[0], jax.devices()[0]))
        report[name] = {}
        for layout in LAYOUTS:
            sharding = split if layout == "fully sharded" else replicated
            many = run(tx, sharding, split)
            momenta = [x for x in jax.tree.leaves(many["state"]) if x.ndim > 0]
            report[name][layout] = {
                "moved": distance(one["params"], start),
                "params": distance(one["params"], jax.device_get(many["params"])),
                "clean": distance(one["clean"], jax.device_get(many["clean"])),
                "perturbation": distance(one["clean"], one["params"]),
                "decisions": [one["decisions"], many["decisions"]],
                "shares": [x.addressable_shards[0].data.size / x.size for x in momenta],
                "devices": len(many["params"]["kernel"].sharding.device_set),
            }
    return report


@functools.cache
def report() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(pathlib.Path(__file__).resolve())],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


on_all = pytest.mark.parametrize("layout", LAYOUTS)
by_all = pytest.mark.parametrize("method", METHODS)


@on_all
@by_all
def test_the_trajectory_is_that_of_one_device(method, layout):
    found = report()[method][layout]
    assert found["devices"] == DEVICES
    assert found["moved"] > 0.01
    assert found["params"] < 1e-4 * found["moved"]
    assert found["clean"] < 1e-4 * found["moved"]
    assert (found["perturbation"] > 0.01) == ("msam" in method)


@on_all
@by_all
def test_the_state_is_sharded_like_the_parameters(method, layout):
    found = report()[method][layout]
    assert len(found["shares"]) >= 3
    share = 1 / DEVICES if layout == "fully sharded" else 1
    assert set(found["shares"]) == {share}


@on_all
def test_the_policy_decides_as_on_one_device(layout):
    one, many = report()["ae_sam"][layout]["decisions"]
    assert one == many
    assert set(one) == {True, False}


if __name__ == "__main__":
    print(json.dumps(simulate()))
