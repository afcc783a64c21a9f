"""An ascent for some of the parameters, and where `optax.masked` may not stand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax._base.hyperparams import check_transformation
from msam_optax._base.trees import is_masked


def restrict(
    ascent: optax.GradientTransformation, mask: Any
) -> optax.GradientTransformationExtraArgs:
    r"""An ascent over some of the parameters; the others are not perturbed.

    The ascent sees the parameters of the mask alone: a radius over all parameters
    together is one over these. Elsewhere :math:`\varepsilon = 0`, where
    ``optax.masked`` would hand the direction through.

    *Cost*: the ascent's. *State*: the ascent's, for these parameters. *Position*: where
    the ascent would stand, also before others in a chain.

    Args:
      ascent: for the parameters of the mask.
      mask: tree of booleans like the parameters (or a prefix), or a function of the
        parameters (in ``update``, of the direction) that returns one: true for those
        that are perturbed.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if ascent is no transformation, or the mask holds something else than
        booleans.

    >>> import jax, jax.numpy as jnp, msam_optax
    >>> ascent = msam_optax.ascents.restrict(  # biases and scales alone
    ...     msam_optax.ascents.normalized(rho=0.5),
    ...     lambda params: jax.tree.map(lambda w: w.ndim < 2, params),
    ... )
    >>> direction = {"w": jnp.ones((1, 2)), "b": jnp.array([3.0, 4.0])}
    >>> epsilon, _ = ascent.update(direction, ascent.init(direction))
    >>> print(epsilon["w"], epsilon["b"])
    [[0. 0.]] [0.3 0.4]
    """
    ascent = check_transformation("ascent", ascent)

    def hidden(tree: Any, like: Any) -> Any:
        """The tree without what the mask leaves out; None where there is no tree."""
        if tree is None:
            return None
        chosen = mask(like) if callable(mask) else mask
        _check_mask(chosen)
        return jax.tree.map(
            lambda is_chosen, part: part if is_chosen else optax.MaskedNode(),
            chosen,
            tree,
        )

    def init_fn(params: Any) -> Any:
        return ascent.init(hidden(params, params))

    def update_fn(
        direction: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        epsilon, state = ascent.update(
            hidden(direction, direction),
            state,
            hidden(params, direction),
            **extra_args,
        )
        shown = jax.tree.map(
            lambda e, g: jax.tree.map(jnp.zeros_like, g) if is_masked(e) else e,
            epsilon,
            direction,
            is_leaf=is_masked,
        )
        return shown, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_masked(state: Any) -> None:
    """Raises ValueError where an `optax.masked` stands before another ascent.

    What it masks out it hands through as it came, the direction itself. Behind another
    element that is taken for a perturbation.
    """
    if isinstance(state, optax.MaskedState):
        check_masked(state.inner_state)
    parts = _chained(state)
    while parts and _is_all_masked(parts[-1]):
        parts.pop()
    if any(map(_holds_masked, parts[:-1])):
        raise ValueError(
            "In the chain of an ascent, optax.masked stands before another element, "
            "which would take the direction that is masked out for a perturbation: use "
            "ascents.restrict(ascent, mask), which gives zeros there, or put "
            "optax.masked last."
        )
    for part in parts:
        check_masked(part)


def _chained(state: Any) -> list[Any]:
    """The states of the elements of a chain, of a named one too, or else none."""
    if isinstance(state, dict):
        return list(state.values())
    return list(state) if type(state) is tuple else []


def _holds_masked(state: Any) -> bool:
    # In chains alone: `optax.partition`, for one, masks nothing out.
    is_masked_state = isinstance(state, optax.MaskedState)
    return is_masked_state or any(map(_holds_masked, _chained(state)))


def _is_all_masked(state: Any) -> bool:
    parts = _chained(state)
    return isinstance(state, optax.MaskedState) or (
        bool(parts) and all(map(_is_all_masked, parts))
    )


def _check_mask(mask: Any) -> None:
    leaves = [((), None)] if mask is None else jax.tree.leaves_with_path(mask)
    for path, leaf in leaves:
        if not isinstance(leaf, bool | np.bool_):
            raise ValueError(
                "mask must be a tree of booleans like the parameters, or a function of "
                "the parameters that returns one, but "
                f"{leaf!r} stands at {jax.tree_util.keystr(path) or 'its root'}."
            )
