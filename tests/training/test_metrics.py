"""step_metrics: what an optimizer's state tells, in any loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo

SGD = optax.sgd(0.01, momentum=0.9)
RHO = 0.2
SAM = mo.sharpness_aware_gradient(mo.ascents.normalized(RHO))
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[2.0]])}


def train(tx: Any, steps: int) -> Any:
    tx = optax.with_extra_args_support(tx)
    params, state = PARAMS, tx.init(PARAMS)

    def loss(p):
        return sum(jnp.sum(x**4) for x in jax.tree.leaves(p))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            jax.grad(loss)(params), state, params, grad_fn=jax.grad(loss)
        )
        params = optax.apply_updates(params, updates)
        return params, state, mo.step_metrics(state, params)

    for _ in range(steps):
        params, state, metrics = step(params, state)
    return params, state, metrics


def clipped(policy: Any) -> Any:
    return mo.employ(policy, optax.clip_by_global_norm(1.0))


EVERY_2, EVERY_4 = mo.policies.every(2), mo.policies.every(4)
FIRST = mo.policies.between(0, 1)
# By optimizer: whether the third of three steps took an extra gradient, and the share.
CASES: dict[str, tuple[Any, bool, float]] = {
    "sgd": (SGD, False, 0),
    "msam": (mo.msam(0.01, rho=RHO), False, 0),
    "sam": (mo.sam(SGD, RHO), True, 1),
    "every 2": (optax.chain(mo.employ(EVERY_2, SAM), SGD), True, 2 / 3),
    "every 4": (optax.chain(mo.employ(EVERY_4, SAM), SGD), False, 1 / 3),
    # What is employed must be the extra gradient.
    "sam, clipped seldom": (optax.chain(SAM, clipped(EVERY_4), SGD), True, 1),
    "sam seldom, clipped": (
        optax.chain(mo.employ(EVERY_4, SAM), clipped(mo.policies.always()), SGD),
        False,
        1 / 3,
    ),
    "nested": (
        optax.chain(mo.employ(EVERY_2, mo.employ(FIRST, SAM)), SGD),
        False,
        1 / 3,
    ),
    "looksam": (mo.looksam(SGD, RHO, k=2), True, 2 / 3),
    "inside a wrapper": (
        optax.named_chain(("sam", mo.employ(EVERY_2, SAM)), ("sgd", SGD)),
        True,
        2 / 3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_extra_gradients_are_told(name):
    tx, employed, share = CASES[name]
    params, _, metrics = train(tx, 3)
    assert metrics.employed == employed
    np.testing.assert_allclose(metrics.employed_fraction, share, rtol=1e-6)
    perturbed = employed or name == "msam"
    np.testing.assert_allclose(metrics.perturbation_norm, RHO * perturbed, rtol=1e-5)
    np.testing.assert_allclose(
        metrics.relative_perturbation,
        RHO * perturbed / optax.tree.norm(params),
        rtol=1e-5,
    )


def test_the_norm_of_msam_is_no_scale():
    params, state, metrics = train(mo.msam(0.01, rho=RHO), 3)
    epsilon = optax.tree.sub(params, mo.eval_params(state, params))
    np.testing.assert_allclose(
        metrics.perturbation_norm, optax.tree.norm(epsilon), rtol=1e-4
    )
    assert abs(state.scale - metrics.perturbation_norm) > 0.1


def test_metrics_of_many_runs_are_had_by_vmap():
    def run(rho):
        tx = mo.msam(0.01, rho=rho)
        updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        return mo.step_metrics(state, optax.apply_updates(PARAMS, updates))

    metrics = jax.vmap(run)(jnp.array([0.1, 0.4]))
    np.testing.assert_allclose(metrics.perturbation_norm, [0.1, 0.4], rtol=1e-5)


def test_a_policy_of_a_much_longer_run_shows():
    """total_steps=100,000 in a run of 40: hardly any step is employed."""
    _, _, metrics = train(mo.ae_sam(SGD, RHO, total_steps=100_000), 40)
    assert metrics.employed_fraction < 0.2


def test_the_metrics_keep_their_dtypes_in_low_precision():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for tx in (SGD, mo.sam(SGD, RHO), mo.ae_sam(SGD, RHO, 10)):
        metrics = mo.step_metrics(tx.init(params), params)
        assert metrics.employed.dtype == bool
        assert {m.dtype for m in metrics} == {jnp.dtype(bool), jnp.dtype("float32")}
        assert metrics.perturbation_norm == 0
