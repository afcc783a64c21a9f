"""Programs compiled, and what XLA says of them."""

import time
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      trace_seconds: for tracing and lowering, of the processor.
      compile_seconds: in XLA, of the processor: of all its threads together.
      instructions: of the optimized program.
      temporary_bytes: over its arguments and results.
      argument_bytes: of its arguments.
      flops: as XLA counts them; of a conditional the dearest branch.
      accessed_bytes: what its instructions read and write, as XLA counts them.
    """

    trace_seconds: float
    compile_seconds: float
    instructions: int
    temporary_bytes: int
    argument_bytes: int
    flops: float
    accessed_bytes: float


def compile_program(
    lowered: jax.stages.Lowered, trace_seconds: float
) -> tuple[Program, jax.stages.Compiled]:
    """Compiles a function that was lowered, whose calls then find it compiled.

    Returns:
      What XLA says of the program, and what runs it.
    """
    # Other work on the machine makes this longer by less than it does the clock's.
    start = time.process_time()
    compiled: Any = lowered.compile()
    seconds = time.process_time() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    program = Program(
        trace_seconds=trace_seconds,
        compile_seconds=seconds,
        instructions=(compiled.as_text() or "").count(" = "),
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        flops=cost.get("flops", 0.0),
        accessed_bytes=cost.get("bytes accessed", 0.0),
    )
    return program, compiled
