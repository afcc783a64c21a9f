"""Steps compiled for many devices, which are simulated: bytes and collectives."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import msam_optax
from benchmarks.costs.methods import METHODS
from benchmarks.costs.networks import KEY, Network, gpt

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
_ITEM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


class Collectives(NamedTuple):
    """Those of one kind in a program.

    Attributes:
      sizes: bytes that each gives, but for those that give scalars alone.
      scalars: how many give scalars alone.
    """

    sizes: list[int]
    scalars: int


def collectives(program: str) -> dict[str, Collectives]:
    """The collectives of a compiled program, by their kind."""
    sizes: dict[str, list[int]] = {kind: [] for kind in KINDS}
    scalars = dict.fromkeys(KINDS, 0)
    # `%name = f32[8,4]{1,0} all-reduce(...)`, or a tuple of such results; on a GPU they
    # start in one instruction and are done in another.
    pattern = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
    for line in program.splitlines():
        if match := pattern.search(line):
            results, kind, _ = match.groups()
            found = [
                _ITEM_BYTES[dtype] * math.prod(map(int, shape.split(",")))
                for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", results)
            ]
            if found:
                sizes[kind].append(sum(found))
            else:
                scalars[kind] += 1
    return {kind: Collectives(sizes[kind], scalars[kind]) for kind in KINDS}


def simulate(devices: int) -> None:
    """Gives this process so many devices; to be called before anything is on one."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def compiled(network: Network, name: str, layout: str, devices: int) -> dict[str, Any]:
    """The columns of a step whose work is shared out.

    Args:
      network: what is trained.
      name: of the method.
      layout: "data parallel" shares out the batch, "FSDP" the state too, and
        "m-sharpness" has each device ascend along the gradient of its own examples.
      devices: how many there are.
    """
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    if layout == "m-sharpness":
        lowered = _m_sharpness(network, mesh)
    else:
        lowered = _partitioned(network, name, mesh, layout == "FSDP")
    program: Any = lowered.compile()
    params_bytes = 4 * network.parameters
    memory = program.memory_analysis()
    columns: dict[str, Any] = {"params_bytes": params_bytes}
    for kind, found in collectives(program.as_text()).items():
        columns[f"{kind} bytes / P"] = sum(found.sizes) / params_bytes
        columns[f"{kind} operations"] = len(found.sizes)
        columns[f"{kind} scalars"] = found.scalars
    return {
        **columns,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def large_gpt(parameters: int, devices: int) -> Network:
    """A GPT of about so many parameters, with a text for each device."""
    width = 1024 if parameters < 5e8 else 2048
    # 12 squares of the width in each layer
    depth = round(parameters / (12 * width**2))
    sizes = {"vocabulary": 4096, "length": 64, "examples": devices}
    return gpt(depth, width, scanned=False, **sizes)


def _partitioned(
    network: Network, name: str, mesh: Mesh, shard_state: bool
) -> jax.stages.Lowered:
    """The step of `make_train_step` with its batch, and maybe its state, sharded."""
    optimizer = METHODS[name].build(1)
    step = msam_optax.make_train_step(
        network.loss_fn, optimizer, dispatch="in_graph", donate=False
    )

    def place(leaf):
        spec = _first_axis_that_divides(leaf, mesh) if shard_state else PartitionSpec()
        return _like(leaf, mesh, spec)

    state = jax.tree.map(place, network.state(optimizer))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    # The new state lies as the old one did, so that steps can follow each other.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(state, _sharded_batch(network, mesh), KEY)


def _m_sharpness(network: Network, mesh: Mesh) -> jax.stages.Lowered:
    sam = msam_optax.sharpness_aware_gradient(msam_optax.ascents.normalized(0.05))
    sgd = METHODS["sgd"].build(1)

    def device_gradient(params, batch):
        # Varying from device to device, or each gradient would be summed over them.
        params = jax.lax.pcast(params, "data", to="varying")

        def loss(params):
            losses: Any = network.loss_fn(
                params, network.model_state, batch, jax.random.key(0)
            )[0]
            return jnp.mean(losses)

        grad_fn = jax.grad(loss)
        gradient, _ = sam.update(
            grad_fn(params), sam.init(params), params, grad_fn=grad_fn
        )
        return jax.lax.pmean(gradient, "data")

    def step(params, state, batch):
        gradient = jax.shard_map(
            device_gradient,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
        )(params, batch)
        updates, state = sgd.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(
        lambda leaf: _like(leaf, mesh, PartitionSpec()),
        (network.params, jax.eval_shape(sgd.init, network.params)),
    )
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, state, _sharded_batch(network, mesh))


def _sharded_batch(network: Network, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf: _like(leaf, mesh, PartitionSpec("data")), network.batch
    )


def _like(leaf: Any, mesh: Mesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    )


def _first_axis_that_divides(leaf: Any, mesh: Mesh) -> PartitionSpec:
    for axis, size in enumerate(leaf.shape):
        if size % mesh.size == 0:
            return PartitionSpec(*[None] * axis, "data")
    return PartitionSpec()
