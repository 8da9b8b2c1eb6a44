"""For Flax: `attention_fn` for its own attention layers, and layers of our own.

`attention_fn`, or one made by `make_attention_fn` with windows, sinks and so on, goes into
`nnx.MultiHeadAttention` and `linen.MultiHeadDotProductAttention`. `FlashAttention` is a layer for
NNX, `LinenFlashAttention` the same for Linen.
"""

from jax_flashattn.flax._attention_fn import attention_fn as attention_fn
from jax_flashattn.flax._attention_fn import make_attention_fn as make_attention_fn
from jax_flashattn.flax._linen_layer import LinenFlashAttention as LinenFlashAttention
from jax_flashattn.flax._nnx_layer import FlashAttention as FlashAttention
