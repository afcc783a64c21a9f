"""Which branch of a step runs: chosen in the program, or by the host.

XLA for CPU runs the gradient of a convolution many times slower inside a ``cond``
than outside. There the host has to read the decision and run one of two programs:
before the gradient where the decision hangs on the optimizer's state alone, as every
k-th step's does, and else behind it.
Everywhere else a ``cond`` costs nothing, and the host's reading does.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
from jax.extend.core import Jaxpr, Var

from msam_optax.training._state import TrainState
from msam_optax.transforms._employ import EmployState
from msam_optax.transforms._find_momentum import find_states

try:
    from jax.extend.core import get_opaque_trace_state, subjaxprs
except ImportError:  # JAX 0.6
    from jax.core import get_opaque_trace_state, subjaxprs  # type: ignore


class Dispatch(NamedTuple):
    """How a step is dispatched.

    Attributes:
      where: "in_graph" or "host".
      reason: why, in words.
    """

    where: Literal["in_graph", "host"]
    reason: str


class Dispatcher:
    """Answers how a step is dispatched, by the cheapest question that settles it."""

    def __init__(
        self,
        asked: Literal["auto", "in_graph", "host"],
        gradient: Callable[[TrainState, Any, Any], Jaxpr],
        decision: Callable[[TrainState, Any, Any], Jaxpr],
    ) -> None:
        """Takes what the user asked for, and what traces a step's two parts."""
        self._asked = asked
        self._gradient = gradient
        self._decision = decision
        self._foreseen: dict[Any, bool] = {}
        self._places: int | None = None
        self._by_shapes: dict[Any, Dispatch] = {}

    def __call__(self, state: TrainState, batch: Any, key: Any) -> Dispatch:
        if self._asked == "in_graph":
            return Dispatch("in_graph", "as asked for")
        if self._places is None:
            self._places = len(find_states(state.opt_state, EmployState))
        if self._places == 0:
            return Dispatch("in_graph", "the optimizer employs nothing")
        if is_traced():
            self._refuse_host(
                "reads each decision on the host, but the step was called inside jit, "
                'scan or another transformation: use dispatch="in_graph".'
            )
            return Dispatch("in_graph", "the step is itself traced")
        if self._places > 1:
            self._refuse_host(
                "takes one decision a step, but the optimizer employs in "
                f'{self._places} places: use dispatch="in_graph", or one policy for '
                "all."
            )
            return Dispatch("in_graph", "the optimizer employs in several places")
        if self._asked == "host":
            return Dispatch("host", "as asked for")
        shapes = _shapes(batch)
        if shapes not in self._by_shapes:
            self._by_shapes[shapes] = self._by_program(state, batch, key)
        return self._by_shapes[shapes]

    def foreseen(self, state: TrainState, batch: Any, key: Any) -> bool:
        """Whether the decision hangs on the optimizer's state alone.

        As a coin's or every k-th step's does, on the number of the step. Not where the
        loss prints or calls back, for it would do so twice.
        """
        shapes = _shapes(batch)
        if shapes not in self._foreseen:
            jaxpr = self._decision(state, batch, key)
            arguments = jax.tree.structure((state, batch, key))
            used, *others = jax.tree.unflatten(arguments, inputs_used(jaxpr))
            elsewhere = jax.tree.leaves((used._replace(opt_state=()), others))
            self._foreseen[shapes] = not (jaxpr.effects or any(elsewhere))
        return self._foreseen[shapes]

    def forget(self) -> None:
        """Asks anew at the next step: what was asked about failed."""
        self._places = None
        self._by_shapes.clear()
        self._foreseen.clear()

    def _refuse_host(self, why: str) -> None:
        if self._asked == "host":
            raise ValueError(f'dispatch="host" {why}')

    def _by_program(self, state: TrainState, batch: Any, key: Any) -> Dispatch:
        if not _on_cpu(state.params):
            return Dispatch("in_graph", "the parameters are not on CPU")
        if not convolves(self._gradient(state, batch, key)):
            return Dispatch("in_graph", "on CPU, the loss holds no convolution")
        return Dispatch(
            "host", "on CPU a convolution's gradient is very slow inside a cond"
        )


def is_traced() -> bool:
    """Whether JAX is tracing, so that no value can be read.

    Asked of the trace: inside a `jit`, an `eval_shape` or a `vmap` that closes over
    them, all arguments of a step can be arrays with values.
    """
    return get_opaque_trace_state() != _untraced()


@cache
def _untraced() -> Any:
    """Asked once: leaving the trace and coming back slows down the next step's call."""
    with jax.core.eval_context():
        return get_opaque_trace_state()


def convolves(jaxpr: Jaxpr) -> bool:
    """Whether a convolution stands anywhere in a program, at whatever depth."""
    return any(
        equation.primitive.name == "conv_general_dilated" for equation in jaxpr.eqns
    ) or any(map(convolves, subjaxprs(jaxpr)))


def inputs_used(jaxpr: Jaxpr) -> list[bool]:
    """Which inputs of a program its outputs hang on, at most.

    Of a program that is called in it, each output is taken to hang on all inputs.
    """
    needed = {v for v in jaxpr.outvars if isinstance(v, Var)}
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed.update(v for v in equation.invars if isinstance(v, Var))
    return [v in needed for v in jaxpr.invars]


def _shapes(batch: Any) -> tuple[Any, ...]:
    """What tells when the loss is traced anew.

    The shapes of a model do not change between the steps of a training.
    """
    return tuple(getattr(x, "shape", ()) for x in jax.tree.leaves(batch))


def _on_cpu(tree: Any) -> bool:
    """Whether the first array is on CPU, or would be by default."""
    for leaf in jax.tree.leaves(tree):
        if getattr(leaf, "sharding", None) is not None:
            return next(iter(leaf.sharding.device_set)).platform == "cpu"
    return jax.default_backend() == "cpu"
