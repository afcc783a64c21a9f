"""The loss's gradient at a second point, from what the caller of `update` hands in."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.trees import check_like, is_like, is_masked, shapes_like

# at(params) -> (loss or None, gradient)
At = Callable[[optax.Params], tuple[Any, optax.Updates]]

TAKEN_AT = "A sharpness-aware gradient is taken at params + epsilon"

# By which argument a caller may give the gradient; the first that is there serves.
_SOURCES = ("value_and_grad_fn", "grad_fn", "value_fn")


def second_gradient(
    updates: optax.Updates, params: optax.Params, extra_args: dict[str, Any]
) -> At:
    """The loss and its gradient as a function of the parameters.

    Args:
      updates: what came in, the clean gradient.
      params: where it was taken; a wrapper may have masked some of them out, here and
        in the updates.
      extra_args: ``grad_fn(params) -> gradient``, ``value_fn(params) -> loss`` or
        ``value_and_grad_fn(params) -> (loss, gradient)``; ``all_params``, in which what
        is masked out is found; ``clean_grad``, the clean gradient as its maker has it.

    Returns:
      A function of parameters like ``params``. The loss is None where only ``grad_fn``
      is there.

    Raises:
      ValueError: if nothing gives a gradient or what does is not as it should be, the
        updates are not the clean gradient, or hidden parameters are not to be had.
    """
    name = next((name for name in _SOURCES if extra_args.get(name) is not None), None)
    if name is None or not callable(extra_args[name]):
        raise ValueError(_missing(name, extra_args.get(name or "")))
    keywords = _keywords(extra_args[name], extra_args) if name == "value_fn" else {}
    _check_signature(name, extra_args[name], keywords)
    check_clean(updates, extra_args)
    whole = whole_params(params, extra_args)

    def function(point: Any) -> Any:
        return extra_args[name](point, **keywords)

    def at(params: Any) -> Any:
        point = whole(params)
        if name == "grad_fn":
            value, gradient = None, function(point)
        elif name == "value_fn":
            value, gradient = jax.value_and_grad(lambda p: _scalar(function(p)))(point)
        else:
            value, gradient = _pair(function(point))
        needs = f"{name} must return a gradient like the updates"
        if point is not params:
            check_like(needs, gradient, point, dtypes=False)
            gradient = jax.tree.map(
                lambda shown, g: shown if is_masked(shown) else g,
                params,
                gradient,
                is_leaf=is_masked,
            )
        hint = _hint(gradient, updates)
        check_like(needs, gradient, updates, dtypes=True, hint=hint)
        return value, gradient

    return at


def whole_params(
    params: optax.Params, extra_args: dict[str, Any]
) -> Callable[[optax.Params], optax.Params]:
    """What fills into such parameters those that a wrapper masked out.

    The loss is a function of all parameters, while `optax.masked` and `partition` hand
    on a part. A loss that sums over leaves would take the part for the whole.
    """
    everything = extra_args.get("all_params")
    if not any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        if everything is not None and not is_like(params, shapes_like(everything)):
            raise ValueError(
                "The parameters arrive in another form than they have, and the loss "
                "can't be asked for them: optax.flatten, split_real_and_imaginary or "
                "lookahead stands around. Put it inside, "
                "sam(optax.flatten(optimizer)), if it can be."
            )
        return lambda params: params
    if everything is None:
        raise ValueError(
            "Some parameters are masked out here (optax.masked, partition or "
            "selective_transform stands around), but the loss is a function of all: "
            "give them to update, update(updates, state, params, grad_fn=grad_fn, "
            "all_params=params), as make_train_step does. To perturb some of the "
            "parameters and train all, give the mask to the ascent instead."
        )
    if not is_like(params, shapes_like(everything), masked=True):
        raise ValueError(
            "all_params must be the parameters as they were given to update, but those "
            "that are not masked out differ from them in structure or shapes."
        )

    def fill(params: Any) -> Any:
        return jax.tree.map(
            lambda shown, all_: all_ if is_masked(shown) else shown,
            params,
            everything,
            is_leaf=is_masked,
        )

    return fill


def check_clean(updates: optax.Updates, extra_args: dict[str, Any]) -> None:
    """Raises ValueError unless the updates are the clean gradient, array by array.

    This can be asked where the maker of the gradient hands it in as ``clean_grad``
    too. A transformation before this one makes arrays of its own.
    """
    clean = extra_args.get("clean_grad")
    if clean is None:
        return
    try:
        same = jax.tree.map(
            lambda u, g: is_masked(u) or u is g, updates, clean, is_leaf=is_masked
        )
    except (TypeError, ValueError):  # the trees' structures differ
        same = False
    if not jax.tree.all(same):
        raise ValueError(
            "A sharpness-aware gradient replaces the gradient, but what came in is no "
            "longer the clean one: something stands before it in the chain or "
            "accumulates around it, and would steer the ascent and then be lost from "
            "the step. Put it behind, sam(optax.chain(optax.clip_by_global_norm(1.0), "
            "optax.sgd(0.1))) or optax.chain(sharpness_aware_gradient(ascent), "
            "optax.MultiSteps(optimizer, k).gradient_transformation()); what is to "
            "steer the ascent alone goes into a chain with it."
        )


def for_the_ascent(extra_args: dict[str, Any]) -> dict[str, Any]:
    """The extra arguments that an ascent receives."""
    own = (*_SOURCES, "clean_grad", "all_params")
    return {name: value for name, value in extra_args.items() if name not in own}


def _missing(name: str | None, given: Any) -> str:
    return (
        f"A sharpness-aware gradient needs the keyword {name or 'grad_fn'}, a function "
        f"of the parameters, but got a {type(given if name else None).__name__}: call "
        "update(updates, state, params, grad_fn=jax.grad(loss)) with the loss of the "
        "same batch and random key. make_train_step does it by itself. Flax's own "
        "TrainState.apply_gradients and nnx.Optimizer.update do not: use "
        "msam_optax.flax.linen.LinenTrainState and msam_optax.flax.nnx.nnx_update. Nor "
        "do wrappers that hand no extra arguments on, optax.lookahead for one. A loop "
        "that is not yours may give value_fn, a function from params to the loss."
    )


def _keywords(function: Any, extra_args: dict[str, Any]) -> dict[str, Any]:
    """What a value_fn takes beside the parameters, as Optax's line searches give it."""
    try:
        parameters = [*inspect.signature(function).parameters][1:]
    except (TypeError, ValueError):  # it tells nothing about itself
        return {}
    return {name: extra_args[name] for name in parameters if name in extra_args}


def _check_signature(name: str, function: Any, keywords: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, **keywords)
    except TypeError as error:
        raise ValueError(
            f"{name} is called with the parameters alone, but it takes {signature}: "
            f"give {name}=lambda params: ... with batch and key inside. (The second "
            "argument that optax.contrib.sam hands to its grad_fn is not needed here.)"
        ) from error


def _scalar(value: Any) -> Any:
    if isinstance(value, tuple) or jnp.shape(value) != ():
        raise ValueError(
            "value_fn must return the loss, one number without auxiliary outputs, but "
            f"it returned {jax.tree.map(jnp.shape, value)!r} (in shapes)."
        )
    return value


def _pair(result: Any) -> tuple[Any, Any]:
    pair = isinstance(result, tuple) and len(result) == 2
    if not pair or isinstance(result[0], tuple) or jnp.shape(result[0]) != ():
        raise ValueError(
            "value_and_grad_fn must return (loss, gradient), the loss one number "
            "without auxiliary outputs, but it returned "
            f"{jax.tree.map(jnp.shape, result)!r} (in shapes)."
        )
    return result


def _hint(gradient: Any, updates: Any) -> str:
    if isinstance(gradient, tuple) and not isinstance(updates, tuple):
        return (
            " It returned a tuple: did you pass jax.value_and_grad, or a gradient with "
            "has_aux=True? Return the gradient alone."
        )
    if isinstance(gradient, jax.Array) and gradient.ndim == 0:
        return " It returned a scalar: did you pass the loss and not jax.grad(loss)?"
    return ""
