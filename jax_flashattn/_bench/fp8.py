"""The forward of 8-bit inputs on a GPU beside cuDNN's, and decoding from 8-bit caches."""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from jax_flashattn._api import attention
from jax_flashattn._bench import peers, plain, serve
from jax_flashattn._bench.harness import Cell, Entry, Group
from jax_flashattn._bench.report import OURS
from jax_flashattn._bench.timing import jax_build, queries_for
from jax_flashattn._fp8 import ACCUMULATIONS

LENGTHS = (1024, 4096, 16384)


def _group(case: Cell) -> Group:
    entries = []
    queries = max(2, queries_for(case.seconds))
    q, k, v = case.shapes()
    for accumulation in ACCUMULATIONS:
        ours = partial(
            attention,
            is_causal=case.causal,
            fp8_accumulation=accumulation,
            q_scale=1.0,
            k_scale=1.0,
            v_scale=1.0,
        )
        build = jax_build(ours, case.shapes(), case.seconds, queries=queries)
        kind = case if accumulation == "fast" else replace(case, feature=accumulation)
        name = OURS if accumulation == "fast" else accumulation
        entries.append(Entry(OURS, build, kind, name))
    return Group(case, [*[q] * queries, k, v], [*entries, *peers.fp8(case, queries)])


def groups() -> list[Group]:
    """The forward's cells, then decoding."""
    dtype = jnp.dtype(jnp.float8_e4m3fn).name
    cells = [
        plain.cell("float8", head_dim, S, causal, dtype=dtype)
        for head_dim in plain.HEAD_DIMS
        for causal in (False, True)
        for S in LENGTHS
    ]
    return [*map(_group, cells), *serve.fp8_groups()]
