"""What Flax's attention layers call in place of their own `dot_product_attention`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_flashattn._api import attention
from jax_flashattn._spec import UnsupportedError

MASK_ADVICE = (
    "mask must be one of keys alone, [..., 1, 1, S], or a causal mask that is known when it is "
    "traced; got shape {shape}. A dense [T, S] mask is what these kernels avoid: use is_causal (of "
    "nnx.MultiHeadAttention's call, or of make_attention_fn), and make_attention_fn's "
    "local_window_size and segment_ids"
)


def make_attention_fn(*, is_causal: bool = False, **options: Any) -> Callable[..., jax.Array]:
    """An `attention_fn` with arguments of `jax_flashattn.attention` filled in.

    Args:
      is_causal: for layers that can't say so in their call (Linen's). A layer that says it is
        causal is so in any case.
      **options: such as `local_window_size`, `sinks`, `logits_soft_cap`, `alibi_slopes`.

    Returns:
      a function for `attention_fn=` of `nnx.MultiHeadAttention` and
      `linen.MultiHeadDotProductAttention`; see `attention_fn`.
    """
    always_causal, defaults = is_causal, options

    def attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = True,
    ) -> jax.Array:
        """Attention as Flax's layers call it, by `jax_flashattn.attention`.

        Args:
          query: `[*B, T, N, H]`.
          key: `[*B, S, K, H]`, N a multiple of K.
          value: `[*B, S, K, Hv]`.
          bias: refused.
          mask: None; or of keys alone, `[..., 1, 1, S]`, as decoding with a cache makes it; or one
            that is known when it is traced and is causal or all True.
          broadcast_dropout: without meaning here, as there is no dropout.
          dropout_rng: likewise.
          dropout_rate: must be 0 unless `deterministic`.
          deterministic: see `dropout_rate`.
          dtype: of the computation; that of the inputs by default.
          precision: without meaning here: products accumulate in float32.
          module: refused: attention weights are never there to be sown.
          is_causal: hide later keys.
          force_fp32_for_softmax: without meaning here: it always is.

        Raises:
          UnsupportedError: what is refused above.
        """
        if dropout_rate > 0 and not deterministic:
            raise UnsupportedError(
                f"dropout_rate must be 0 or deterministic True, got {dropout_rate}: attention "
                "weights are not dropped by these kernels; drop out the layer's output instead"
            )
        if module is not None:
            raise UnsupportedError(
                "module (sow_weights=True) is not supported: attention weights are never computed "
                "as a whole"
            )
        dtype = dtype or jnp.result_type(query, key, value)
        query, key, value = (x.astype(dtype) for x in (query, key, value))
        more = dict(defaults)
        is_causal = bool(is_causal or always_causal)
        if is_causal:
            more.setdefault("query_offset", 0)
        if mask is not None:
            is_causal = _apply_mask(mask, query, key, is_causal, more)
        return attention(query, key, value, bias=bias, is_causal=is_causal, **more)  # type: ignore

    return attention_fn


attention_fn = make_attention_fn()


def _apply_mask(
    mask: jax.Array, query: jax.Array, key: jax.Array, is_causal: bool, options: dict[str, Any]
) -> bool:
    """Puts what a mask says into `options`; returns whether attention is causal."""
    (*batch, T), S = query.shape[:-2], key.shape[-3]
    if mask.ndim >= 2 and mask.shape[-2] == 1 and math.prod(mask.shape[-3:-2]) == 1 and T >= 1:
        if "segment_ids" in options:
            raise UnsupportedError("mask and segment_ids can't be given both")
        # Queries have id 1: equal ids are visible.
        keys = mask.reshape(*mask.shape[:-3], mask.shape[-1]) if mask.ndim > 2 else mask[0]
        keys = jnp.broadcast_to(keys, (*batch, S)).astype(jnp.int32)
        options["segment_ids"] = (jnp.ones((*batch, T), jnp.int32), keys)
        return is_causal
    if not isinstance(mask, Tracer):
        known = np.asarray(mask).astype(bool)
        if known.all():
            return is_causal
        if known.shape[-2:] == (T, S) and (known == np.tri(T, S, dtype=bool)).all():
            options.setdefault("query_offset", 0)
            return True
    raise UnsupportedError(MASK_ADVICE.format(shape=tuple(mask.shape)))
