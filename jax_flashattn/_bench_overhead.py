"""What a call costs the host inside a program.

A program of many tiny calls, one after the other, and the same program with a kernel that does next
to nothing in the place of each call. XLA is kept from recording them into a CUDA graph, where a
call would cost the host nothing. A program takes as long as the slower of host and device, so the
difference per call bounds from above what the host does for a call beyond launching a kernel,
unless the empty kernels keep the device busier than the host. Recorded into a graph, the same
programs show what the device alone takes.
"""

from functools import partial

import jax

from jax_flashattn._api import attention
from jax_flashattn._bench_harness import Cell, Entry, Group
from jax_flashattn._bench_report import OURS
from jax_flashattn._timing import PROGRAM_SECONDS, WITHOUT_GRAPHS, jax_build

EMPTY = "empty_kernel"
CALLS = 128
SEQ_LEN, HEAD_DIM = 256, 64  # with fewer queries it would be decoding, which may take two kernels


def empty_kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """A kernel of its own for a few elements: the barrier keeps XLA from merging several."""
    return jax.lax.optimization_barrier(q * 0.5)


def groups() -> list[Group]:
    """The forward without CUDA graphs, and with them."""
    found = []
    for feature, options in (
        ("without CUDA graphs", WITHOUT_GRAPHS),
        ("with CUDA graphs", dict.fromkeys(WITHOUT_GRAPHS, 1)),
    ):
        case = Cell("overhead", HEAD_DIM, 1, 1, 1, SEQ_LEN, SEQ_LEN, feature=feature, op="overhead")
        build = partial(
            jax_build,
            inputs=case.shapes(),
            seconds=PROGRAM_SECONDS / CALLS,
            compiler_options=options,
        )
        entries = [
            Entry(EMPTY, build(empty_kernel), case, base=EMPTY),
            Entry(OURS, build(attention), case, base=EMPTY),
        ]
        found.append(Group(case, case.shapes(), entries))
    return found
