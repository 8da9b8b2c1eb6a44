"""Masks, biases and packing on the CPU kernels: each by itself, and any combination."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import draws
import oracle
from jax_flashattn import attention, attention_varlen

SIZES = [(2, 70, 70, 4, 2, 40, 72), (2, 130, 65, 3, 1, 64, 64), (2, 33, 257, 4, 2, 16, 16)]


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: d.__name__)
@settings(max_examples=100)
@given(data=st.data(), value=st.sampled_from([np.nan, np.inf]))
def test_any_combination(dtype, data, value):
    choose = lambda choices: data.draw(st.sampled_from(choices))
    inputs, options = draws.draw(choose, sizes=SIZES, dtypes=[dtype])
    oracle.check(*inputs, poison=draws.poison(options, value), **options)


def small(dtype=jnp.float32, B=2, T=70, S=90):
    return oracle.make_inputs(0, B, T, S, 4, 2, 16, 16, dtype)


WINDOWS = [(3, 5), (0, 0), (None, 4), (4, None), (2**31 - 1, 7), (2**40, 2**40), 6, 0, (0, None)]


@pytest.mark.parametrize("offset", [0, "end", -30, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_window(window, offset):
    oracle.check(*small(), local_window_size=window, query_offset=offset)


@pytest.mark.parametrize("sink_tokens", [1, 64, 200])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_sink_tokens(is_causal, sink_tokens):
    oracle.check(
        *small(T=200, S=200),
        is_causal=is_causal,
        local_window_size=(9, 9),
        sink_tokens=sink_tokens,
    )


@pytest.mark.parametrize("S", [40, 0])
def test_sinks_of_rows_that_see_nothing(S):
    q, k, v, _, _ = small(T=5, S=S)
    sinks = jnp.array([0.5, -2.0, 3.0, 0.0])
    options = dict(is_causal=True, query_offset=-2, query_seq_lengths=4, return_lse=True)

    def f(sinks):
        out, lse = attention(q, k, v, sinks=sinks, **options)
        return (jnp.sum(out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0)), (out, lse))

    dsinks, (out, lse) = jax.grad(f, has_aux=True)(sinks)
    blind = 2 if S else 4
    np.testing.assert_array_equal(out[:, :blind], np.zeros_like(out[:, :blind]))
    np.testing.assert_allclose(lse[0, :, 0], sinks, rtol=1e-6)
    np.testing.assert_array_equal(lse[:, :, 4:], np.full((2, 4, 1), -np.inf))
    assert np.isfinite(dsinks).all() and (np.asarray(dsinks) > 0).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("cap", [1e-2, 1.0, 50.0])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: d.__name__)
def test_soft_cap(dtype, cap, scale):
    """At small and at very large logits."""
    oracle.check(*small(dtype), logits_soft_cap=cap, scale=scale)


@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=str)
def test_alibi_slopes(shape):
    slopes = np.random.default_rng(0).uniform(-0.1, 0.5, shape).astype(np.float32)
    oracle.check(*small(), alibi_slopes=slopes, query_offset="end")
    oracle.check(*small(), alibi_slopes=slopes, query_offset=np.array([-500, 300], np.int32))


def test_half_precision_slopes_and_sinks():
    """Given in the model's dtype, they act in float32 and their gradients come back in it."""
    q, k, v, _, _ = small(jnp.bfloat16)
    x = jnp.array([0.5, 0.25, 0.125, 0.0625], jnp.bfloat16)

    def loss(slopes, sinks):
        return jnp.sum(attention(q, k, v, alibi_slopes=slopes, sinks=sinks).astype(jnp.float32))

    low = jax.grad(loss, (0, 1))(x, x)
    high = jax.grad(loss, (0, 1))(x.astype(jnp.float32), x.astype(jnp.float32))
    for a, b in zip(low, high, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def test_segment_ids_are_packing():
    q, k, v, _, _ = small(B=1, T=90)
    ends = jnp.array([0, 20, 21, 60, 90])
    ids = jnp.searchsorted(ends, jnp.arange(90), side="right")
    packed = attention_varlen(q[0], k[0], v[0], cu_seqlens_q=ends, is_causal=True)
    segments = attention(q, k, v, segment_ids=ids[None], is_causal=True)
    np.testing.assert_allclose(packed, segments[0], atol=1e-6)
    alone = [
        attention(q[:, a:b], k[:, a:b], v[:, a:b], is_causal=True)[0]
        for a, b in itertools.pairwise(ends)
    ]
    np.testing.assert_allclose(packed, jnp.concatenate(alone), atol=1e-6)


@pytest.mark.parametrize(
    "boundaries",
    [[0, 30, 20, 50], [7, 30, 60, 90], [0, 10, 200, 90], [-5, -1, 40, 2**31 - 1], [0, 0, 0, 0]],
    ids=str,
)
def test_boundaries_that_make_no_sense(boundaries):
    """Each has the result that the docstring says."""
    boundaries = np.asarray(boundaries, np.int32)
    oracle.check(*small(T=90), cu_seqlens_q=boundaries, is_causal=True)


def test_unused_tail():
    q, k, v, _, _ = small(B=1)
    tail = lambda x, end: jnp.asarray(x)[0].at[end:].set(jnp.nan)
    q, k, v = tail(q, 50), tail(k, 70), tail(v, 70)

    def f(q, k, v):
        return attention_varlen(
            q, k, v, cu_seqlens_q=jnp.array([0, 9, 50]), cu_seqlens_kv=jnp.array([0, 8, 70])
        )

    out, vjp = jax.vjp(f, q, k, v)
    np.testing.assert_array_equal(out[50:], np.zeros_like(out[50:]))
    for x, end in zip(vjp(jnp.ones_like(out)), (50, 70, 70), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x[end:], np.zeros_like(x[end:]))


def test_agrees_with_jax_nn():
    """Where jax.nn has the feature. It averages the keys in a row that sees none: here none."""
    q, k, v, _, _ = small(S=70)
    for options in (
        dict(local_window_size=(9, 4)),
        dict(local_window_size=(9, 0), is_causal=True),
        dict(query_seq_lengths=jnp.array([70, 31]), key_value_seq_lengths=jnp.array([70, 20])),
    ):
        ours = attention(q, k, v, **options)
        theirs = jax.nn.dot_product_attention(q, k, v, **options)
        if "query_seq_lengths" in options:  # it leaves padding rows undefined
            ours, theirs = (x.at[1, 31:].set(0) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


FEATURES = {
    "window": dict(local_window_size=(50, 0)),
    "sink tokens": dict(local_window_size=(50, 0), sink_tokens=4),
    "sinks": dict(sinks=jnp.ones(1)),
    "ALiBi": dict(alibi_slopes=jnp.ones(1)),
    "soft cap": dict(logits_soft_cap=10.0),
    "segments": dict(segment_ids=(jnp.zeros(512, jnp.int32), jnp.zeros(768, jnp.int32))),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_no_quadratic_array(feature):
    q, k, v, _, _ = oracle.make_inputs(14, 1, 512, 768, 1, 1, 8, 8, jnp.float32)
    loss = lambda *x: attention(*x, query_offset=0, **FEATURES[feature]).sum()
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().as_text()
    assert "jfa_bwd_v3" in text
    assert "512,768" not in text and "768,512" not in text


def test_implementation_xla():
    """The dense definition means the same."""
    for seed in range(12):
        inputs, options = draws.draw(
            draws.from_seed(seed), sizes=[(2, 20, 30, 4, 2, 8, 12)], dtypes=[jnp.float32]
        )
        oracle.check(*inputs, poison=draws.poison(options, np.nan), implementation="xla", **options)
