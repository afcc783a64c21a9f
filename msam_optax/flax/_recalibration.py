r"""Batch statistics taken anew: which of them are averages, and of what.

A collection of batch statistics holds more than batch norm's. Averaged is a pair of
leaves ``mean`` and ``var`` (also ``running_mean`` and ``running_var``, ``ema_mean`` and
``ema_variance``, ...) of one module, if one step of both is

.. math:: s \leftarrow \delta s + (1 - \delta)\, b

with one constant decay :math:`\delta` and a b of the batch that does not depend on s.
This is measured and not believed: s is moved by a large power of two, c, by which the
new one moves by :math:`\delta c` exactly, up to the rounding of :math:`\delta`. Then a
step from s = 0 is :math:`(1 - \delta) b`. All other leaves (the vectors of spectral
norm, maxima, counters) go on from batch to batch, as in training.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# step(statistics, streams, inputs) -> (fingerprint of the outputs, statistics, streams)
Step = Callable[[Any, Any, Any], tuple[Any, Any, Any]]


class _Pair(NamedTuple):
    """Places of a batch norm's statistics among the leaves."""

    mean: int
    var: int


def check_batches(batches: Any) -> None:
    """ValueError for one batch in the place of batches."""
    if hasattr(batches, "shape"):
        given = f"an array of shape {batches.shape}"
    elif isinstance(batches, Mapping):
        given = f"one dict of {', '.join(map(repr, batches))}"
    elif isinstance(batches, tuple) and any(hasattr(x, "shape") for x in batches):
        given = f"a tuple of arrays of shapes {[jnp.shape(x) for x in batches]}"
    elif isinstance(batches, Iterable):
        return
    else:
        given = f"a {type(batches).__name__}"
    raise ValueError(
        f"batches must be a list of batches, or an iterator over them, but {given} "
        "was given: give [batch] if it is one batch, list(batches) if its first axis "
        "counts batches."
    )


@contextlib.contextmanager
def told_of_whole_batches(args: tuple[Any, ...]) -> Iterator[None]:
    """Tells what a module may have failed of that was called with a whole batch."""
    try:
        yield
    except Exception as error:
        if len(args) == 1 and isinstance(args[0], tuple | list | Mapping):
            raise ValueError(
                f"The module can't be called with a batch that is a "
                f"{type(args[0]).__name__} of {len(args[0])}. If the batches hold "
                "labels as well, say what the module is called with, for instance "
                "inputs=lambda batch: batch[0]."
            ) from error
        raise


def take_anew(step: Step, statistics: Any, streams: Any, batches: Iterable[Any]) -> Any:
    """The statistics after a pass over the batches, batch norm's as exact averages.

    Args:
      step: one forward pass in training mode.
      statistics: tree of arrays, the collection before.
      streams: what else goes on from batch to batch.
      batches: what the module is called with, batch by batch.
    """
    paths, leaves = _flat(statistics)
    structure = jax.tree.structure(statistics)

    def run(leaves: Any, streams: Any, inputs: Any) -> Any:
        outputs, new, streams = step(
            jax.tree.unflatten(structure, leaves), streams, inputs
        )
        new_paths, new_leaves = _flat(new)
        if new_paths != paths:
            changed = [str(p) for p in set(new_paths) ^ set(paths)]
            raise ValueError(
                f"A pass in training mode added or removed the batch statistics "
                f"{', '.join(sorted(changed))}: initialise the module such that it "
                "makes all of them."
            )
        return outputs, new_leaves, streams

    pairs, examples, last = _pairs(paths, leaves), 0, None
    total: dict[int, Any] = {}
    decays: dict[_Pair, np.ndarray] = {}
    for inputs in batches:
        if last is None and pairs:
            decays = _decays(run, leaves, streams, inputs, pairs, paths)
        last = leaves, streams, inputs
        averaged = {place for pair in decays for place in pair}
        start = [
            jnp.zeros_like(x) if i in averaged else x for i, x in enumerate(leaves)
        ]
        _, new, streams = run(start, streams, inputs)
        size = _examples(inputs)
        for i in averaged:
            wide = jnp.promote_types(new[i].dtype, jnp.float32)
            total[i] = total.get(i, 0) + size * new[i].astype(wide)
        examples += size
        leaves = [x if i in averaged else new[i] for i, x in enumerate(leaves)]
    if last is None:
        raise ValueError("Batch statistics need at least one batch of examples.")
    if decays:
        at_last = _measured(run, *last, list(decays), paths)
        changed = [p for p, d in decays.items() if abs(at_last[p] - d) > _rounding(d)]
        if changed:
            why = "its decay changes from batch to batch"
            raise ValueError(_unlike(changed, paths, why))
    for pair, decay in decays.items():
        share = 1 - _as_written(decay)
        for i in pair:
            leaves[i] = (total[i] / examples / share).astype(leaves[i].dtype)
    return jax.tree.unflatten(structure, leaves)


def _flat(tree: Any) -> tuple[list[str], list[Any]]:
    found = jax.tree.leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in found], [x for _, x in found]


def _examples(inputs: Any) -> int:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(inputs)]
    if not shapes or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            "The leading axis of a batch's first array must count its examples, at "
            f"least one, but the batch's shapes are {shapes}."
        )
    return shapes[0][0]


def _pairs(paths: list[str], leaves: list[Any]) -> list[_Pair]:
    """The leaves that are named as mean and variance of one module."""
    places = {path: i for i, path in enumerate(paths)}
    pairs = []
    for path, mean in places.items():
        for other in ("var", "variance"):
            # The last key that is a name: a box around the leaf may follow it.
            partner = re.sub(r"mean'\](?!.*\[')", rf"{other}']", path)
            if partner == path or partner not in places:
                continue
            pair = _Pair(mean, places[partner])
            of_mean, of_var = (leaves[i] for i in pair)
            if jnp.shape(of_mean) == jnp.shape(of_var) and _is_real(of_mean, of_var):
                pairs.append(pair)
    return pairs


def _is_real(*leaves: Any) -> bool:
    return all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves)


def _decays(
    run: Any, leaves: Any, streams: Any, inputs: Any, pairs: Any, paths: Any
) -> dict[_Pair, np.ndarray]:
    """The decay of each pair that the module updates; a frozen one keeps its values."""
    # Variances alone: a frozen layer divides by them, and what it returns stays small.
    moved = _moved(leaves, [pair.var for pair in pairs])
    _, at, _ = run(leaves, streams, inputs)
    _, new, _ = run(moved, streams, inputs)

    def written(pair: _Pair) -> bool:
        return any(
            not np.array_equal(after[i], before[i])
            for before, after in ((leaves, at), (moved, new))
            for i in pair
        )

    free = [pair for pair in pairs if written(pair)]
    if not free:
        raise ValueError(
            "The module left its batch statistics as they are: call it as in training, "
            "recalibrate_batch_stats(..., train=True) for instance."
        )
    return _measured(run, leaves, streams, inputs, free, paths)


def _measured(
    run: Any, leaves: Any, streams: Any, inputs: Any, pairs: Any, paths: Any
) -> dict[_Pair, np.ndarray]:
    """The decays; ValueError if a pair is not a running average with one of them."""
    places = [i for pair in pairs for i in pair]
    moved = _moved(leaves, places)
    outputs, at, _ = run(leaves, streams, inputs)
    other_outputs, new, _ = run(moved, streams, inputs)
    decays = {}
    for pair in pairs:
        found = [(new[i] - at[i]) / (moved[i] - leaves[i]) for i in pair]
        flat = np.concatenate([np.ravel(x) for x in found])
        # Written so that NaN is refused, too.
        if not (np.all(abs(flat - flat[0]) <= _rounding(flat)) and 0 <= flat[0] < 1):
            raise ValueError(_unlike([pair], paths, "it has not one decay"))
        decays[pair] = flat[0]
    if not all(
        np.allclose(a, b, rtol=1e-3, equal_nan=True)
        for a, b in zip(outputs, other_outputs, strict=True)
    ):
        raise ValueError(
            _unlike(pairs, paths, "the module's outputs in training depend on it")
        )
    return decays


def _moved(leaves: list[Any], places: list[int]) -> list[Any]:
    def move(x: jax.Array) -> jax.Array:
        return x + jnp.asarray(2.0 ** (8 if x.dtype == jnp.float16 else 60), x.dtype)

    return [move(jnp.asarray(x)) if i in places else x for i, x in enumerate(leaves)]


def _rounding(decay: Any) -> float:
    return 16 * float(jnp.finfo(decay.dtype).eps)


def _as_written(decay: Any) -> float:
    """The shortest number that rounds to it: 1 - float32(0.99) is off by 2e-6."""
    texts = (f"{float(decay):.{digits}g}" for digits in range(1, 18))
    return next(float(t) for t in texts if decay.dtype.type(float(t)) == decay)


def _unlike(pairs: Iterable[_Pair], paths: list[str], why: str) -> str:
    names = ", ".join(f"{paths[p.mean]} and {paths[p.var]}" for p in pairs)
    return (
        f"The batch statistics {names} are named as batch norm's are, but a step of "
        f"them is no running average of the batches' own mean and variance: {why}. "
        "Give them other names, and they go on from batch to batch as in training; or "
        "keep them apart from the batch statistics, and they stay as they are."
    )


def fingerprint(outputs: Any) -> list[jax.Array]:
    """One number for each array of the outputs, to see whether they changed."""
    arrays = [x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array)]
    return [jnp.sum(jnp.abs(x.astype(jnp.float32))) for x in arrays if _is_real(x)]


def split_arguments(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], tuple]:
    """Keywords that hold arrays, and the others, which are compiled for."""
    arrays = {
        name: value
        for name, value in kwargs.items()
        if any(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(value))
    }
    return arrays, tuple(sorted((n, v) for n, v in kwargs.items() if n not in arrays))


def compiled_for(function: Callable[..., Any], *static: Any) -> Callable[..., Any]:
    """The function at its first arguments; compiled once for all that are equal."""
    try:
        hash(static)
    except TypeError:  # a module that holds arrays, for instance
        return jax.jit(functools.partial(function, *static))
    return functools.partial(_jitted(function, len(static)), *static)


@functools.cache
def _jitted(function: Callable[..., Any], num_static: int) -> Callable[..., Any]:
    return jax.jit(function, static_argnums=range(num_static))
