"""What is dispatched from the host and what runs in one program make the same steps."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax as mo
from tests.every_method import falling, params, sgd

DISPATCHED: dict[str, Callable[[], Any]] = {
    "looksam": lambda: mo.looksam(sgd(), 0.2, k=3),
    "looksam, per tensor and layer-wise": lambda: mo.looksam(
        sgd(), falling, k=2, per_tensor=True, layerwise=True
    ),
    "ae_looksam": lambda: mo.ae_looksam(sgd(), 0.2, total_steps=12, delta=0.5),
    "ae_looksam, asked on every second step": lambda: mo.ae_looksam(
        sgd(), falling, total_steps=12, delta=0.5, k=2
    ),
}


def loss_fn(p: Any, model_state: Any, batch: Any, key: Any) -> Any:
    outputs = jnp.cos(batch @ p["kernel"] + p["bias"][None])
    return jnp.mean(outputs**2), (model_state + 1, {"outputs": outputs})


@pytest.mark.parametrize("name", DISPATCHED)
def test_both_dispatches_make_the_same_steps(name):
    batches = np.random.default_rng(0).normal(size=(12, 8, 3)).astype(np.float32)
    tx = DISPATCHED[name]()

    def train(dispatch: Any) -> list[Any]:
        step = mo.make_train_step(loss_fn, tx, dispatch=dispatch)
        state = mo.TrainState(params(), tx.init(params()), jnp.int32(0))
        seen = []
        for batch in batches:
            state, metrics = step(state, batch, None)
            seen.append(jax.device_get((state, metrics)))
        return seen

    from_host, in_graph = train("host"), train("in_graph")
    chex.assert_trees_all_close(from_host, in_graph, rtol=1e-4, atol=1e-5)
    employed = [bool(metrics.employed) for _, metrics in from_host]
    assert 0 < sum(employed) < 12
    for state, metrics in from_host:
        norm = metrics.perturbation_norm
        assert (norm > 0) == metrics.employed
        assert state.model_state == int(state.opt_state[0].step)
