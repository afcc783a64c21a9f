"""On eight simulated devices every method does what it does on one.

Devices must be simulated before JAX starts, hence a process of its own: the tests here
read what ``python tests/contract/test_sharding.py`` printed.
"""

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import msam_optax as mo
from tests.every_method import MSAM, build, sgd
from tests.versions import needs_meshes

STEPS, DEVICES = 6, 8
REPLICATED, SPLIT = PartitionSpec(), PartitionSpec("data")


SGD = sgd()


class Case(NamedTuple):
    """What is trained, and how it is dispatched."""

    method: str
    dispatch: Any = "auto"

    @property
    def tx(self) -> Any:
        return build(self.method)


NAMES = ["msam, rho schedule", "adamw_msam", "momentum_perturbation, adaptive"]
NAMES += ["sam, rho schedule", "friendly_sam", "esam", "looksam"]
METHODS = {
    **{name: Case(name) for name in NAMES},
    "ae_sam in graph": Case("ae_sam", "in_graph"),
    "ae_sam from the host": Case("ae_sam", "host"),
}
# Of these the policy takes both decisions within the steps.
DECIDING = [name for name in METHODS if name.startswith(("ae_sam", "looksam"))]
LAYOUTS = {
    "data parallel": list(METHODS),
    "fully sharded": list(METHODS),
    # JAX chooses no samples from an array that is explicitly sharded, and a device in
    # shard_map knows its own only.
    "explicitly sharded": ["msam, rho schedule", "sam, rho schedule", *DECIDING],
    "shard_map": [n for n in METHODS if n not in ("esam", "ae_sam from the host")],
}
CASES = [(name, layout) for layout, names in LAYOUTS.items() for name in names]


class Layout(NamedTuple):
    """How a run is laid out.

    Attributes:
      mesh: its devices.
      params: of the parameters, and whatever is as large in the optimizer's state.
      make_step: makes the step of a loss function, an optimizer and a dispatch.
    """

    mesh: Mesh
    params: PartitionSpec
    make_step: Callable[..., Any]


def layouts() -> dict[str, Layout]:
    devices = np.array(jax.devices())
    one, implicit = Mesh(devices[:1], ("data",)), Mesh(devices, ("data",))
    explicit = Mesh(devices, ("data",), axis_types=(AxisType.Explicit,))

    def step(loss_fn: Any, tx: Any, dispatch: Any) -> Any:
        return mo.make_train_step(loss_fn, tx, dispatch=dispatch)

    def gathering_step(loss_fn: Any, tx: Any, dispatch: Any) -> Any:
        def gathering(params: Any, *args: Any) -> Any:
            return loss_fn(jax.sharding.reshard(params, REPLICATED), *args)

        return step(gathering, tx, dispatch)

    def step_in_shard_map(loss_fn: Any, tx: Any, dispatch: Any) -> Any:
        def averaged(*args: Any) -> Any:
            losses, aux = loss_fn(*args)
            # At parameters that are alike on all devices, the gradient of this mean is
            # alike on all devices too, and so is what is made of it.
            return jax.lax.pmean(jnp.mean(losses), "data"), aux

        return jax.jit(
            jax.shard_map(
                step(averaged, tx, "in_graph"),
                mesh=implicit,
                in_specs=(REPLICATED, SPLIT, REPLICATED),
                # Refused for a result that JAX can't show to be alike on all devices.
                out_specs=REPLICATED,
            )
        )

    return {
        "one device": Layout(one, REPLICATED, step),
        "data parallel": Layout(implicit, REPLICATED, step),
        "fully sharded": Layout(implicit, SPLIT, step),
        "explicitly sharded": Layout(explicit, SPLIT, gathering_step),
        "shard_map": Layout(implicit, REPLICATED, step_in_shard_map),
    }


def problem() -> tuple[Any, np.ndarray]:
    """Parameters to start from, and the batches of all steps."""
    rng = np.random.default_rng(0)
    start = {
        "kernel": rng.normal(size=(8, 16)) / 3,
        "bias": rng.normal(size=16),
        "output": rng.normal(size=(16, 8)) / 4,
    }
    sizes = np.array([1.0, 0.3, 2.0, 0.2, 1.0, 3.0])[:, None, None]
    return start, sizes * rng.normal(size=(STEPS, 16, 8))


def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    hidden = jnp.tanh(batch @ params["kernel"] + params["bias"][None])
    return jnp.mean((hidden @ params["output"] - batch) ** 2, -1), (model_state, {})


def run(name: str, layout: Layout) -> dict[str, Any]:
    """Trains; what is kept is on the host."""
    tx, dispatch = METHODS[name].tx, METHODS[name].dispatch
    start, batches = problem()

    def shardings(tree: Any) -> Any:
        def sharding(x: Any) -> NamedSharding:
            # Whatever is not as large as a parameter is a scalar.
            return NamedSharding(layout.mesh, layout.params if x.ndim else REPLICATED)

        return jax.tree.map(sharding, tree)

    def shares(tree: Any) -> list[float]:
        leaves = [x for x in jax.tree.leaves(tree) if x.ndim]
        return [x.addressable_shards[0].data.size / x.size for x in leaves]

    def scalars_are_replicated(tree: Any) -> bool:
        scalars = [x for x in jax.tree.leaves(tree) if not x.ndim]
        everywhere = NamedSharding(layout.mesh, REPLICATED)
        return all(x.sharding.is_equivalent_to(everywhere, 0) for x in scalars)

    is_explicit = AxisType.Explicit in layout.mesh.axis_types
    with jax.set_mesh(layout.mesh) if is_explicit else contextlib.nullcontext():
        params = jax.device_put(start, shardings(start))
        # Told by the shapes alone: under jit zeros know nothing of the parameters.
        init = jax.jit(tx.init, out_shardings=shardings(jax.eval_shape(tx.init, start)))
        state = mo.TrainState(params, init(params))
        found: dict[str, Any] = {
            "shares": {
                "eager init": shares(tx.init(params)),
                "jitted init": shares(state),
            },
            "trajectory": [],
            "decisions": [],
        }
        step = layout.make_step(loss_fn, tx, dispatch)
        for batch in batches:
            batch = jax.device_put(batch, NamedSharding(layout.mesh, SPLIT))
            state, metrics = step(state, batch, None)
            found["trajectory"].append(jax.device_get((metrics.loss, state.params)))
            found["decisions"].append(decisions(state, metrics))
        found["shares"]["steps"] = shares(state)
        found["replicated"] = scalars_are_replicated((state, metrics))
        clean = mo.eval_params(state.opt_state, state.params)
    found["trajectory"].append(jax.device_get(clean))
    return found


def decisions(state: mo.TrainState, metrics: mo.StepMetrics) -> list[bool]:
    """The last one as each device holds it."""
    employ = optax.tree.get(state.opt_state, "EmployState")
    kept = metrics.employed if employ is None else employ.employed
    shards = [*kept.addressable_shards, *metrics.employed.addressable_shards]
    return [bool(shard.data) for shard in shards]


def distance(tree: Any, other: Any) -> float:
    gaps = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), tree, other)
    return float(np.max(jax.tree.leaves(gaps)))


def compare() -> dict[str, Any]:
    """Runs every method in its layouts, and compares them with one device."""
    ways = layouts()
    report: dict[str, Any] = {}
    for name in METHODS:
        one = run(name, ways["one device"])
        *_, (_, last), clean = one["trajectory"]
        for layout in (layout for other, layout in CASES if other == name):
            many = run(name, ways[layout])
            report[f"{name}, {layout}"] = {
                "moved": distance(last, problem()[0]),
                "perturbation": distance(last, clean),
                "apart": distance(one["trajectory"], many["trajectory"]),
                "decisions": [one["decisions"], many["decisions"]],
                "shares": many["shares"],
                "replicated": many["replicated"],
            }
    return report


def ascend_by_shard() -> dict[str, float]:
    """m-sharpness in three ways, and plain SAM, by their distances to the first."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sam = mo.sharpness_aware_gradient(mo.ascents.normalized(0.3))
    start, batches = problem()

    def batch_gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: jnp.mean(loss_fn(p, (), batch, None)[0]))(params)

    def gradient_at(params: Any, batch: Any) -> Any:
        grad_fn = functools.partial(batch_gradient, batch=batch)
        return sam.update(grad_fn(params), sam.init(params), params, grad_fn=grad_fn)[0]

    def of_m_sharpness(params: Any, batch: Any) -> Any:
        sharded = mo.m_sharpness(sam, DEVICES)
        return sharded.gradient(batch_gradient, sharded.init(params), params, batch)[0]

    def of_the_device(params: Any, batch: Any) -> Any:
        params = jax.lax.pcast(params, "data", to="varying")
        return jax.lax.pmean(gradient_at(params, batch), "data")

    in_shard_map = jax.shard_map(
        of_the_device, mesh=mesh, in_specs=(REPLICATED, SPLIT), out_specs=REPLICATED
    )

    def end(gradient: Any, *shardings: Any) -> Any:
        @jax.jit
        def step(params: Any, state: Any, batch: Any) -> Any:
            updates, state = SGD.update(gradient(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        params = jax.device_put(start, shardings[0])
        state = SGD.init(params)
        for batch in jax.device_put(list(batches), shardings[1]):
            params, state = step(params, state, batch)
        return jax.device_get(params)

    one = [jax.devices()[0]] * 2
    many = [NamedSharding(mesh, spec) for spec in (REPLICATED, SPLIT)]
    by_shard = end(of_m_sharpness, *one)
    return {
        "shard_map": distance(by_shard, end(in_shard_map, *many)),
        "sharded batch": distance(by_shard, end(of_m_sharpness, *many)),
        "one ascent": distance(by_shard, end(gradient_at, *one)),
    }


pytestmark = needs_meshes


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.contract.test_sharding"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


in_all_cases = pytest.mark.parametrize("method, layout", CASES)


@in_all_cases
def test_the_trajectory_is_that_of_one_device(report, method, layout):
    found = report[f"{method}, {layout}"]
    assert found["moved"] > 0.01
    assert (found["perturbation"] > 0.01) == (method in MSAM)
    assert found["apart"] < 1e-12


@in_all_cases
def test_the_state_is_sharded_like_the_parameters(report, method, layout):
    found = report[f"{method}, {layout}"]
    share = 1 / DEVICES if "sharded" in layout else 1
    for when, shares in found["shares"].items():
        assert len(shares) >= 3, when
        assert set(shares) == {share}, when
    assert found["replicated"]


@pytest.mark.parametrize("method, layout", [c for c in CASES if c[0] in DECIDING])
def test_all_devices_decide_as_one(report, method, layout):
    one, many = report[f"{method}, {layout}"]["decisions"]
    assert {decision for step in one for decision in step} == {True, False}
    for alone, together in zip(one, many, strict=True):
        # In the optimizer's state and in the metrics
        assert len(alone) == 2 and len(together) == 2 * DEVICES
        assert set(together) == set(alone)


def test_each_device_ascends_by_itself_in_shard_map(report):
    found = report["m-sharpness"]
    assert found["shard_map"] < 1e-12
    assert found["sharded batch"] < 1e-12
    assert found["one ascent"] > 1e-3


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_enable_x64", True)
    # Compiling takes nearly all of the time.
    jax.config.update("jax_disable_most_optimizations", True)
    print(json.dumps(compare() | {"m-sharpness": ascend_by_shard()}))
