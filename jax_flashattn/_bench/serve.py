"""Serving on a GPU: decoding from dense and paged caches beside the peers, and chunked prefill.

Decoding is bound by reading K and V, so its figure is their bytes over time; chunks are compared
with the forward over the same keys without pages.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jax_flashattn._api import attention
from jax_flashattn._bench import peers
from jax_flashattn._bench.harness import Cell, Entry, Group
from jax_flashattn._bench.report import OURS
from jax_flashattn._bench.timing import jax_build
from jax_flashattn._kv_cache import PagedKVCache
from jax_flashattn._serving import paged_attention

PAGE_SIZES = (16, 128)
HEADS = ((32, 8), (64, 8), (32, 32), (128, 1))
BATCHES = ((1, 131072), (4, 32768), (32, 8192), (128, 2048), (8, 4096), (1, 8192))
SMALL = ((1, 8192), (8, 4096), (1, 1024), (16, 512))  # warm or cold in the L2; 32/8, head dim 128
COLD_BYTES = 256 << 20  # keys and values of calls that take turns: several times any L2
MIXED_BATCH, MIXED_KEYS = 64, 32768
CHUNKS = [(chunk, prefix) for chunk in (512, 2048) for prefix in (8192, 32768)]
# Of 8-bit keys, which hold 512 MB and more.
FP8_CASES = ((128, 4, 65536), (128, 32, 16384), (128, 128, 4096), (64, 4, 131072), (64, 32, 32768))


def _cell(set: str, head_dim: int, heads: int, kv_heads: int, B: int, S: int, **more: Any) -> Cell:
    size = 1 if "float8" in more.get("dtype", "") else 2
    moved = B * S * kv_heads * head_dim * 2 * size
    return Cell(set, head_dim, heads, kv_heads, B, 1, S, **{"moved": moved, **more})


def page_table(batch: int, pages: int) -> np.ndarray:
    """Pages of sequences that share a pool without a gap, in random order."""
    table = np.random.default_rng(0).permutation(batch * pages)
    return table.reshape(batch, pages).astype(np.int32)


def _paged(page_size: int) -> Callable[..., jax.Array]:
    """Of q, dense keys and values taken as pages, lengths and page table."""

    def function(
        q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, table: jax.Array
    ) -> jax.Array:
        k, v = (x.reshape(-1, page_size, *x.shape[2:]) for x in (k, v))
        return paged_attention(q, PagedKVCache(k, v, table, lengths))

    return function


def _pages(case: Cell) -> list[np.ndarray]:
    """Lengths, and a page table for each size of pages."""
    lengths = np.full(case.batch, case.seq_kv, np.int32)
    return [lengths, *(page_table(case.batch, case.seq_kv // size) for size in PAGE_SIZES)]


def _paged_entries(
    case: Cell,
    inputs: Sequence[Any],
    timer: str,
    dense: tuple[int, int, int] = (0, 1, 2),
) -> list[Entry]:
    """The call over pages of each size.

    Args:
      case: what their cells say but for the pages.
      inputs: of the group; the last of them those of `_pages`.
      timer: its name.
      dense: numbers of the inputs q, k and v.
    """
    first_table = len(inputs) - len(PAGE_SIZES)
    entries = []
    for number, page_size in enumerate(PAGE_SIZES):
        paged = replace(case, feature=f"pages of {page_size}")
        taken = (*dense, first_table - 1, first_table + number)
        build = jax_build(_paged(page_size), [inputs[i] for i in taken], case.seconds, op=timer)
        entries.append(Entry(OURS, build, paged, paged.feature, inputs=taken))
    return entries


def _paged_decode(case: Cell) -> Cell:
    return replace(case, set=f"paged {case.set}", op="paged_decode")


def decode_group(case: Cell) -> Group:
    """One query token a sequence: dense, and pages of each size."""
    arrays = _pages(case)
    shapes = case.shapes()
    inputs = [*shapes, *arrays]
    entries = [Entry(OURS, jax_build(attention, shapes, case.seconds, op="decode"), case)]
    entries += peers.decode(case)
    dense = [inputs[i] for i in (0, 1, 2, 3)] + [arrays[1]]
    for build in peers.fa3_kv_cache(case, dense, page_size=0, op="decode"):
        entries.append(Entry("flash_attn3_jax", build, case, inputs=(0, 1, 2, 3, 4)))
    entries = [entry if entry.inputs else replace(entry, inputs=(0, 1, 2)) for entry in entries]
    ours = _paged_entries(_paged_decode(case), inputs, "decode")
    for page_size, entry in zip(PAGE_SIZES, ours, strict=True):
        entries.append(entry)
        given = [inputs[i] for i in entry.inputs or ()]
        for build in peers.fa3_kv_cache(entry.cell, given, page_size=page_size, op="decode"):
            peer = replace(entry, impl="flash_attn3_jax", build=build, base=entry.key)
            entries.append(replace(peer, name=f"flash_attn3_jax {page_size}"))
    return Group(case, shapes, entries, arrays)


def cold_group(case: Cell) -> Group:
    """The same dense decode with keys that the L2 doesn't hold: calls take turns over copies."""
    copies = max(2, -(-COLD_BYTES // (case.moved or 1)))
    case = replace(case, set=f"{case.set}, cold L2", feature="cold L2")
    q, k, v = case.shapes()
    shapes = [q, *[k, v] * copies]
    functions = peers.take_turns(attention, copies)
    build = jax_build(functions, shapes, case.seconds, op="decode")
    return Group(case, shapes, [Entry(OURS, build, case), *peers.decode(case, copies=copies)])


def mixed_group(batch: int = MIXED_BATCH, most: int = MIXED_KEYS) -> Group:
    """Log-normal lengths, and equal ones of the same sum, in pages of 16."""
    page_size, kv_heads, head_dim = PAGE_SIZES[0], 8, 128
    rng = np.random.default_rng(0)
    mixed = np.clip(rng.lognormal(8, 1, batch), page_size, most).astype(int)
    mixed = mixed // page_size * page_size
    equal = np.full(batch, mixed.sum() // batch // page_size * page_size)
    pool = most // 4  # pages are shared: few of the table are in use
    order = rng.permutation(batch * pool // page_size)
    arrays, entries = [], []
    shapes = _cell("", head_dim, 32, kv_heads, batch, pool).shapes()
    for name, lengths in (("equal lengths", equal), ("log-normal lengths", mixed)):
        table, first = np.zeros((batch, most // page_size), np.int32), 0
        for b, n in enumerate(lengths // page_size):
            table[b, :n] = np.take(order, range(first, first + n), mode="wrap")
            first += n
        case = _cell(
            "mixed lengths",
            head_dim,
            32,
            kv_heads,
            batch,
            most,
            feature=f"pages of {page_size}, {name}",
            moved=int(lengths.sum()) * kv_heads * head_dim * 4,
        )
        taken = (0, 1, 2, 3 + len(arrays), 4 + len(arrays))
        arrays += [lengths.astype(np.int32), table]
        given = [*shapes, *arrays[-2:]]
        build = jax_build(_paged(page_size), given, case.seconds, op="paged_decode")
        entries.append(Entry(OURS, build, case, name, "equal lengths", True, taken))
    return Group(entries[0].cell, shapes, entries, arrays)


def prefill_group(chunk: int, prefix: int) -> Group:
    """A chunk of prefill over pages, and the forward on the same shape without."""
    S = prefix + chunk
    pairs = chunk * prefix + chunk * (chunk + 1) / 2
    case = Cell("prefill", 128, 32, 8, 1, chunk, S, causal=True, pairs=pairs)
    arrays = _pages(case)
    inputs = [*case.shapes(), *arrays]
    dense = partial(attention, is_causal=True, query_offset="end")
    build = jax_build(dense, case.shapes(), case.seconds, op="prefill")
    entries = [Entry(OURS, build, case, inputs=(0, 1, 2))]
    entries += _paged_entries(case, inputs, "prefill")
    return Group(case, case.shapes(), entries, arrays)


def fp8_group(case: Cell) -> Group:
    """Decoding from 8-bit keys and values, beside the same in bfloat16: tokens per second."""
    eight = replace(case, dtype="float8_e4m3fn", moved=(case.moved or 0) // 2)
    arrays = _pages(case)
    q, k, v = case.shapes()
    shapes = [q, k, v, *eight.shapes()[1:]]
    inputs = [*shapes, *arrays]
    build = jax_build(attention, [q, k, v], case.seconds, op="decode")
    entries = [Entry(OURS, build, case, "bfloat16", inputs=(0, 1, 2))]
    build = jax_build(attention, [q, *shapes[3:]], eight.seconds, op="decode")
    entries.append(Entry(OURS, build, eight, eight.dtype, "bfloat16", inputs=(0, 3, 4)))
    wide = _paged_entries(_paged_decode(case), inputs, "decode")
    narrow = _paged_entries(_paged_decode(eight), inputs, "decode", (0, 3, 4))
    for pair in zip(wide, narrow, strict=True):
        feature = pair[0].cell.feature
        for entry, base in zip(pair, ("bfloat16", f"bfloat16, {feature}"), strict=True):
            entries.append(replace(entry, name=f"{entry.cell.dtype}, {feature}", base=base))
    return Group(case, shapes, entries, arrays)


def groups() -> list[Group]:
    """Every cell but those of 8-bit keys."""
    found = [
        decode_group(_cell("decode", D, *heads, B, S))
        for D in (128, 64)
        for heads in HEADS
        for B, S in BATCHES
    ]
    small = [_cell("small decode", 128, 32, 8, B, S) for B, S in SMALL]
    found += [decode_group(case) for case in small] + [cold_group(case) for case in small]
    return [*found, mixed_group(), *(prefill_group(*x) for x in CHUNKS)]


def fp8_groups() -> list[Group]:
    """Decoding from 8-bit keys."""
    return [
        fp8_group(_cell("float8 decode", D, 32, 8, B, S, moved=B * S * 8 * D * 4))
        for D, B, S in FP8_CASES
    ]
