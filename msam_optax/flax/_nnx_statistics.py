"""Batch statistics of NNX modules at given parameters."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
from flax import nnx

from msam_optax._base.trees import check_alive
from msam_optax.flax._arguments import check_module
from msam_optax.flax._inputs import Inputs
from msam_optax.flax._pure import as_pure
from msam_optax.flax._recalibration import (
    check_batches,
    compiled_for,
    fingerprint,
    split_arguments,
    take_anew,
    told_of_whole_batches,
)


def recalibrate_batch_stats(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    **call_kwargs: Any,
) -> None:
    """Takes an NNX module's batch statistics anew, as an exact average, in place.

    As :func:`msam_optax.flax.linen.recalibrate_batch_stats`, of the module's
    ``nnx.BatchStat``, at the parameters that the module holds; see
    :func:`msam_optax.flax.nnx.eval_model`. Random streams and all other state stay as
    they are, and so does the mode: a module in evaluation mode is run in training mode,
    one of which some normalisations are frozen (``use_running_average``) as it is.

    Args:
      model: an NNX module.
      batches: the module's inputs without labels, batch by batch, in a list or an
        iterator.
      inputs: what of a batch the module is called with, where that is not the whole
        batch; see :class:`msam_optax.flax.nnx.Inputs` for several inputs.
      **call_kwargs: passed to the module, for instance ``rngs=nnx.Rngs(0)``.

    Raises:
      ValueError: as :func:`msam_optax.flax.linen.recalibrate_batch_stats`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from msam_optax.flax.nnx import recalibrate_batch_stats
    >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> inputs = jnp.array([[0.0], [2.0]])
    >>> recalibrate_batch_stats(model, [inputs, inputs + 1.0])
    >>> print(model.mean[...], model.var[...])
    [1.5] [1.]
    """
    check_module("recalibrate_batch_stats(model, batches)", model, nnx.Module)
    check_batches(batches)
    check_alive("model", as_pure(nnx.state(model)))
    if not jax.tree.leaves(nnx.state(model, nnx.BatchStat)):
        return
    training = nnx.clone(model)
    frozen = [
        node.use_running_average
        for _, node in nnx.iter_graph(training)
        if hasattr(node, "use_running_average")
    ]
    if all(frozen):
        training.train()
    arrays, static = split_arguments(call_kwargs)
    graphdef, statistics, streams, rest = _split(training, arrays)
    new = take_anew(
        partial(compiled_for(_pass, graphdef, static), rest),
        as_pure(statistics),
        as_pure(streams),
        (Inputs.of(b if inputs is None else inputs(b)) for b in batches),
    )
    nnx.update((model,), new)


def _split(model: nnx.Module, arrays: Any) -> Any:
    is_statistic = nnx.filterlib.to_predicate(nnx.BatchStat)

    def of_the_model(path: Any, variable: Any) -> bool:
        return path[0] == 0 and is_statistic(path, variable)

    return nnx.split((model, arrays), of_the_model, nnx.RngState, ...)


def _pass(
    graphdef: Any, static: tuple, rest: Any, statistics: Any, streams: Any, inputs: Any
) -> Any:
    model, arrays = nnx.merge(graphdef, statistics, streams, rest, copy=True)
    with told_of_whole_batches(inputs.args):
        outputs = model(*inputs.args, **inputs.kwargs, **arrays, **dict(static))
    _, statistics, streams, _ = _split(model, arrays)
    return fingerprint(outputs), as_pure(statistics), as_pure(streams)
