"""Serving on a GPU: decoding from dense and paged caches beside cuDNN, and chunked prefill.

Decoding is bound by reading K and V, so its figure is their bytes over time; chunks are compared
with the forward over the same keys without pages. Ours and the peers' alternate.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn._api import attention
from jax_flashattn._kv_cache import PagedKVCache
from jax_flashattn._serving import paged_attention
from jax_flashattn._timing import LEAST_SECONDS, Timer, forward_timer, repeats_for

ROUNDS = 5
BANDWIDTH = 3e12  # about what the device reads, bytes per second
SPEED = 5e14
PAGE_SIZES = (16, 128)

Case = tuple[int, int, int, int, int]  # batch, keys, query heads, key heads, head dim
BATCHES = [(1, 131072), (4, 32768), (32, 8192), (128, 2048), (8, 4096), (1, 8192)]
DECODE_CASES: list[Case] = [
    *((B, S, 32, 8, D) for D in (128, 64) for B, S in BATCHES),
    *((B, S, 64, 8, D) for D in (128, 64) for B, S in BATCHES[2:4]),
    *((B, S // 4, 32, 32, D) for D in (128, 64) for B, S in BATCHES[2:4]),
    *((B, S, 128, 1, 128) for B, S in ((64, 8192), (4, 32768))),
    (1, 1024, 32, 8, 128),
    (16, 512, 32, 8, 128),
]
FP8_CASES: list[Case] = [(B, S, 32, 8, D) for D in (128, 64) for B, S in BATCHES[:4]]
CHUNKS = [(chunk, prefix) for chunk in (512, 2048) for prefix in (8192, 32768)]


def _keys(case: Case) -> tuple[jax.Array, jax.Array]:
    B, S, _, K, D = case
    of_k, of_v = jax.random.split(jax.random.key(0))
    k = jax.random.normal(of_k, (B, S, K, D), jnp.bfloat16)
    return k, jax.random.normal(of_v, (B, S, K, D), jnp.bfloat16)


def _paged(k: jax.Array, v: jax.Array, page_size: int, lengths: Any) -> PagedKVCache:
    """The same memory as pages in random order."""
    B, S, K, D = k.shape
    pages = S // page_size
    table = np.random.default_rng(0).permutation(B * pages).reshape(B, pages)
    k, v = (x.reshape(B * pages, page_size, K, D) for x in (k, v))
    return PagedKVCache(k, v, jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32))


def _decode_paged(
    q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, lengths: jax.Array
) -> jax.Array:
    return paged_attention(q, PagedKVCache(k, v, table, lengths))


def _timer_of_pages(q: jax.Array, cache: PagedKVCache, repeats: int) -> Timer:
    arrays = cache.k_pages, cache.v_pages, cache.page_table, cache.lengths
    return forward_timer(_decode_paged, (q, *arrays), repeats)


def _alternate(timed: dict[Any, Timer]) -> dict[Any, list[float]]:
    rounds = [{name: timer() for name, timer in timed.items()} for _ in range(ROUNDS)]
    return {name: [r[name] for r in rounds] for name in timed}


def _row(op: str, impl: str, case: Case, seconds: float, **more: Any) -> dict[str, Any]:
    B, S, N, K, D = case
    return {
        "op": op,
        "impl": impl,
        "head_dim": D,
        "head_dim_v": D,
        "heads": N,
        "kv_heads": K,
        "batch": B,
        "seq_q": 1,
        "seq_kv": S,
        "causal": op != "decode",
        "dtype": "bfloat16",
        "feature": "plain",
        "ms": seconds * 1e3,
        **more,
    }


def _decode(case: Case) -> list[dict[str, Any]]:
    B, S, N, _, D = case
    k, v = _keys(case)
    q = jax.random.normal(jax.random.key(1), (B, 1, N, D), jnp.bfloat16)
    moved = k.nbytes + v.nbytes
    # Short calls need many in a program, or starting it counts.
    repeats = min(256, math.ceil(LEAST_SECONDS / (moved / BANDWIDTH + 5e-6)))
    cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn")
    timed = {
        "jax_flashattn": forward_timer(attention, (q, k, v), repeats),
        "jax_cudnn": forward_timer(cudnn, (q, k, v), repeats),
    }
    for page_size in PAGE_SIZES:
        cache = _paged(k, v, page_size, np.full(B, S))
        timed[f"pages of {page_size}"] = _timer_of_pages(q, cache, repeats)
    found = _alternate(timed)
    ours = found["jax_flashattn"]
    rows = []
    for name, seconds in found.items():
        pages = name.startswith("pages")
        row = _row(
            "paged_decode" if pages else "decode",
            "jax_flashattn" if pages else name,
            case,
            statistics.median(seconds),
            gbs=moved / statistics.median(seconds) / 1e9,
        )
        if pages:
            row["feature"] = name
        if name != "jax_flashattn":
            ratio = statistics.median(b / a for a, b in zip(ours, seconds, strict=True))
            row["our_dense_speedup"] = ratio
        rows.append(row)
    return rows


def _fp8_decode(case: Case) -> list[dict[str, Any]]:
    """Keys and values of 8 bits beside the same of 16, dense and in pages."""
    B, S, N, _, D = case
    k, v = _keys(case)
    keys = {
        jnp.dtype(x).name: (k.astype(x), v.astype(x)) for x in (jnp.bfloat16, jnp.float8_e4m3fn)
    }
    q = jax.random.normal(jax.random.key(1), (B, 1, N, D), jnp.bfloat16)
    timed, moved, page_size = {}, {}, PAGE_SIZES[0]
    for dtype, (k, v) in keys.items():
        moved[dtype] = k.nbytes + v.nbytes
        repeats = min(256, math.ceil(LEAST_SECONDS / (moved[dtype] / BANDWIDTH + 5e-6)))
        timed[dtype, "plain"] = forward_timer(attention, (q, k, v), repeats)
        cache = _paged(k, v, page_size, np.full(B, S))
        timed[dtype, f"pages of {page_size}"] = _timer_of_pages(q, cache, repeats)
    found = _alternate(timed)
    rows = []
    for (dtype, feature), seconds in found.items():
        time, wide = statistics.median(seconds), found["bfloat16", feature]
        ratio = statistics.median(b / a for a, b in zip(seconds, wide, strict=True))
        op = "decode" if feature == "plain" else "paged_decode"
        row = _row(op, "jax_flashattn", case, time, gbs=moved[dtype] / time / 1e9)
        rows.append({**row, "feature": feature, "dtype": dtype, "speedup_over_bf16": ratio})
    return rows


def _mixed_lengths() -> list[dict[str, Any]]:
    """Log-normal lengths, and equal ones of the same sum."""
    B, S, page_size = 64, 32768, 16
    case = (B, S, 32, 8, 128)
    rng = np.random.default_rng(0)
    mixed = np.clip(rng.lognormal(8, 1, B), 16, S).astype(int) // page_size * page_size
    equal = np.full(B, mixed.sum() // B // page_size * page_size)
    k, v = _keys((B, S // 4, 32, 8, 128))  # pages are shared: few of the table are in use
    q = jax.random.normal(jax.random.key(1), (B, 1, 32, 128), jnp.bfloat16)
    pages = np.random.default_rng(0).permutation(B * S // 4 // page_size)
    timed = {}
    for name, lengths in (("equal lengths", equal), ("log-normal lengths", mixed)):
        cache = _paged(k, v, page_size, lengths)
        table, first = np.zeros((B, S // page_size), np.int32), 0
        for b, n in enumerate(lengths // page_size):
            table[b, :n] = np.take(pages, range(first, first + n), mode="wrap")
            first += n
        cache = PagedKVCache(cache.k_pages, cache.v_pages, jnp.asarray(table), cache.lengths)
        timed[name] = _timer_of_pages(q, cache, 20)
    rows = []
    sums = {"equal lengths": equal.sum(), "log-normal lengths": mixed.sum()}
    for name, seconds in _alternate(timed).items():
        moved = int(sums[name]) * 8 * 128 * 2 * 2
        time = statistics.median(seconds)
        row = _row("paged_decode", "jax_flashattn", case, time, gbs=moved / time / 1e9)
        rows.append({**row, "feature": f"pages of {page_size}, {name}"})
    return rows


def _chunk(chunk: int, prefix: int) -> list[dict[str, Any]]:
    """A chunk of prefill over pages, and the forward on the same shape without."""
    S, N, K, D = prefix + chunk, 32, 8, 128
    case = (1, S, N, K, D)
    k, v = _keys(case)
    q = jax.random.normal(jax.random.key(1), (1, chunk, N, D), jnp.bfloat16)
    flops = 4 * N * D * (chunk * prefix + chunk * (chunk + 1) / 2)
    repeats = repeats_for(flops / SPEED)
    dense = partial(attention, is_causal=True, query_offset="end")
    timed = {"plain": forward_timer(dense, (q, k, v), repeats)}
    for page_size in PAGE_SIZES:
        cache = _paged(k, v, page_size, [S])
        timed[f"pages of {page_size}"] = _timer_of_pages(q, cache, repeats)
    rows = []
    for name, seconds in _alternate(timed).items():
        time = statistics.median(seconds)
        row = _row("prefill", "jax_flashattn", case, time, tflops=flops / time / 1e12)
        rows.append({**row, "seq_q": chunk, "feature": name})
    return rows


def run(*, cases: list[Case] | None = None) -> list[dict[str, Any]]:
    """Times every case; prints and returns rows."""
    rows: list[dict[str, Any]] = []
    print("| op | batch | keys | heads | head dim | feature | impl | us | GB/s or TF/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    jobs: list[Callable[[], list[dict[str, Any]]]] = [
        *(partial(_decode, case) for case in (DECODE_CASES if cases is None else cases)),
        *(partial(_fp8_decode, case) for case in (FP8_CASES if cases is None else [])),
        _mixed_lengths,
        *(partial(_chunk, *x) for x in CHUNKS),
    ]
    for job in jobs:
        for row in job():
            rows.append(row)
            rate = row.get("gbs") or row["tflops"]
            print(
                f"| {row['op']} | {row['batch']} | {row['seq_kv']} | {row['heads']}/"
                f"{row['kv_heads']} | {row['head_dim']} | {row['feature']} | {row['impl']} | "
                f"{row['ms'] * 1e3:.1f} | {rate:.0f} |",
                flush=True,
            )
    return rows
