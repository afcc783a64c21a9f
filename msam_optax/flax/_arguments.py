"""Arguments in each other's place."""

from collections.abc import Mapping
from typing import Any


def check_module(call: str, module: Any, kind: type) -> None:
    """ValueError unless the module of a call is one of its framework's.

    Args:
      call: how the function is called, ``linen_loss(model, loss)``.
      module: what was given as the model.
      kind: ``nn.Module`` or ``nnx.Module``.
    """
    if not isinstance(module, kind):
        known = f"{kind.__module__.partition('.')[0]}'s {_name(kind)}"
        raise ValueError(
            f"{call} needs a module of {known} as model, but a "
            f"{type(module).__module__}.{type(module).__name__} was given there."
        )


def check_function(call: str, name: str, function: Any) -> None:
    """ValueError unless an argument is a function."""
    if not callable(function):
        raise ValueError(
            f"{call} needs a function as {name}, but a {type(function).__name__} was "
            "given there."
        )


def check_collections(call: str, model_state: Mapping[str, Any]) -> None:
    """Raises ValueError where the parameters stand among the other collections."""
    if "params" in model_state:
        raise ValueError(
            f"{call} needs a model_state of the collections other than the parameters, "
            'but it holds "params", which would stand in the place of those that are '
            "trained: take them out, variables = model.init(...); params = "
            'variables.pop("params").'
        )


def _name(kind: type) -> str:
    return "NNX" if ".nnx" in kind.__module__ else "Linen"
