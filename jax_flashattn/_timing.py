"""Time of one call on the device, without what it costs to launch it."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax

Timer = Callable[[], float]  # seconds of one call


# A timed program repeats the call for so many seconds: starting it and waiting for it takes up to
# a millisecond.
LEAST_SECONDS = 0.03
MOST_REPEATS = 64


def _seconds(compiled: Any, args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - start


def _timer(program: Callable[..., Any], *args: Any) -> Timer:
    """Times `program(repeats, *args)`, with as many repeats as it takes to time it well."""

    def compiled(repeats: int) -> Any:
        run = jax.jit(lambda *x: program(repeats, *x)).lower(*args).compile()
        for _ in range(2):
            jax.block_until_ready(run(*args))
        return run

    once = min(_seconds(run, args) for run in [compiled(1)] * 3)
    repeats = min(MOST_REPEATS, math.ceil(LEAST_SECONDS / once))
    if repeats > 1:  # most of a single call may be overhead
        few = compiled(repeats)
        each = min(_seconds(few, args) for _ in range(3)) / repeats
        repeats = min(MOST_REPEATS, math.ceil(LEAST_SECONDS / each))
    run = compiled(repeats)
    return lambda: _seconds(run, args) / repeats


def timers(function: Callable[..., jax.Array], inputs: tuple[jax.Array, ...]) -> dict[str, Timer]:
    """Timers of forward ("fwd") and backward ("bwd") of one function.

    Args:
      function: of `inputs`; its result has the shape of the first of them.
      inputs: what it is differentiated by.
    """
    out, vjp = jax.vjp(function, *inputs)

    # Each call takes the last one's result, or XLA would merge them.
    def forward(repeats: int, q: jax.Array, *others: jax.Array) -> jax.Array:
        for _ in range(repeats):
            q = function(q, *others)
        return q

    def backward(repeats: int, vjp: Any, dout: jax.Array) -> Any:
        grads = (dout,)
        for _ in range(repeats):
            grads = vjp(grads[0])
        return grads

    return {"fwd": _timer(forward, *inputs), "bwd": _timer(backward, vjp, out)}
