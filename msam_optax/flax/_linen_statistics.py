"""Batch statistics of Linen modules at given parameters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from msam_optax._base.trees import check_alive
from msam_optax.flax._arguments import check_collections, check_module
from msam_optax.flax._inputs import Inputs
from msam_optax.flax._recalibration import (
    check_batches,
    compiled_for,
    fingerprint,
    split_arguments,
    take_anew,
    told_of_whole_batches,
)


def recalibrate_batch_stats(
    model: nn.Module,
    params: Any,
    model_state: Any,
    batches: Iterable[Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    rngs: Sequence[str] = ("dropout",),
    **apply_kwargs: Any,
) -> Any:
    """Takes a Linen module's batch statistics anew, as an exact average.

    The means and variances of batch norm, which are known by their names and by how
    they move: each is the mean over the examples of that of their batch. All batches
    count alike, in the place of a running average's tail. As in training, the variance
    is that within the batches. What else is in ``batch_stats`` (the vectors of spectral
    norm, maxima, counters) goes on from batch to batch, as in training. A batch norm
    that is frozen keeps its statistics, and all other collections stay as they are.

    *Cost*: one forward pass a batch, and six more, of which one shape is compiled once.

    Args:
      model: a Linen module; its statistics are the collection ``batch_stats``.
      params: where the statistics are taken, :func:`msam_optax.eval_params` of a run.
      model_state: the module's collections other than the parameters.
      batches: the module's inputs without labels, batch by batch, in a list or an
        iterator.
      inputs: what of a batch the module is called with, where that is not the whole
        batch; see :class:`msam_optax.flax.linen.Inputs` for several inputs.
      rngs: names of the module's random streams.
      **apply_kwargs: passed to the module as in training, for instance ``train=True``.

    Returns:
      `model_state` with the new ``batch_stats``; as it is for a model without any.

    Raises:
      ValueError: if there are no batches, one batch was given in their place, the
        module, called so, takes no statistics or can't be called with a batch as it
        is, or what is named as a mean and a variance does not move as a batch norm's.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from msam_optax.flax.linen import recalibrate_batch_stats
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> inputs = jnp.array([[0.0], [2.0]])
    >>> state = model.init(jax.random.key(0), inputs)
    >>> params = state.pop("params")
    >>> state = recalibrate_batch_stats(model, params, state, [inputs, inputs + 1.0])
    >>> print(state["batch_stats"]["mean"], state["batch_stats"]["var"])
    [1.5] [1.]
    """
    call = "recalibrate_batch_stats(model, params, model_state, batches)"
    check_module(call, model, nn.Module)
    if isinstance(params, Mapping) and "batch_stats" in params:
        raise ValueError(
            f"{call} needs the parameters second, but what was given there holds "
            "batch_stats: were params and model_state swapped?"
        )
    check_collections(call, model_state or {})
    check_batches(batches)
    if not model_state or "batch_stats" not in model_state:
        return model_state
    check_alive("params", params)
    check_alive("model_state", model_state)
    arrays, static = split_arguments(apply_kwargs)
    variables = {**model_state, "params": params}
    old = variables.pop("batch_stats")
    step = compiled_for(_pass, model, tuple(rngs), static)
    new = take_anew(
        partial(step, variables, arrays),
        old,
        jnp.asarray(0),
        (Inputs.of(b if inputs is None else inputs(b)) for b in batches),
    )
    return {**model_state, "batch_stats": new}


def _pass(
    model: nn.Module,
    rngs: tuple[str, ...],
    static: tuple,
    variables: Any,
    arrays: dict[str, Any],
    statistics: Any,
    step: jax.Array,
    inputs: Inputs,
) -> Any:
    # Made here: JAX's checker takes a key that several passes are handed for reused.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), len(rngs))
    with told_of_whole_batches(inputs.args):
        outputs, updated = model.apply(
            {**variables, "batch_stats": statistics},
            *inputs.args,
            # Not only batch_stats: a module may write other collections as well.
            mutable=[*(set(variables) - {"params"}), "batch_stats"],
            rngs=dict(zip(rngs, keys, strict=True)),
            **inputs.kwargs,
            **arrays,
            **dict(static),
        )
    return fingerprint(outputs), updated["batch_stats"], step + 1
