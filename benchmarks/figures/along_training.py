"""Measures of single steps, averaged over each epoch of a run."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msam_optax
from benchmarks.figures import common
from benchmarks.tasks import training


class Moment(NamedTuple):
    """What a step is about to be taken from.

    Attributes:
      weights: the unperturbed parameters w.
      params: those in use: the perturbed ones with MSAM, otherwise the weights.
      momentum: v of all steps before.
      loss: ``loss(params)``, of the step's batch.
      gradient: ``gradient(params)`` of that loss.
    """

    weights: Any
    params: Any
    momentum: Any
    loss: Callable[[Any], jax.Array]
    gradient: Callable[[Any], Any]


Measure = Callable[[Moment], Mapping[str, Any]]


class Observer:
    """Looks at the steps of runs whose optimizer is momentum SGD inside."""

    def __init__(
        self,
        trainer: training.Trainer,
        measure: Measure,
        steps: Collection[int],
    ) -> None:
        def loss(params, model_state, batch, key):
            losses: Any = trainer.loss_fn(params, model_state, batch, key)[0]
            return jnp.mean(losses)

        self._trainer = trainer
        self._measure = measure
        self._steps = steps
        self._loss = jax.jit(loss)
        self._gradient = jax.jit(jax.grad(loss))

    def epochs(self, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Trains, and yields for each epoch the means of what was measured, if any."""
        count = itertools.count()
        found: list[Mapping[str, Any]] = []

        def before_step(state, batch, key):
            if next(count) in self._steps:
                found.append(self._measure(self._moment(state, batch, key)))

        for _ in self._trainer.epochs(seed, before_step):
            yield {
                name: np.mean([np.asarray(values[name]) for values in found], axis=0)
                for name in (found[0] if found else {})
            }
            found.clear()

    def _moment(
        self, state: msam_optax.TrainState, batch: Any, key: jax.Array
    ) -> Moment:
        of_step = {"model_state": state.model_state, "batch": batch, "key": key}
        return Moment(
            weights=msam_optax.eval_params(state.opt_state, state.params),
            params=state.params,
            momentum=common.momentum_of(state.opt_state),
            loss=partial(self._loss, **of_step),
            gradient=partial(self._gradient, **of_step),
        )


@jax.jit
def perturbed(weights: Any, direction: Any, rho: Any) -> Any:
    """w + rho direction / |direction|."""
    ascent = msam_optax.ascents.normalized(rho)
    epsilon, _ = ascent.update(direction, ascent.init(weights), weights)
    return optax.tree.add(weights, epsilon)


def measured(
    study: common.Study,
    measures: Mapping[str, Measure],
    looks: int,
    epochs: int | None = None,
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Trains by each method at its own setting, and measures on the way.

    Args:
      study: what is trained.
      measures: what is measured, by method.
      looks: steps of an epoch that are measured, evenly spaced.
      epochs: how many are measured, evenly spaced from the first to the last; all if
        None.

    Yields:
      For each seed, method and measured epoch the columns that say which it is, and
      the means of what was measured in it.
    """
    chosen = _epochs(study.task.epochs, epochs)
    steps = _steps(study.task.steps_per_epoch, looks, chosen)
    observers = {
        method: Observer(study.trainer(method), measure, steps)
        for method, measure in measures.items()
    }
    for columns, values in common.trained(study, observers):
        if columns["epoch"] in chosen:
            yield columns, values


def _epochs(total: int, count: int | None) -> set[int]:
    """Which epochs are measured, counted from 1."""
    return set(np.linspace(1, total, count or total).round().astype(int).tolist())


def _steps(steps_per_epoch: int, looks: int, epochs: Collection[int]) -> set[int]:
    """Which steps of a run are measured, counted from 0.

    Of an epoch of several steps the first is none: there the run has no momentum yet.
    """
    looks = max(1, min(looks, steps_per_epoch // 2))
    offsets = [int((i + 0.5) * steps_per_epoch / looks) for i in range(looks)]
    return {(epoch - 1) * steps_per_epoch + i for epoch in epochs for i in offsets}
