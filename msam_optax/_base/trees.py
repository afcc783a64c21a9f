"""Trees compared with one another, and parameters that must be there."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def check_params(why: str, params: Any) -> None:
    """Raises ValueError if the parameters are missing; `why` says what needs them."""
    if params is None:
        raise ValueError(
            f"{why}, but params were None: call update(updates, state, params)."
        )


def check_state(state: Any, kind: type) -> None:
    """Raises ValueError unless what was given as state is one of its kind."""
    if not isinstance(state, kind):
        raise ValueError(
            f"update(updates, state, params) needs the {kind.__name__} that init "
            f"returned, but got a {type(state).__name__} as state: were state and "
            "params swapped? A state from a checkpoint must be restored into that of "
            "optimizer.init(params)."
        )


def check_init(params: Any) -> None:
    """Raises ValueError where an optimizer or its state was given as parameters."""
    if _holds_state(params):
        raise ValueError(
            "init(params) needs the parameters alone, but an optimizer, its state or a "
            f"train state was given, or stands inside the {type(params).__name__}."
        )


def is_of_an_optimizer(node: Any) -> bool:
    """Whether a node is an optimizer or one of its states, and no parameters."""
    kind = type(node)
    theirs = kind.__module__.startswith(("optax.", "msam_optax."))
    state = theirs and hasattr(kind, "_fields") and kind.__name__.endswith("State")
    return state or isinstance(node, optax.GradientTransformation)


def _holds_state(tree: Any) -> bool:
    if is_of_an_optimizer(tree):
        return True
    children = jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)
    return any(_holds_state(child) for child in children if child is not tree)


def check_alive(name: str, tree: Any) -> None:
    """Raises ValueError if an array's memory was handed on to a training step."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        if array and leaf.is_deleted():
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} was given to a training step, "
                "which took over its memory. Take what the step returned, or keep the "
                "old by make_train_step(..., donate=False)."
            )


def is_masked(x: Any) -> bool:
    """Whether a node stands for a parameter that is masked out."""
    return isinstance(x, optax.MaskedNode)


def shapes_like(tree: Any) -> Any:
    """The leaves' shapes and dtypes, in their structure.

    They stand for the leaves where trees are compared: JAX's error on trees of
    different structure prints their arrays, which copies them from the device.
    """
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree
    )


def is_like(
    tree: Any, shapes: Any, *, masked: bool = False, dtypes: bool = False
) -> bool:
    """Whether a tree is another one in structure and shapes.

    Args:
      tree: any tree.
      shapes: `shapes_like` of the other one.
      masked: let pass what the tree masks out.
      dtypes: compare them too.
    """

    def matches(leaf: Any, other: Any) -> bool:
        if is_masked(leaf):
            return masked or is_masked(other)
        return (
            jax.tree_util.all_leaves([other])
            and jnp.shape(leaf) == other.shape
            and not (dtypes and jnp.result_type(leaf) != other.dtype)
        )

    try:
        same = jax.tree.map(matches, tree, shapes, is_leaf=is_masked)
    except (TypeError, ValueError):  # the trees' structures differ
        return False
    return jax.tree.all(same)


def check_like(
    needs: str, tree: Any, other: Any, *, dtypes: bool, hint: str = ""
) -> None:
    """Raises ValueError unless a tree is another one in structure and shapes.

    Args:
      needs: the sentence that says so, without its full stop.
      tree: what was given.
      other: what it must be like.
      dtypes: compare them too.
      hint: a further sentence.
    """
    if not is_like(tree, shapes_like(other), dtypes=dtypes):
        raise ValueError(f"{needs}, but {_difference(tree, other)}.{hint}")


def described(tree: Any) -> dict[str, str]:
    """Each leaf's path with its dtype and shape."""
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
        for path, leaf in leaves
    }


def _difference(tree: Any, other: Any) -> str:
    """How a tree differs from what it must be like; the first few leaves of it."""
    given, needed = described(tree), described(other)
    pairs = [
        (path, given.get(path), needed.get(path))
        for path in {**needed, **given}
        if given.get(path) != needed.get(path)
    ]
    if not pairs:
        structures = jax.tree.structure(tree), jax.tree.structure(other)
        return "it is a {} where a {} is needed".format(*structures)
    shown = [
        f"{has or 'nothing'} at {path or 'its root'} where {should or 'nothing'} is"
        for path, has, should in pairs[:3]
    ]
    more = f" (and {len(pairs) - 3} more)" if len(pairs) > 3 else ""
    return f"it has {', '.join(shown)} needed{more}"
