"""A whole training run as one program, with hyper-parameters that are traced.

It is compiled once for a method, and `jax.vmap` makes a sweep of it: over radii, rates
or seeds, in one program. On a CPU that does not pay: for the MLP of 784-256-256-10 a
step costs 1.44 ms of one core alone and 1.88 ms for each of 16 at once, whose weights
no longer fit the cache. Under `vmap` a policy's step takes both gradients.

Convolutions do not belong into it: their gradients in a loop are many times slower on a
CPU. Written as matrix products they took twice the time of steps from the host, so that
a problem with convolutions is trained by those, with the same hyper-parameters as
arguments of the compiled step.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msam_optax
from benchmarks.tasks import optimizers


class Inputs(NamedTuple):
    """What differs from seed to seed.

    Attributes:
      seed: int32 scalar.
      order: int32[steps, batch], the examples of each step.
      train: what is trained on, as the problem's functions take it.
      held_out: what is evaluated, likewise.
    """

    seed: Any
    order: Any
    train: Any
    held_out: Any


class Problem(NamedTuple):
    """A model, and how it meets its data.

    Attributes:
      init: ``init(optimizer, key, train) -> TrainState``.
      loss_fn: as `make_train_step` takes it.
      gather: ``gather(train, indices, key) -> batch``.
      evaluate: ``evaluate(params, examples) -> (accuracy, loss)``.
      inputs: ``inputs(seed, validation) -> Inputs`` on the host.
      total_steps: of a run.
      from_host: whether each step is called from the host.
    """

    init: Callable[..., msam_optax.TrainState]
    loss_fn: Callable[..., Any]
    gather: Callable[..., Any]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]
    inputs: Callable[[int, bool], Inputs]
    total_steps: int
    from_host: bool = False


class Outcome(NamedTuple):
    """At the end of a run, at the unperturbed weights.

    Attributes:
      accuracy: on what was held out.
      loss: on what was held out.
      train_accuracy: on what was trained on, wrong labels included.
      train_loss: likewise.
      sam_fraction: share of the steps that took a second gradient.
    """

    accuracy: jax.Array
    loss: jax.Array
    train_accuracy: jax.Array
    train_loss: jax.Array
    sam_fraction: jax.Array


class Traced(NamedTuple):
    """Hyper-parameters of a run: float32 scalars, which may be traced or batched."""

    learning_rate: Any
    rho: Any
    weight_decay: Any


Run = Callable[[Traced, Inputs], tuple[Outcome, Any]]


def traced(setting: Iterable[float | None]) -> Traced:
    """What a search found, for a run; 0 for a hyper-parameter that a method lacks."""
    return Traced(*(np.float32(value or 0.0) for value in setting))


def compiled(problem: Problem, build: optimizers.Build) -> Run:
    """A run that is compiled at most once, for all hyper-parameters and seeds."""
    if problem.from_host:
        return make_host_run(problem, build)
    return jax.jit(make_run(problem, build))


def make_run(
    problem: Problem,
    build: optimizers.Build,
) -> Run:
    """Makes ``run(hyperparameters, inputs) -> (outcome, params)`` of a method.

    Args:
      problem: what is learned.
      build: makes the optimizer; its setting's numbers are traced but for total_steps.
    """

    def run(hyperparameters, inputs):
        rate, rho, decay = hyperparameters
        setting = optimizers.Setting(
            rate, rho, decay, problem.total_steps, seed=inputs.seed
        )
        optimizer = build(setting)
        step = msam_optax.make_train_step(
            problem.loss_fn, optimizer, dispatch="in_graph", donate=False
        )
        init_key, key = jax.random.split(jax.random.key(inputs.seed))
        state = problem.init(optimizer, init_key, inputs.train)

        def body(state, xs):
            indices, number = xs
            step_key = jax.random.fold_in(key, number)
            batch = problem.gather(inputs.train, indices, step_key)
            state, metrics = step(state, batch, step_key)
            return state, metrics.employed_fraction

        numbers = jnp.arange(len(inputs.order))
        state, fractions = jax.lax.scan(body, state, (inputs.order, numbers))
        params = msam_optax.eval_params(state.opt_state, state.params)
        outcome = Outcome(
            *problem.evaluate(params, inputs.held_out),
            *problem.evaluate(params, inputs.train),
            fractions[-1],
        )
        return outcome, params

    return run


def make_host_run(problem: Problem, build: optimizers.Build) -> Run:
    """As `make_run`, step by step; what an optimizer draws does not hang on the seed.

    Args:
      problem: what is learned.
      build: makes the optimizer; its learning rate, rho and weight decay are traced.
    """

    def with_numbers(learning_rate, rho, weight_decay):
        return build(
            optimizers.Setting(learning_rate, rho, weight_decay, problem.total_steps)
        )

    inject = optax.inject_hyperparams(with_numbers)
    step = msam_optax.make_train_step(problem.loss_fn, inject(0.0, 0.0, 0.0))

    @jax.jit
    def gather(train, indices, key, number):
        step_key = jax.random.fold_in(key, number)
        return problem.gather(train, indices, step_key), step_key

    @jax.jit
    def init(hyperparameters, key, train):
        return problem.init(inject(*hyperparameters), key, train)

    @jax.jit
    def evaluate(state, examples):
        params = msam_optax.eval_params(state.opt_state, state.params)
        return problem.evaluate(params, examples), params

    def run(hyperparameters, inputs):
        train = jax.device_put(inputs.train)
        init_key, key = jax.random.split(jax.random.key(inputs.seed))
        state = init(hyperparameters, init_key, train)
        for number, indices in enumerate(inputs.order):
            batch, step_key = gather(train, indices, key, number)
            state, metrics = step(state, batch, step_key)
        (accuracy, loss), params = evaluate(state, inputs.held_out)
        (fit, train_loss), _ = evaluate(state, train)
        employed = metrics.employed_fraction
        return Outcome(accuracy, loss, fit, train_loss, employed), params

    return run
