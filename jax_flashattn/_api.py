"""The public functions: what they mean, and which implementation they run."""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_flashattn import _prepare, _reference, _spec, _vjp

Implementation = Literal["cuda", "cpu", "xla"]
Window = int | tuple[int | None, int | None] | None
Offset = int | Literal["end"] | ArrayLike | None
Accumulation = Literal["fast", "two_level"]
Schedule = Literal["grid", "persistent"]


@overload
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_offset: Offset = ...,
    local_window_size: Window = ...,
    sink_tokens: int = ...,
    sinks: jax.Array | None = ...,
    alibi_slopes: jax.Array | None = ...,
    logits_soft_cap: float | None = ...,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    schedule: Schedule | None = ...,
    sm_margin: int = ...,
    q_scale: ArrayLike | None = ...,
    k_scale: ArrayLike | None = ...,
    v_scale: ArrayLike | None = ...,
    out_dtype: DTypeLike | None = ...,
    fp8_accumulation: Accumulation | None = ...,
    implementation: Implementation | None = ...,
    bias: None = ...,
    mask: None = ...,
) -> jax.Array: ...


@overload
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_offset: Offset = ...,
    local_window_size: Window = ...,
    sink_tokens: int = ...,
    sinks: jax.Array | None = ...,
    alibi_slopes: jax.Array | None = ...,
    logits_soft_cap: float | None = ...,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    schedule: Schedule | None = ...,
    sm_margin: int = ...,
    q_scale: ArrayLike | None = ...,
    k_scale: ArrayLike | None = ...,
    v_scale: ArrayLike | None = ...,
    out_dtype: DTypeLike | None = ...,
    fp8_accumulation: Accumulation | None = ...,
    implementation: Implementation | None = ...,
    bias: None = ...,
    mask: None = ...,
) -> tuple[jax.Array, jax.Array]: ...


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: Offset = None,
    local_window_size: Window = None,
    sink_tokens: int = 0,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    logits_soft_cap: float | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    schedule: Schedule | None = None,
    sm_margin: int = 0,
    q_scale: ArrayLike | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    out_dtype: DTypeLike | None = None,
    fp8_accumulation: Accumulation | None = None,
    implementation: Implementation | None = None,
    bias: None = None,
    mask: None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Exact attention, `softmax(scale * q k^T) v`, in memory linear in the sequence length.

    Letters: B batch, T queries, S keys, N query heads, K key heads (N % K == 0), H head dim of q
    and k, Hv head dim of v. Query head n reads key head `n // (N // K)`: N == K is multi-head,
    K == 1 multi-query, anything between grouped-query attention. The method is FlashAttention-2
    (Dao, 2023, arXiv:2307.08691): tiles, an online softmax, and gradients recomputed from the
    log-sum-exp.

    Query i stands at position `i + query_offset`, key j at j. Under `is_causal` key j is visible to
    query i iff `j <= i + query_offset`::

        T = 3, S = 5         query_offset=0 (default)     query_offset='end'
                             x . . . .                    x x x . .
        x visible            x x . . .                    x x x x .
        . hidden             x x x . .                    x x x x x

    The default is top-left as in `jax.nn.dot_product_attention`; `'end'` is bottom-right as in
    FlashAttention, what decoding wants. Chunked prefill and sequence sharding are other offsets.

    A logit goes through scale, soft cap, ALiBi and mask, in this order. All masks hold at once. Two
    arguments have "sink" in their name: `sink_tokens` are keys that a window doesn't hide
    (StreamingLLM), `sinks` are learned logits without a key (gpt-oss). They may be combined.

    Args:
      q: queries `[B, T, N, H]`, or `[T, N, H]`, or with more leading axes; float32, bfloat16 or
        float16, or (forward only, on GPUs only on Hopper) float8_e4m3fn or float8_e5m2.
      k: keys `[B, S, K, H]`, dtype and batch axes of q. The two float8 dtypes may be mixed; and
        float8 keys and values may have bfloat16 or float16 queries (on any GPU; a cache that takes
        half the memory and half the time to read).
      v: values `[B, S, K, Hv]`, dtype and batch axes of q, with the same exceptions.
      scale: factor of the logits, a Python number; `1 / sqrt(H)` by default.
      is_causal: hide later keys, as drawn above.
      query_offset: position of query 0: an int, `'end'` (the sequence's keys minus its queries),
        or an int array, one value or one per sequence. None is 0, and warns if `is_causal` and
        T != S, where the alignment should be chosen.
      local_window_size: `(left, right)`: key j is visible iff `position - left <= j <= position +
        right`; None (or 2**31 and more) opens a side, an int is both sides. The last W tokens are
        `(W - 1, 0)`.
      sink_tokens: the first so many keys of the sequence are visible whatever the window, if
        causality, lengths and segments allow it (Xiao et al., 2023, arXiv:2309.17453).
      sinks: `[N]` floats, a logit per query head that adds `exp(sinks[n])` to the softmax's
        denominator and has no value; differentiable. Counts in the log-sum-exp.
      alibi_slopes: `[N]` or `[B, N]` floats: `slope * |position - j|` is subtracted from the logits
        (Press et al., 2021, arXiv:2108.12409); differentiable.
      logits_soft_cap: c of `c * tanh(logit / c)` (Gemma 2), a positive Python number.
      segment_ids: ints `[B, T]`, or a pair `[B, T]` and `[B, S]`: a key is visible iff its id is
        that of the query. Any ids in any order; sorted ones let whole blocks be skipped.
      query_seq_lengths: int array `[B]` (or one value): queries from there on are padding. Their
        output is 0, their log-sum-exp -inf. Clamped to [0, T].
      key_value_seq_lengths: int array `[B]` (or one value): keys from there on are padding, hidden
        whatever they hold. Clamped to [0, S].
      return_lse: also return the log-sum-exp of each query's logits.
      deterministic: gradients are bitwise repeatable. On a GPU that costs time; on a CPU and in the
        forward pass, it is always so.
      schedule: how the forward deals out tiles of queries on a GPU: 'grid' starts a CTA for each;
        'persistent', which Hopper's kernels alone have, as many CTAs as multiprocessors, which
        take one after the other. Neither changes a kernel's results. None leaves it to the kernel:
        persistent on Hopper, but a grid with segments, and for packed sequences of float8. Decoding
        calls share out keys in their own way, and ignore it, as do the backward, CPUs and 'xla'.
      sm_margin: so many of a GPU's multiprocessors are left to what runs at the same time, such as
        collectives. For the forward alone, which then is persistent, or decodes; one works in any
        case. 0 by default; ignored like `schedule`.
      q_scale: for float8 queries, what a stored value is multiplied with to give the true one: a
        number or floating array, one value or one per batch element and key head, `[B, K]`; 1 by
        default, not negative. Traced values compile nothing anew.
      k_scale: the same for float8 keys.
      v_scale: the same for float8 values.
      out_dtype: for float8 queries, the output's dtype: bfloat16 (by default) or float16.
      fp8_accumulation: for float8 queries on a GPU, how products with v are summed: 'fast' (the
        default) in the tensor cores, which keep about 14 bits of a sum; 'two_level' in float32,
        block of keys by block. docs/performance.md has the errors and the cost of both.
      implementation: None for the platform's own kernels; `'cuda'`, `'cpu'`, or `'xla'` (dense:
        memory grows with T * S, any differentiation). A named one is never replaced by another.
      bias: refused; see Raises.
      mask: refused; see Raises.

    Returns:
      Output `[B, T, N, Hv]` in q's dtype (`out_dtype` for float8). With `return_lse`, also the
      log-sum-exp, float32, natural logarithm, `[B, N, T]` (`[N, T]` for 3-axis input). A query that
      sees no key has output 0, log-sum-exp -inf (`sinks[n]` with sinks) and gradient 0. Both are
      differentiable, in reverse mode (float8 aside). Keys that only causality, window or segments
      hide must be finite; padding may be NaN.

    Raises:
      TypeError: a dtype that differs or isn't supported, a tracer where a Python number is needed,
        arrays sharded over sequence or head dim by explicit mesh axes.
      ValueError: shapes that don't fit together, a negative window, `sink_tokens` without window or
        causal mask, an unknown implementation or schedule, a negative `sm_margin` or one beside
        a grid, float8 options without float8 inputs.
      UnsupportedError: `bias` or `mask` (a dense [T, S] array is what this function avoids), head
        dims over 512, a named implementation on another platform, forward-mode differentiation;
        float8 inputs that are differentiated, or with head dims that aren't multiples of 16 up to
        256; a persistent schedule or an `sm_margin` where no Hopper kernel takes the call.
    """
    _refuse_dense_arrays(bias, mask)
    return_lse = _spec.static_bool("return_lse", return_lse)
    call = _prepare.dense(
        q,
        k,
        v,
        scale=scale,
        is_causal=is_causal,
        query_offset=query_offset,
        local_window_size=local_window_size,
        sink_tokens=sink_tokens,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        logits_soft_cap=logits_soft_cap,
        segment_ids=segment_ids,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        deterministic=deterministic,
        schedule=schedule,
        sm_margin=sm_margin,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        out_dtype=out_dtype,
        fp8_accumulation=fp8_accumulation,
        implementation=implementation,
    )
    return _run(call, jnp.shape(q)[:-3], return_lse)


@overload
def attention_varlen(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike | None = ...,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_offset: Offset = ...,
    local_window_size: Window = ...,
    sink_tokens: int = ...,
    sinks: jax.Array | None = ...,
    alibi_slopes: jax.Array | None = ...,
    logits_soft_cap: float | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    schedule: Schedule | None = ...,
    sm_margin: int = ...,
    q_scale: ArrayLike | None = ...,
    k_scale: ArrayLike | None = ...,
    v_scale: ArrayLike | None = ...,
    out_dtype: DTypeLike | None = ...,
    fp8_accumulation: Accumulation | None = ...,
    implementation: Implementation | None = ...,
    bias: None = ...,
    mask: None = ...,
) -> jax.Array: ...


@overload
def attention_varlen(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike | None = ...,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_offset: Offset = ...,
    local_window_size: Window = ...,
    sink_tokens: int = ...,
    sinks: jax.Array | None = ...,
    alibi_slopes: jax.Array | None = ...,
    logits_soft_cap: float | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    schedule: Schedule | None = ...,
    sm_margin: int = ...,
    q_scale: ArrayLike | None = ...,
    k_scale: ArrayLike | None = ...,
    v_scale: ArrayLike | None = ...,
    out_dtype: DTypeLike | None = ...,
    fp8_accumulation: Accumulation | None = ...,
    implementation: Implementation | None = ...,
    bias: None = ...,
    mask: None = ...,
) -> tuple[jax.Array, jax.Array]: ...


def attention_varlen(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: Offset = None,
    local_window_size: Window = None,
    sink_tokens: int = 0,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    schedule: Schedule | None = None,
    sm_margin: int = 0,
    q_scale: ArrayLike | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    out_dtype: DTypeLike | None = None,
    fp8_accumulation: Accumulation | None = None,
    implementation: Implementation | None = None,
    bias: None = None,
    mask: None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`attention` over sequences that are packed one after the other, without padding between them.

    Sequence s has the queries `cu_seqlens_q[s]` to `cu_seqlens_q[s + 1]` (exclusive) and the keys
    `cu_seqlens_kv[s]` to `cu_seqlens_kv[s + 1]`, and each query sees keys of its own sequence only.
    Positions, offsets, windows and sink tokens count from the start of each sequence. The number of
    tokens is static, the boundaries are not: changing them compiles nothing.

    Args:
      q: queries `[total_q, N, H]`, or with leading batch axes (each with its own boundaries).
      k: keys `[total_kv, K, H]`, dtype and batch axes of q.
      v: values `[total_kv, K, Hv]`, dtype and batch axes of q.
      cu_seqlens_q: ints `[n + 1]`, or with q's batch axes before: 0, then where each of n sequences
        ends. Tokens from the last end on are padding. What doesn't rise from 0 to at most total_q
        is made to: the first boundary is taken as 0, a boundary below the one before as equal to
        it (an empty sequence), one beyond the tokens as their end.
      cu_seqlens_kv: the same for k and v; by default `cu_seqlens_q`.
      scale: see `attention`.
      is_causal: see `attention`.
      query_offset: position of each sequence's first query: an int, `'end'` (keys minus queries of
        the sequence), or an int array, one value or one per sequence `[n]`. 0 by default.
      local_window_size: see `attention`.
      sink_tokens: see `attention`.
      sinks: see `attention`.
      alibi_slopes: see `attention`; `[N]`, or with q's batch axes before.
      logits_soft_cap: see `attention`.
      return_lse: also return the log-sum-exp, `[N, total_q]` after the batch axes.
      deterministic: see `attention`.
      schedule: see `attention`.
      sm_margin: see `attention`.
      q_scale: see `attention`; `[K]` where there are no batch axes.
      k_scale: the same.
      v_scale: the same.
      out_dtype: see `attention`.
      fp8_accumulation: see `attention`.
      implementation: see `attention`.
      bias: refused, as by `attention`.
      mask: refused, as by `attention`.

    Returns:
      As `attention`: output `[total_q, N, Hv]`, and with `return_lse` the log-sum-exp. Tokens of no
      sequence have output 0, log-sum-exp -inf and gradient 0.

    Raises:
      TypeError, ValueError, UnsupportedError: as `attention`; and ValueError where the boundaries'
        shapes don't fit.
    """
    _refuse_dense_arrays(bias, mask)
    return_lse = _spec.static_bool("return_lse", return_lse)
    call = _prepare.packed(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        scale=scale,
        is_causal=is_causal,
        query_offset=query_offset,
        local_window_size=local_window_size,
        sink_tokens=sink_tokens,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        logits_soft_cap=logits_soft_cap,
        deterministic=deterministic,
        schedule=schedule,
        sm_margin=sm_margin,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        out_dtype=out_dtype,
        fp8_accumulation=fp8_accumulation,
        implementation=implementation,
    )
    return _run(call, jnp.shape(q)[:-3], return_lse)


def _refuse_dense_arrays(bias: Any, mask: Any) -> None:
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            raise _spec.UnsupportedError(
                f"{name} is not supported: a dense [T, S] array is what these kernels avoid. Use "
                "is_causal, local_window_size, segment_ids, alibi_slopes and the sequence lengths "
                "where they say the same, or jax.nn.dot_product_attention"
            )


def _run(
    call: _prepare.Call, batch: tuple[int, ...], return_lse: bool
) -> jax.Array | tuple[jax.Array, jax.Array]:
    # Where there is no query or no key, nothing is launched: the definition fills the results.
    empty = 0 in call.q.shape or 0 in call.k.shape
    backend = _reference if empty or call.spec.implementation == "xla" else _vjp
    out, lse = backend.attention(*call)
    out, lse = out.reshape(*batch, *out.shape[1:]), lse.reshape(*batch, *lse.shape[1:])
    return (out, lse) if return_lse else out
