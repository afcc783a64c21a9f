"""Bad input is told what is needed."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.against_recursions import element, lr
from tests.every_method import sgd

P, B = {"w": jnp.ones(3)}, 6


def per_example(params: Any, indices: Any = None) -> jax.Array:
    x = jnp.ones((B, 3)) if indices is None else jnp.ones((B, 3))[indices]
    return (x @ params["w"]) ** 2


def select(gamma: float = 0.5, **given: Any) -> Any:
    """An update of ESAM's element with some of its arguments replaced."""
    tx = mo.selected_gradient(mo.ascents.normalized(0.1), gamma)
    arguments = {
        "per_example_losses": per_example(P),
        "per_example_loss_fn": per_example,
        "params": P,
        **given,
    }
    return tx.update(P, tx.init(P), **arguments)


def scalar_step() -> Any:
    """ESAM in a train step whose loss is a scalar."""
    tx = mo.esam(optax.sgd(0.1))
    step = mo.make_train_step(
        lambda params, model_state, batch, key: (
            jnp.mean(batch @ params["w"]),
            (model_state, ()),
        ),
        tx,
    )
    return step(mo.TrainState(P, tx.init(P)), jnp.ones((B, 3)), None)


def sharded(shards: Any) -> Any:
    sharded = mo.m_sharpness(element(mo.ascents.normalized(0.1)), shards)
    return sharded.gradient(
        jax.grad(lambda p, x: jnp.mean(x @ p["w"])),
        sharded.init(P),
        P,
        jnp.ones((B, 3)),
    )


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    **{
        f"esam {name}={value}": (
            functools.partial(mo.esam, sgd(), **{name: value}),  # type: ignore[arg-type]
            rf"{name} must be one finite real number in \(0, 1\], but {value}",
        )
        for name in ("beta", "gamma")
        for value in (0.0, -0.5, 1.1, math.nan, math.inf)
    },
    "gamma is text": (
        lambda: mo.selected_gradient(mo.ascents.normalized(0.1), "half"),  # type: ignore[arg-type]
        "gamma must be one finite real number .* but 'half' was given",
    ),
    "looksam k=0": (
        lambda: mo.looksam(sgd(), k=0),
        r"k must be one finite real number in \[1, inf\], but 0 was given",
    ),
    "looksam k=-3": (lambda: mo.looksam(sgd(), k=-3), "k must be .* -3 was given"),
    "looksam k=2.5": (
        lambda: mo.looksam(sgd(), k=2.5),  # type: ignore[arg-type]
        "k must be an integer, but 2.5 was given",
    ),
    "looksam alpha": (
        lambda: mo.looksam(sgd(), alpha=math.nan),
        "alpha must be one finite real number, but nan",
    ),
    "ae_looksam k=0": (
        lambda: mo.ae_looksam(sgd(), 0.1, total_steps=10, k=0),
        "k must be .* 0 was given",
    ),
    "ae_looksam total_steps=0": (
        lambda: mo.ae_looksam(sgd(), 0.1, total_steps=0),
        "total_steps must be .* 0 was given",
    ),
    "wsam gamma=1": (
        lambda: mo.wsam(sgd(), gamma=1.0),
        r"gamma must be one finite real number in \[0, 1\), but 1.0 was given",
    ),
    "wsam gamma=-0.1": (lambda: mo.wsam(sgd(), gamma=-0.1), "gamma must be .* -0.1"),
    "wsam learning_rate": (
        lambda: mo.wsam(sgd(), learning_rate="fast"),  # type: ignore[arg-type]
        "learning_rate .* must be one finite real number, but 'fast'",
    ),
    "gsam alpha": (lambda: mo.gsam(sgd(), alpha=math.inf), "alpha must be .* inf"),
    "gradient_norm_penalty alpha": (
        lambda: mo.gradient_norm_penalty(sgd(), alpha=math.nan),
        "alpha must be .* nan",
    ),
    "friendly decay": (
        lambda: mo.friendly_sam(sgd(), decay=1.5),
        r"decay must be one finite real number in \[0, 1\], but 1.5",
    ),
    "friendly sigma": (
        lambda: mo.friendly_sam(sgd(), sigma=math.nan),
        "sigma must be .* nan",
    ),
    "fisher eta": (lambda: mo.fisher_sam(sgd(), eta=-1.0), "eta must be .* -1.0"),
    **{
        f"p={p}": (
            functools.partial(mo.ascents.normalized, 0.1, p),
            rf"p must be a Python number in \[1, inf\], but {p} was given",
        )
        for p in (0.9, 0, -2, math.nan)
    },
    "rho_max": (
        lambda: mo.rho_like_learning_rate(lr, math.nan, 0.0, 0.1),
        "rho_max must be .* nan",
    ),
    "learning rates": (
        lambda: mo.rho_like_learning_rate(lr, 0.2, 0.1, 0.1, 0.1),
        "learning_rate_max must be above learning_rate_min, but 0.1 and 0.1",
    ),
    "batch smaller than 1/gamma": (
        lambda: select(0.15),
        "gamma=0.15 keeps none of a batch of 6: it needs at least 7 examples",
    ),
    "scalar loss in a train step": (
        scalar_step,
        r"must have shape \[batch\], one loss for each example, but has shape \(\)",
    ),
    "scalar losses": (
        lambda: select(per_example_losses=jnp.ones([])),
        r"must have shape \[batch\], one loss for each example, but has shape \(\)",
    ),
    "losses of two axes": (
        lambda: select(per_example_losses=jnp.ones((B, 1))),
        r"must have shape \[batch\].* but has shape \(6, 1\)",
    ),
    "loss function that returns the mean": (
        lambda: select(per_example_loss_fn=lambda p, i: jnp.mean(per_example(p, i))),
        r"per_example_loss_fn must .*\(6,\).*\(\)",
    ),
    "loss function that returns two axes": (
        lambda: select(per_example_loss_fn=lambda p, i: per_example(p, i)[:, None]),
        r"per_example_loss_fn must .*\(6,\).*\(6, 1\)",
    ),
    "loss function that ignores the choice": (
        lambda: select(per_example_loss_fn=lambda p, i: per_example(p)),
        r"per_example_loss_fn must .*\(3,\).*\(6,\)",
    ),
    "no losses": (
        lambda: select(per_example_losses=None),
        "needs the keywords per_example_losses and per_example_loss_fn",
    ),
    "no loss function": (
        lambda: select(per_example_loss_fn=None),
        "needs the keywords per_example_losses and per_example_loss_fn",
    ),
    "no params": (lambda: select(params=None), "params were None"),
    "shards that do not divide": (
        lambda: sharded(4),
        r"shards must divide the first axis .* shape \[6, 3\] and shards=4 were given",
    ),
    "no shards": (lambda: sharded(0), "shards must be .* 0 was given"),
    "half a shard": (lambda: sharded(1.5), "shards must be an integer, but 1.5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_what_is_needed(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_smallest_batch_that_gamma_needs_is_enough():
    _, state = select(1 / 6)
    assert float(state.perturbation_norm) == pytest.approx(0.1)


def test_a_sequence_of_shards_forms_the_mean_in_float32():
    # Four gradients of 3e4 add up to more than float16 holds.
    sharded = mo.m_sharpness(optax.identity(), shards=4, sequential=True)
    params, batch = jnp.ones(2, jnp.float16), jnp.zeros(8)

    def grad_fn(params: Any, batch: Any) -> Any:
        return jnp.full(2, 3e4, params.dtype)

    gradient, _ = sharded.gradient(grad_fn, sharded.init(params), params, batch)
    assert gradient.dtype == jnp.float16
    np.testing.assert_allclose(gradient, 3e4, rtol=1e-3)


def test_shards_in_sequence_take_gradients_of_another_dtype():
    sharded = mo.m_sharpness(optax.identity(), shards=2, sequential=True)
    params, batch = jnp.ones(2, jnp.bfloat16), jnp.arange(4.0)

    def grad_fn(params: Any, batch: Any) -> Any:
        return jnp.full(2, jnp.mean(batch))

    gradient, _ = sharded.gradient(grad_fn, sharded.init(params), params, batch)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, 1.5)
