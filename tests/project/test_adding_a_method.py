"""How far a new method reaches: the places of CONTRIBUTING, and the contract for it."""

import re
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo
from tests import every_method
from tests.every_method import STEPS, Carry, one_step, scanned, spy, start

ROOT = Path(__file__).parents[2]


def random_sam(optimizer: Any, rho: Any = 0.05, seed: int = 0) -> Any:
    """A method that is not in the package: SAM along a random direction."""
    ascent = mo.ascents.gaussian(rho, seed)
    return optax.chain(mo.sharpness_aware_gradient(ascent), optimizer)


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(every_method.AROUND, "random_sam", random_sam)
    return "random_sam"


def test_one_entry_in_the_table_puts_a_method_under_contract(added):
    tx = every_method.build(added)
    seen = every_method.trajectory(added)
    chex.assert_trees_all_equal_shapes_and_dtypes(*seen)
    last = jax.jit(lambda carry: scanned(tx, carry))(seen[0])
    chex.assert_trees_all_close(last, seen[-1], rtol=1e-4, atol=1e-5)
    for dtype in (jnp.bfloat16, jnp.float16):
        carry = start(tx, dtype)
        after = jax.eval_shape(lambda carry: scanned(tx, carry, STEPS), carry)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, carry)

    handed: dict[str, Any] = {}
    tx = every_method.build(added, optax.chain(spy(handed), every_method.sgd()))
    jax.eval_shape(
        lambda c: Carry(*one_step(tx, c.params, c.state, 0, value=3.0)), start(tx)
    )
    assert handed["value"] == 3.0


# What CONTRIBUTING lists; the sixth is the test against a recursion.
PLACES = [
    "msam_optax/methods/_name.py",
    "msam_optax/methods/__init__.py",
    "msam_optax/__init__.py",
    "tests/every_method.py",
    "benchmarks/tasks/optimizers.py",
]


def test_contributing_lists_the_places():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"`{place}`" in text for place in [*PLACES, "tests/methods/"])


@pytest.mark.parametrize("name", ["gradient_norm_penalty", "friendly_sam", "ss_sam"])
def test_a_method_stands_in_these_places_and_nowhere_else_in_the_package(name):
    places = {place.replace("_name", f"_{name}") for place in PLACES}
    named = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "msam_optax").rglob("*.py")
        if path.parent.name != "plotting"  # whose colours some methods have for good
        and re.search(rf'def {name}\(|import {name}\b|"{name}"', path.read_text())
    }
    assert named == {place for place in places if place.startswith("msam_optax")}
    for place in places - named:
        assert f'"{name}"' in (ROOT / place).read_text()
