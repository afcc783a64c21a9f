"""What a module is called with."""

from typing import Any

import jax


@jax.tree_util.register_pytree_node_class
class Inputs:
    """What a module is called with, where that is more than one positional argument.

    In the place of the one input, wherever this package calls a module:
    ``model(*args, **kwargs)``. All of it is arrays, or trees of arrays; what is not, as
    ``train=True``, goes to the keywords of the function that takes the inputs.

    >>> import jax.numpy as jnp
    >>> from msam_optax.flax.linen import Inputs
    >>> inputs = Inputs(jnp.ones((8, 3)), mask=jnp.ones(8))
    >>> inputs.kwargs["mask"].shape
    (8,)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, inputs: Any) -> "Inputs":
        """The inputs, of a module's only positional argument if they are not yet."""
        return inputs if isinstance(inputs, cls) else cls(inputs)

    def tree_flatten(self) -> tuple[Any, None]:
        return (self.args, self.kwargs), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Inputs":
        args, kwargs = children
        return cls(*args, **kwargs)
