"""What the methods cost, in what does not drift: FLOPs, bytes and collectives.

Temporaries of the MSAM updates and their states' sizes are in test_momentum, the
gradients that run in test_employ and test_train. Seconds are for the benchmarks.
"""

import functools
import json
import math
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import msam_optax as mo
from tests.versions import needs_meshes, needs_no_temporaries

LR = 0.01
RHO = 0.05
# Large enough that a gradient is 60 times the arithmetic of any update.
BATCH, WIDTH = 256, 32
KEY = None


def sgd() -> optax.GradientTransformation:
    return optax.sgd(LR, momentum=0.9)


def sam_of_optax() -> optax.GradientTransformation:
    """`optax.contrib.sam` as `make_train_step` calls it."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(sgd(), ascent, opaque_mode=True)

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_fn: Any, **extra: Any
    ) -> Any:
        return tx.update(updates, state, params, grad_fn=lambda p, i: grad_fn(p))

    return optax.GradientTransformationExtraArgs(tx.init, update)


def loss_fn(params: Any, model_state: Any, batch: jax.Array, key: Any) -> Any:
    x = batch
    for kernel in params.values():
        x = jnp.tanh(x @ kernel)
    return jnp.mean(x**2, axis=-1), (model_state, {})


def structs(
    width: int = WIDTH, examples: int = BATCH
) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Parameters of three layers and a batch, without values."""
    kernel = jax.ShapeDtypeStruct((width, width), jnp.float32)
    batch = jax.ShapeDtypeStruct((examples, width), jnp.float32)
    return {f"layer{i}": kernel for i in range(3)}, batch


def state_of(tx: optax.GradientTransformation, width: int = WIDTH) -> mo.TrainState:
    params, _ = structs(width)
    return mo.TrainState(params, jax.eval_shape(tx.init, params))


class Cost(NamedTuple):
    flops: float
    temporary_bytes: int
    accessed_bytes: float


def cost(jitted: Any, *args: Any, **kwargs: Any) -> Cost:
    compiled = jitted.lower(*args, **kwargs).compile()
    analysis = compiled.cost_analysis()
    return Cost(
        analysis["flops"],
        compiled.memory_analysis().temp_size_in_bytes,
        analysis["bytes accessed"],
    )


def step_cost(
    tx: optax.GradientTransformation, width: int = WIDTH, examples: int = BATCH
) -> Cost:
    """Of the training step that is one program."""
    step = mo.make_train_step(loss_fn, tx, dispatch="in_graph")
    _, batch = structs(width, examples)
    return cost(jax.jit(step, donate_argnums=0), state_of(tx, width), batch, KEY)


@functools.cache
def base_cost() -> Cost:
    return step_cost(sgd())


# --- FLOPs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx, gradients",
    [
        (mo.msam(LR, rho=0.3), 1),
        (mo.momentum_perturbation(sgd(), RHO), 1),
        (mo.sam(sgd(), RHO), 2),
        (mo.asam(sgd(), RHO), 2),
        (mo.gsam(sgd(), RHO), 2),
        (mo.friendly_sam(sgd(), RHO), 2),
        # A forward pass, three of a gradient's eight products, tells which half of the
        # samples is worth a gradient.
        (mo.esam(sgd(), RHO, gamma=0.5), 1 + 3 / 8 + 1 / 2),
    ],
    ids=["msam", "around sgd", "sam", "asam", "gsam", "friendly_sam", "esam"],
)
def test_a_step_costs_its_gradients(tx, gradients):
    ratio = step_cost(tx).flops / base_cost().flops
    assert 0.98 * gradients < ratio < 1.015 * gradients


def host_flops(tx: optax.GradientTransformation) -> tuple[float, float]:
    """Of the programs of a step dispatched from the host: plain, and employed."""
    step = mo.make_train_step(loss_fn, tx, dispatch="host")
    compiled = step.lower(state_of(tx), structs()[1], KEY).compile()
    flops = {}
    for name, program in compiled.programs.items():
        analysis = program.cost_analysis()
        assert analysis is not None
        flops[name] = analysis.get("flops", 0.0)
    return flops["decide"] + flops["plain"], flops["decide"] + flops["employed"]


@pytest.mark.parametrize(
    "tx",
    [
        mo.ae_sam(sgd(), RHO, total_steps=10),
        mo.ss_sam(sgd(), RHO),
        mo.looksam(sgd(), RHO, k=5),
    ],
    ids=["ae_sam", "ss_sam", "looksam"],
)
def test_a_fraction_f_of_employed_steps_costs_1_plus_f_gradients(tx):
    plain, employed = host_flops(tx)
    for f in (0.0, 0.2, 0.5, 1.0):
        flops = (1 - f) * plain + f * employed
        assert flops < 1.02 * (1 + f) * base_cost().flops


def test_never_employed_costs_nothing():
    transform = mo.sharpness_aware_gradient(mo.ascents.normalized(RHO))
    tx = optax.chain(mo.employ(mo.policies.never(), transform), sgd())
    plain, _ = host_flops(tx)
    assert plain < 1.01 * base_cost().flops


# --- Bytes ----------------------------------------------------------------------------


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@needs_no_temporaries
@pytest.mark.parametrize(
    "width, examples",
    [
        (WIDTH, BATCH),
        # Far more parameters than activations
        (512, 8),
    ],
)
def test_sam_needs_no_more_memory_than_that_of_optax(width, examples):
    ours, theirs = mo.sam(sgd(), RHO), sam_of_optax()
    ours_cost = step_cost(ours, width, examples)
    theirs_cost = step_cost(theirs, width, examples)
    # The metrics take up to three per cent, for the norm of epsilon, and the examples'
    # losses at the perturbed point, for the sharpness.
    told = 4 * examples + 256
    assert ours_cost.temporary_bytes <= 1.03 * theirs_cost.temporary_bytes + told
    state_bytes = [
        nbytes(jax.eval_shape(tx.init, structs()[0])) for tx in (ours, theirs)
    ]
    assert state_bytes[0] <= state_bytes[1] + 4  # the sharpness


def test_sam_needs_no_more_arithmetic_than_that_of_optax():
    ours, theirs = step_cost(mo.sam(sgd(), RHO)), step_cost(sam_of_optax())
    assert ours.flops < 1.01 * theirs.flops


@needs_no_temporaries
@pytest.mark.parametrize(
    "tx, moved",
    [
        (sgd(), 6),
        (mo.msam(LR, rho=0.3), 8),
        (optax.adamw(LR), 10),
        (mo.adamw_msam(LR, rho=1.0), 12),
    ],
    ids=["sgd", "msam", "adamw", "adamw_msam"],
)
def test_an_msam_update_moves_two_more_trees_than_its_base(tx, moved):
    params = {f"{i}": jax.ShapeDtypeStruct((125_000,), jnp.float32) for i in range(8)}

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    accessed = cost(
        jax.jit(update, donate_argnums=(0, 1)), params, state, params
    ).accessed_bytes
    assert accessed < (moved + 0.1) * nbytes(params)


# --- Collectives ----------------------------------------------------------------------


def all_reduced(lowered: jax.stages.Lowered) -> float:
    """Bytes that the all-reduces of a program give, in units of the gradient's."""
    total = 0
    for line in (lowered.compile().as_text() or "").splitlines():
        if match := re.search(r" = (.*?) all-reduce\(", line):
            for shape in re.findall(r"f32\[([\d,]+)\]", match[1]):
                total += 4 * math.prod(map(int, shape.split(",")))
    return total / nbytes(structs()[0])


def data_parallel(tx: optax.GradientTransformation, mesh: Mesh) -> jax.stages.Lowered:
    step = mo.make_train_step(loss_fn, tx, dispatch="in_graph")
    state, batch = placed(mesh, state_of(tx))
    return jax.jit(step, donate_argnums=0).lower(state, batch, KEY)


def m_sharpness(mesh: Mesh) -> jax.stages.Lowered:
    """SAM whose devices each ascend along the gradient of their own examples."""
    sam = mo.sharpness_aware_gradient(mo.ascents.normalized(RHO))

    def device_gradient(params: Any, batch: Any) -> Any:
        # Varying from device to device, or each gradient would be summed over them.
        params = jax.lax.pcast(params, "data", to="varying")
        grad_fn = jax.grad(lambda p: jnp.mean(loss_fn(p, (), batch, KEY)[0]))
        gradient, _ = sam.update(
            grad_fn(params), sam.init(params), params, grad_fn=grad_fn
        )
        return jax.lax.pmean(gradient, "data")

    def step(state: mo.TrainState, batch: Any) -> mo.TrainState:
        gradient = jax.shard_map(
            device_gradient,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
        )(state.params, batch)
        updates, opt_state = sgd().update(gradient, state.opt_state, state.params)
        return mo.TrainState(optax.apply_updates(state.params, updates), opt_state)

    return jax.jit(step).lower(*placed(mesh, state_of(sgd())))


def placed(mesh: Mesh, state: mo.TrainState) -> tuple[mo.TrainState, Any]:
    """The state on every device, and a batch shared out among them."""

    def place(tree: Any, *spec: str) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    return place(state), place(structs()[1], "data")


def all_reduces() -> dict[str, Any]:
    """All-reduced gradients of a step on eight devices; for a process of its own."""
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    methods = {
        "sgd": sgd(),
        "msam": mo.msam(LR, rho=0.3),
        "adamw_msam": mo.adamw_msam(LR, rho=1.0),
        "sam": mo.sam(sgd(), RHO),
    }
    counts: dict[str, Any] = {
        name: all_reduced(data_parallel(tx, mesh)) for name, tx in methods.items()
    }
    counts["m-sharpness"] = all_reduced(m_sharpness(mesh))
    counts["of scalars"] = {
        name: [scalars_all_reduced(tx, mesh, tensors) for tensors in (2, 6)]
        for name, tx in methods.items()
        if name != "sgd"
    }
    return counts


def scalars_all_reduced(
    tx: optax.GradientTransformation, mesh: Mesh, tensors: int
) -> int:
    """All-reduces of scalars alone in a step whose parameters are shared out."""
    kernel = structs()[0]["layer0"]
    params = {f"{i}": kernel for i in range(tensors)}

    def place(leaf: Any) -> Any:
        spec = PartitionSpec("data") if leaf.ndim else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = mo.TrainState(params, jax.eval_shape(tx.init, params))
    state, batch = jax.tree.map(place, (state, structs()[1]))
    out = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = mo.make_train_step(loss_fn, tx, dispatch="in_graph")
    jitted = jax.jit(step, out_shardings=(out, None))
    program = jitted.lower(state, batch, KEY).compile().as_text() or ""
    results = re.findall(r" = (.*?) all-reduce\(", program)
    assert any("f32[32,32]" in result for result in results)
    return sum("f32[]" in r and not re.search(r"f32\[\d", r) for r in results)


@needs_meshes
def test_gradients_and_scalars_all_reduced_in_a_step():
    process = subprocess.run(
        [sys.executable, "-m", "tests.contract.test_cost"],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert json.loads(process.stdout) == {
        "sgd": 1,
        "msam": 1,
        "adamw_msam": 1,
        "sam": 2,
        "m-sharpness": 1,
        # One for the loss and the norms of the method and its metrics: the tensors'
        # shares of a norm travel together, or with their gradients.
        "of scalars": {name: [1, 1] for name in ("msam", "adamw_msam", "sam")},
    }


if __name__ == "__main__":
    print(json.dumps(all_reduces()))
