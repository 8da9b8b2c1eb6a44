"""The definition of attention, in plain jnp.

Every backend is tested against this function in float64. It is also `implementation='xla'`: the
logits are materialised, so memory grows with T * S, but it runs, differentiates (in both modes, any
order) and partitions wherever XLA does.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_flashattn._spec import AttentionSpec


def visible(spec: AttentionSpec, T: int, S: int, aux: Mapping[str, jax.Array]) -> jax.Array:
    """Which keys each query sees: bool, broadcastable to `[B, T, S]`."""
    i = jnp.arange(T, dtype=jnp.int32)[None, :, None]
    j = jnp.arange(S, dtype=jnp.int32)[None, None, :]
    mask = jnp.ones((1, T, S), bool)
    if spec.is_causal:
        # j - i <= offset, not j <= i + offset: the sum would overflow for a huge offset.
        mask &= j - i <= per_sequence(aux, "query_offset", spec.query_offset)
    if "q_lengths" in aux:
        mask &= i < per_sequence(aux, "q_lengths", T)
    if "kv_lengths" in aux:
        mask &= j < per_sequence(aux, "kv_lengths", S)
    return mask


def per_sequence(aux: Mapping[str, jax.Array], name: str, default: int) -> jax.Array:
    """The `[B, 1, 1]` array of that name, or the default."""
    return aux[name][:, None, None] if name in aux else jnp.asarray(default, jnp.int32)


def before_end(length: int, lengths: jax.Array) -> jax.Array:
    """Which of `length` positions are not padding: bool `[B, length, 1, 1]`."""
    return jnp.arange(length, dtype=jnp.int32)[None, :, None, None] < lengths[:, None, None, None]


def attention(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    aux: Mapping[str, jax.Array],
    *,
    softmax_dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Dense attention.

    Args:
      spec: static description of the call.
      q: `[B, T, N, H]`.
      k: `[B, S, K, H]`; query head n reads key head `n // (N // K)`.
      v: `[B, S, K, Hv]`.
      aux: the optional arrays, int32 `[B]` each: `query_offset`, `q_lengths`, `kv_lengths`.
      softmax_dtype: dtype of everything between the two matrix products, which accumulate in at
        least float32, its default. Tests set the inputs' dtype, for the low-precision twin.

    Returns:
      `out [B, T, N, Hv]` in q's dtype and the log-sum-exp `lse [B, N, T]` in at least float32. A
      query that sees nothing has output 0 and lse -inf.
    """
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    accumulator = q.dtype if q.dtype == jnp.float64 else jnp.dtype(jnp.float32)
    dtype = jnp.dtype(accumulator if softmax_dtype is None else softmax_dtype)
    # Padding may hold anything, NaN included, and 0 * NaN is NaN: it is zeroed, not only masked.
    if "q_lengths" in aux:
        q = jnp.where(before_end(T, aux["q_lengths"]), q, 0)
    if "kv_lengths" in aux:
        k = jnp.where(before_end(S, aux["kv_lengths"]), k, 0)
        v = jnp.where(before_end(S, aux["kv_lengths"]), v, 0)

    q = q.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=accumulator)
    logits = logits.astype(dtype) * jnp.asarray(spec.scale, dtype)
    mask = visible(spec, T, S, aux)[:, None, None]
    logits = jnp.where(mask, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    weights = (weights / total).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=accumulator)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0].astype(accumulator)
    return out.reshape(B, T, N, v.shape[-1]).astype(v.dtype), lse.reshape(B, N, T)
