"""What masks, biases and packing cost: each against plain causal attention in the same run.

The time of a mask is taken per visible pair of query and key, so that 1.0 is a mask whose cost
follows what it shows.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn._api import attention, attention_varlen
from jax_flashattn._timing import repeats_for, timers

SEQ_LEN, PACKED_LEN = 16384, 32768
WINDOW = 1024
ROUNDS = 7


class Case(NamedTuple):
    """One feature."""

    name: str
    head_dim: int
    seq_len: int
    visible: float  # pairs that it shows
    function: Callable[..., jax.Array]
    more: tuple[Any, ...] = ()  # inputs beside q, k and v that gradients are taken of


def document_lengths() -> list[int]:
    """Of about 40 documents, log-normal, that fill `PACKED_LEN` tokens."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < PACKED_LEN:
        lengths.append(int(min(rng.lognormal(6.5, 1.0) + 16, PACKED_LEN - sum(lengths))))
    return lengths


def _cases(heads: int) -> list[Case]:
    causal = partial(attention, is_causal=True)
    pairs = SEQ_LEN * (SEQ_LEN + 1) / 2

    def plain(D):
        return Case("causal", D, SEQ_LEN, pairs, causal)

    def capped(D):
        return Case("soft cap", D, SEQ_LEN, pairs, partial(causal, logits_soft_cap=30.0))

    lengths = document_lengths()
    of_documents = sum(n * (n + 1) / 2 for n in lengths)
    ends = jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)
    ids = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths), jnp.int32)
    slopes = 2.0 ** jnp.linspace(-1, -8, heads)
    window = partial(attention, local_window_size=(WINDOW - 1, 0))

    def packed(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention_varlen(q[0], k[0], v[0], cu_seqlens_q=ends, is_causal=True)[None]

    of_window = WINDOW * (SEQ_LEN - WINDOW) + WINDOW * (WINDOW + 1) / 2
    of_sinks = 4 * (SEQ_LEN - WINDOW)  # nearly: the first four tokens of each row beyond it
    return [
        plain(128),
        Case("window 1024", 128, SEQ_LEN, of_window, window),
        Case(
            "window 1024, 4 sink tokens",
            128,
            SEQ_LEN,
            of_window + of_sinks,
            partial(window, sink_tokens=4),
        ),
        Case(f"{len(lengths)} documents, packed", 128, PACKED_LEN, of_documents, packed),
        Case(
            f"{len(lengths)} documents, segments",
            128,
            PACKED_LEN,
            of_documents,
            partial(causal, segment_ids=ids),
        ),
        Case("ALiBi", 128, SEQ_LEN, pairs, partial(causal, alibi_slopes=slopes)),
        Case(
            "ALiBi, learned",
            128,
            SEQ_LEN,
            pairs,
            lambda q, k, v, slopes: causal(q, k, v, alibi_slopes=slopes),
            (slopes,),
        ),
        Case(
            "sinks",
            128,
            SEQ_LEN,
            pairs,
            lambda q, k, v, sinks: causal(q, k, v, sinks=sinks),
            (jnp.ones(heads),),
        ),
        capped(128),
        plain(64),
        capped(64),
        plain(256),
        capped(256),
    ]


def run(*, heads: int, speed: float) -> list[dict[str, Any]]:
    """Times every case, bfloat16, in alternation with plain causal; prints and returns rows.

    Args:
      heads: query and key heads.
      speed: about what the device does, FLOP/s; long calls are repeated less.
    """
    rows = []
    print("| pass | feature | head dim | S | ms | time per visible pair over causal |")
    print("|---|---|---|---|---|---|")
    plain: dict[int, tuple[Case, dict[str, Any]]] = {}
    for case in _cases(heads):
        shape = (1, case.seq_len, heads, case.head_dim)
        keys = jax.random.split(jax.random.key(0), 3)
        inputs = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
        flops = 4 * heads * case.visible * case.head_dim
        timed = timers(case.function, (*inputs, *case.more), repeats_for(flops / speed))
        if case.name == "causal":
            plain[case.head_dim] = case, timed
        base, base_timed = plain[case.head_dim]
        for op, timer in timed.items():
            pairs = [(timer(), base_timed[op]()) for _ in range(ROUNDS)]
            ratio = statistics.median(a / b for a, b in pairs) * base.visible / case.visible
            ms = 1e3 * statistics.median(a for a, _ in pairs)
            rows.append(
                {
                    "op": op,
                    "feature": case.name,
                    "head_dim": case.head_dim,
                    "heads": heads,
                    "seq_len": case.seq_len,
                    "dtype": "bfloat16",
                    "ms": ms,
                    "ratio_per_visible_pair": ratio,
                }
            )
            print(
                f"| {op} | {case.name} | {case.head_dim} | {case.seq_len} | {ms:.3f} | "
                f"{ratio:.2f} |",
                flush=True,
            )
    return rows
