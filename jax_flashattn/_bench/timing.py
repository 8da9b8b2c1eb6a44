"""Time of one call on the device, without what it costs to launch it.

A program repeats a call so often that the host keeps ahead of the device; programs are queued one
behind the other, and only the last is waited for. Programs are compiled from shapes, so that many
of them can be made at once before the first is timed.
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Timer = Callable[[], float]  # seconds of one call
Start = Callable[[Sequence[Any]], dict[str, Timer]]  # of inputs; the timers by pass
Build = Callable[[], Start]  # compiles, which takes long and may be done in a thread

QUEUED_SECONDS = 0.012  # of one reading: starting and waiting take up to 50 microseconds of it
# Of one program: between two of them the device seems to wait for about 20 microseconds, and the
# host needs up to 100 to queue the next.
PROGRAM_SECONDS = 4e-3
MOST_REPEATS = 256
MOST_QUERIES = 20  # arrays of queries for a program's calls
BACKWARD = 3  # forwards that a backward takes about as long as
WITHOUT_GRAPHS = {"xla_gpu_graph_min_graph_size": 1_000_000}  # as an option of XLA


def repeats_for(seconds: float, most: int = MOST_REPEATS) -> int:
    """Calls in one program if one takes about so long."""
    return max(1, min(most, math.ceil(PROGRAM_SECONDS / seconds)))


def queries_for(seconds: float) -> int:
    """Arrays of queries for `jax_build`."""
    return repeats_for(seconds, MOST_QUERIES)


def queue_timer(queue: Callable[[], Any], wait: Callable[[Any], object], calls: int) -> Timer:
    """Timer of what is started by `queue` and takes `calls` calls; `wait` gets its last result."""
    for _ in range(2):
        wait(queue())
    start = time.perf_counter()
    wait(queue())
    once = time.perf_counter() - start
    programs = max(1, min(512, math.ceil(QUEUED_SECONDS / once)))

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(programs - 1):
            queue()
        wait(queue())
        return (time.perf_counter() - start) / (programs * calls)

    return seconds


def chain(
    function: Callable[..., jax.Array] | Sequence[Callable[..., jax.Array]], calls: int
) -> Callable[..., jax.Array]:
    """So many calls, each of which takes the last one's result: equal ones would be merged.

    Args:
      function: its result has the shape and dtype of its first input. Or several, which take turns.
      calls: how many.
    """
    functions = [jax.jit(f) for f in (function if isinstance(function, Sequence) else [function])]

    def chained(q: jax.Array, *others: jax.Array) -> jax.Array:
        for i in range(calls):
            q = functions[i % len(functions)](q, *others)
        return q

    return chained


def jax_build(
    function: Callable[..., jax.Array] | Sequence[Callable[..., jax.Array]],
    inputs: Sequence[Any],
    seconds: float,
    *,
    op: str = "fwd",
    backward: int = 0,
    queries: int = 1,
    most: int = MOST_REPEATS,
    compiler_options: dict[str, Any] | None = None,
) -> Build:
    """Builds the timers of a function of arrays.

    Args:
      function: of `inputs`; its result has the shape and dtype of the first of them. Or several
        such functions, which take turns.
      inputs: arrays or their shapes and dtypes.
      seconds: about what a call takes.
      op: name of the forward's timer.
      backward: also time the gradients by so many of the inputs, as "bwd".
      queries: if more than 1, a program's calls each have a first input of their own, so many
        arrays that come before the other inputs, and the result may be of any dtype. Otherwise each
        call takes the last one's result; queries that are results give nearly equal weights, and a
        device that multiplies equal numbers draws less power than one that multiplies random ones.
      most: calls in a program, for what takes long to compile.
      compiler_options: of XLA, for the forward.
    """
    functions = function if isinstance(function, Sequence) else [function]
    first = jax.jit(functions[0])
    repeats = repeats_for(seconds, most)
    repeats = math.ceil(repeats / len(functions)) * len(functions)
    backward_repeats = math.ceil(repeats / BACKWARD)
    calls = repeats if queries == 1 else min(queries, most)

    def apart(*inputs: jax.Array) -> list[jax.Array]:
        return [first(q, *inputs[queries:]) for q in inputs[:calls]]

    forward = chain(functions, calls)
    if queries > 1:
        # In a CUDA graph they could run at the same time.
        forward, compiler_options = apart, {**WITHOUT_GRAPHS, **(compiler_options or {})}

    def linearize(*inputs: jax.Array) -> Any:
        others = inputs[backward:]
        return jax.vjp(lambda *x: first(*x, *others), *inputs[:backward])

    def gradients(vjp: Any, dout: jax.Array) -> Any:
        others = []  # results, too: XLA leaves out kernels whose results nothing uses
        for _ in range(backward_repeats):
            dout, *rest = vjp(dout)
            others += rest
        return dout, others

    def build() -> Start:
        lowered = jax.jit(forward).lower(*[inputs[0]] * queries, *inputs[1:])
        compiled = lowered.compile(compiler_options)
        programs: tuple[Any, Any] | None = None
        if backward:
            linear = jax.jit(linearize).lower(*inputs)
            out, vjp = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), linear.out_info
            )
            programs = linear.compile(), jax.jit(gradients).lower(vjp, out).compile()

        def start(arrays: Sequence[jax.Array]) -> dict[str, Timer]:
            wait = jax.block_until_ready
            timers = {op: queue_timer(lambda: compiled(*arrays), wait, calls)}
            if programs is not None:
                linearized, chained = programs
                out, vjp = linearized(arrays[0], *arrays[queries:])
                timers["bwd"] = queue_timer(lambda: chained(vjp, out), wait, backward_repeats)
            return timers

        return start

    return build


def alternate(timers: Mapping[str, Timer], rounds: int) -> dict[str, list[float]]:
    """Readings of each timer, taken in turns.

    Each round is in another order. A device at its power limit is faster for a while after what
    drew little power: in one order for all rounds, one timer would always profit by another.
    """
    order = list(timers)
    shuffle = random.Random(0).shuffle
    readings: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            readings[name].append(timers[name]())
    return readings
