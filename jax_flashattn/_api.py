"""The public functions: check, canonicalise, choose an implementation."""

import math
import warnings
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_flashattn import _reference, _spec, _vjp
from jax_flashattn._spec import AUX_NAMES, IMPLEMENTATIONS, AttentionSpec

Implementation = Literal["cuda", "cpu", "xla"]


@overload
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_offset: int | Literal["end"] | ArrayLike | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
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
    query_offset: int | Literal["end"] | ArrayLike | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
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
    query_offset: int | Literal["end"] | ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
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

    Under `is_causal` key j is visible to query i iff `j <= i + query_offset`::

        T = 3, S = 5         query_offset=0 (default)     query_offset='end'
                             x . . . .                    x x x . .
        x visible            x x . . .                    x x x x .
        . hidden             x x x . .                    x x x x x

    The default is top-left as in `jax.nn.dot_product_attention`; `'end'` is bottom-right as in
    FlashAttention, what decoding wants. Chunked prefill and sequence sharding are other offsets.

    Args:
      q: queries `[B, T, N, H]`, or `[T, N, H]`, or with more leading axes; float32, bfloat16 or
        float16.
      k: keys `[B, S, K, H]`, dtype and batch axes of q.
      v: values `[B, S, K, Hv]`, dtype and batch axes of q.
      scale: factor of the logits, a Python number; `1 / sqrt(H)` by default.
      is_causal: hide later keys, as drawn above.
      query_offset: position of query 0: an int, `'end'` (the sequence's keys minus its queries),
        or an int array, one value or one per sequence. None is 0, and warns if `is_causal` and
        T != S, where the alignment should be chosen.
      query_seq_lengths: int array `[B]` (or one value): queries from there on are padding. Their
        output is 0, their log-sum-exp -inf. Clamped to [0, T].
      key_value_seq_lengths: int array `[B]` (or one value): keys from there on are padding, hidden
        whatever they hold. Clamped to [0, S].
      return_lse: also return the log-sum-exp of each query's logits.
      deterministic: gradients are bitwise repeatable. On a GPU that costs time; on a CPU and in the
        forward pass, it is always so.
      implementation: None for the platform's own kernels; `'cuda'`, `'cpu'`, or `'xla'` (dense:
        memory grows with T * S, any differentiation). A named one is never replaced by another.
      bias: refused; see Raises.
      mask: refused; see Raises.

    Returns:
      Output `[B, T, N, Hv]` in q's dtype. With `return_lse`, also the log-sum-exp, float32, natural
      logarithm, `[B, N, T]` (`[N, T]` for 3-axis input). A query that sees no key has output 0,
      log-sum-exp -inf and gradient 0. Both are differentiable, in reverse mode.

    Raises:
      TypeError: a dtype that differs or isn't supported, a tracer where a Python number is needed.
      ValueError: shapes that don't fit together, an unknown implementation.
      UnsupportedError: `bias` or `mask` (a dense [T, S] array is what this function avoids), head
        dims over 512, a named implementation on another platform, forward-mode differentiation.
    """
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            raise _spec.UnsupportedError(
                f"{name} is not supported: a dense [T, S] array is what these kernels avoid. Use "
                "is_causal, query_offset and the sequence lengths where they say the same, or "
                "jax.nn.dot_product_attention"
            )
    return_lse = _spec.static_bool("return_lse", return_lse)
    call = prepare(
        q,
        k,
        v,
        scale=scale,
        is_causal=is_causal,
        query_offset=query_offset,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        deterministic=deterministic,
        implementation=implementation,
    )
    if 0 in call.q.shape or 0 in call.k.shape:
        out, lse = _nothing_to_see(call)
    elif implementation == "xla":
        out, lse = _reference.attention(*call)
    else:
        out, lse = _vjp.attention(*call)
    batch = jnp.shape(q)[:-3]
    out, lse = out.reshape(*batch, *out.shape[1:]), lse.reshape(*batch, *lse.shape[1:])
    return (out, lse) if return_lse else out


class Call(NamedTuple):
    """One call, canonical: what every backend takes."""

    spec: AttentionSpec
    q: jax.Array  # [B, T, N, H]
    k: jax.Array  # [B, S, K, H]
    v: jax.Array  # [B, S, K, Hv]
    aux: dict[str, jax.Array]  # int32 [B] each


def prepare(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: Any = None,
    is_causal: Any = False,
    query_offset: Any = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    deterministic: Any = False,
    implementation: Any = None,
) -> Call:
    """Checks the arguments of `attention` and brings them to their canonical form."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}"
        )
    q, k, v = (jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in (q, k, v))
    _spec.check_arrays(q, k, v, dense=implementation == "xla")
    is_causal = _spec.static_bool("is_causal", is_causal)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    scale = _spec.static_number("scale", scale, "multiply q by it instead")
    if scale <= 0:
        # Kernels take the maximum before they scale, which needs a positive factor.
        q, scale = q * jnp.asarray(math.copysign(1, scale) if scale else 0, q.dtype), -scale or 1.0

    batch, T, S = q.shape[:-3], q.shape[-3], k.shape[-3]
    if query_offset is None and is_causal and T != S:
        warnings.warn(
            f"causal attention with {T} queries and {S} keys and no query_offset: query 0 is at "
            "position 0 (top-left, as in jax.nn). Pass query_offset=0 to say so, or 'end' for "
            "FlashAttention's bottom-right alignment",
            stacklevel=3,
        )
    aux: dict[str, jax.Array] = {}
    if query_seq_lengths is not None:
        aux["q_lengths"] = _spec.int32_per_sequence("query_seq_lengths", query_seq_lengths, batch)
    if key_value_seq_lengths is not None:
        aux["kv_lengths"] = _spec.int32_per_sequence(
            "key_value_seq_lengths", key_value_seq_lengths, batch
        )
    offset = _query_offset(query_offset, aux, batch, T, S)
    if not isinstance(offset, int):
        aux["query_offset"] = offset
    if not is_causal:
        # Positions matter to the mask alone: without one, no operand and no recompilation.
        aux.pop("query_offset", None)

    spec = AttentionSpec(
        scale=scale,
        is_causal=is_causal,
        query_offset=offset if is_causal and isinstance(offset, int) else 0,
        aux=tuple(name for name in AUX_NAMES if name in aux),
        deterministic=_spec.static_bool("deterministic", deterministic),
        implementation=implementation,
    )
    B = math.prod(batch)
    q, k, v = (x.reshape(B, *x.shape[-3:]) for x in (q, k, v))
    return Call(spec, q, k, v, {name: x.reshape(B) for name, x in aux.items()})


def _nothing_to_see(call: Call) -> tuple[jax.Array, jax.Array]:
    """Results where there is no query or no key; nothing is launched."""
    B, T, N, _ = call.q.shape
    out = jnp.zeros((B, T, N, call.v.shape[-1]), call.q.dtype)
    return out, jnp.full((B, N, T), -jnp.inf, jnp.float32)


def _query_offset(
    query_offset: Any, aux: dict[str, jax.Array], batch: tuple[int, ...], T: int, S: int
) -> int | jax.Array:
    """The offset: an int where it is the same for all and known now, else int32 `batch`."""
    if query_offset is None:
        return 0
    if isinstance(query_offset, str):
        if query_offset != "end":
            raise ValueError(
                f"query_offset must be an int, 'end' or an int array, got {query_offset!r}"
            )
        if not aux:
            return S - T
        q_length = jnp.clip(aux.get("q_lengths", jnp.int32(T)), 0, T)
        kv_length = jnp.clip(aux.get("kv_lengths", jnp.int32(S)), 0, S)
        return jnp.broadcast_to(kv_length - q_length, batch)
    if isinstance(query_offset, (int, np.integer)) and not isinstance(query_offset, bool):
        info = np.iinfo(np.int32)
        return int(min(max(query_offset, info.min), info.max))
    return _spec.int32_per_sequence("query_offset", query_offset, batch)
