"""Every method of the package in one table, and the step that tests drive it by.

A method stands around a base optimizer, or brings one of its own. ``ONE_EACH`` names
every method once, for tests that need no variants.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo

STEPS = 6


def falling(t: Any) -> Any:
    """A schedule of rho that changes on every step."""
    return 0.3 / (1 + 0.5 * t)


def sgd(learning_rate: Any = 0.1) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=0.9)


def sharpness_aware(rho: Any = 0.2) -> optax.GradientTransformationExtraArgs:
    return mo.sharpness_aware_gradient(mo.ascents.normalized(rho))


# --- The table ------------------------------------------------------------------------

# With this one AE-SAM decides both ways within the few steps of a test.
ADAPTIVE: dict[str, Any] = dict(total_steps=8, delta=0.5)

AROUND: dict[str, Callable[[Any], Any]] = {
    "momentum_perturbation": lambda base: mo.momentum_perturbation(base, 0.2),
    "momentum_perturbation, adaptive": lambda base: mo.momentum_perturbation(
        base, ascent=mo.ascents.adaptive(falling, eta=0.01)
    ),
    "momentum_perturbation, along the update": lambda base: mo.momentum_perturbation(
        base, falling, along="update"
    ),
    "sam": lambda base: mo.sam(base, 0.2),
    "sam, rho schedule": lambda base: mo.sam(base, falling),
    "sam, second order": lambda base: optax.chain(
        mo.sharpness_aware_gradient(mo.ascents.normalized(0.2), second_order=True), base
    ),
    "asam": lambda base: mo.asam(base, 0.5),
    "ss_sam": lambda base: mo.ss_sam(base, 0.2, seed=2),
    "ae_sam": lambda base: mo.ae_sam(base, 0.2, **ADAPTIVE),
    "ae_sam, rho schedule": lambda base: mo.ae_sam(base, falling, **ADAPTIVE),
    "looksam": lambda base: mo.looksam(base, 0.2, k=2),
    "looksam, per tensor and layer-wise": lambda base: mo.looksam(
        base, falling, k=3, per_tensor=True, layerwise=True
    ),
    "ae_looksam": lambda base: mo.ae_looksam(base, 0.2, **ADAPTIVE),
    "ae_looksam, asked on every second step": lambda base: mo.ae_looksam(
        base, falling, **ADAPTIVE, k=2
    ),
    "esam": lambda base: mo.esam(base, 0.2, seed=1),
    "esam, rho schedule": lambda base: mo.esam(base, falling, beta=0.8, gamma=0.3),
    "esam, by coordinate": lambda base: mo.esam(base, 0.2, by_coordinate=True, seed=3),
    "esam, every parameter": lambda base: mo.esam(base, 0.2, beta=1.0),
    "gsam": lambda base: mo.gsam(base, falling),
    "gradient_norm_penalty": lambda base: mo.gradient_norm_penalty(base, 0.2),
    "wsam": lambda base: mo.wsam(base, 0.2),
    "wsam, decoupled": lambda base: mo.wsam(base, 0.2, learning_rate=0.1),
    "wsam, decoupled, schedules": lambda base: mo.wsam(
        base, falling, gamma=0.6, learning_rate=falling
    ),
    "friendly_sam": lambda base: mo.friendly_sam(base, 0.2),
    "friendly_sam, rho schedule": lambda base: mo.friendly_sam(base, falling),
    "fisher_sam": lambda base: mo.fisher_sam(base, 0.2),
    "sampa": lambda base: mo.sampa(base, 0.1, 0.2),
    "sampa, schedules": lambda base: mo.sampa(base, falling, falling, lambda_=0.0),
    "sam, renormalized": lambda base: optax.chain(
        mo.sharpness_aware_gradient(
            mo.ascents.loss_equated(falling, rho_max=0.2), mo.combine.renormalize
        ),
        base,
    ),
    "sam, spectral": lambda base: optax.chain(
        mo.sharpness_aware_gradient(mo.ascents.spectral(falling, rho_other=0.1)), base
    ),
    "sam, filter-wise noise": lambda base: optax.chain(
        mo.sharpness_aware_gradient(mo.ascents.gaussian(falling, filterwise=True)), base
    ),
    "employ every second": lambda base: optax.chain(
        mo.employ(mo.policies.every(2), sharpness_aware()), base
    ),
    "employ late, halved otherwise": lambda base: optax.chain(
        mo.employ(
            mo.policies.between(3),
            sharpness_aware(falling),
            otherwise=lambda updates, _: optax.tree.scale(0.5, updates),
        ),
        base,
    ),
}

OWN_BASE: dict[str, Callable[[Any], Any]] = {
    "msam": lambda lr: mo.msam(lr, rho=0.2),
    "msam, rho schedule": lambda lr: mo.msam(lr, rho=falling),
    "msam, nesterov": lambda lr: mo.msam(lr, rho=0.2, nesterov=True),
    "msam, no momentum": lambda lr: mo.msam(lr, momentum=0.0, rho=0.2),
    # It has no base that a guard could stand in front of: no row of ONE_EACH.
    "bsam, constants": lambda lr: mo.bsam(lr, 100, rho=0.2, b1=0.5),
    "bsam, schedules": lambda lr: mo.bsam(falling, 10, rho=falling, b1=0.5, b2=0.9),
    # The usual eps is 0 in float16, and Adam's step then 0/0 where gradients are zero.
    "adamw_msam": lambda lr: mo.adamw_msam(lr, eps=1e-6, rho=0.2),
    "adamw_msam, rho schedule": lambda lr: mo.adamw_msam(lr, eps=1e-6, rho=falling),
    "momentum_perturbation around adam": lambda lr: mo.momentum_perturbation(
        optax.adam(lr), 0.2
    ),
    "momentum_perturbation around lion": lambda lr: mo.momentum_perturbation(
        optax.lion(lr), 0.2
    ),
    "momentum_perturbation, stochastic": lambda lr: mo.momentum_perturbation(
        optax.lion(lr), ascent=mo.ascents.stochastic(falling, beta=0.5)
    ),
}


def build(name: str, base: Any = None, learning_rate: Any = 0.1) -> Any:
    """A method around ``base``, by default SGD, or with an optimizer of its own."""
    if name in OWN_BASE:
        return OWN_BASE[name](learning_rate)
    return AROUND[name](sgd(learning_rate) if base is None else base)


METHODS = [*OWN_BASE, *AROUND]
# Those whose weights are perturbed from one step to the next.
MSAM = [n for n in METHODS if n.startswith(("msam", "adamw_msam", "momentum_pert"))]
ONE_EACH = [name for name in METHODS if name.isidentifier()]
# Those whose policy decides from step to step.
EMPLOYING = ["ss_sam", "ae_sam", "looksam", "ae_looksam"]

all_methods = pytest.mark.parametrize("name", METHODS)
one_of_each = pytest.mark.parametrize("name", ONE_EACH)
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)


# --- A small problem, and a step on it ------------------------------------------------


def params(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    return {
        "kernel": jnp.linspace(-1.0, 2.0, 12, dtype=dtype).reshape(3, 4),
        "bias": jnp.linspace(0.5, 1.0, 4, dtype=dtype),
    }


def leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def losses(p: Any, t: Any, indices: Any = None) -> jax.Array:
    """Losses of four examples, for parameters of any structure; no two steps alike."""
    scales = jnp.array([1.0, 0.9, 1.2, 0.8])
    scales = scales if indices is None else scales[indices]

    def of_example(scale: Any) -> jax.Array:
        factor = scale * (1 + 0.2 * t)
        terms = (
            jnp.sum(jnp.cos(x * factor.astype(x.dtype) + i))
            for i, x in enumerate(leaves(p))
        )
        return sum(terms, start=jnp.zeros([]))

    return jax.vmap(of_example)(scales)


def loss(p: Any, t: Any) -> jax.Array:
    return jnp.mean(losses(p, t))


def one_step(tx: Any, p: Any, state: Any, t: Any, **extra_args: Any) -> tuple[Any, Any]:
    """A step that hands over whatever any method asks for, and promotes no rank."""

    def grad_fn(q: Any) -> Any:
        return jax.grad(loss)(q, t)

    with jax.numpy_rank_promotion("raise"):
        updates, state = tx.update(
            grad_fn(p),
            state,
            p,
            grad_fn=grad_fn,
            per_example_losses=losses(p, t),
            per_example_loss_fn=lambda q, indices: losses(q, t, indices),
            **extra_args,
        )
    return optax.apply_updates(p, updates), state


class Carry(NamedTuple):
    params: Any
    state: Any


def start(tx: Any, dtype: Any = jnp.float32) -> Carry:
    p = params(dtype)
    return Carry(p, tx.init(p))


def scanned(tx: Any, carry: Carry, steps: int = STEPS) -> Carry:
    """The carry after a scan over some steps."""

    def body(c: Carry, t: Any) -> tuple[Carry, None]:
        return Carry(*one_step(tx, *c, t)), None

    return jax.lax.scan(body, carry, jnp.arange(steps))[0]


@functools.cache
def method(name: str) -> optax.GradientTransformationExtraArgs:
    return build(name)


@functools.cache
def compiled_step(name: str) -> Callable[..., tuple[Any, Any]]:
    """One compilation of a method's step for all tests of a process, no second one."""

    traces = itertools.count(1)  # chex counts by the source line, so for all methods

    @jax.jit
    def step(p: Any, state: Any, t: Any) -> tuple[Any, Any]:
        assert next(traces) == 1, f"{name}'s step is traced a second time"
        return one_step(method(name), p, state, t)

    return step


@functools.cache
def trajectory(name: str) -> list[Carry]:
    """The carries before the first step and after each."""
    carries = [start(method(name))]
    for t in range(STEPS):
        carries.append(Carry(*compiled_step(name)(*carries[-1], jnp.int32(t))))
    return carries


def spy(seen: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    """A transformation that records the extra arguments it is handed."""

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
