"""Tests of benchmarks/models.py."""

import math
from functools import cache, partial
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tasks import models

# Small enough to compile in a second or two.
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"widths": (16,)},
    "cnn": {"channels": (4, 8), "width": 16},
    "wrn": {"depth": 10, "width": 1},
    "vit": {"width": 16, "depth": 1, "heads": 2},
}


def shapes(model: nn.Module, *image_shape: int) -> Any:
    """The shapes of the model's variables, without computing any."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), images)


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def random_images() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (8, 8, 8, 1))


@cache
def initialised(name: str) -> Any:
    """Variables of the small model; initialising takes longer than the tests do."""
    model = models.build(name, 4, **SMALL[name])
    return jax.jit(partial(model.init, train=False))(jax.random.key(0), random_images())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
@pytest.mark.parametrize("name", models.NAMES)
def test_logits_and_params_are_float32(
    name: str, shape: tuple[int, int, int], dtype: Any
) -> None:
    model = models.build(name, 7, dtype=dtype)

    def forward(images: jax.Array) -> Any:
        variables = model.init(jax.random.key(0), images, train=False)
        logits, state = model.apply(
            variables,
            images,
            train=False,
            capture_intermediates=lambda module, _: isinstance(
                module, nn.Dense | nn.Conv
            ),
            mutable=["intermediates"],
        )
        return logits, variables, state["intermediates"]

    images = jax.ShapeDtypeStruct((5, *shape), jnp.float32)
    logits, variables, intermediates = jax.eval_shape(forward, images)
    assert (logits.shape, logits.dtype) == ((5, 7), jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    # All layers but the last one compute in the given type.
    computed = [leaf.dtype for leaf in jax.tree.leaves(intermediates)]
    assert computed.count(dtype) >= len(computed) - 1 >= 2


@pytest.mark.parametrize("name", models.NAMES)
def test_gradient_descent_lowers_the_loss(name: str) -> None:
    model = models.build(name, 4, **SMALL[name])
    images, labels = random_images(), jnp.arange(8) % 4

    def loss(params: Any, statistics: Any, key: jax.Array) -> Any:
        logits, mutated = model.apply(
            {"params": params, **statistics},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return -jax.nn.log_softmax(logits)[jnp.arange(8), labels].mean(), mutated

    @jax.jit
    def step(params: Any, statistics: Any, key: jax.Array) -> Any:
        grad_fn = jax.value_and_grad(loss, has_aux=True)
        (value, statistics), grads = grad_fn(params, statistics, key)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return params, statistics, value

    statistics = dict(initialised(name))
    params = statistics.pop("params")
    values = []
    for key in jax.random.split(jax.random.key(2), 50):
        params, statistics, value = step(params, statistics, key)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("name", models.NAMES)
def test_only_the_wide_resnet_has_batch_statistics(name: str) -> None:
    variables = shapes(models.build(name, 10), 32, 32, 3)
    expected = {"params", "batch_stats"} if name == "wrn" else {"params"}
    assert set(variables) == expected


def test_batch_statistics_change_in_training_only() -> None:
    model = models.build("wrn", 4, **SMALL["wrn"])
    images, variables = random_images(), initialised("wrn")

    @partial(jax.jit, static_argnums=0)
    def statistics(train: bool) -> Any:
        _, mutated = model.apply(
            variables, images, train=train, mutable=["batch_stats"]
        )
        return jax.tree.leaves(mutated["batch_stats"])

    before = jax.tree.leaves(variables["batch_stats"])
    for old, kept, new in zip(before, statistics(False), statistics(True), strict=True):
        np.testing.assert_array_equal(old, kept)
        assert not np.array_equal(old, new)


@pytest.mark.parametrize("name", ["vit", "wrn"])
def test_dropout_acts_in_training_only(name: str) -> None:
    model = models.build(name, 4, **SMALL[name], dropout_rate=0.5)
    images, variables = random_images(), initialised(name)

    @partial(jax.jit, static_argnums=0)
    def logits(train: bool, seed: int) -> jax.Array:
        rngs = {"dropout": jax.random.key(seed)}
        out, _ = model.apply(
            variables, images, train=train, rngs=rngs, mutable=["batch_stats"]
        )
        return out

    assert not np.allclose(logits(True, 0), logits(True, 1))
    np.testing.assert_array_equal(logits(True, 0), logits(True, 0))
    np.testing.assert_array_equal(logits(False, 0), logits(False, 1))


@pytest.mark.parametrize(
    ("name", "train"), [(name, name != "vit") for name in models.NAMES]
)
def test_only_dropout_needs_a_key(name: str, train: bool) -> None:
    model = models.build(name, 4, **SMALL[name])
    forward = partial(model.apply, train=train, mutable=["batch_stats"])
    logits, _ = jax.eval_shape(forward, initialised(name), random_images())
    assert logits.shape == (8, 4)


def test_vit_without_a_key_does_not_train() -> None:
    model = models.build("vit", 4, **SMALL["vit"])
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        jax.eval_shape(
            partial(model.apply, train=True), initialised("vit"), random_images()
        )


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(28, 10, 36.48), (16, 4, 2.75), (40, 4, 8.95)]
)
def test_wide_resnets_have_the_papers_size(
    depth: int, width: int, millions: float
) -> None:
    model = models.build("wrn", 10, depth=depth, width=width)
    params = shapes(model, 32, 32, 3)["params"]
    assert round(size(params) / 1e6, 2) == millions


def test_mlp_size() -> None:
    params = shapes(models.build("mlp", 10), 28, 28, 1)["params"]
    assert size(params) == 785 * 256 + 257 * 256 + 257 * 10


def test_cnn_halves_the_image_at_each_convolution() -> None:
    params = shapes(models.build("cnn", 10), 28, 28, 1)["params"]
    assert params["Dense_0"]["kernel"].shape == (7 * 7 * 64, 128)


@pytest.mark.parametrize(("side", "patches"), [(8, 4), (28, 49), (32, 64)])
def test_vit_has_a_token_for_each_patch_and_one_for_the_class(
    side: int, patches: int
) -> None:
    params = shapes(models.build("vit", 10), side, side, 1)["params"]
    assert params["positions"].shape == (1, 1 + patches, 64)


def test_vit_sees_where_a_patch_lies() -> None:
    model = models.build("vit", 4, **SMALL["vit"])
    images, variables = random_images(), initialised("vit")
    moved = jnp.roll(images, 4, axis=1)
    logits, logits_of_moved = (
        np.asarray(jax.jit(partial(model.apply, train=False))(variables, x))
        for x in (images, moved)
    )
    assert not np.allclose(logits, logits_of_moved)


def test_vit_rejects_images_that_cannot_be_cut_into_patches() -> None:
    with pytest.raises(ValueError, match="28x28 cannot be cut into patches of 5"):
        shapes(models.build("vit", 10, patch_size=5), 28, 28, 1)


@pytest.mark.parametrize("depth", [4, 15, 18])
def test_wide_resnet_rejects_a_depth_that_is_not_6n_plus_4(depth: int) -> None:
    with pytest.raises(
        ValueError, match=rf"depth must be 6 n \+ 4 .* {depth} was given"
    ):
        models.build("wrn", 10, depth=depth)


def test_build_rejects_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="'resnet': choose from mlp, cnn, wrn, vit"):
        models.build("resnet", 10)
