"""What masks, biases and packing cost, each in alternation with plain causal attention.

The time of a mask is taken per visible pair of query and key, so that 1.0 is a mask whose cost
follows what it shows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jax_flashattn._api import attention, attention_varlen
from jax_flashattn._bench.harness import SPEED, Cell, Entry, Group
from jax_flashattn._bench.report import OURS
from jax_flashattn._bench.timing import jax_build

SEQ_LEN, PACKED_LEN = 16384, 32768
WINDOW = 1024


def document_lengths() -> list[int]:
    """Of about 40 documents, log-normal, that fill `PACKED_LEN` tokens."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < PACKED_LEN:
        lengths.append(int(min(rng.lognormal(6.5, 1.0) + 16, PACKED_LEN - sum(lengths))))
    return lengths


def _group(head_dim: int, heads: int, speed: float, seq_len: int) -> Group:
    causal = partial(attention, is_causal=True)
    lengths = document_lengths()
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    slopes = (2.0 ** np.linspace(-1, -8, heads)).astype(np.float32)
    arrays = (slopes, np.ones(heads, np.float32), ends, ids)
    pairs = seq_len * (seq_len + 1) / 2
    of_documents = sum(n * (n + 1) / 2 for n in lengths)
    of_window = WINDOW * (seq_len - WINDOW) + WINDOW * (WINDOW + 1) / 2
    of_sinks = 4 * (seq_len - WINDOW)  # nearly: the first four tokens of each row beyond it
    window = partial(attention, local_window_size=(WINDOW - 1, 0))

    def packed(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array) -> jax.Array:
        return attention_varlen(q[0], k[0], v[0], cu_seqlens_q=ends, is_causal=True)[None]

    def sunk(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        return causal(q, k, v, sinks=sinks)

    def biased(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array) -> jax.Array:
        return causal(q, k, v, alibi_slopes=slopes)

    def segmented(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        return causal(q, k, v, segment_ids=ids)

    short, long = (0, 1, 2), (3, 4, 5)  # inputs; behind them slopes, sinks, boundaries and ids
    # Name, inputs, how many of them gradients are taken of, visible pairs, function.
    capped = ("soft cap", short, 3, pairs, partial(causal, logits_soft_cap=30.0))
    cases: list[tuple[str, tuple[int, ...], int, float, Callable[..., Any]]] = [
        ("causal", short, 3, pairs, causal),
        capped,
    ]
    if head_dim == 128:
        documents = f"{len(lengths)} documents"
        sink_tokens = partial(window, sink_tokens=4)
        cases += [
            ("window 1024", short, 3, of_window, window),
            ("window 1024, 4 sink tokens", short, 3, of_window + of_sinks, sink_tokens),
            (f"{documents}, packed", (*long, 8), 3, of_documents, packed),
            (f"{documents}, segments", (*long, 9), 3, of_documents, segmented),
            ("ALiBi", (*short, 6), 3, pairs, biased),
            ("ALiBi, learned", (*short, 6), 4, pairs, biased),
            ("sinks", (*short, 7), 4, pairs, sunk),
        ]
    shape = heads, heads, 1
    cells = [
        Cell("features", head_dim, *shape, S, S, True, pairs=pairs) for S in (seq_len, PACKED_LEN)
    ]
    shapes = [x for cell in cells for x in cell.shapes()]
    inputs = [*shapes, *arrays]
    entries = []
    for name, taken, gradients, visible, function in cases:
        S = PACKED_LEN if taken[0] == long[0] else seq_len
        cell = Cell(
            "features",
            head_dim,
            *shape,
            S,
            S,
            True,
            feature=name,
            pairs=visible,
            speed=speed,
        )
        given = [inputs[i] for i in taken]
        build = jax_build(function, given, cell.seconds, backward=gradients)
        entries.append(Entry(OURS, build, cell, name, "causal", per_work=True, inputs=taken))
    return Group(entries[0].cell, shapes, entries, arrays)


def groups(*, heads: int, speed: float = SPEED, seq_len: int = SEQ_LEN) -> list[Group]:
    """Every feature, one group per head dim.

    Args:
      heads: query and key heads.
      speed: about what the device does, FLOP/s; long calls are repeated less.
      seq_len: tokens, but of the packed documents.
    """
    return [_group(D, heads, speed, seq_len) for D in (128, 64, 256)]
