"""Forward and backward on a GPU beside the peers: lengths, head dims, groups, windows, packing."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn._api import attention, attention_varlen
from jax_flashattn._bench import peers
from jax_flashattn._bench.features import PACKED_LEN, document_lengths
from jax_flashattn._bench.harness import Cell, Entry, Group
from jax_flashattn._bench.report import OURS
from jax_flashattn._bench.timing import Build, jax_build, queries_for

NUM_TOKENS, HIDDEN = 16384, 2048
LENGTHS = (512, 1024, 4096, 16384)
SM80_LENGTHS = LENGTHS[1:]
HEAD_DIMS, OTHER_HEAD_DIMS = (64, 128, 256), (80, 96, 192)
GROUPED_LENGTHS, DTYPES_LENGTH = (2048, 8192), 4096
WINDOWS = (1024, 4096)
PACKED = ((64, 32, 8), (128, 16, 16), (128, 32, 8))  # head dim, query heads, key heads


def cell(set: str, head_dim: int, seq_len: int, causal: bool, **more: Any) -> Cell:
    """Self-attention of `NUM_TOKENS` tokens; by default of hidden size `HIDDEN`."""
    heads, batch = HIDDEN // head_dim, NUM_TOKENS // seq_len
    pairs = batch * seq_len**2 / (2 if causal else 1)
    given = dict(heads=heads, kv_heads=heads, batch=batch, seq_q=seq_len, seq_kv=seq_len)
    return Cell(set, head_dim, **{**given, "causal": causal, "pairs": pairs, **more})


def _build(function: Callable[..., jax.Array], case: Cell, inputs: Sequence[Any]) -> Build:
    queries = queries_for(case.seconds)
    return jax_build(function, inputs, case.seconds, backward=3, queries=queries)


def _shapes(case: Cell) -> list[jax.ShapeDtypeStruct]:
    """Of as many arrays of queries as `_build` asks for, keys and values."""
    q, k, v = case.shapes()
    return [*[q] * queries_for(case.seconds), k, v]


def _group(case: Cell, impl: str, window: tuple[int, int] | None = None) -> Group:
    ours = partial(attention, is_causal=case.causal, local_window_size=window)
    entries = [
        Entry(impl, _build(ours, case, case.shapes()), case, OURS),
        *peers.attention(case, window, only=None if impl == OURS else ("torch_fa2",)),
    ]
    return Group(case, _shapes(case), entries)


def _packed(head_dim: int, heads: int, kv_heads: int) -> Group:
    lengths = document_lengths()
    case = cell(
        "packed",
        head_dim,
        PACKED_LEN,
        True,
        heads=heads,
        kv_heads=kv_heads,
        batch=1,
        feature=f"{len(lengths)} documents, packed",
        pairs=sum(n * n / 2 for n in lengths),
    )
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array) -> jax.Array:
        return attention_varlen(q[0], k[0], v[0], cu_seqlens_q=ends, is_causal=True)[None]

    inputs = [*case.shapes(), ends]
    entries = [
        Entry(OURS, _build(ours, case, inputs), case),
        *peers.packed(case, inputs, lengths),
    ]
    return Group(case, _shapes(case), entries, [ends])


def _half(head_dim: int, causal: bool) -> Group:
    entries, shapes = [], []
    for dtype in (jnp.bfloat16, jnp.float16):
        case = cell("dtypes", head_dim, DTYPES_LENGTH, causal, dtype=jnp.dtype(dtype).name)
        build = _build(partial(attention, is_causal=causal), case, case.shapes())
        own = _shapes(case)
        taken = tuple(range(len(shapes), len(shapes) + len(own)))
        entries.append(Entry(OURS, build, case, case.dtype, "bfloat16", inputs=taken))
        shapes += own
    return Group(entries[0].cell, shapes, entries)


def groups(family: str | None = None) -> list[Group]:
    """Every cell; where a family of kernels is forced, those that it is compared in."""
    impl = OURS if family is None else f"{OURS}[{family}]"
    lengths = LENGTHS if family is None else SM80_LENGTHS
    masks = (False, True)
    cells = [cell("grid", D, S, causal) for D in HEAD_DIMS for causal in masks for S in lengths]
    cells += [cell("head dims", D, 4096, causal) for D in OTHER_HEAD_DIMS for causal in masks]
    if family is not None:
        return [_group(case, impl) for case in cells]
    heads = {"heads": 32, "kv_heads": 8}
    cells += [cell("grouped heads", 128, S, True, **heads) for S in GROUPED_LENGTHS]
    found = [_group(case, impl) for case in cells]
    for head_dim in HEAD_DIMS:
        for left in WINDOWS:
            S = NUM_TOKENS
            pairs = S * (left + 1) - left * (left + 1) / 2
            feature = f"window {left}"
            case = cell("windows", head_dim, S, True, feature=feature, pairs=pairs)
            found.append(_group(case, impl, (left, 0)))
    found += [_packed(*case) for case in PACKED]
    return found + [_half(D, causal) for D in HEAD_DIMS for causal in masks]
