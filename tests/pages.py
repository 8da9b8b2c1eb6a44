"""Paged caches made in numpy from dense keys, and paged attention checked by the oracle."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import oracle
import oracle_fp8
from jax_flashattn import PagedKVCache, paged_attention
from tolerances import assert_close

NO_PAGE = (-7, 2**31 - 1, -(2**31))


def make_cache(
    k: np.ndarray,
    v: np.ndarray,
    lengths: Any,
    *,
    page_size: int,
    layout: str = "NHD",
    seed: int = 0,
    max_pages: int | None = None,
) -> PagedKVCache:
    """The cache that holds `k [B, S, K, H]` and `v` up to `lengths`, in pages in random order.

    Everything that must not be read is NaN, every unused entry of the table no page.
    """
    rng = np.random.default_rng(seed)
    B, S = k.shape[:2]
    max_pages = max_pages or -(-S // page_size)
    used = [-(-int(n) // page_size) for n in lengths]
    num_pages = sum(used) + 3
    numbers = iter(rng.permutation(num_pages))
    table = rng.choice(np.array(NO_PAGE, np.int32), (B, max_pages))
    pools = [np.full((num_pages, page_size, *x.shape[2:]), np.nan, np.float32) for x in (k, v)]
    for b, n in enumerate(lengths):
        for column in range(used[b]):
            page = table[b, column] = next(numbers)
            begin = column * page_size
            end = min(begin + page_size, int(n))
            for pool, x in zip(pools, (k, v), strict=True):
                pool[page, : end - begin] = x[b, begin:end].astype(np.float32)
    if layout == "HND":
        pools = [pool.swapaxes(1, 2) for pool in pools]
    pools = [jnp.asarray(pool).astype(k.dtype) for pool in pools]
    return PagedKVCache(*pools, jnp.asarray(table), jnp.asarray(lengths, jnp.int32), layout)


@partial(jax.jit, static_argnames="options")
def run(q, cache, arrays, options):
    return paged_attention(q, cache, return_lse=True, **dict(options), **arrays)


def pack(x: np.ndarray, lengths: Any) -> np.ndarray:
    """`[1, total + 1, ...]` from `[B, length, ...]`; the last token belongs to no sequence."""
    return np.concatenate([*(x[b, :n] for b, n in enumerate(lengths)), x[0, :1]])[None]


def boundaries(lengths: Any) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def check(q, k, v, lengths, cache: PagedKVCache, *, cu_seqlens_q=None, **options) -> None:
    """Compares `paged_attention` with the oracle on the dense keys.

    Args:
      q: `[B, T, N, H]`, or `[total, N, H]` with `cu_seqlens_q`.
      k: what the cache holds, `[B, S, K, H]`.
      v: likewise.
      lengths: of the sequences.
      cache: the cache.
      cu_seqlens_q: boundaries of packed queries.
      **options: arguments of `paged_attention`.
    """
    arrays = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    static = tuple((name, x) for name, x in options.items() if name not in arrays)
    expected = {"is_causal": True, "query_offset": "end", **options}
    if cu_seqlens_q is None:
        dense = q, k, v
        expected["key_value_seq_lengths"] = np.asarray(lengths)
    else:
        arrays["cu_seqlens_q"] = cu_seqlens_q
        dense = q[None], pack(k, lengths), pack(v, lengths)
        expected |= dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=boundaries(lengths))
        if isinstance(expected["query_offset"], np.ndarray):
            expected["query_offset"] = expected["query_offset"][None]
    (B, T, N, _), Hv = dense[0].shape, v.shape[-1]
    if k.dtype in oracle_fp8.DTYPES:
        scales = dict(k_scale=cache.k_scale, v_scale=cache.v_scale)
        exact, twin = oracle_fp8.references(*dense, **scales, **expected)
    else:
        zeros = np.zeros((B, T, N, Hv), q.dtype), np.zeros((B, N, T), np.float32)
        exact, twin, _ = oracle.references(*dense, *zeros, **expected)
    got = run(jnp.asarray(q), cache, arrays, static)
    for name, x, reference, low in zip(("out", "lse"), got, exact, twin, strict=False):
        assert x.dtype == (q.dtype if name == "out" else jnp.float32), name
        packed = cu_seqlens_q is not None
        assert_close(x[None] if packed else x, reference, low, dtype=q.dtype, what=name)


@partial(jax.jit, donate_argnums=0)
def generate(cache: PagedKVCache, q, k, v) -> tuple[PagedKVCache, jax.Array]:
    """Appends and attends token by token, in one program that takes the cache's memory."""

    def step(cache, token):
        q, k, v = (x[:, None] for x in token)
        cache = cache.append(k, v)
        return cache, paged_attention(q, cache)[:, 0]

    cache, out = jax.lax.scan(step, cache, tuple(x.swapaxes(0, 1) for x in (q, k, v)))
    return cache, out.swapaxes(0, 1)


def check_generated(out: Any, expected: Any) -> None:
    """Compares bfloat16 outputs around 1: an ulp or two."""
    difference = np.asarray(out, np.float32) - np.asarray(expected, np.float32)
    assert np.abs(difference).max() < 2**-6


def check_clamped(q, k, v, **options) -> None:
    """Page numbers and lengths of any value give what those clamped into range give, bit by bit.

    Three sequences of 64 keys.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    cache = make_cache(np.asarray(k), np.asarray(v), [64] * 3, page_size=8, max_pages=8)
    k_pages, v_pages = (jnp.nan_to_num(x) for x in (cache.k_pages, cache.v_pages))
    wild = np.array([[-1, 10**9] * 4, [2**31 - 1, -(2**31)] * 4, [0, 1, 2, 3, 4, 5, 6, 27]])
    table, lengths = jnp.asarray(wild, jnp.int32), jnp.array([2**31 - 1, 64, -5], jnp.int32)
    tame = jnp.clip(table, 0, cache.num_pages - 1), jnp.clip(lengths, 0, 64)
    call = jax.jit(
        lambda table, lengths: paged_attention(
            q, PagedKVCache(k_pages, v_pages, table, lengths), return_lse=True, **options
        )
    )
    for x, y in zip(call(table, lengths), call(*tame), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def _options(choose: Any, T: int, N: int, S: int, rng: np.random.Generator) -> dict[str, Any]:
    maybe = lambda f: f() if choose([False, True]) else None
    is_causal = choose([True, True, False])
    window = choose([None, (20, 0), (9, 3), (None, 5), 70])
    options = {
        "is_causal": is_causal,
        "local_window_size": window,
        "sink_tokens": choose([0, 3, 70]) if is_causal or window else 0,
        "logits_soft_cap": maybe(lambda: 5.0),
        "alibi_slopes": maybe(lambda: rng.uniform(-0.02, 0.5, N).astype(np.float32)),
        "sinks": maybe(lambda: rng.normal(size=N).astype(np.float32)),
        "scale": maybe(lambda: -0.3),
        "query_offset": choose(["end", "end", 0, 11, rng.integers(-9, S, 3).astype(np.int32)]),
    }
    return {name: x for name, x in options.items() if x is not None}


def with_scales(cache: PagedKVCache, k_scale: Any, v_scale: Any) -> PagedKVCache:
    """The cache with scales that are None, scalars or one value per key head."""
    scales = (None if x is None else jnp.asarray(x, jnp.float32) for x in (k_scale, v_scale))
    return dataclasses.replace(cache, **dict(zip(("k_scale", "v_scale"), scales, strict=True)))


def check_any(
    choose: Any, heads: tuple[int, ...], T: list[int], S: int, dtype: Any, kv_dtype: Any = None
) -> None:
    """Checks a call that `choose` draws: three sequences of up to S keys and one of T queries.

    `heads` are N, K, H and Hv; `kv_dtype` is an 8-bit one of keys and values.
    """
    T, seed = choose(T), choose(range(1000))
    rng = np.random.default_rng(seed)
    q, k, v = oracle.make_inputs(seed, 3, T, S, *heads, dtype)[:3]
    k, v = (x if kv_dtype is None else x.astype(kv_dtype) for x in (k, v))
    lengths = [choose([0, 1, 8, S // 3, 64, S - 1, S]) for _ in range(3)]
    cache = make_cache(
        k, v, lengths, page_size=choose([8, 32, 128]), layout=choose(["NHD", "HND"]), seed=seed
    )
    if kv_dtype is not None:
        per_head = rng.uniform(0.3, 2, heads[1])
        cache = with_scales(cache, choose([None, 0.5, per_head]), choose([None, 2.0, per_head]))
    options = _options(choose, T, heads[0], S, rng)
    form = choose(["whole", "padded", "packed"])
    if form == "padded":
        options["query_seq_lengths"] = np.array([choose([0, 1, T, T + 3]) for _ in range(3)])
    if form == "packed":
        q_lengths = [choose([0, 1, 1, T // 2, T]) for _ in range(3)]
        q = q.reshape(-1, *q.shape[2:])  # 3 T tokens, with a tail
        options["cu_seqlens_q"] = boundaries(q_lengths)
    check(q, k, v, lengths, cache, **options)
