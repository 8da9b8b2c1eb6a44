"""The definition of attention, in plain jnp.

Every backend is tested against this function in float64. It is also `implementation='xla'`: the
logits are materialised, so memory grows with T * S, but it runs, differentiates (in both modes, any
order) and partitions wherever XLA does.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_flashattn import _fp8
from jax_flashattn._spec import AttentionSpec

Aux = Mapping[str, jax.Array]
INT32 = jnp.iinfo(jnp.int32)


class Tokens(NamedTuple):
    """Where each token of one side stands; int32, broadcastable to `[B, length]`."""

    position: jax.Array  # in its sequence
    sequence: jax.Array  # number of its sequence
    exists: jax.Array  # bool: not padding


def _tokens(length: int, ends: jax.Array | None, lengths: jax.Array | None) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None, :]
    if lengths is not None and lengths.ndim == 2:  # every sequence has as much room, paged or not
        num_sequences = lengths.shape[1]
        room = length // num_sequences
        sequence, position = index // room, index % room
        return Tokens(position, sequence, position < jnp.repeat(lengths, room, axis=1))
    if ends is None:
        exists = jnp.ones_like(index, bool) if lengths is None else index < lengths[:, None]
        return Tokens(index, jnp.zeros_like(index), exists)
    # Boundaries rise, so the number of ends passed is the sequence.
    sequence = jnp.sum(index[:, :, None] >= ends[:, None, 1:], axis=-1, dtype=jnp.int32)
    num_sequences = ends.shape[1] - 1
    begin = jnp.take_along_axis(ends, jnp.minimum(sequence, num_sequences - 1), axis=1)
    return Tokens(index - begin, sequence, sequence < num_sequences)


def tokens(T: int, S: int, aux: Aux) -> tuple[Tokens, Tokens]:
    """The places of queries and keys.

    Packed keys have boundaries, or, as those of paged calls, equal room and lengths `[B, n]`.
    """
    return (
        _tokens(T, aux.get("cu_seqlens_q"), aux.get("q_lengths")),
        _tokens(S, aux.get("cu_seqlens_kv"), aux.get("kv_lengths")),
    )


def _offsets(spec: AttentionSpec, queries: Tokens, aux: Aux) -> jax.Array:
    """The query offset of each query's sequence, `[B or 1, T or 1, 1]`."""
    if "query_offset" not in aux:
        return jnp.full((1, 1, 1), spec.query_offset, jnp.int32)
    offset = aux["query_offset"]
    if offset.ndim == 1:
        return offset[:, None, None]
    sequence = jnp.minimum(queries.sequence, offset.shape[1] - 1)
    return jnp.take_along_axis(offset, sequence, axis=1)[:, :, None]


def _pairs(queries: Tokens, keys: Tokens) -> jax.Array:
    """Key position minus query position, `[B or 1, T, S]`."""
    return keys.position[:, None, :] - queries.position[:, :, None]


def visible(spec: AttentionSpec, T: int, S: int, aux: Aux) -> jax.Array:
    """Which keys each query sees: bool, broadcastable to `[B, T, S]`."""
    queries, keys = tokens(T, S, aux)
    offset, distance = _offsets(spec, queries, aux), _pairs(queries, keys)
    mask = queries.exists[:, :, None] & keys.exists[:, None, :]
    mask &= queries.sequence[:, :, None] == keys.sequence[:, None, :]
    if spec.is_causal:
        mask &= distance <= offset
    if spec.mask_kind == "local":
        # Sums saturate: an offset or a window may be as large as int32 is.
        window = jnp.ones_like(mask)
        if spec.window_left is not None:
            overflow = offset < INT32.min + spec.window_left
            window &= distance >= jnp.where(overflow, INT32.min, offset - spec.window_left)
        if spec.window_right is not None:
            overflow = offset > INT32.max - spec.window_right
            window &= distance <= jnp.where(overflow, INT32.max, offset + spec.window_right)
        mask &= window | (keys.position[:, None, :] < spec.sink_tokens)
    if "q_segment_ids" in aux:
        mask &= aux["q_segment_ids"][:, :, None] == aux["kv_segment_ids"][:, None, :]
    return mask


def logits(
    spec: AttentionSpec, scores: jax.Array, T: int, S: int, aux: Aux
) -> tuple[jax.Array, jax.Array]:
    """Logits from `q k^T`, in its dtype and shape `[B, K, G, T, S]`.

    Returns:
      the logits, and the derivative of each by its score.
    """
    B, K, G = scores.shape[:3]
    dtype = scores.dtype
    x = scores * jnp.asarray(spec.scale, dtype)
    slope = jnp.full_like(x, spec.scale)
    if spec.soft_cap is not None:
        cap = jnp.asarray(spec.soft_cap, dtype)
        tanh = jnp.tanh(x / cap)
        x, slope = cap * tanh, slope * (1 - tanh * tanh)
    if "alibi_slopes" in aux:
        alibi = aux["alibi_slopes"].reshape(B, K, G, 1, 1).astype(dtype)
        x -= alibi * distances(spec, T, S, aux, dtype)[:, None, None]
    return x, slope


def distances(spec: AttentionSpec, T: int, S: int, aux: Aux, dtype: DTypeLike) -> jax.Array:
    """`|position of the query - position of the key|`, `[B or 1, T, S]`."""
    queries, keys = tokens(T, S, aux)
    # As floats: the sum with a huge offset overflows int32.
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    distance = _offsets(spec, queries, aux).astype(wide) - _pairs(queries, keys).astype(wide)
    return abs(distance).astype(dtype)


def zero_padding(x: jax.Array, exists: jax.Array) -> jax.Array:
    """`x [B, length, heads, dim]` with 0 where there is no token."""
    return jnp.where(exists[:, :, None, None], x, 0)


def attention(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    aux: Aux,
    *,
    softmax_dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Dense attention.

    Args:
      spec: static description of the call.
      q: `[B, T, N, H]`.
      k: `[B, S, K, H]`; query head n reads key head `n // (N // K)`.
      v: `[B, S, K, Hv]`.
      aux: the optional arrays, as `_spec.AUX_NAMES` says.
      softmax_dtype: dtype of everything between the two matrix products, which accumulate in at
        least float32, its default. Tests set the inputs' dtype, for the low-precision twin.

    Returns:
      `out [B, T, N, Hv]` in q's dtype (`spec.out_dtype` for float8) and the log-sum-exp
      `lse [B, N, T]` in at least float32. A query that sees nothing has output 0 and lse -inf, or
      the logit of its sink.
    """
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    out_dtype = spec.out_dtype or q.dtype
    if _fp8.is_fp8(k):
        q, k, v = _fp8.dequantize(q, k, v, aux)
    accumulator = q.dtype if q.dtype == jnp.float64 else jnp.dtype(jnp.float32)
    dtype = jnp.dtype(accumulator if softmax_dtype is None else softmax_dtype)
    queries, keys = tokens(T, S, aux)
    # Padding may hold anything, NaN included, and 0 * NaN is NaN: it is zeroed, not only masked.
    if "q_lengths" in aux or "cu_seqlens_q" in aux:
        q = zero_padding(q, queries.exists)
    if "kv_lengths" in aux or "cu_seqlens_kv" in aux:
        k, v = zero_padding(k, keys.exists), zero_padding(v, keys.exists)

    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=accumulator)
    x, _ = logits(spec, scores.astype(dtype), T, S, aux)
    x = jnp.where(visible(spec, T, S, aux)[:, None, None], x, -jnp.inf)
    top = jnp.max(x, axis=-1, keepdims=True, initial=-jnp.inf)
    sink = jnp.full((1, 1, 1, 1, 1), -jnp.inf, dtype)
    if "sinks" in aux:
        sink = aux["sinks"].reshape(B, K, N // K, 1, 1).astype(dtype)
        sink = jnp.where(queries.exists[:, None, None, :, None], sink, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(top, sink))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(x - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    weights = (weights / total).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=accumulator)
    out = out.reshape(B, T, N, v.shape[-1])
    if "q_lengths" in aux or "cu_seqlens_q" in aux:
        out = zero_padding(out, queries.exists)  # for the cotangents of padding, whatever they are
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0].astype(accumulator)
    return out.astype(out_dtype), lse.reshape(B, N, T)


def paged_attention(
    spec: AttentionSpec,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    aux: Aux,
    *,
    layout: str,
) -> tuple[jax.Array, jax.Array]:
    """`attention` over keys in pages: gathers them, and so takes the memory that paging saves.

    Args:
      spec: static description of the call.
      q: `[B, T, N, H]`.
      k_pages: `[num_pages, page_size, K, H]` ('NHD') or `[num_pages, K, page_size, H]` ('HND').
      v_pages: the same with Hv.
      aux: the optional arrays, with `page_table` and `kv_lengths`.
      layout: 'NHD' or 'HND'.

    Returns:
      as `attention`.
    """
    dense = {name: x for name, x in aux.items() if name != "page_table"}
    table = jnp.clip(aux["page_table"], 0, k_pages.shape[0] - 1)
    B = table.shape[0]

    def gather(pages: jax.Array) -> jax.Array:
        if layout == "HND":
            pages = pages.swapaxes(1, 2)
        tokens = pages[table]  # [B, M, page_size, K, H], or n before M
        return tokens.reshape(B, math.prod(tokens.shape[1:-2]), *tokens.shape[-2:])

    return attention(spec, q, gather(k_pages), gather(v_pages), dense)
