"""Training images, moved and mirrored at random."""

import jax
import jax.numpy as jnp

# Pixels by which an image may move
_PAD = 2


def crop_and_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each image by up to two pixels along both axes, and mirrors half of them.

    What comes from outside of an image is as its nearest pixel.

    Args:
      images: float[batch, height, width, channels].
      key: random key.

    Returns:
      An array of the same shape.
    """
    count, height, width, _ = images.shape
    row_key, column_key, flip_key = jax.random.split(key, 3)

    def places(key: jax.Array, size: int) -> jax.Array:
        starts = jax.random.randint(key, (count, 1), 0, 2 * _PAD + 1)
        return starts + jnp.arange(size)

    columns = places(column_key, width)
    flipped = jax.random.bernoulli(flip_key, shape=(count, 1))
    columns = jnp.where(flipped, columns[:, ::-1], columns)
    rows = places(row_key, height)
    padding = ((0, 0), (_PAD, _PAD), (_PAD, _PAD), (0, 0))
    padded = jnp.pad(images, padding, mode="edge")
    each = jnp.arange(count)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]]
