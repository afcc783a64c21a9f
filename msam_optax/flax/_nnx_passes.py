"""A pass through an NNX module whose changes stay in a copy until they are wanted."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import jax
from flax import nnx

from msam_optax.flax._nnx_captured import with_objects
from msam_optax.flax._pure import as_pure
from msam_optax.training._gradients import loss_and_aux

# loss(model, batch, *others) -> (loss, aux)
NNXLoss = Callable[..., tuple[jax.Array, Any]]


class Graph(NamedTuple):
    """The NNX objects of a pass, the module first, and what they hold but arrays.

    Attributes:
      objects: the module, and what its loss uses besides.
      graphdef: their structure; what is shared stands there once.
      wrt: filter of the module's parameters.
    """

    objects: tuple[Any, ...]
    graphdef: Any
    wrt: Any


def split(
    model: nnx.Module, objects: Sequence[Any], wrt: Any
) -> tuple[Graph, nnx.State, nnx.State]:
    """The graph, the module's parameters, and all other arrays by path in the objects.

    What earlier passes have sown is taken out: it is no state that goes on.
    """
    whole = (model, *(x for x in objects if x is not model))
    _take_out_sown(whole)
    graphdef, params, rest = _split(whole, wrt)
    return Graph(whole, graphdef, wrt), params.get(0, nnx.State({})), as_pure(rest)


def run(
    graph: Graph, params: Any, rest: Any, loss: NNXLoss, batch: Any, others: Any
) -> tuple[Any, tuple[Any, nnx.State]]:
    """The loss at the parameters, aux, and what of the other arrays has changed.

    The pass runs on a copy, so that another one does not see what it changes.
    """
    copy = nnx.merge(graph.graphdef, of_the_first(params), rest, copy=True)
    before = dict(nnx.to_flat_state(as_pure(nnx.state(copy))))
    inside, batch, others = with_objects((loss, batch, others), graph.objects, copy)
    try:
        value, aux = loss_and_aux(inside(copy[0], batch, *others))
    except flax.errors.TraceContextError as error:
        raise ValueError(_UNKNOWN) from error
    _take_out_sown(copy)
    _, _, after = _split(copy, graph.wrt)
    flat = nnx.to_flat_state(as_pure(after))
    _check_places([path for path, _ in nnx.to_flat_state(rest)], [p for p, _ in flat])
    changed = [(path, x) for path, x in flat if x is not before[path]]
    return value, (aux, nnx.from_flat_state(changed))


def of_the_first(state: Any) -> nnx.State:
    """A state of the first object as one of all of them."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([((0, *path), x) for path, x in flat])


def write(graph: Graph, changed: nnx.State) -> None:
    """Writes what a pass has changed into the objects themselves."""
    try:
        nnx.update(graph.objects, changed)
    except flax.errors.TraceContextError as error:
        raise ValueError(_UNKNOWN) from error


_UNKNOWN = (
    "The loss changes an NNX object (random streams, a metric) that it was not handed "
    "over with. In a step of your own make it an argument of the jitted step, and of "
    "nnx_update(model, optimizer, loss, batch, rngs); for make_train_step hand it to "
    "nnx_loss(model, loss, rngs) and init_nnx(model, tx, rngs). All of them call "
    "loss(model, batch, rngs)."
)


def _split(whole: Any, wrt: Any) -> Any:
    """The structure, the parameters of the first object, and all else."""
    predicate = nnx.filterlib.to_predicate(wrt)
    return nnx.split(
        whole, lambda path, value: path[0] == 0 and predicate(path[1:], value), ...
    )


def _take_out_sown(whole: Sequence[Any]) -> None:
    """Sown values are of one pass: those of earlier ones would add up."""
    if jax.tree.leaves(nnx.state(whole, nnx.Intermediate)):
        nnx.pop(whole, nnx.Intermediate)


def _check_places(before: list[Any], after: list[Any]) -> None:
    changed = sorted(".".join(map(str, p[1:])) for p in set(before) ^ set(after))
    if changed:
        raise ValueError(
            "A pass added state to the module or took some away, which a training step "
            f"can't carry on: {', '.join(changed)}. What is sown must be an "
            "nnx.Intermediate (or of a class derived from it), or be popped by the "
            "loss: nnx.pop(model, MyLoss)."
        )
