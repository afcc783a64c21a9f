"""Flax Linen models for the benchmarks.

All are called as `model.apply(variables, images, train=...)` with images in NHWC and
return one logit a class. Parameters are float32; `dtype` is what the layers compute in.
The last layer is always float32, since the softmax of bfloat16 logits loses too much.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class MLP(nn.Module):
    """Fully connected layers with ReLU (Rumelhart, Hinton & Williams 1986).

    Reference: "Learning representations by back-propagating errors", Nature 323.

    Attributes:
      num_classes: number of logits.
      widths: width of each hidden layer.
      dtype: what the hidden layers compute in.
    """

    num_classes: int
    widths: Sequence[int] = (256, 256)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        del train
        x = images.reshape(images.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes)(x)


class CNN(nn.Module):
    """Strided convolutions and one hidden layer (Springenberg et al. 2015).

    A stride in the place of pooling keeps the backward pass cheap on a CPU, and without
    batch norm there are no statistics to look after.

    Reference: "Striving for Simplicity: The All Convolutional Net", arXiv 1412.6806.

    Attributes:
      num_classes: number of logits.
      channels: output channels of each convolution, which halves height and width.
      width: width of the hidden layer.
      dtype: what all layers but the last compute in.
    """

    num_classes: int
    channels: Sequence[int] = (32, 64)
    width: int = 128
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        del train
        x = images
        for channels in self.channels:
            x = nn.relu(nn.Conv(channels, (3, 3), strides=2, dtype=self.dtype)(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes)(x)


class WideResNet(nn.Module):
    """Residual network of few layers with many channels (Zagoruyko & Komodakis 2016).

    Pre-activation blocks of two 3x3 convolutions, in three groups of which the last two
    halve height and width. WRN-28-10 is `depth=28, width=10`. Its `batch_stats` change
    when `train` is true.

    Reference: "Wide Residual Networks", arXiv 1605.07146.

    Attributes:
      num_classes: number of logits.
      depth: number of layers; 6 n + 4 for n blocks in each group.
      width: how many times 16, 32 and 64 channels the groups have.
      dropout_rate: between the two convolutions of a block.
      dtype: what all layers but the last compute in; batch statistics are float32.
    """

    num_classes: int
    depth: int = 16
    width: int = 4
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(
                f"depth must be 6 n + 4 for some n >= 1, but {self.depth} was given."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            dtype=self.dtype,
        )
        conv = partial(
            nn.Conv,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=self.dtype,
        )
        x = conv(16, (3, 3))(images)
        for group in range(3):
            channels = 16 * 2**group * self.width
            for block in range((self.depth - 4) // 6):
                strides = 2 if group > 0 and block == 0 else 1
                y = nn.relu(norm()(x))
                if x.shape[-1] != channels or strides != 1:
                    x = conv(channels, (1, 1), strides)(y)
                y = conv(channels, (3, 3), strides)(y)
                y = nn.relu(norm()(y))
                y = nn.Dropout(self.dropout_rate, deterministic=not train)(y)
                x = x + conv(channels, (3, 3))(y)
        x = nn.relu(norm()(x)).mean(axis=(1, 2))
        return nn.Dense(self.num_classes)(x)


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021).

    Pre-norm encoder over patches and a class token, with learned position embeddings.
    Needs a `dropout` key when `train` is true.

    Reference: "An Image is Worth 16x16 Words", arXiv 2010.11929.

    Attributes:
      num_classes: number of logits.
      patch_size: height and width of a patch; divides those of the images.
      width: size of a token; a multiple of `heads`.
      depth: number of encoder blocks.
      heads: number of attention heads.
      dropout_rate: after the position embeddings and after every dense layer but those
        of query, key and value.
      dtype: what all layers but the last compute in.
    """

    num_classes: int
    patch_size: int = 4
    width: int = 64
    depth: int = 4
    heads: int = 4
    dropout_rate: float = 0.1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        batch, height, breadth, _ = images.shape
        if height % self.patch_size or breadth % self.patch_size:
            raise ValueError(
                f"patch_size must divide the images' height and width, but {height}x"
                f"{breadth} cannot be cut into patches of {self.patch_size}."
            )
        dropout = partial(nn.Dropout, self.dropout_rate, deterministic=not train)
        dense = partial(nn.Dense, dtype=self.dtype)
        norm = partial(nn.LayerNorm, dtype=self.dtype)

        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.width, patch, patch, "VALID", dtype=self.dtype)(images)
        x = x.reshape(batch, -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        token = jnp.broadcast_to(token.astype(x.dtype), (batch, 1, self.width))
        x = jnp.concatenate([token, x], axis=1)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (1, *x.shape[1:])
        )
        x = dropout()(x + positions.astype(x.dtype))

        for _ in range(self.depth):
            attention = nn.MultiHeadAttention(
                self.heads, dtype=self.dtype, force_fp32_for_softmax=True
            )
            y = attention(norm()(x))
            x = x + dropout()(y)
            y = dropout()(nn.gelu(dense(4 * self.width)(norm()(x))))
            x = x + dropout()(dense(self.width)(y))
        return nn.Dense(self.num_classes)(norm()(x)[:, 0])


class CharacterTransformer(nn.Module):
    """A small causal transformer with the norm first (Radford et al. 2019).

    Called with int[batch, length], and returns the logits of each next character.

    Reference: "Language Models are Unsupervised Multitask Learners".

    Attributes:
      num_classes: how many characters there are.
      width: of the embedding; the hidden layer of a block is four times as wide.
      depth: number of blocks.
      heads: number of attention heads.
    """

    num_classes: int
    width: int = 32
    depth: int = 2
    heads: int = 2

    @nn.compact
    def __call__(self, characters: jax.Array, *, train: bool) -> jax.Array:
        del train
        length = characters.shape[1]
        x = nn.Embed(self.num_classes, self.width)(characters)
        x = x + self.param(
            "positions", nn.initializers.normal(0.02), (length, self.width)
        )
        causal = nn.make_causal_mask(characters)
        for _ in range(self.depth):
            x = x + nn.MultiHeadAttention(self.heads)(nn.LayerNorm()(x), mask=causal)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x))


_MODELS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "wrn": WideResNet,
    "vit": ViT,
}
NAMES = tuple(_MODELS)


def build(name: str, num_classes: int, **overrides: Any) -> nn.Module:
    """Builds a model by name.

    Args:
      name: one of `NAMES`.
      num_classes: number of logits.
      **overrides: attributes of the model that differ from their defaults.

    Returns:
      The model, to be initialised.

    Raises:
      ValueError: if there is no model of that name.
    """
    if name not in _MODELS:
        raise ValueError(
            f"No model is called {name!r}: choose from {', '.join(NAMES)}."
        )
    return _MODELS[name](num_classes=num_classes, **overrides)
