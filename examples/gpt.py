"""A small GPT in Flax NNX whose attention is an argument.

The usual modern decoder: pre-norm residual blocks, RMSNorm, rotary positions, grouped-query
attention, SwiGLU, no biases, input and output embeddings tied. `GPT` is called on whole sequences;
whoever needs another loop over the layers, a key/value cache for instance, writes it with `embed`,
`blocks` and `logits`, and gives each block its own attention function.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_flashattn import attention

# From q [B, T, heads, head_dim] and k, v [B, T, kv_heads, head_dim] to an array like q.
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

causal_attention: AttentionFn = partial(attention, is_causal=True)


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`.

    Attributes:
      vocab_size: number of distinct tokens.
      num_layers: number of blocks.
      width: features per token between the blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads, a divisor of `num_heads`; fewer make a smaller cache.
      head_dim: features per head, even.
      mlp_width: hidden features of the MLP.
      rope_theta: base of the rotary wavelengths.
      dtype: dtype of activations; parameters are float32.
    """

    vocab_size: int = 128
    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp_width: int = 352
    rope_theta: float = 10_000.0
    dtype: DTypeLike = jnp.float32


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates pairs of features by angles proportional to the position (Su et al., 2021).

    Args:
      x: queries or keys `[B, T, heads, head_dim]`.
      positions: int array `[T]` or `[B, T]`.
      theta: wavelengths run from 2 pi to almost 2 pi theta.

    Returns:
      An array like x. The dot product of two of its rows depends on positions by difference only.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None] * frequencies  # float32: bfloat16 has no room for 1000 + 1
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class SelfAttention(nnx.Module):
    """Projections and rotary positions around an attention function."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=config.dtype, rngs=rngs)
        self.config = config
        self.query = linear(config.width, config.num_heads * config.head_dim)
        self.key = linear(config.width, config.num_kv_heads * config.head_dim)
        self.value = linear(config.width, config.num_kv_heads * config.head_dim)
        # Zero: at the start every block is the identity, which lets the learning rate be high.
        self.out = linear(
            config.num_heads * config.head_dim, config.width, kernel_init=nnx.initializers.zeros
        )

    def __call__(self, x: jax.Array, positions: jax.Array, attention_fn: AttentionFn) -> jax.Array:
        """Maps `[B, T, width]` to the same shape; positions are `[T]` or `[B, T]`."""
        B, T, _ = x.shape
        q, k, v = (
            f(x).reshape(B, T, -1, self.config.head_dim) for f in (self.query, self.key, self.value)
        )
        q, k = (rope(y, positions, self.config.rope_theta) for y in (q, k))
        return self.out(attention_fn(q, k, v).reshape(B, T, -1))


class MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=config.dtype, rngs=rngs)
        self.gate = linear(config.width, config.mlp_width)
        self.up = linear(config.width, config.mlp_width)
        self.down = linear(config.mlp_width, config.width, kernel_init=nnx.initializers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., width]` to the same shape."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and MLP, each normalised on the way in and added to its input."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.attention = SelfAttention(config, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, attention_fn: AttentionFn) -> jax.Array:
        """Maps `[B, T, width]` to the same shape; positions are `[T]` or `[B, T]`."""
        x = x + self.attention(self.attention_norm(x), positions, attention_fn)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nnx.Module):
    """A decoder-only transformer.

    Attributes:
      blocks: the layers.
      attention_fn: the attention of every layer; a causal one, or tokens see their own targets.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        attention_fn: AttentionFn = causal_attention,
        rngs: nnx.Rngs,
    ):
        self.attention_fn = attention_fn
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.width,
            dtype=config.dtype,
            embedding_init=nnx.initializers.normal(config.width**-0.5),
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Maps int tokens `[B, T]` to what the first block takes."""
        return self.embedding(tokens)

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps the last block's output to float32 logits of the next token."""
        return self.embedding.attend(self.norm(x)).astype(jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps int tokens `[B, T]` to float32 logits `[B, T, vocab_size]` of the tokens after."""
        positions = jnp.arange(tokens.shape[1])
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, positions, self.attention_fn)
        return self.logits(x)
