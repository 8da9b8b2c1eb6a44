"""Flax layers: the same numbers as Flax's own attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jax_flashattn import UnsupportedError
from jax_flashattn.flax import (
    FlashAttention,
    LinenFlashAttention,
    _core,
    attention_fn,
    make_attention_fn,
)

FEATURES, N, B, T = 32, 4, 2, 12
X = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, FEATURES), np.float32))


@pytest.fixture(autouse=True)
def _promotion_as_flax_has_it():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=2e-5)


def flax_nnx(function=nnx.dot_product_attention, **options):
    return nnx.MultiHeadAttention(
        N, FEATURES, attention_fn=function, decode=False, rngs=nnx.Rngs(0), **options
    )


def flax_linen(function=linen.dot_product_attention, **options):
    return linen.MultiHeadDotProductAttention(N, attention_fn=function, **options)


def test_nnx_attention_fn():
    close(flax_nnx(attention_fn)(X), flax_nnx()(X))
    causal = nnx.make_causal_mask(X[..., 0])
    expected = flax_nnx()(X, mask=causal)
    close(flax_nnx(attention_fn)(X, mask=causal), expected)
    close(flax_nnx(make_attention_fn(is_causal=True))(X), expected)


@pytest.mark.parametrize("decode", [False, True])
def test_nnx_gradients_and_decoding(decode):
    def run(function):
        layer = flax_nnx(function)
        if not decode:
            return nnx.grad(lambda m: jnp.sum(jnp.sin(m(X))))(layer)
        layer.set_attributes(decode=True)
        layer.init_cache(X.shape)
        return [layer(X[:, i : i + 1]) for i in range(T)]

    got, expected = (jax.tree.leaves(run(f)) for f in (attention_fn, nnx.dot_product_attention))
    for x, y in zip(got, expected, strict=True):
        close(x, y)


def test_linen_attention_fn():
    variables = flax_linen().init(jax.random.key(0), X)
    expected = flax_linen().apply(variables, X)
    close(jax.jit(flax_linen(attention_fn).apply)(variables, X), expected)
    valid = jnp.arange(T) < jnp.array([[T], [5]])
    mask = valid[:, None, None, :]
    expected = flax_linen().apply(variables, X, mask=mask)
    close(jax.jit(flax_linen(attention_fn).apply)(variables, X, mask=mask), expected)


def test_linen_decoding():
    def run(function):
        layer = flax_linen(function, decode=True)
        variables = layer.init(jax.random.key(0), X)
        outputs = []
        for i in range(T):
            out, cache = layer.apply(variables, X[:, i : i + 1], mutable="cache")
            variables = {**variables, **cache}
            outputs.append(out)
        return jnp.concatenate(outputs, axis=1)

    close(run(attention_fn), run(linen.dot_product_attention))


def test_what_attention_fn_refuses():
    dense = jnp.ones((B, 1, T, T), bool).at[..., 3, 3].set(False)
    with pytest.raises(UnsupportedError, match=r"mask must be .* got shape \(2, 1, 12, 12\)"):
        flax_nnx(attention_fn)(X, mask=dense)
    with pytest.raises(UnsupportedError, match=r"mask must be"):
        jax.jit(lambda m: flax_nnx(attention_fn)(X, mask=m))(nnx.make_causal_mask(X[..., 0]))
    with pytest.raises(UnsupportedError, match="sow_weights"):
        flax_nnx(attention_fn)(X, sow_weights=True)
    layer = flax_nnx(attention_fn, dropout_rate=0.5, deterministic=False)
    with pytest.raises(UnsupportedError, match="dropout_rate must be 0"):
        layer(X)
    with pytest.raises(UnsupportedError, match="bias is not supported"):
        attention_fn(*[X[:, :, None]] * 3, bias=jnp.zeros((T, T)))


def copied(layer, source):
    """`layer` with the parameters of one of Flax's, whose names are the same."""
    for name in ("query", "key", "value", "out"):
        getattr(layer, name).kernel[...] = getattr(source, name).kernel[...]
    return layer


def test_nnx_layer():
    theirs = flax_nnx(use_bias=False)
    ours = copied(FlashAttention(FEATURES, N, fused_qkv=False, rngs=nnx.Rngs(1)), theirs)
    close(ours(X), theirs(X, mask=nnx.make_causal_mask(X[..., 0])))


def test_linen_layer():
    theirs = flax_linen(use_bias=False)
    ours = LinenFlashAttention(N, fused_qkv=False)
    variables = theirs.init(jax.random.key(0), X)
    expected = theirs.apply(variables, X, mask=linen.make_causal_mask(X[..., 0]))
    close(ours.apply(variables, X), expected)


LAYERS = {
    "plain": {},
    "grouped": dict(num_kv_heads=2, rope_theta=1e4),
    "everything": dict(
        num_kv_heads=1,
        rope_theta=1e4,
        local_window_size=(4, 0),
        sink_tokens=1,
        use_sinks=True,
        logits_soft_cap=5.0,
        use_bias=True,
    ),
}


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_decoding_is_the_whole(options, chunk):
    """Token by token or in chunks, by both libraries: the numbers of the whole at once."""
    layer = FlashAttention(FEATURES, N, rngs=nnx.Rngs(0), **options)
    whole = layer(X)
    layer.init_cache(B, T)
    parts = [layer(X[:, i : i + chunk], decode=True) for i in range(0, T, chunk)]
    close(jnp.concatenate(parts, axis=1), whole)

    linen_layer = LinenFlashAttention(N, decode=True, **options)
    variables = linen_layer.init(jax.random.key(0), X)
    whole = LinenFlashAttention(N, **options).apply({"params": variables["params"]}, X)
    parts = []
    for i in range(0, T, chunk):
        out, cache = linen_layer.apply(variables, X[:, i : i + chunk], mutable="cache")
        variables = {**variables, **cache}
        parts.append(out)
    close(jnp.concatenate(parts, axis=1), whole)


def test_sinks_are_learned():
    layer = FlashAttention(FEATURES, N, use_sinks=True, rngs=nnx.Rngs(0))
    gradients = nnx.grad(lambda m: jnp.sum(jnp.sin(m(X))))(layer)
    assert np.abs(gradients["sinks"][...]).min() > 0


def test_segments_and_lengths():
    layer = FlashAttention(FEATURES, N, rngs=nnx.Rngs(0))
    ids = jnp.broadcast_to(jnp.arange(T) // 6, (B, T))
    together = layer(X, segment_ids=ids)
    close(together[:, 6:], layer(X[:, 6:]))
    close(layer(X, seq_lengths=jnp.array([5, T]))[:1, :5], layer(X[:1, :5]))


def test_rope():
    """Rotating by the position leaves products a function of the distance, and lengths alone."""
    x = jnp.broadcast_to(X[:, :1, None, :8], (B, T, 1, 8))
    turned = _core.rope(x, jnp.arange(T), 1e4)
    close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1))
    products = jnp.einsum("btnh,bsnh->bts", turned, turned)
    close(jnp.diagonal(products, 3, 1, 2), products[:, :1, 3] * jnp.ones((1, T - 3)))
    if hasattr(nnx, "RoPE"):
        close(turned, jnp.swapaxes(nnx.RoPE()(jnp.swapaxes(x, 1, 2)), 1, 2))


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"num_heads must be a multiple .* got 4 and 3"):
        FlashAttention(FEATURES, N, num_kv_heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="init_cache"):
        FlashAttention(FEATURES, N, rngs=nnx.Rngs(0))(X, decode=True)
