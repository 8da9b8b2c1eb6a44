"""Exact attention for JAX at the speed of hand-written kernels.

`attention`, and `attention_varlen` for packed sequences, run our kernels through XLA FFI, forward
and backward, under `jax.jit`, `jax.grad`, `jax.vmap`, `jax.checkpoint` and `jax.lax.scan`.

For serving there are `PagedKVCache` with `paged_attention`, `merge_attention` and `PageAllocator`.
"""

from jax_flashattn._api import attention as attention
from jax_flashattn._api import attention_varlen as attention_varlen
from jax_flashattn._explain import Explanation as Explanation
from jax_flashattn._explain import explain as explain
from jax_flashattn._kv_cache import PagedKVCache as PagedKVCache
from jax_flashattn._page_allocator import OutOfPagesError as OutOfPagesError
from jax_flashattn._page_allocator import PageAllocator as PageAllocator
from jax_flashattn._page_allocator import prefill_chunks as prefill_chunks
from jax_flashattn._serving import merge_attention as merge_attention
from jax_flashattn._serving import paged_attention as paged_attention
from jax_flashattn._spec import KernelNotCachedError as KernelNotCachedError
from jax_flashattn._spec import UnsupportedError as UnsupportedError

__version__ = "0.1.0"
