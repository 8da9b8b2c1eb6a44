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


def repeats_for(seconds: float) -> int:
    """Calls in one timed program if one takes about so long."""
    return max(1, min(MOST_REPEATS, math.ceil(LEAST_SECONDS / seconds)))


def _timer(program: Callable[..., Any], repeats: int, *args: Any) -> Timer:
    compiled = jax.jit(program).lower(*args).compile()
    for _ in range(2):
        jax.block_until_ready(compiled(*args))

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        return (time.perf_counter() - start) / repeats

    return seconds


def forward_timer(
    function: Callable[..., jax.Array], inputs: tuple[jax.Array, ...], repeats: int
) -> Timer:
    """Timer of one function of `inputs`, whose result has the shape of the first of them."""

    # Each call takes the last one's result, or XLA would merge them.
    def forward(q: jax.Array, *others: jax.Array) -> jax.Array:
        for _ in range(repeats):
            q = function(q, *others)
        return q

    return _timer(forward, repeats, *inputs)


def timers(
    function: Callable[..., jax.Array], inputs: tuple[jax.Array, ...], repeats: int
) -> dict[str, Timer]:
    """Timers of forward ("fwd") and backward ("bwd") of one function.

    Args:
      function: of `inputs`; its result has the shape of the first of them.
      inputs: what it is differentiated by.
      repeats: calls in one timed program.
    """
    out, vjp = jax.vjp(function, *inputs)

    def backward(vjp: Any, dout: jax.Array) -> Any:
        grads = (dout,)
        for _ in range(repeats):
            grads = vjp(grads[0])
        return grads

    return {
        "fwd": forward_timer(function, inputs, repeats),
        "bwd": _timer(backward, repeats, vjp, out),
    }
