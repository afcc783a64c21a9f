"""What Optax asks of its own optimizers, asked of every method here.

Each is built from its signature, so that a new one is asked as well. Dtypes, extra
arguments, micro-batches and injected hyper-parameters are in ``test_contract``.
"""

import functools
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import msam_optax as mo
from tests.versions import needs_meshes

STEPS = 3000

all_methods = pytest.mark.parametrize(
    "name",
    [n for n in mo.methods.__all__ if inspect.isfunction(getattr(mo.methods, n))],
)


def shrinking(t: Any) -> Any:
    """A radius that ends at 0: with a fixed one the minimum is not reached."""
    return 0.05 * jnp.maximum(1 - 1.25 * t / STEPS, 0)


def build(name: str) -> optax.GradientTransformationExtraArgs:
    """A method, its required arguments told by their names, with a shrinking radius."""
    given = {
        "optimizer": optax.adam(0.02),
        "learning_rate": 2e-3,
        "rho": shrinking,
        "total_steps": STEPS,
        "num_examples": 10**6,  # a posterior that is next to a point
    }
    function = getattr(mo, name)
    parameters = inspect.signature(function).parameters.values()
    chosen = {
        p.name: given[p.name]
        for p in parameters
        if p.default is p.empty or (p.name == "rho" and p.default is not None)
    }
    if name == "bsam":
        chosen["learning_rate"] = 0.02
    if name == "adamw_msam":
        chosen |= {"learning_rate": 0.02, "weight_decay": 0.0}
    return function(**chosen)


START = {
    "parabola": jnp.array([-1.0, 10.0, 1.0]),
    "matrix": jnp.array([[2.0, -1.0], [0.5, 3.0]]),
    "rosenbrock": (jnp.zeros([]), jnp.zeros([])),
}
GOAL: dict[str, Any] = {
    "parabola": jnp.array([1.0, -1.0, 2.0]),
    "matrix": jnp.eye(2),
    "rosenbrock": (jnp.ones([]), jnp.ones([])),
}


def loss_fn(p: Any, model_state: Any, batch: Any, key: Any) -> Any:
    """A parabola over a vector and over a matrix, and Rosenbrock's valley."""
    x, y = p["rosenbrock"]
    value = (1 - x) ** 2 + 10 * (y - x**2) ** 2
    for name in ("parabola", "matrix"):
        value += jnp.sum((p[name] - GOAL[name].astype(p[name].dtype)) ** 2)
    # Examples that agree, for methods that choose among them.
    return value * jnp.ones_like(batch), (model_state, {})


@functools.cache
def step(name: str) -> Any:
    return mo.make_train_step(loss_fn, build(name), dispatch="in_graph", donate=False)


def start(name: str) -> mo.TrainState:
    return mo.TrainState(START, build(name).init(START))


@all_methods
def test_it_finds_the_minimum_of_a_parabola_and_of_a_valley(name):
    @jax.jit
    def train(state: mo.TrainState) -> mo.TrainState:
        def body(state: Any, _: Any) -> Any:
            return step(name)(state, jnp.ones(2), None)[0], None

        return jax.lax.scan(body, state, None, length=STEPS)[0]

    last = train(start(name))
    weights = mo.eval_params(last.opt_state, last.params)
    chex.assert_trees_all_close(weights, GOAL, rtol=3e-2, atol=3e-2)


@all_methods
def test_complex_parameters_are_refused_with_a_way_out(name):
    params = {"w": jnp.ones(3, jnp.complex64)}
    with pytest.raises(ValueError, match="hold the real and the imaginary part as two"):
        build(name).init(params)


@needs_meshes
@all_methods
def test_shapes_dtypes_and_shardings_of_the_state_last(name):
    """Under explicit sharding, where the type of an array says how it is laid out."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    by_rows = NamedSharding(mesh, PartitionSpec("x"))
    with jax.set_mesh(mesh):
        params = {
            "w": jax.device_put(jnp.ones((4, 2)), by_rows),
            "b": jax.device_put(jnp.ones(2), by_rows),
        }

        def losses(p: Any, model_state: Any, batch: Any, key: Any) -> Any:
            value = jnp.sum(p["w"] ** 2) + jnp.sum(p["b"] ** 2)
            return value * jnp.ones_like(batch), (model_state, {})

        tx = build(name)
        train = mo.make_train_step(losses, tx, dispatch="in_graph", donate=False)
        state = mo.TrainState(params, tx.init(params))
        after = jax.eval_shape(lambda s: train(s, jnp.ones(2), None)[0], state)
        for before, now in zip(
            jax.tree.leaves(state), jax.tree.leaves(after), strict=True
        ):
            assert (before.shape, before.dtype) == (now.shape, now.dtype)
            spec = getattr(jax.typeof(before).sharding, "spec", None)
            assert spec == getattr(now.sharding, "spec", PartitionSpec())
