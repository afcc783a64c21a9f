"""m-sharpness: every shard of the batch has its own ascent."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax as mo
from tests.against_recursions import distance, element, ramp, x64
from tests.problems import named
from tests.reference.recursions import Tree, unit
from tests.samples import BATCH, Samples, classes, on_both_samples
from tests.versions import needs_meshes

M_TRANSFORMS: dict[str, Callable[[], Any]] = {
    "sam": lambda: element(mo.ascents.normalized(0.3)),
    "gsam, rho schedule": lambda: element(
        mo.ascents.normalized(ramp), mo.combine.surrogate_gap(0.4)
    ),
    "friendly": lambda: element(mo.ascents.friendly(0.3, decay=0.6)),
}


def batch_grad(samples: Samples) -> Callable[[Any, Any], Any]:
    return jax.grad(lambda params, batch: jnp.mean(samples.losses(params, batch)))


def m_sharp_gradients(
    transform: Any, samples: Samples, shards: int, steps: int = 4, **options: Any
) -> list[Any]:
    """Gradients of some steps at the start."""
    sharded = mo.m_sharpness(transform, shards, **options)
    params = jax.tree.map(jnp.asarray, samples.params)
    state, gradients = sharded.init(params), []

    @jax.jit
    def gradient(state: Any, batch: Any) -> Any:
        return sharded.gradient(batch_grad(samples), state, params, batch)

    for t in range(steps):
        g, state = gradient(state, samples.batch(t))
        gradients.append(g)
    return jax.device_get(gradients)


@x64
@pytest.mark.parametrize("name", M_TRANSFORMS)
def test_m_sharpness_at_once_is_in_sequence_and_a_plain_loop(name):
    samples, transform = classes(), M_TRANSFORMS[name]()
    at_once = m_sharp_gradients(transform, samples, 5)
    in_sequence = m_sharp_gradients(transform, samples, 5, sequential=True)

    params = jax.tree.map(jnp.asarray, samples.params)
    states = [transform.init(params) for _ in range(5)]

    @jax.jit
    def alone(state: Any, batch: Any) -> Any:
        def grad_fn(params: Any) -> Any:
            return batch_grad(samples)(params, batch)

        return transform.update(grad_fn(params), state, params, grad_fn=grad_fn)

    loop = []
    for t in range(4):
        gradients = []
        for i in range(5):
            part = jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], samples.batch(t))
            g, states[i] = alone(states[i], part)
            gradients.append(g)
        loop.append(jax.tree.map(lambda *g: sum(g) / 5, *gradients))
    assert distance(at_once, jax.device_get(loop)) < 1e-12
    assert distance(in_sequence, jax.device_get(loop)) < 1e-12


@x64
@on_both_samples
def test_m_sharpness_of_sam_is_its_formula_and_not_that_of_the_whole_batch(samples):
    w = Tree(named(samples.params))

    def sharp(t: int, part: np.ndarray) -> Tree:
        epsilon = 0.3 * unit(Tree(samples.named_grad(w, t, part)))
        return Tree(samples.named_grad(w + epsilon, t, part))

    def mean(t: int, parts: list[np.ndarray]) -> Tree:
        total = sharp(t, parts[0])
        for part in parts[1:]:
            total = total + sharp(t, part)
        return total / len(parts)

    everything = np.arange(BATCH)
    transform = element(mo.ascents.normalized(0.3))
    whole = [mean(t, [everything]) for t in range(4)]
    fifths = [mean(t, np.split(everything, 5)) for t in range(4)]
    interleaved = [mean(t, [everything[i::5] for i in range(5)]) for t in range(4)]
    ours = m_sharp_gradients(transform, samples, 5)
    assert distance(ours, fifths) < 1e-12
    assert distance(ours, whole) > 1e-3
    assert distance(ours, interleaved) > 1e-6
    assert distance(m_sharp_gradients(transform, samples, 1), whole) < 1e-12


M_SHARPNESS_ON_DEVICES = """
import re
import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import msam_optax as mo
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
params = {"kernel": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "bias": jnp.arange(4.0)}
batch = jax.random.normal(jax.random.key(0), (16, 3))
grad = jax.grad(
    lambda p, x: jnp.mean(jnp.cos(x @ p["kernel"] + p["bias"]) ** 2)
)
sam = mo.sharpness_aware_gradient(mo.ascents.normalized(0.3))
state = sam.init(params)


def on_each_device(params, state, batch):
    # Parameters that all devices share have one gradient for all of them: a device's
    # own needs parameters of its own.
    params = jax.lax.pcast(params, "data", to="varying")
    grad_fn = lambda p: grad(p, batch)
    gradient, state = sam.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return jax.lax.pmean(gradient, "data"), state.perturbation_norm[None]


step = jax.jit(
    jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P(), P("data")),
    )
)
gradient, norms = step(params, state, batch)
sharded = mo.m_sharpness(sam, shards=4)
expected, _ = sharded.gradient(grad, sharded.init(params), params, batch)
whole, _ = sam.update(
    grad(params, batch), state, params, grad_fn=lambda p: grad(p, batch)
)


def distance(a, b):
    return max(float(jnp.max(jnp.abs(a[k] - b[k]))) for k in a)


reduced = 0
for line in step.lower(params, state, batch).compile().as_text().splitlines():
    # %name = (f64[4]{0}, f64[3,4]{1,0}) all-reduce(...)
    if found := re.search(r"= (.*) all-reduce(-start)?\\(", line):
        for shape in re.findall(r"f64\\[([\\d,]*)\\]", found[1]):
            reduced += eval("*".join(shape.split(",")) or "1")
print(distance(gradient, expected), distance(gradient, whole), reduced, norms.shape)
"""


@needs_meshes
def test_m_sharpness_on_four_devices_needs_one_all_reduce():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", M_SHARPNESS_ON_DEVICES],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    to_shards, to_whole, reduced, *_ = done.stdout.split()
    assert float(to_shards) < 1e-14
    assert float(to_whole) > 1e-4
    assert int(reduced) == 12 + 4  # numbers summed over devices: one gradient's
