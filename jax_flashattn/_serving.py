"""Attention over a paged cache, and merging of partial results."""

from collections.abc import Iterable
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_flashattn import _paged, _prepare, _reference, _spec
from jax_flashattn._api import Implementation, Offset, Window
from jax_flashattn._kv_cache import PagedKVCache


@overload
def paged_attention(
    q: jax.Array,
    cache: PagedKVCache,
    *,
    cu_seqlens_q: ArrayLike | None = ...,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_offset: Offset = ...,
    local_window_size: Window = ...,
    sink_tokens: int = ...,
    sinks: jax.Array | None = ...,
    alibi_slopes: jax.Array | None = ...,
    logits_soft_cap: float | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation | None = ...,
) -> jax.Array: ...


@overload
def paged_attention(
    q: jax.Array,
    cache: PagedKVCache,
    *,
    cu_seqlens_q: ArrayLike | None = ...,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_offset: Offset = ...,
    local_window_size: Window = ...,
    sink_tokens: int = ...,
    sinks: jax.Array | None = ...,
    alibi_slopes: jax.Array | None = ...,
    logits_soft_cap: float | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    return_lse: Literal[True],
    implementation: Implementation | None = ...,
) -> tuple[jax.Array, jax.Array]: ...


def paged_attention(
    q: jax.Array,
    cache: PagedKVCache,
    *,
    cu_seqlens_q: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    query_offset: Offset = "end",
    local_window_size: Window = None,
    sink_tokens: int = 0,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    logits_soft_cap: float | None = None,
    query_seq_lengths: ArrayLike | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of new queries over a paged cache (PagedAttention, arXiv:2309.06180).

    The keys of the queries have been appended before, so that by default a sequence's last query
    stands at its last key: decoding is T = 1, a chunk of a prompt on top of what is cached is
    T > 1, and packed queries mix both in one call. Meaning and letters are those of `attention`;
    positions count from the start of each sequence, the keys are `cache.lengths[b]` tokens.

    Pages are read where they lie. Nothing out of bounds is read whatever the cache holds: page
    numbers are clamped to [0, num_pages), lengths to [0, capacity]; entries of the table beyond a
    sequence's length are not looked at, and what pages hold beyond it may be NaN. The dense
    `implementation='xla'` gathers the pages. Sharded over heads or, with pools of their own, over
    sequences, use `jax.shard_map`; where the compiler alone divides a CPU call, it gathers.

    Args:
      q: queries `[B, T, N, H]`, or `[total, N, H]` with `cu_seqlens_q`; float32, bfloat16 or
        float16, the dtype of the pages. Over float8 pages bfloat16 or float16, and head dims must
        be multiples of 16 up to 256.
      cache: B sequences with K key heads, N % K == 0.
      cu_seqlens_q: ints `[B + 1]`: where each sequence's queries begin and end, as in
        `attention_varlen`. A sequence may have none.
      scale: see `attention`.
      is_causal: hide later keys; on by default.
      query_offset: position of each sequence's first query: `'end'` (its length minus its queries,
        the default), an int, or an int array, one value or one per sequence; None is 0.
      local_window_size: see `attention`.
      sink_tokens: see `attention`.
      sinks: see `attention`.
      alibi_slopes: `[N]` floats, or `[B, N]` (packed, `[N]` only); see `attention`.
      logits_soft_cap: see `attention`.
      query_seq_lengths: ints `[B]` (or one value), not with `cu_seqlens_q`: queries from there on
        are padding, and `'end'` counts those before only. Clamped to [0, T].
      return_lse: also return the log-sum-exp.
      implementation: see `attention`.

    Returns:
      Output `[B, T, N, Hv]` (`[total, N, Hv]`) in q's dtype. With `return_lse` also the
      log-sum-exp, float32, `[B, N, T]` (`[N, total]`). A query that sees no key, as of a sequence
      of length 0, has output 0 and log-sum-exp -inf (`sinks[n]` with sinks).

    Raises:
      TypeError: a dtype that isn't supported or isn't that of the pages, a tracer where a Python
        number is needed.
      ValueError: shapes that don't fit together, and as `attention`.
      UnsupportedError: differentiation, except of `implementation='xla'`; head dims over 512; a
        named implementation on another platform; float8 queries.
    """
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache must be a PagedKVCache, got {type(cache).__name__}")
    return_lse = _spec.static_bool("return_lse", return_lse)
    call = _prepare.paged(
        q,
        cache.k_pages,
        cache.v_pages,
        cache.page_table,
        cache.lengths,
        cache.layout,
        k_scale=cache.k_scale,
        v_scale=cache.v_scale,
        cu_seqlens_q=cu_seqlens_q,
        scale=scale,
        is_causal=is_causal,
        query_offset=query_offset,
        local_window_size=local_window_size,
        sink_tokens=sink_tokens,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        logits_soft_cap=logits_soft_cap,
        query_seq_lengths=query_seq_lengths,
        implementation=implementation,
    )
    # Without a query nothing is launched: the definition makes the empty results.
    dense = 0 in call.q.shape or implementation == "xla"
    run = _reference.paged_attention if dense else _paged.attention
    out, lse = run(*call, layout=cache.layout)
    if cu_seqlens_q is not None:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def merge_attention(
    parts: Iterable[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """Merges results of the same queries over disjoint sets of keys into those over all keys.

    `out = sum_i exp(lse_i - lse) out_i` with `lse = log sum_i exp(lse_i)`: what one call over the
    union gives, up to rounding (split keys, a prefix that many sequences share, ring attention).
    Learned `sinks` count in the log-sum-exp: give them to one of the parts only.

    Args:
      parts: pairs `(out, lse)` as `return_lse=True` gives: `out [..., T, N, Hv]` of one floating
        dtype and `lse [..., N, T]`, all of the same shapes.

    Returns:
      The merged pair, in the dtypes of the parts. Where every log-sum-exp is -inf, the output is 0
      and the log-sum-exp -inf. Plain jnp: differentiable in any mode.

    Raises:
      TypeError: the parts differ in dtype.
      ValueError: no part, or shapes that differ or don't belong together.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("parts must have at least 1 pair (out, lse), got none")
    first = parts[0][0]
    for i, (out, lse) in enumerate(parts):
        if out.ndim < 3 or out.shape != first.shape:
            raise ValueError(
                f"out of part {i} must have the shape [..., T, N, Hv] of part 0, "
                f"{tuple(first.shape)}, got {tuple(out.shape)}"
            )
        if out.dtype != first.dtype:
            raise TypeError(
                f"out of part {i} must have the dtype of part 0, {first.dtype}, got {out.dtype}"
            )
        shape = (*first.shape[:-3], first.shape[-2], first.shape[-3])
        if lse.shape != shape:
            raise ValueError(
                f"lse of part {i} must have shape {shape}, [..., N, T], got {tuple(lse.shape)}"
            )
    lses = jnp.stack([lse for _, lse in parts])
    top = jax.lax.stop_gradient(jnp.max(lses, axis=0))
    # -inf - (-inf) would be NaN, and so would be the derivative of the logarithm at 0.
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lses - top[None])
    total = jnp.sum(weights, axis=0)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    shares = (weights / total[None]).swapaxes(-1, -2)[..., None]
    outs = jnp.stack([out for out, _ in parts]).astype(shares.dtype)
    return jnp.sum(shares * outs, axis=0).astype(first.dtype), lse
