"""Networks of real shapes, and chains of matrices, to be compiled and not trained.

Their parameters are shapes without values. Widths are narrow: what a compiler takes
depends on the number of tensors and layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import msam_optax
from benchmarks.tasks import models
from benchmarks.tasks.losses import classified, cross_entropy
from msam_optax.flax.linen import linen_loss

KEY = jax.eval_shape(partial(jax.random.key, 0))


class Network(NamedTuple):
    """What is compiled.

    Attributes:
      loss_fn: for `make_train_step`, with one loss for each example.
      params: tree of shapes.
      model_state: tree of shapes.
      batch: tree of shapes.
    """

    loss_fn: msam_optax.LossFn
    params: Any
    model_state: Any
    batch: Any

    @property
    def tensors(self) -> int:
        return len(jax.tree.leaves(self.params))

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def state(self, optimizer: optax.GradientTransformation) -> msam_optax.TrainState:
        """The shapes of a training state."""
        opt_state = jax.eval_shape(optimizer.init, self.params)
        return msam_optax.TrainState(self.params, opt_state, self.model_state)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def chain(tensors: int, width: int = 8, examples: int = 4) -> Network:
    """Matrices that are multiplied, and nothing else."""

    def loss_fn(params, model_state, batch, key):
        x = batch
        for matrix in params.values():
            x = jnp.tanh(x @ matrix)
        return jnp.mean(x**2, axis=-1), (model_state, {})

    matrices = {f"{i}": _floats(width, width) for i in range(tensors)}
    return Network(loss_fn, matrices, (), _floats(examples, width))


class _ResNet50(nn.Module):
    """He et al. 2016, arXiv 1512.03385: bottlenecks of 3, 4, 6 and 3 blocks."""

    width: int
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=not train)
        conv = partial(nn.Conv, use_bias=False)
        x = nn.relu(norm()(conv(self.width, (7, 7), 2)(images)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for group, blocks in enumerate((3, 4, 6, 3)):
            channels = self.width * 2**group
            for block in range(blocks):
                strides = 2 if group and not block else 1
                y = nn.relu(norm()(conv(channels, (1, 1))(x)))
                y = nn.relu(norm()(conv(channels, (3, 3), strides)(y)))
                y = norm()(conv(4 * channels, (1, 1))(y))
                if not block:
                    x = norm()(conv(4 * channels, (1, 1), strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


def _images(model: nn.Module, size: int) -> Network:
    """A Linen model on two square images."""

    images = _floats(2, size, size, 3)
    init = partial(model.init, train=False)
    variables = dict(jax.eval_shape(init, KEY, images))
    params = variables.pop("params")
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    loss_fn = linen_loss(model, classified, train=True)
    return Network(loss_fn, params, variables, (images, labels))


def gpt(
    depth: int,
    width: int,
    *,
    scanned: bool,
    heads: int = 4,
    vocabulary: int = 64,
    length: int = 16,
    examples: int = 2,
) -> Network:
    """A transformer that reads from left to right (Radford et al. 2019).

    Args:
      depth: number of layers.
      width: of a token; a multiple of `heads`.
      scanned: one stack of each layer's tensors, gone through by `jax.lax.scan`, in
        the place of tensors of their own.
      heads: of the attention.
      vocabulary: number of tokens.
      length: of a text.
      examples: in a batch.
    """

    def norm(x, scale):
        return scale * jax.nn.standardize(x)

    def layer(x, p):
        y = norm(x, p["norm_1"]) @ p["qkv"]
        q, k, v = jnp.split(y.reshape(*y.shape[:2], heads, -1), 3, axis=-1)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + y.reshape(x.shape) @ p["out"]
        y = jax.nn.gelu(norm(x, p["norm_2"]) @ p["up"] + p["up_bias"])
        return x + y @ p["down"] + p["down_bias"]

    def loss_fn(params, model_state, batch, key):
        x = params["tokens"][batch] + params["positions"]
        if scanned:
            x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params["layers"])
        else:
            for p in params["layers"]:
                x = layer(x, p)
        logits = norm(x, params["norm"]) @ params["tokens"].T
        losses = cross_entropy(logits[:, :-1], batch[:, 1:])
        return losses.mean(axis=-1), (model_state, {})

    shapes = {
        "norm_1": (width,),
        "qkv": (width, 3 * width),
        "out": (width, width),
        "norm_2": (width,),
        "up": (width, 4 * width),
        "up_bias": (4 * width,),
        "down": (4 * width, width),
        "down_bias": (width,),
    }
    if scanned:
        layers: Any = {name: _floats(depth, *s) for name, s in shapes.items()}
    else:
        layers = [{n: _floats(*s) for n, s in shapes.items()} for _ in range(depth)]
    params = {
        "tokens": _floats(vocabulary, width),
        "positions": _floats(length, width),
        "layers": layers,
        "norm": _floats(width),
    }
    batch = jax.ShapeDtypeStruct((examples, length), jnp.int32)
    return Network(loss_fn, params, (), batch)


def _vit(depth: int) -> Network:
    model = models.ViT(10, patch_size=16, width=32, depth=depth, dropout_rate=0.0)
    return _images(model, 32)


# As they are built, layer by layer, but for the widths; the last is what scanning
# makes of the one before.
SHAPES: dict[str, Callable[[], Network]] = {
    "ResNet-50": lambda: _images(_ResNet50(8), 32),
    "WRN-28-10": lambda: _images(models.WideResNet(10, depth=28, width=1), 32),
    "ViT-B/16, 12 layers": lambda: _vit(12),
    "ViT-L/16, 24 layers": lambda: _vit(24),
    "GPT, 24 layers": lambda: gpt(24, 32, scanned=False),
    "GPT, 24 layers, scanned": lambda: gpt(24, 32, scanned=True),
}
