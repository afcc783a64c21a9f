"""What a step of a method costs to compile, to start and to hold, untrained."""

import gc
import time
from typing import Any

import jax
import jax.numpy as jnp

import msam_optax
from benchmarks.costs.methods import METHODS
from benchmarks.costs.networks import KEY, Network
from benchmarks.costs.programs import Program, compile_program

# Of the whole training, where a method wants to know
_STEPS = 1000


def compiled(name: str, network: Network) -> tuple[Program, Any]:
    """The whole training step, one program, whose state is written over."""
    optimizer = METHODS[name].build(_STEPS)
    # What was traced for another method would be found again, or collected meanwhile.
    jax.clear_caches()
    gc.collect()
    step = msam_optax.make_train_step(network.loss_fn, optimizer, dispatch="in_graph")
    state = network.state(optimizer)
    begin = time.process_time()
    lowered = step.lower(state, network.batch, KEY).programs["step"]
    return compile_program(lowered, time.process_time() - begin)


def start(name: str, network: Network) -> dict[str, Any]:
    """The columns of a program, and the seconds of all that a training starts with."""
    program, step = compiled(name, network)
    tx = METHODS[name].build(_STEPS)
    params, batch, model_state = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        (network.params, network.batch, network.model_state),
    )
    jax.block_until_ready(params)

    def timed(function: Any, *args: Any) -> tuple[float, Any]:
        begin = time.process_time()
        result = jax.block_until_ready(function(*args))
        return time.process_time() - begin, result

    init_seconds, opt_state = timed(tx.init, params)
    state = msam_optax.TrainState(params, opt_state, model_state)
    first_seconds, (state, _) = timed(step, state, batch, jax.random.key(0))
    timed(msam_optax.eval_params, state.opt_state, state.params)  # compiles
    eval_seconds, _ = timed(msam_optax.eval_params, state.opt_state, state.params)
    return {
        **columns(program),
        "first_step_seconds": first_seconds,
        "init_seconds": init_seconds,
        "eval_params_seconds": eval_seconds,
    }


def columns(program: Program) -> dict[str, Any]:
    """What does not depend on how the program's work is counted."""
    names = ("trace_seconds", "compile_seconds", "instructions", "temporary_bytes")
    return {name: getattr(program, name) for name in names}
