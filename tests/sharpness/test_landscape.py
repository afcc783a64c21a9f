"""The losses on lines and planes: closed forms, orientation, weights, errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msam_optax import sharpness
from msam_optax.sharpness import loss_on_line, loss_on_plane
from tests import problems

MATRIX = problems.quadratic_matrix()
DISTANCES = np.array([-2.0, -0.5, 0.0, 0.3, 4.0])


def quadratic_loss(params: Any, batch: Any) -> jax.Array:
    """½ wᵀAw - bᵀw, averaged over the examples b."""
    w = jnp.concatenate([jnp.ravel(params["matrix"]), params["vector"]])
    return 0.5 * w @ jnp.asarray(MATRIX) @ w - jnp.mean(batch["b"] @ w)


def tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"matrix": rng.normal(size=(3, 4)), "vector": rng.normal(size=5)}


def flat(params: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(params["matrix"]), params["vector"]])


def batches(dtype: Any = np.float64) -> list[dict[str, np.ndarray]]:
    """Ten examples in batches of unequal size."""
    b = np.random.default_rng(3).normal(size=(10, 17)).astype(dtype)
    return [{"b": b[:7]}, {"b": b[7:9]}, {"b": b[9:]}]


def exact(w: np.ndarray) -> float:
    b = np.concatenate([batch["b"] for batch in batches()])
    return 0.5 * w @ MATRIX @ w - np.mean(b @ w)


@pytest.mark.usefixtures("x64")
def test_line_through_a_quadratic():
    params, direction = tree(0), tree(1)
    found = loss_on_line(quadratic_loss, params, direction, DISTANCES, batches())
    expected = [exact(flat(params) + t * flat(direction)) for t in DISTANCES]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_plane_has_a_row_for_each_y():
    params, first, second = tree(0), tree(1), tree(2)
    xs, ys = DISTANCES, np.array([-1.0, 0.0, 3.0])
    found = loss_on_plane(quadratic_loss, params, [first, second], xs, ys, batches())
    expected = [
        [exact(flat(params) + x * flat(first) + y * flat(second)) for x in xs]
        for y in ys
    ]
    assert found.shape == (3, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_line_agrees_with_the_sharpness():
    params, direction = tree(0), tree(1)
    at_w, ahead = loss_on_line(quadratic_loss, params, direction, [0, 1], batches())
    args = (quadratic_loss, params)
    assert at_w == pytest.approx(sharpness.mean_loss(*args, batches()), rel=1e-12)
    rise = sharpness.sharpness_along(*args, direction, batches())
    assert ahead - at_w == pytest.approx(rise, rel=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_does_not_swallow_a_small_step(dtype):
    """In bfloat16, 1 + 1e-3 is 1."""
    params = {"w": jnp.ones(4, dtype)}
    direction = {"w": jnp.ones(4, dtype)}

    def loss(params, batch):
        return jnp.mean(batch @ params["w"])

    data = [jnp.eye(4), jnp.eye(4)]
    found = loss_on_line(loss, params, direction, [0.0, 1e-3], data)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [1.0, 1.001], rtol=2e-7)


def test_many_batches_do_not_add_up_rounding_errors():
    batch = [jnp.full(1, 0.1)]
    found = loss_on_line(lambda w, b: jnp.mean(w * b), 1.0, 0.0, [1.0], batch * 3000)
    np.testing.assert_allclose(found, [0.1], rtol=2e-7)


def test_batches_are_read_once_and_the_loss_is_not_traced_anew():
    traced, done, read = [], [], []

    def loss(params, batch):
        traced.append(params)
        return jnp.mean(params * batch)

    class Batches:
        def __iter__(self):
            for value in (1.0, 2.0):
                read.append(value)
                yield jnp.full(3, value)

    for _ in range(2):
        line = loss_on_line(
            loss,
            1.0,
            1.0,
            DISTANCES,
            Batches(),
            on_batch=lambda: done.append(len(read)),
        )
    np.testing.assert_allclose(line, 1.5 * (1 + DISTANCES), rtol=1e-6)
    assert read == [1.0, 2.0] * 2 and done == [1, 2, 3, 4]
    assert len(traced) == 2  # for the losses, and for what the batches weigh


def test_a_loss_that_is_not_finite_stays_where_it_is():
    found = loss_on_line(lambda w, b: jnp.mean(b / w), 0.0, 1.0, [1, 0], [jnp.ones(2)])
    assert found[0] == 1.0 and not np.isfinite(found[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": {"w": jnp.ones(3)}}, "direction must be a tree like the param"),
        ({"direction": jnp.ones(2)}, "direction must be a tree like the parameters"),
        ({"distances": 1.0}, r"distances must be one axis of .* shape is \(\)"),
        ({"distances": []}, r"distances must be one axis of .* shape is \(0,\)"),
        ({"distances": [[1.0]]}, r"distances must be one axis .* shape is \(1, 1\)"),
        ({"batches": []}, "batches must hold at least one batch"),
        ({"batches": iter([jnp.ones(2)])}, "an iterator was given"),
        ({"loss_fn": lambda w, b: b}, "loss_fn must return the mean loss"),
    ],
)
def test_mistakes_on_a_line_are_explained(changes, message):
    arguments = {
        "loss_fn": lambda params, batch: jnp.mean(batch * params["w"]),
        "params": {"w": jnp.ones(2)},
        "direction": {"w": jnp.ones(2)},
        "distances": [0.0],
        "batches": [jnp.ones(2)],
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        loss_on_line(**arguments)


@pytest.mark.parametrize("count", [1, 3])
def test_a_plane_has_two_directions(count):
    with pytest.raises(ValueError, match=f"two directions, but {count} were given"):
        loss_on_plane(jnp.dot, 1.0, [1.0] * count, [0.0], [0.0], [jnp.ones(1)])


@pytest.mark.parametrize("bad", ["xs", "ys"])
def test_mistakes_in_a_grid_are_explained(bad):
    axes: dict[str, Any] = {"xs": [0.0], "ys": [0.0], bad: 0.0}
    with pytest.raises(ValueError, match=f"{bad} must be one axis"):
        loss_on_plane(jnp.dot, 1.0, [1.0, 1.0], batches=[jnp.ones(1)], **axes)
