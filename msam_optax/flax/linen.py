"""Flax Linen: modules in `make_train_step`, and a TrainState for steps of your own.

Extra: ``pip install msam_optax[flax]``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msam_optax._base.versions import require as _require

_require("flax", extra="flax")

import flax.linen as nn
import jax
import optax
from flax.core import DenyList

from msam_optax._base.hyperparams import check_transformation
from msam_optax.flax._arguments import (
    check_collections,
    check_function,
    check_module,
)
from msam_optax.flax._inputs import Inputs
from msam_optax.flax._linen_statistics import recalibrate_batch_stats
from msam_optax.flax._linen_train_state import LinenTrainState
from msam_optax.training._gradients import LossFn, loss_and_aux
from msam_optax.training._state import TrainState

__all__ = [
    "Inputs",
    "LinenTrainState",
    "init_linen",
    "linen_loss",
    "recalibrate_batch_stats",
]


def _first(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        raise ValueError(
            f"the batch is a dict of {', '.join(map(repr, batch))}; linen_loss needs "
            "to know what the module is called with, for instance inputs=lambda batch: "
            'batch["image"]'
        )
    return batch[0]


def linen_loss(
    model: nn.Module,
    loss: Callable[..., tuple[jax.Array, Any]],
    *,
    inputs: Callable[[Any], Any] = _first,
    rngs: Sequence[str] = ("dropout",),
    sown: Sequence[str] = (),
    **apply_kwargs: Any,
) -> LossFn:
    """The loss function of a Linen module, for :func:`msam_optax.make_train_step`.

    Mutable collections (batch statistics) are the train state's ``model_state``; the
    step keeps those of the clean pass. All random streams are drawn from the step's
    key, so both passes drop the same units.

    Args:
      model: a Linen module.
      loss: ``loss(outputs, batch) -> (loss, aux)``; the loss is a scalar, or one loss
        for each example.
      inputs: what of the batch the module is called with; its first element by
        default. A batch that is a dict needs it, and a module of several inputs:
        ``inputs=lambda batch: Inputs(batch["x"], mask=batch["mask"])``.
      rngs: names of the module's random streams.
      sown: names of collections that the module sows. They are written anew by each
        pass, not carried on, and handed to ``loss(outputs, batch, sown)`` as a dict of
        collections, so that a sown loss can be added.
      **apply_kwargs: passed to the module, for instance ``train=True``.

    Returns:
      ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, aux))``.

    Raises:
      ValueError: if the model is no Linen module; by ``loss_fn``, if the batch is a
        dict and ``inputs`` is not given, a collection of ``model_state`` is sown, or it
        holds the parameters.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, msam_optax, optax
    >>> from msam_optax.flax.linen import init_linen, linen_loss
    >>> def loss(outputs, batch):
    ...     return jnp.mean((outputs - batch[1]) ** 2), {}
    >>> model, tx = nn.Dense(1), msam_optax.msam(0.1, rho=0.3)
    >>> batch = (jnp.ones((8, 3)), jnp.zeros((8, 1)))
    >>> state = init_linen(model, tx, jax.random.key(0), batch[0])
    >>> step = msam_optax.make_train_step(linen_loss(model, loss), tx)
    >>> state, metrics = step(state, batch, jax.random.key(1))
    """
    check_module("linen_loss(model, loss)", model, nn.Module)
    check_function("linen_loss(model, loss)", "loss", loss)
    if isinstance(sown, str) or isinstance(rngs, str):
        raise ValueError(
            "rngs and sown must be sequences of names, for instance "
            f'sown=("losses",), but rngs={rngs!r} and sown={sown!r} were given.'
        )

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        collections = model_state or {}  # there may be none
        check_collections("linen_loss(model, loss)", collections)
        if in_both := set(sown) & set(collections):
            raise ValueError(_SOWN.format(", ".join(sorted(in_both))))
        streams = (
            {}
            if key is None
            else dict(zip(rngs, jax.random.split(key, len(rngs)), strict=True))
        )
        called_with, mutable = Inputs.of(inputs(batch)), [*collections, *sown]
        outputs = model.apply(
            {"params": params, **collections},
            *called_with.args,
            rngs=streams,
            mutable=mutable or False,
            **called_with.kwargs,
            **apply_kwargs,
        )
        new: Any = {}
        if mutable:
            outputs, new = outputs
        given = [{name: new.get(name, {}) for name in sown}] if sown else []
        value, aux = loss_and_aux(loss(outputs, batch, *given))
        if collections:
            model_state = _carried_on(model_state, new)
        return value, (model_state, aux)

    return loss_fn


_SOWN = (
    "The collection {} of model_state is sown: each pass writes it anew, and it is no "
    "state that goes on from step to step. Leave it out of model_state, as init_linen "
    'does; linen_loss(model, loss, sown=("losses",)) hands what was sown into "losses" '
    "to loss(outputs, batch, sown)."
)


def _carried_on(old: Any, new: Mapping[str, Any]) -> Any:
    """The new collections, in the old ones' structure."""
    for name, collection in old.items():
        paths = [
            [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(x)]
            for x in (collection, new.get(name, collection))
        ]
        if paths[0] == paths[1]:
            continue
        changed = ", ".join(sorted(set(paths[0]) ^ set(paths[1])))
        raise ValueError(
            f"A pass changed which arrays the collection {name} of model_state holds: "
            f"{changed}. If the module makes them only as it is called here, "
            "initialise it in the same way. Else: " + _SOWN.format(name)
        )
    leaves = jax.tree.leaves({name: new.get(name, x) for name, x in old.items()})
    return jax.tree.unflatten(jax.tree.structure(old), leaves)


def init_linen(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    inputs: Any,
    **apply_kwargs: Any,
) -> TrainState:
    """Initialises a Linen module and its optimizer.

    Args:
      model: a Linen module.
      optimizer: any Optax optimizer.
      key: random key of the initial parameters, and of all random streams.
      inputs: an example of what the module is called with; an
        :class:`msam_optax.flax.linen.Inputs` if that is more than one argument.
      **apply_kwargs: passed to the module, for instance ``train=False``.

    Returns:
      A :class:`msam_optax.TrainState` whose ``model_state`` is the dict of all
      collections other than the parameters, without those that are sown.

    Raises:
      ValueError: if ``model`` or ``optimizer`` is none.
    """
    check_module("init_linen(model, optimizer, key, inputs)", model, nn.Module)
    check_transformation("optimizer", optimizer)
    example = Inputs.of(inputs)

    def variables_but(*names: str) -> Any:
        return model.init(
            key,
            *example.args,
            mutable=DenyList(("intermediates", *names)),
            **example.kwargs,
            **apply_kwargs,
        )

    def is_sown(name: str) -> bool:
        # To sow where that is forbidden does nothing; to make a variable there fails.
        try:
            jax.eval_shape(lambda: variables_but(name))
        except Exception:  # it has just succeeded with the collection
            return False
        return True

    variables = dict(variables_but())
    params = variables.pop("params", {})
    carried_on = {name: x for name, x in variables.items() if not is_sown(name)}
    return TrainState(params, optimizer.init(params), carried_on)
