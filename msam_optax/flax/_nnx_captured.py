"""NNX objects that a function was given along the way: in its closure, in a partial."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

# All of them are Pytrees since Flax 0.12, Objects before.
_OBJECTS = (getattr(nnx, "Pytree", nnx.Object), nnx.Variable)


def is_object(value: Any) -> bool:
    """Whether it is a module, a stream of random keys, a variable, ..."""
    return isinstance(value, _OBJECTS)


def objects_in(value: Any) -> list[Any]:
    """The NNX objects in trees and functions, each once.

    Functions are searched in their closures and defaults, partials in their arguments,
    methods in what they are bound to.
    """
    found: dict[int, Any] = {}

    def see(node: Any) -> Any:
        found.setdefault(id(node), node)
        return node

    _replaced(value, see, {})
    return list(found.values())


def with_objects(value: Any, old: Sequence[Any], new: Sequence[Any]) -> Any:
    """The trees and functions with other NNX objects in the place of the old ones."""
    places = {id(node): replacement for node, replacement in zip(old, new, strict=True)}
    return _replaced(value, lambda node: places.get(id(node), node), {})


def _replaced(value: Any, replace: Callable[[Any], Any], seen: dict[int, Any]) -> Any:
    """The value itself where nothing in it is replaced."""
    if is_object(value):
        return replace(value)
    if id(value) in seen:  # functions may close over themselves
        return seen[id(value)]

    def inside(part: Any) -> Any:
        return _replaced(part, replace, seen)

    if isinstance(value, functools.partial):
        parts: list[Any] = [value.func, value.args, value.keywords]
        func, args, keywords = new = [inside(part) for part in parts]
        if _same(new, parts):
            return value
        return functools.partial(func, *args, **keywords)
    if isinstance(value, types.MethodType):
        parts = [value.__func__, value.__self__]
        new = [inside(part) for part in parts]
        return value if _same(new, parts) else types.MethodType(*new)
    if isinstance(value, types.FunctionType):
        seen[id(value)] = value
        seen[id(value)] = _function(value, inside)
        return seen[id(value)]
    try:
        leaves, structure = jax.tree.flatten(value, is_leaf=is_object)
    except (TypeError, ValueError):  # a dict whose keys can't be sorted
        return value
    if jax.tree_util.treedef_is_leaf(structure):
        return value
    new = [inside(leaf) for leaf in leaves]
    return value if _same(new, leaves) else jax.tree.unflatten(structure, new)


def _function(
    function: types.FunctionType, inside: Callable[[Any], Any]
) -> types.FunctionType:
    cells = function.__closure__ or ()
    parts = [_content(cell) for cell in cells]
    new = [inside(part) for part in parts]
    defaults = inside(function.__defaults__)
    keywords = inside(function.__kwdefaults__)
    if _same(
        [*new, defaults, keywords],
        [*parts, function.__defaults__, function.__kwdefaults__],
    ):
        return function
    closure = tuple(
        cell if now is before else types.CellType(now)
        for cell, now, before in zip(cells, new, parts, strict=True)
    )
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults, closure
    )
    made.__kwdefaults__ = keywords
    return made


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that is not bound yet
        return None


def _same(new: Sequence[Any], old: Sequence[Any]) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))
