"""The compiled program of a step grows with the number of tensors, not its square.

What is counted is the optimized program. A scalar over the whole tree that ends in a
select is computed again in every fusion, see `msam_optax/_base/numerics.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo
from msam_optax import ascents
from tests.every_method import build, sgd


def around(ascent: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(mo.sharpness_aware_gradient(ascent), sgd())


ASCENTS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "p=1": lambda: ascents.normalized(0.1, p=1),
    "p=3": lambda: ascents.normalized(0.1, p=3),
    "clipped": lambda: optax.chain(
        ascents.normalized(0.1), ascents.clip_by_weight_norm(0.1)
    ),
    "random tensors": lambda: ascents.stochastic(0.1, beta=0.5),
    "random coordinates": lambda: ascents.stochastic(0.1, 0.5, by_coordinate=True),
    "gaussian": lambda: ascents.gaussian(0.1),
}
# Of the others, ss_sam, looksam and gradient_norm_penalty are made of the same scalars.
METHODS = ["sam", "asam", "fisher_sam", "friendly_sam", "gsam", "wsam, decoupled"]
METHODS += ["ae_sam", "ae_looksam", "msam", "adamw_msam", "sampa", "bsam, constants"]
METHODS += ["sam, renormalized", "sam, spectral"]


def instructions(tx: optax.GradientTransformation, tensors: int) -> int:
    """Instructions of the optimized program of one step."""
    tx = optax.with_extra_args_support(tx)
    params = {
        f"w{i}": jax.ShapeDtypeStruct((4, 4), jnp.float32) for i in range(tensors)
    }
    state = jax.eval_shape(tx.init, params)

    def step(params, state, x):
        grad_fn = jax.grad(lambda p: sum(jnp.sum((w @ x) ** 2) for w in p.values()))
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    vector = jax.ShapeDtypeStruct((4,), jnp.float32)
    program = jax.jit(step).lower(params, state, vector).compile().as_text()
    assert program is not None
    return program.count(" = ")


def growth(tx: optax.GradientTransformation) -> float:
    """Of the instructions from 12 to 36 tensors, over the number of tensors."""
    return instructions(tx, 36) / instructions(tx, 12) / 3


@pytest.mark.parametrize("name", METHODS)
def test_the_program_grows_with_the_number_of_tensors(name):
    assert growth(build(name)) < 1.1


@pytest.mark.parametrize("name", ASCENTS)
def test_so_does_that_of_every_norm(name):
    assert growth(around(ASCENTS[name]())) < 1.1


def instructions_in_step(name: str, tensors: int, **kwargs: Any) -> int:
    """Of the whole program of `make_train_step`: metrics, branches and all."""
    params = {
        f"w{i}": jax.ShapeDtypeStruct((4, 4), jnp.float32) for i in range(tensors)
    }
    tx, scaling = build(name), kwargs.get("loss_scaling")
    state = mo.TrainState(params, jax.eval_shape(tx.init, params))
    if scaling is not None:
        state = state._replace(loss_scale=jax.eval_shape(scaling.init))

    def loss_fn(params, model_state, x, key):
        return sum(jnp.sum((w @ x) ** 2) for w in params.values()), (model_state, {})

    step = mo.make_train_step(loss_fn, tx, **kwargs)
    vector = jax.ShapeDtypeStruct((4,), jnp.float32)
    compiled = step.lower(state, vector, None).compile()
    texts = [program.as_text() or "" for program in compiled.programs.values()]
    return sum(text.count(" = ") for text in texts)


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("gsam", {}),
        ("ae_looksam", {}),
        ("ae_sam", {"dispatch": "host"}),
        ("msam", {"loss_scaling": mo.LossScaling()}),
    ],
)
def test_so_does_the_whole_training_step(name, kwargs):
    small, large = (instructions_in_step(name, n, **kwargs) for n in (12, 36))
    assert large / small / 3 < 1.1


def test_a_norm_that_ends_in_a_select_grows_with_its_square():
    def perturb(rho, direction, params):
        squares = sum(jnp.sum(g**2) for g in jax.tree.leaves(direction))
        norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
        factor = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
        return jax.tree.map(lambda g: factor * g, direction)

    assert growth(around(ascents.make(0.1, perturb))) > 1.3


@pytest.mark.parametrize("name", ["random tensors", "random coordinates", "gaussian"])
def test_random_numbers_are_drawn_in_one_loop_for_all_tensors_of_a_shape(name):
    # On its own a draw is some 250 instructions, SAM's step some 70 a tensor, with the
    # norm of epsilon measured, as that of random ones is.
    program = instructions(around(ASCENTS[name]()), 48)
    measured = optax.chain(ascents.normalized(0.1), optax.identity())
    assert program < 1.7 * instructions(around(measured), 48)
