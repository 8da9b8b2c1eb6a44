"""What the layers of NNX and Linen share: everything but their parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashattn._api import attention


@dataclasses.dataclass(frozen=True)
class Options:
    """How a layer attends; the names are those of `jax_flashattn.attention`."""

    is_causal: bool
    local_window_size: Any
    sink_tokens: int
    logits_soft_cap: float | None
    rope_theta: float | None
    implementation: Any

    def _arguments(self) -> dict[str, Any]:
        return {
            "is_causal": self.is_causal,
            "local_window_size": self.local_window_size,
            "sink_tokens": self.sink_tokens,
            "logits_soft_cap": self.logits_soft_cap,
            "implementation": self.implementation,
        }


def check_heads(num_heads: int, num_kv_heads: int | None) -> int:
    """The number of key heads; ValueError unless it divides that of the query heads."""
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
        )
    return num_kv_heads


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864), halves rotated.

    Args:
      x: `[*B, T, N, H]`, H even.
      positions: ints, `[T]` or `[*B, T]`.
      theta: base of the wave lengths.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    angles = angles.reshape((1,) * (x.ndim - angles.ndim) + angles.shape)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    sinks: jax.Array | None,
    segment_ids: jax.Array | None,
    seq_lengths: jax.Array | None,
    positions: jax.Array | None,
) -> jax.Array:
    """Self-attention of whole sequences; `seq_lengths [*B]` is what of them isn't padding."""
    if options.rope_theta is not None:
        if positions is None:
            positions = jnp.arange(q.shape[-3])
        q, k = (rope(x, positions, options.rope_theta) for x in (q, k))
    return attention(
        q,
        k,
        v,
        sinks=sinks,
        segment_ids=segment_ids,
        query_seq_lengths=seq_lengths,
        key_value_seq_lengths=seq_lengths,
        **options._arguments(),
    )


def attend_cached(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: tuple[jax.Array, jax.Array, jax.Array],
    *,
    sinks: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Attention of the next T tokens, which see the cached ones and each other causally.

    Args:
      options: as of the layer; causal whatever they say.
      q: `[*B, T, N, H]`.
      k: `[*B, T, K, H]`.
      v: `[*B, T, K, H]`.
      cache: keys and values `[*B, L, K, H]` and how many tokens they hold, int32.
      sinks: as of the layer.

    Returns:
      output, and the cache with the tokens appended.
    """
    keys, values, index = cache
    T = q.shape[-3]
    if options.rope_theta is not None:
        positions = index + jnp.arange(T)
        q, k = (rope(x, positions, options.rope_theta) for x in (q, k))
    start = (*(0,) * (keys.ndim - 3), index, 0, 0)
    keys = lax.dynamic_update_slice(keys, k.astype(keys.dtype), start)
    values = lax.dynamic_update_slice(values, v.astype(values.dtype), start)
    arguments = {**options._arguments(), "is_causal": True}
    out = attention(
        q,
        keys.astype(q.dtype),
        values.astype(q.dtype),
        sinks=sinks,
        query_offset=index,
        key_value_seq_lengths=index + T,
        **arguments,
    )
    return out, (keys, values, index + T)
