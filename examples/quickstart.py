"""Attention with grouped heads, its gradient, and how far it is from jax.nn's."""

import jax
import jax.numpy as jnp

from jax_flashattn import attention

kq, kk, kv = jax.random.split(jax.random.key(0), 3)
q = jax.random.normal(kq, (2, 1024, 8, 64))  # [B, T, N, H]
k = jax.random.normal(kk, (2, 1024, 2, 64))  # [B, S, K, H]: four query heads per key head
v = jax.random.normal(kv, (2, 1024, 2, 64))

out = jax.jit(lambda q, k, v: attention(q, k, v, is_causal=True))(q, k, v)
grads = jax.jit(jax.grad(lambda *x: attention(*x, is_causal=True).sum(), (0, 1, 2)))(q, k, v)
expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
print("output", out.shape, "gradients", [x.shape for x in grads])
print("largest difference to jax.nn:", float(jnp.abs(out - expected).max()))
