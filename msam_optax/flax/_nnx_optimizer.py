"""An `nnx.Optimizer` whose transformation gets more than its `update` hands on."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import optax
from flax import nnx


def check_optimizer(optimizer: Any) -> None:
    """TypeError for what is no `nnx.Optimizer`."""
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            f"the second argument is a {type(optimizer).__name__}; it must be the "
            "module's nnx.Optimizer(model, tx, wrt=nnx.Param), after the module itself"
        )


@contextlib.contextmanager
def handing_on(optimizer: nnx.Optimizer, **given: Any) -> Iterator[None]:
    """The optimizer's transformation gets `given`, whatever `update` calls it with."""
    own = optimizer.tx
    tx = optax.with_extra_args_support(own)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return tx.update(updates, state, params, **{**given, **extra_args})

    optimizer.tx = optax.GradientTransformationExtraArgs(tx.init, update)
    try:
        yield
    finally:
        optimizer.tx = own


def call_update(optimizer: nnx.Optimizer, model: nnx.Module, grads: Any) -> None:
    """`optimizer.update` with as much as it takes: a subclass may hold the model."""
    signature = inspect.signature(optimizer.update)
    for args, kwargs in ((model, grads), {}), ((grads,), {}), ((), {"grads": grads}):
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            continue
        optimizer.update(*args, **kwargs)
        return
    raise TypeError(
        f"nnx_update calls optimizer.update(model, grads) or optimizer.update(grads), "
        f"but that of {type(optimizer).__name__} takes {signature}: give what it takes "
        "besides a default."
    )
