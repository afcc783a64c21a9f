"""Tests of the figures on sharpness and curvature: about 50 seconds."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from benchmarks.figures import (
    common,
    curvature,
    hessian_eigenvalues,
    loss_planes,
    networks,
    proposition_1,
    sharpness_directions,
)
from benchmarks.tasks import optimizers
from msam_optax.sharpness import mean_gradient, mean_loss, sharpness_along
from tests.figure_scripts import FAST, Row, run

COLUMNS = ["method", "learning_rate", "rho", "weight_decay", "seed", "epoch"]


@pytest.fixture(autouse=True)
def fewer_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the methods takes most of the time."""
    for script, methods in {
        curvature: ("sgd", "msam"),
        hessian_eigenvalues: ("sgd",),
        loss_planes: ("msam",),
        proposition_1: ("sgd",),
        sharpness_directions: ("sgd", "msam"),
    }.items():
        assert {*methods} <= {*script.METHODS}
        monkeypatch.setattr(script, "METHODS", methods)


def study(*flags: str, **quick: Any) -> common.Study:
    argv = [*FAST, "--seeds", "1", *flags]
    return common.open_study("test.py", "A test.", argv, quick=quick)


def values(rows: list[Row], column: str, **chosen: Any) -> np.ndarray:
    return np.array(
        [
            row[column]
            for row in rows
            if all(row[key] == value for key, value in chosen.items())
        ]
    )


# The scripts.


def test_sharpness_directions(tmp_path: Path) -> None:
    rows = run(sharpness_directions, tmp_path)
    assert list(rows[0]) == [*COLUMNS, "direction", "distance", "loss", "sharpness"]
    assert len(rows) == 2 * 2 * 3 * 11  # methods, seeds, directions, points
    assert not values(rows, "sharpness", distance=0.0).any()
    sgd = {"method": "sgd", "seed": 1.0}
    np.testing.assert_allclose(
        values(rows, "distance", direction="random", **sgd), np.linspace(-10, 10, 11)
    )
    # The loss rises along its gradient; at 1 it is as at 0, whatever the direction.
    gradient = values(rows, "sharpness", direction="gradient", **sgd)
    assert gradient[6] > 0 and gradient[6] > gradient[4]
    assert len(set(values(rows, "loss", distance=0.0, **sgd))) == 1


def test_loss_planes(tmp_path: Path) -> None:
    rows = run(loss_planes, tmp_path)
    columns = [*COLUMNS, "along_momentum", "along_gradient", "loss", "rise"]
    assert list(rows[0]) == columns
    assert len(rows) == 2 * 15**2
    at_weights = values(rows, "rise", along_momentum=0.0, along_gradient=0.0)
    assert len(at_weights) == 2 and not at_weights.any()
    # The first network again, at a point that is on the momentum's axis alone.
    (network,) = networks.networks(study("--epochs", "1", examples=1000), ["msam"])
    on_axis = next(r for r in rows if not r["along_gradient"] and r["rise"])
    rise = sharpness_along(
        network.loss,
        network.weights,
        optax.tree.scale(
            on_axis["along_momentum"] / optax.tree.norm(network.momentum),
            network.momentum,
        ),
        network.batches,
    )
    assert on_axis["rise"] == pytest.approx(rise, rel=1e-3)


def test_hessian_eigenvalues(tmp_path: Path) -> None:
    rows = run(hessian_eigenvalues, tmp_path)
    assert list(rows[0]) == [*COLUMNS, "quantity", "place", "value", "error"]
    assert len(rows) == 2 * 6
    names = ["trace", *(f"lambda_{place}" for place in range(1, 6))]
    assert [row["quantity"] for row in rows[:6]] == names
    for start in range(0, len(rows), 6):
        trace, *largest = [row["value"] for row in rows[start : start + 6]]
        assert largest == sorted(largest, reverse=True)
        assert 0 < sum(largest) < trace
        assert all(row["error"] >= 0 for row in rows[start : start + 6])


def test_curvature(tmp_path: Path) -> None:
    rows = run(curvature, tmp_path)
    assert list(rows[0]) == [*COLUMNS, "direction", "curvature"]
    assert len(rows) == 2 * 2 * 4
    mean = values(rows, "curvature", direction="mean, tr H / |W|")
    # A Gaussian direction has the mean curvature, the gradient far more.
    random = values(rows, "curvature", direction="random")
    np.testing.assert_allclose(random.mean(), mean.mean(), rtol=0.3)
    assert (values(rows, "curvature", direction="gradient g") > 10 * mean).all()


def test_proposition_1(tmp_path: Path) -> None:
    rows = run(proposition_1, tmp_path)
    columns = ["sigma", "rise", "predicted", "ratio", "trace", "trace_error"]
    assert list(rows[0]) == ["model", *COLUMNS, *columns]
    assert len(rows) == 2 * 2 * 7
    for row in rows:
        assert row["predicted"] == pytest.approx(row["sigma"] ** 2 / 2 * row["trace"])
    # Where the loss has second derivatives, the proposition holds for small noise.
    smooth = values(rows, "ratio", model="mlp with GELU", sigma=rows[1]["sigma"])
    np.testing.assert_allclose(smooth.mean(), 1.0, rtol=0.3)


# The networks.


def test_networks_are_at_the_unperturbed_weights() -> None:
    of_study = study("--epochs", "1", examples=300)
    (network,) = networks.networks(of_study, ["msam"])
    assert network.columns == {
        "method": "msam",
        "learning_rate": 0.1,
        "rho": optimizers.METHODS["msam"].default,
        "weight_decay": optimizers.WEIGHT_DECAY,
        "seed": 0,
        "epoch": 1,
    }
    trainer = of_study.trainer("msam")
    (epoch,) = trainer.epochs(0)
    state = epoch.state.opt_state
    weights = msam_optax.eval_params(state, epoch.state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        network.weights,
        weights,
    )
    # ε = -ρ v/‖v‖ is on the parameters in use.
    epsilon = optax.tree.sub(epoch.state.params, weights)
    expected = optax.tree.scale(
        -network.columns["rho"], networks.unit(network.momentum)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), epsilon, expected
    )


@pytest.mark.parametrize("method", ["sgd", "nag", "sam", "msam", "ae_sam"])
def test_momentum_is_that_of_sgd(method: str) -> None:
    setting = optimizers.Setting(0.1, 0.1, 0.0, 10)
    optimizer = optimizers.METHODS[method].build(setting)
    params = {"mu": jnp.ones(2), "trace": jnp.ones(3)}
    gradient = {"mu": jnp.full(2, 3.0), "trace": jnp.full(3, 4.0)}
    _, state = optimizer.update(
        gradient, optimizer.init(params), params, grad_fn=lambda p: gradient
    )
    found = common.momentum_of(state)
    jax.tree.map(np.testing.assert_array_equal, found, gradient)


def test_loss_is_that_of_the_training_labels() -> None:
    of_study = study("--epochs", "1", examples=1200)
    (network,) = networks.networks(of_study, ["sgd"])
    assert [len(labels) for _, labels, _ in network.batches] == [1000, 200]
    task, labels = of_study.task, of_study.task.labels(0)[:1200]
    logits = task.model.apply(
        {"params": network.weights}, task.train_images[:1200], train=False
    )
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    found = mean_loss(network.loss, network.weights, network.batches)
    assert found == pytest.approx(float(expected.mean()), rel=1e-5)
    gradient = mean_gradient(network.loss, network.weights, [network.batch])
    jax.tree.map(np.testing.assert_array_equal, network.gradient(), gradient)
    assert len(network.batch[1]) == 256
    for direction in network.directions().values():
        assert float(optax.tree.norm(direction)) == pytest.approx(1.0, rel=1e-5)


def test_networks_stop_where_they_are_asked_to() -> None:
    of_study = study("--epochs", "3", examples=100)
    found = [
        network.columns["epoch"]
        for network in networks.networks(of_study, ["sgd"], epochs={1, 3})
    ]
    assert found == [1, 3]
