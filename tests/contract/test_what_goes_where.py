"""The table of what goes where, cell by cell."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo
from tests import what_goes_where as table
from tests.what_goes_where import PARAMS, RHO, STEPS, Loop, Row, gradient, loss


def steps_of(tx: Any, loop: Loop) -> Any:
    """The parameters after a user's own loop: those to evaluate."""
    tx = optax.with_extra_args_support(tx)
    p: Any = optax.LookaheadParams.init_synced(PARAMS) if loop.synced else PARAMS
    state = tx.init(p)
    for t in range(STEPS):
        value, g = jax.value_and_grad(loss)(p.fast if loop.synced else p, t)
        given: dict[str, Any] = {"grad_fn": second(loop, t)}
        if loop.searches:
            given = {"value": value, "grad": g, "value_fn": lambda q, t=t: loss(q, t)}
        updates, state = tx.update(g, state, p, **given)
        p = optax.apply_updates(p, updates)
    return mo.eval_params(state, p)


def second(loop: Loop, t: int) -> Any:
    """The second gradient, which is not finite where the loop says so."""
    factor = jnp.nan if t == loop.nan_at else 1.0
    return lambda p: optax.tree.scale(factor, gradient(p, t))


def reference(row: Row) -> Any:
    """What is meant by a row, with the perturbation made by hand."""
    meant, loop = optax.with_extra_args_support(row.meant()), row.loop
    w, state = PARAMS, meant.init(PARAMS)
    before = loop.before or optax.identity()
    before_state = before.init(PARAMS)
    momentum = optax.tree.zeros_like(PARAMS)
    for t in range(STEPS):
        value, clean = jax.value_and_grad(loss)(w, t)
        if row.method == "MSAM":
            at = optax.tree.add_scale(w, -RHO / length(momentum), momentum)
            g, before_state = before.update(gradient(at, t), before_state, at)
        elif loop.employed(t):
            seen = {k: x if k in loop.visible else 0 * x for k, x in clean.items()}
            at = optax.tree.add_scale(w, RHO / length(seen), seen)
            g = second(loop, t)(at)
        else:
            g = clean
        given = {"value": value, "grad": clean, "value_fn": lambda q, t=t: loss(q, t)}
        updates, state = meant.update(g, state, w, **given if loop.searches else {})
        w = optax.apply_updates(w, updates)
        if row.method == "MSAM":
            momentum = mo.find_momentum(state, w)
    return w


def length(tree: Any) -> Any:
    norm = optax.tree.norm(tree)
    return jnp.where(norm == 0, 1, norm)


def in_our_step(tx: Any) -> Any:
    """The parameters after `make_train_step`."""

    def loss_fn(params, model_state, t, key):
        return loss(params, t), (model_state, {})

    step = mo.make_train_step(loss_fn, tx, donate=False)
    state = mo.TrainState(PARAMS, tx.init(PARAMS))
    for t in range(STEPS):
        state, _ = step(state, jnp.float32(t), None)
    return mo.eval_params(state.opt_state, state.params)


def refused(run: Any, *args: Any) -> bool:
    """Whether a loop is refused; anything but a ValueError of ours is a bug."""
    try:
        run(*args)
    except ValueError:
        return True
    return False


def same(one: Any, other: Any) -> bool:
    try:
        chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    "row", table.ROWS, ids=lambda row: f"{row.method}, {row.wrapper} {row.place}"
)
def test_what_comes_of_it(row):
    if row.outcome == table.REFUSED:
        assert refused(steps_of, row.build(), row.loop)
    elif row.outcome == table.FILLED:
        assert refused(steps_of, row.build(), row.loop)
        chex.assert_trees_all_close(
            in_our_step(row.build()), reference(row), rtol=1e-4, atol=1e-5
        )
    elif row.outcome == table.RIGHT:
        chex.assert_trees_all_close(
            steps_of(row.build(), row.loop), reference(row), rtol=1e-4, atol=1e-5
        )
    else:
        if row.outcome == table.SEEN:
            assert refused(in_our_step, row.build())
        try:
            found = steps_of(row.build(), row.loop)
        except (TypeError, IndexError):  # from inside the loss, which names no cause
            return
        assert not same(found, reference(row))


@pytest.mark.parametrize("method", ["SAM", "MSAM"])
def test_the_table_is_rendered(method):
    _, _, *lines = table.markdown(method).splitlines()
    rows = [row for row in table.ROWS if row.method == method]
    assert len(lines) == len(rows)
    assert {line.count(" | ") for line in lines} == {2}
    told, wrapper = set(), ""
    for line in lines:
        name, place, outcome = (cell.strip(" |") for cell in line.split(" | "))
        wrapper = name.strip("`") or wrapper
        told.add((wrapper, place, outcome))
    assert told == {
        (row.wrapper, row.place, f"**{row.outcome}**. {row.why}".strip())
        for row in rows
    }


def test_no_cell_is_told_twice():
    cells = [(row.method, row.wrapper, row.place) for row in table.ROWS]
    assert len(cells) == len(set(cells))
