"""Exact attention for JAX at the speed of hand-written kernels.

`attention` is the one entry point: it runs our kernels through XLA FFI, forward and backward, under
`jax.jit`, `jax.grad`, `jax.vmap`, `jax.checkpoint` and `jax.lax.scan`.
"""

from jax_flashattn._api import attention as attention
from jax_flashattn._spec import UnsupportedError as UnsupportedError

__version__ = "0.1.0"
