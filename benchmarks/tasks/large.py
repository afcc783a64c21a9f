"""Training at the size of an accelerator: a run is a few programs, each of many steps.

An accelerator waits for the host between two small steps; between two of these programs
it does not matter. On a CPU convolutions do not belong into such a program: their
gradients in a loop are many times slower there.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import msam_optax
from benchmarks.tasks import data, optimizers, problems, runs, training
from benchmarks.tasks.augmentation import crop_and_flip
from benchmarks.tasks.losses import classified
from benchmarks.tasks.search import Hyperparameters
from msam_optax.flax.linen import init_linen, linen_loss

# Learning rate, rho and weight decay on images: SGD's, SAM's and MSAM's are those that
# the paper of MSAM (arXiv 2401.12033) found for WRN-16-4 on CIFAR-100 in batches of
# 256; AE-SAM and LookSAM take over SAM's. They were not tuned here.
IMAGES = {
    "sgd": Hyperparameters(0.5, None, 5e-4),
    "nag": Hyperparameters(0.5, None, 5e-4),
    "msam": Hyperparameters(0.5, 3.0, 5e-4),
    "sam": Hyperparameters(0.5, 0.3, 5e-4),
    "ae_sam": Hyperparameters(0.5, 0.3, 5e-4),
    "looksam": Hyperparameters(0.5, 0.3, 5e-4),
}
# On characters, around AdamW: the usual learning rate of a transformer of this size,
# the decay that the study of the small one chose, and radii around those of the study.
# Each is run, and the loss on the validation part chooses.
_ADAMW = Hyperparameters(1e-3, None, 0.1)
CHARACTERS = {
    "adamw": [_ADAMW],
    "adamw_msam": [_ADAMW._replace(rho=rho) for rho in (0.1, 0.3, 1.0)],
    "sam": [_ADAMW._replace(rho=rho) for rho in (0.03, 0.1, 0.3)],
    "ae_sam": [_ADAMW._replace(rho=rho) for rho in (0.03, 0.1, 0.3)],
}

# Of the training part, for its accuracy
_SEEN = 10_000

# scores(state, inputs): what is told of a run on its way and at its end
Scores = Callable[[msam_optax.TrainState, runs.Inputs], dict[str, float]]


class Large(NamedTuple):
    """What is trained.

    Attributes:
      init: ``init(optimizer, key, train) -> TrainState``.
      loss_fn: as `make_train_step` takes it.
      gather: ``gather(train, indices, key) -> batch``.
      inputs: ``inputs(seed) -> Inputs`` on the host.
      scores: of a state, at its unperturbed weights.
      total_steps: of a run.
    """

    init: Callable[..., msam_optax.TrainState]
    loss_fn: Callable[..., Any]
    gather: Callable[..., Any]
    inputs: Callable[[int], runs.Inputs]
    scores: Scores
    total_steps: int


class Stop(NamedTuple):
    """Where a run stands.

    Attributes:
      share: of the run that is done.
      loss: of the last step's batch.
      sam_fraction: share of the steps so far that took a second gradient.
      seconds: of the training so far, compiling included.
      scores: as `Large.scores` has them.
    """

    share: float
    loss: float
    sam_fraction: float
    seconds: float
    scores: dict[str, float]


class Runner:
    """Trains by one method, compiled once for all settings, seeds and label noises."""

    def __init__(self, large: Large, build: optimizers.Build) -> None:
        self._large, self._build = large, build
        self._init = jax.jit(self._first)
        self._advance = jax.jit(self._some, donate_argnums=1)

    def stops(
        self, setting: Hyperparameters, inputs: runs.Inputs, stops: int
    ) -> Iterator[Stop]:
        """Trains, and stops for a look, the last time at the end.

        Args:
          setting: learning rate, rho and weight decay.
          inputs: of a seed.
          stops: how often; it divides the number of steps.
        """
        total = len(inputs.order)
        values = runs.traced(setting)
        inputs = jax.device_put(inputs)
        # One length: another is another program.
        each = total // stops
        seconds = 0.0
        state = self._init(values, inputs)
        for start in range(0, stops * each, each):
            begin = time.perf_counter()
            steps = jnp.arange(start, start + each)
            state, loss, fraction = self._advance(values, state, inputs, steps)
            jax.block_until_ready(state)
            seconds += time.perf_counter() - begin
            yield Stop(
                (start + each) / (stops * each),
                float(loss),
                float(fraction),
                seconds,
                self._large.scores(state, inputs),
            )

    def _optimizer(self, values: Any, seed: Any) -> Any:
        rate, rho, decay = values
        total = self._large.total_steps
        return self._build(optimizers.Setting(rate, rho, decay, total, seed=seed))

    def _first(self, values: Any, inputs: Any) -> Any:
        key, _ = jax.random.split(jax.random.key(inputs.seed))
        optimizer = self._optimizer(values, inputs.seed)
        return self._large.init(optimizer, key, inputs.train)

    def _some(self, values: Any, state: Any, inputs: Any, steps: Any) -> Any:
        large = self._large
        _, key = jax.random.split(jax.random.key(inputs.seed))
        step = msam_optax.make_train_step(
            large.loss_fn,
            self._optimizer(values, inputs.seed),
            dispatch="in_graph",
            donate=False,
        )

        def body(state, number):
            step_key = jax.random.fold_in(key, number)
            gather_key, loss_key = jax.random.split(step_key)
            batch = large.gather(inputs.train, inputs.order[number], gather_key)
            state, metrics = step(state, batch, loss_key)
            return state, (metrics.loss, metrics.employed_fraction)

        state, (losses, fractions) = jax.lax.scan(body, state, steps)
        return state, losses[-1], fractions[-1]


def images(task: training.Task) -> Large:
    """Images, moved and mirrored at random, and a network that may have batch norm."""

    def init(optimizer: Any, key: Any, train: Any) -> msam_optax.TrainState:
        return init_linen(task.model, optimizer, key, train[0][:1], train=False)

    def gather(train: Any, indices: Any, key: Any) -> Any:
        return crop_and_flip(train[0][indices], key), train[1][indices]

    def inputs(seed: int) -> runs.Inputs:
        rng = np.random.default_rng([seed, 1])
        count, size = len(task.clean_labels), task.batch_size
        order = [list(data.batches(count, size, rng)) for _ in range(task.epochs)]
        return runs.Inputs(
            seed=np.int32(seed),
            order=np.concatenate(order).astype(np.int32),
            train=(task.train_images, task.labels(seed)),
            held_out=(task.test_images, task.test_labels),
        )

    def scores(state: msam_optax.TrainState, inputs: runs.Inputs) -> dict[str, float]:
        weights = task.weights(state)
        evaluate = partial(training.evaluate, task.model, weights)
        shown, labels = inputs.train
        return {
            "test_accuracy": evaluate(*inputs.held_out).accuracy,
            # On the labels trained on, wrong ones included
            "train_accuracy": evaluate(shown[:_SEEN], labels[:_SEEN]).accuracy,
        }

    loss_fn = linen_loss(task.model, classified, train=True)
    return Large(init, loss_fn, gather, inputs, scores, task.total_steps)


def characters(**size: int) -> Large:
    """The next character, by a transformer; the loss is in nats a character.

    Args:
      **size: as `problems.characters` takes it.
    """
    problem = problems.characters(**size)
    tests = problem.inputs(0, False).held_out

    @jax.jit
    def losses(state: Any, validation: Any) -> Any:
        params = msam_optax.eval_params(state.opt_state, state.params)
        return [problem.evaluate(params, part)[1] for part in (validation, tests)]

    def scores(state: msam_optax.TrainState, inputs: runs.Inputs) -> dict[str, float]:
        validation, test = map(float, losses(state, inputs.held_out))
        return {"validation_loss": validation, "test_loss": test}

    return Large(
        problem.init,
        problem.loss_fn,
        problem.gather,
        lambda seed: problem.inputs(seed, True),
        scores,
        problem.total_steps,
    )
