"""The attention layer for Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx  # pyright: ignore (which takes this folder for the library)

from jax_flashattn.flax import _core


class FlashAttention(nnx.Module):
    """Causal self-attention with grouped heads, rotary embedding, windows, sinks and a cache.

    Parameters are named as in `nnx.MultiHeadAttention` (`query`, `key`, `value`, `out`), or with
    `fused_qkv` `qkv`, whose heads are the queries', then the keys', then the values'.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        fused_qkv: bool = True,
        use_bias: bool = False,
        use_sinks: bool = False,
        rope_theta: float | None = None,
        is_causal: bool = True,
        local_window_size: Any = None,
        sink_tokens: int = 0,
        logits_soft_cap: float | None = None,
        implementation: Any = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters.

        Args:
          in_features: size of the inputs' last axis.
          num_heads: query heads.
          num_kv_heads: key heads, which divide `num_heads`; as many by default.
          head_dim: by default `in_features // num_heads`.
          out_features: by default `in_features`.
          fused_qkv: one projection for queries, keys and values.
          use_bias: projections have a bias.
          use_sinks: a learned logit per head in the softmax's denominator, 0 at first.
          rope_theta: base of the rotary embedding, such as 10000.0; None for none.
          is_causal: hide later tokens; decoding with a cache always does.
          local_window_size: as of `jax_flashattn.attention`.
          sink_tokens: likewise.
          logits_soft_cap: likewise.
          implementation: likewise.
          dtype: of the computation; by default what inputs and parameters promote to.
          param_dtype: of the parameters.
          kernel_init: of the projections; LeCun normal by default.
          rngs: for `params`.
        """
        self.num_heads = num_heads
        self.num_kv_heads = _core.check_heads(num_heads, num_kv_heads)
        self.head_dim = head_dim or in_features // num_heads
        self.options = _core.Options(
            is_causal,
            local_window_size,
            sink_tokens,
            logits_soft_cap,
            rope_theta,
            implementation,
        )

        def linear(inputs: Any, outputs: Any, axis: Any = -1) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                inputs,
                outputs,
                axis=axis,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init or nnx.initializers.lecun_normal(),
                rngs=rngs,
            )

        self.fused_qkv = fused_qkv
        if fused_qkv:
            heads = self.num_heads + 2 * self.num_kv_heads
            self.qkv = linear(in_features, (heads, self.head_dim))
        else:
            self.query = linear(in_features, (self.num_heads, self.head_dim))
            self.key = linear(in_features, (self.num_kv_heads, self.head_dim))
            self.value = linear(in_features, (self.num_kv_heads, self.head_dim))
        self.out = linear((self.num_heads, self.head_dim), out_features or in_features, (-2, -1))
        self.sinks = nnx.Param(jnp.zeros(num_heads, param_dtype)) if use_sinks else nnx.data(None)
        self.cached_key: Any = nnx.data(None)
        self.cached_value: Any = nnx.data(None)
        self.cache_index: Any = nnx.data(None)

    def init_cache(
        self, batch: int | tuple[int, ...], max_length: int, dtype: Any = jnp.float32
    ) -> None:
        """An empty cache for `max_length` tokens of each sequence, for calls with `decode`."""
        batch = (batch,) if isinstance(batch, int) else tuple(batch)
        shape = (*batch, max_length, self.num_kv_heads, self.head_dim)
        self.cached_key = nnx.Cache(jnp.zeros(shape, dtype))
        self.cached_value = nnx.Cache(jnp.zeros(shape, dtype))
        self.cache_index = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        seq_lengths: jax.Array | None = None,
        positions: jax.Array | None = None,
        decode: bool = False,
    ) -> jax.Array:
        """Attends.

        Args:
          x: `[*B, T, in_features]`.
          segment_ids: ints `[*B, T]`; tokens see only those of their own id.
          seq_lengths: ints `[*B]`: tokens from there on are padding.
          positions: ints `[T]` or `[*B, T]` for the rotary embedding; 0, 1, ... by default.
          decode: append these tokens to the cache of `init_cache` and attend to all in it. One
            token or a chunk at a time; beyond the cache's end the last ones are overwritten.

        Returns:
          `[*B, T, out_features]`.
        """
        if self.fused_qkv:
            N, K = self.num_heads, self.num_kv_heads
            q, k, v = jnp.split(self.qkv(x), (N, N + K), axis=-2)
        else:
            q, k, v = self.query(x), self.key(x), self.value(x)
        sinks = None if self.sinks is None else self.sinks[...]
        if not decode:
            masks = dict(segment_ids=segment_ids, seq_lengths=seq_lengths, positions=positions)
            return self.out(_core.attend(self.options, q, k, v, sinks=sinks, **masks))
        if self.cached_key is None:
            raise ValueError("decode needs a cache: call init_cache first")
        cache = (self.cached_key[...], self.cached_value[...], self.cache_index[...])
        out, cache = _core.attend_cached(self.options, q, k, v, cache, sinks=sinks)
        self.cached_key[...], self.cached_value[...], self.cache_index[...] = cache
        return self.out(out)
