"""Trains over several processes, each of which loads its own part of every batch.

Start it once for each process; on one machine, at any free port of it,

    export JAX_COORDINATOR_ADDRESS=127.0.0.1:54321 JAX_NUM_PROCESSES=2
    JAX_PROCESS_ID=1 python benchmarks/distributed.py &
    JAX_PROCESS_ID=0 python benchmarks/distributed.py

and where JAX asks the cluster for all of that (Slurm, Open MPI, Cloud TPU),

    srun python benchmarks/distributed.py
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import msam_optax
from benchmarks import arguments
from benchmarks.tasks import data
from benchmarks.tasks.losses import cross_entropy

# Of the digits; the batch is shared out among all devices.
_STEPS, _BATCH_SIZE, _WIDTH = 22, 64, 32


class Method(NamedTuple):
    """A way to train.

    Attributes:
      optimizer: any Optax optimizer.
      dispatch: as `make_train_step` takes it.
      fully_sharded: share out the parameters and the optimizer's state too.
    """

    optimizer: optax.GradientTransformation
    dispatch: Any = "auto"
    fully_sharded: bool = False


def _ae_sam() -> optax.GradientTransformation:
    return msam_optax.ae_sam(optax.sgd(0.1, momentum=0.9), 0.1, total_steps=_STEPS)


METHODS = {
    "msam": Method(msam_optax.msam(0.1, rho=0.3)),
    "ae_sam in graph": Method(_ae_sam(), "in_graph"),
    "ae_sam from the host": Method(_ae_sam(), "host"),
    "ae_sam fully sharded": Method(_ae_sam(), fully_sharded=True),
}


class Trained(NamedTuple):
    """What a process holds at the end, on its host.

    Attributes:
      weights: the unperturbed parameters.
      losses: of the whole batch, before each step.
      employed: whether each step took an extra gradient.
    """

    weights: dict[str, np.ndarray]
    losses: np.ndarray
    employed: np.ndarray


def connect() -> Mesh:
    """Joins the other processes; to be called before anything is on a device.

    Returns:
      All devices of all processes along one axis, "data".

    Raises:
      ValueError: if neither the variables nor a cluster say how to.
    """

    def number(variable: str) -> int | None:
        text = os.environ.get(variable)
        return None if text is None else int(text)

    try:
        # JAX reads the coordinator's address by itself, and asks the cluster for what
        # is None. CPUs are connected by Gloo, its default.
        jax.distributed.initialize(
            num_processes=number("JAX_NUM_PROCESSES"),
            process_id=number("JAX_PROCESS_ID"),
        )
    except ValueError as error:
        raise ValueError(
            "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or "
            f"start under a cluster that JAX knows, by srun for instance ({error})"
        ) from error
    return Mesh(np.array(jax.devices()), ("data",))


def train(method: Method, mesh: Mesh) -> Trained:
    """Trains a small network on the digits, over all devices of the mesh."""
    step = msam_optax.make_train_step(
        _losses, method.optimizer, dispatch=method.dispatch
    )
    split, replicated = (NamedSharding(mesh, PartitionSpec(*s)) for s in (["data"], []))

    def init(key: jax.Array) -> msam_optax.TrainState:
        params = _initial_params(key)
        return msam_optax.TrainState(params, method.optimizer.init(params))

    def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        divides = leaf.ndim > 0 and leaf.shape[0] % mesh.size == 0
        return split if method.fully_sharded and divides else replicated

    # The optimizer's state under jit lies where it is told to lie, not where the
    # parameters do.
    key = jax.random.key(0)
    shardings = jax.tree.map(place, jax.eval_shape(init, key))
    state = jax.jit(init, out_shardings=shardings)(key)

    digits = data.load("digits")
    # The same seed in all processes: they agree on the batch, each takes its part.
    order = data.batches(
        len(digits.train_labels), _BATCH_SIZE, np.random.default_rng(0)
    )
    losses, employed = [], []
    for _, indices in zip(range(_STEPS), order, strict=True):
        own = np.split(indices, jax.process_count())[jax.process_index()]
        batch = jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(split, rows),
            (digits.train_images[own].reshape(len(own), -1), digits.train_labels[own]),
        )
        state, metrics = step(state, batch, None)
        losses.append(float(metrics.loss))
        employed.append(bool(metrics.employed))
    gather = jax.jit(msam_optax.eval_params, out_shardings=replicated)
    weights = jax.device_get(gather(state.opt_state, state.params))
    return Trained(weights, np.array(losses), np.array(employed))


def _initial_params(key: jax.Array) -> dict[str, jax.Array]:
    hidden, output = jax.random.split(key)
    return {
        "hidden": jax.random.normal(hidden, (64, _WIDTH)) / 8,
        "hidden_bias": jnp.zeros(_WIDTH),
        "output": jax.random.normal(output, (_WIDTH, 10)) / _WIDTH**0.5,
        "output_bias": jnp.zeros(10),
    }


def _losses(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    """One loss for each example; the step takes the mean over all processes'."""
    images, labels = batch
    hidden = jnp.tanh(images @ params["hidden"] + params["hidden_bias"])
    logits = hidden @ params["output"] + params["output_bias"]
    return cross_entropy(logits, labels), (model_state, {})


def main(argv: Sequence[str] | None = None) -> int:
    """Trains by every method, prints and maybe writes; returns the exit code."""
    parser = arguments.Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to which each process writes what it holds at the end",
    )
    args = parser.parse_args(argv)
    try:
        mesh = connect()
    except ValueError as error:
        parser.error(f"{error}.")
    arrays = {}
    for name, method in METHODS.items():
        trained = train(method, mesh)
        for key, value in {**trained.weights, **trained._asdict()}.items():
            if key != "weights":
                arrays[f"{name}: {key}"] = value
        if jax.process_index() == 0:
            print(
                f"{name}: loss {trained.losses[-1]:.3f} after {_STEPS} steps, "
                f"SAM on {trained.employed.mean():.0%} of them, on {mesh.size} devices "
                f"of {jax.process_count()} processes"
            )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        np.savez(args.out / f"{jax.process_index()}.npz", **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
