"""What a call costs the host inside a program.

A program of many tiny calls, one after the other, and the same program with a kernel that does next
to nothing in the place of each call. XLA is kept from recording them into a CUDA graph, where a
call costs the host nothing. Three readings, each per call:

- "behind other work": the time in which the program is queued while the device is busy with
  something else: the host's part alone. Ours less the empty kernel's is the overhead of a call. It
  needs a runtime that queues in the caller's thread; next to 0, the reading means that it doesn't.
- "without CUDA graphs": the time of the whole program, the slower of host and device.
- "with CUDA graphs": the same, recorded: the device's part.
"""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jax_flashattn._api import attention
from jax_flashattn._bench.harness import Cell, Entry, Group
from jax_flashattn._bench.report import OURS
from jax_flashattn._bench.timing import (
    PROGRAM_SECONDS,
    WITHOUT_GRAPHS,
    Build,
    Start,
    Timer,
    chain,
    jax_build,
)

EMPTY = "empty_kernel"
CALLS = 128  # of the 1024 launches that a stream takes before the host has to wait
SEQ_LEN, HEAD_DIM = 256, 64  # with fewer queries it would be decoding, which may take two kernels
# Matrix products of about 1.5 ms each: several times the queueing.
BUSY_SIZE, BUSY_PRODUCTS = 8192, 8


def empty_kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """A kernel of its own for a few elements: the barrier keeps XLA from merging several."""
    return jax.lax.optimization_barrier(q * 0.5)


def _products(x: jax.Array) -> jax.Array:
    y = x
    for _ in range(BUSY_PRODUCTS):
        y = jnp.dot(y, x)
    return y


def _queued_build(
    function: Callable[..., jax.Array], inputs: Sequence[jax.ShapeDtypeStruct]
) -> Build:
    """Builds the timer of the host's part."""
    matrix = jax.ShapeDtypeStruct((BUSY_SIZE, BUSY_SIZE), jnp.bfloat16)

    def build() -> Start:
        compiled = jax.jit(chain(function, CALLS)).lower(*inputs).compile(WITHOUT_GRAPHS)
        busy = jax.jit(_products).lower(matrix).compile()

        def start(arrays: Sequence[jax.Array]) -> dict[str, Timer]:
            x = jnp.zeros(matrix.shape, matrix.dtype)

            def seconds() -> float:
                before = busy(x)
                start = time.perf_counter()
                last = compiled(*arrays)
                queued = time.perf_counter() - start
                jax.block_until_ready((before, last))
                return queued / CALLS

            seconds()
            return {"fwd": seconds}

        return start

    return build


def groups() -> list[Group]:
    """The forward, in the three ways."""
    found = []
    for feature, options in (
        ("behind other work", None),
        ("without CUDA graphs", WITHOUT_GRAPHS),
        ("with CUDA graphs", dict.fromkeys(WITHOUT_GRAPHS, 1)),
    ):
        case = Cell("overhead", HEAD_DIM, 1, 1, 1, SEQ_LEN, SEQ_LEN, feature=feature, op="overhead")
        entries = []
        for impl, function in ((EMPTY, empty_kernel), (OURS, attention)):
            if options is None:
                build = _queued_build(function, case.shapes())
            else:
                build = jax_build(
                    function,
                    case.shapes(),
                    PROGRAM_SECONDS / CALLS,
                    compiler_options=options,
                )
            entries.append(Entry(impl, build, case, base=EMPTY))
        found.append(Group(case, case.shapes(), entries))
    return found
