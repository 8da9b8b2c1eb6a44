"""The attention layer for Flax Linen."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen  # pyright: ignore (which takes this folder for the library)

from jax_flashattn.flax import _core


class LinenFlashAttention(linen.Module):
    """Causal self-attention with grouped heads, rotary embedding, windows, sinks and a cache.

    As `jax_flashattn.flax.FlashAttention`, with parameters named as in
    `linen.MultiHeadDotProductAttention` (`query`, `key`, `value`, `out`), or with `fused_qkv`
    `qkv`. With `decode`, `init` with an input of the full length makes the collection "cache", and
    calls with it as mutable append one token or a chunk and attend to all in it.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key heads, which divide `num_heads`; as many by default.
      head_dim: by default the inputs' features over `num_heads`.
      out_features: by default the inputs' features.
      fused_qkv: one projection for queries, keys and values.
      use_bias: projections have a bias.
      use_sinks: a learned logit per head in the softmax's denominator, 0 at first.
      rope_theta: base of the rotary embedding, such as 10000.0; None for none.
      is_causal: hide later tokens; decoding with a cache always does.
      local_window_size: as of `jax_flashattn.attention`.
      sink_tokens: likewise.
      logits_soft_cap: likewise.
      implementation: likewise.
      decode: use a cache.
      dtype: of the computation; by default what inputs and parameters promote to.
      param_dtype: of the parameters.
      kernel_init: of the projections.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    fused_qkv: bool = True
    use_bias: bool = False
    use_sinks: bool = False
    rope_theta: float | None = None
    is_causal: bool = True
    local_window_size: Any = None
    sink_tokens: int = 0
    logits_soft_cap: float | None = None
    implementation: Any = None
    decode: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = linen.initializers.lecun_normal()

    @linen.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        seq_lengths: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Attends: `[*B, T, features]` to `[*B, T, out_features]`.

        Args:
          x: the inputs.
          segment_ids: ints `[*B, T]`; tokens see only those of their own id.
          seq_lengths: ints `[*B]`: tokens from there on are padding.
          positions: ints `[T]` or `[*B, T]` for the rotary embedding; 0, 1, ... by default.
        """
        N = self.num_heads
        K = _core.check_heads(N, self.num_kv_heads)
        head_dim = self.head_dim or x.shape[-1] // N
        options = _core.Options(
            self.is_causal,
            self.local_window_size,
            self.sink_tokens,
            self.logits_soft_cap,
            self.rope_theta,
            self.implementation,
        )

        def linear(features: Any, name: str, axis: Any = -1) -> linen.DenseGeneral:
            return linen.DenseGeneral(
                features=features,
                axis=axis,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                name=name,
            )

        if self.fused_qkv:
            qkv = linear((N + 2 * K, head_dim), "qkv")(x)
            q, k, v = jnp.split(qkv, (N, N + K), axis=-2)
        else:
            q = linear((N, head_dim), "query")(x)
            k, v = (linear((K, head_dim), name)(x) for name in ("key", "value"))
        sinks = None
        if self.use_sinks:
            sinks = self.param("sinks", linen.initializers.zeros, (N,), self.param_dtype)
        project = linear(self.out_features or x.shape[-1], "out", (-2, -1))

        filled = self.has_variable("cache", "cached_key")
        if self.decode:
            keys = self.variable("cache", "cached_key", jnp.zeros, k.shape, k.dtype)
            values = self.variable("cache", "cached_value", jnp.zeros, v.shape, v.dtype)
            index = self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32)
            if filled:
                cache = (keys.value, values.value, index.value)
                out, cache = _core.attend_cached(options, q, k, v, cache, sinks=sinks)
                keys.value, values.value, index.value = cache
                return project(out)
        masks = dict(segment_ids=segment_ids, seq_lengths=seq_lengths, positions=positions)
        return project(_core.attend(options, q, k, v, sinks=sinks, **masks))
