"""Attention over pages means what attention over the same dense keys means."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import pages
from jax_flashattn import PagedKVCache, attention, paged_attention

LAYOUTS = ["NHD", "HND"]
HEADS = [(4, 2, 16, 16), (3, 1, 40, 24), (2, 2, 64, 64)]  # N, K, H, Hv


def inputs(B=3, T=5, S=90, heads=HEADS[0], dtype=jnp.float32, seed=0):
    return oracle.make_inputs(seed, B, T, S, *heads, dtype)[:3]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256])
def test_page_sizes(page_size, layout):
    q, k, v = inputs(S=300)
    lengths = [300, 129, 7]
    cache = pages.make_cache(k, v, lengths, page_size=page_size, layout=layout)
    pages.check(q, k, v, lengths, cache)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: d.__name__)
@settings(max_examples=15)
@given(data=st.data())
def test_any_combination(dtype, data):
    choose = lambda choices: data.draw(st.sampled_from(choices))
    pages.check_any(choose, choose(HEADS), [1, 1, 7, 70], 90, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_implementation_xla(layout, packed):
    """The dense definition means the same, and differentiates."""
    q, k, v = inputs(dtype=jnp.bfloat16)
    lengths = [90, 31, 0]
    cache = pages.make_cache(k, v, lengths, page_size=16, layout=layout)
    options = dict(implementation="xla", local_window_size=(30, 0), sink_tokens=2)
    if packed:
        q, options["cu_seqlens_q"] = q.reshape(-1, 4, 16), np.array([0, 9, 10, 13])
    pages.check(q, k, v, lengths, cache, **options)
    loss = lambda q: jnp.sum(paged_attention(q, cache, **options).astype(jnp.float32))
    assert np.isfinite(jax.jit(jax.grad(loss))(jnp.asarray(q)).astype(np.float32)).all()


def test_nothing_to_see():
    """Length 0, and a query before every key: 0 and -inf, or the sink."""
    q, k, v = inputs(T=3)
    cache = pages.make_cache(k, v, [0, 2, 0], page_size=8)
    out, lse = paged_attention(jnp.asarray(q), cache, return_lse=True)
    for b, t in [(0, slice(None)), (1, 0), (2, slice(None))]:
        assert not np.any(out[b, t])
        assert np.all(np.isneginf(lse[b, :, t]))
    assert np.isfinite(lse[1, :, 1:]).all()
    sinks = jnp.arange(4.0)
    out, lse = paged_attention(jnp.asarray(q), cache, return_lse=True, sinks=sinks)
    assert not np.any(out[0])
    np.testing.assert_array_equal(lse[0, :, 0], sinks)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_numbers_out_of_range_are_clamped(implementation):
    """Page numbers to the pool, lengths to the table; no value of either reads out of bounds."""
    pages.check_clamped(*inputs(S=64), implementation=implementation)


def test_pages_used_twice():
    """By two sequences with a common prefix, and within one sequence."""
    q, k, v = inputs(S=48)
    cache = pages.make_cache(k, v, [48, 40, 48], page_size=8)
    k[1, :16], v[1, :16] = k[0, :16], v[0, :16]
    k[2, 24:32], v[2, 24:32] = k[2, :8], v[2, :8]
    table = cache.page_table.at[1, :2].set(cache.page_table[0, :2])
    table = table.at[2, 3].set(table[2, 0])
    pages.check(q, k, v, [48, 40, 48], dataclasses.replace(cache, page_table=table))


STEP = 16  # tokens that the simulated server computes at a time


@jax.jit
def _padded_step(cache, q, k, v, num_tokens):
    cache = cache.append(k, v, num_tokens=num_tokens)
    return cache, paged_attention(q, cache, query_seq_lengths=num_tokens)


@jax.jit
def _packed_step(cache, q, k, v, ends):
    cache = cache.append(k, v, cu_seqlens=ends)
    return cache, paged_attention(q, cache, cu_seqlens_q=ends)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@settings(max_examples=15)
@given(data=st.data())
def test_any_chunking_is_whole_prefill(packed, data):
    """A server in small: a step takes a chunk of some sequences, a token of others, or none."""
    B, total = 3, np.array([40, 23, 17])
    q, k, v = inputs(B=B, T=40, S=40)
    cache = PagedKVCache.create(
        batch=B, max_pages=5, num_pages=15, page_size=8, num_kv_heads=2, head_dim=16,
        dtype=jnp.float32, layout=data.draw(st.sampled_from(LAYOUTS)),
    )  # fmt: skip
    order = np.random.default_rng(1).permutation(15).astype(np.int32)
    cache = dataclasses.replace(cache, page_table=jnp.asarray(order.reshape(3, 5)))
    done, got = np.zeros(B, int), np.zeros(q.shape, np.float32)
    limit = STEP // B if packed else STEP
    while (done < total).any():
        wanted = [data.draw(st.integers(0, limit)) for _ in range(B)]
        counts = np.maximum(np.minimum(wanted, total - done), (done < total) & (sum(wanted) == 0))
        parts = [slice(done[b], done[b] + counts[b]) for b in range(B)]
        if packed:
            ends = pages.boundaries(counts)
            step = np.full((3, STEP, 4, 16), np.nan, np.float32)
            for i, x in enumerate((q, k, v)):
                tokens = np.concatenate([x[b, parts[b]] for b in range(B)])
                step[i, : len(tokens), : x.shape[2]] = tokens
            cache, out = _packed_step(cache, step[0], step[1, :, :2], step[2, :, :2], ends)
            outs = [out[ends[b] : ends[b + 1]] for b in range(B)]
        else:
            step = np.full((3, B, STEP, 4, 16), np.nan, np.float32)
            for i, x in enumerate((q, k, v)):
                for b in range(B):
                    step[i, b, : counts[b], : x.shape[2]] = x[b, parts[b]]
            cache, out = _padded_step(cache, step[0], step[1, :, :, :2], step[2, :, :, :2], counts)
            outs = [out[b, : counts[b]] for b in range(B)]
        for b in range(B):
            got[b, parts[b]] = outs[b]
        done += counts
    np.testing.assert_array_equal(cache.lengths, total)
    zeros = np.zeros_like(q), np.zeros((B, 4, 40), np.float32)
    lengths = dict(query_seq_lengths=total, key_value_seq_lengths=total)
    exact, twin, _ = oracle.references(q, k, v, *zeros, is_causal=True, **lengths)
    pages.assert_close(got, exact[0], twin[0], dtype=jnp.float32, what="out")


def test_empty_calls():
    q, k, v = inputs(T=0)
    cache = pages.make_cache(k, v, [90, 0, 3], page_size=8)
    call = jax.jit(partial(paged_attention, return_lse=True))
    out, lse = call(jnp.asarray(q), cache)
    assert out.shape == (3, 0, 4, 16) and lse.shape == (3, 4, 0)
    empty = PagedKVCache(cache.k_pages, cache.v_pages, cache.page_table[:0], cache.lengths[:0])
    out, _ = call(jnp.zeros((0, 2, 4, 16)), empty)
    assert out.shape == (0, 2, 4, 16)


def test_prompt_and_decode_as_dense():
    """The same numbers as `attention` gives, bit for bit: it is the same kernel."""
    q, k, v = (jnp.asarray(x) for x in inputs())
    lengths = jnp.array([90, 50, 64])
    cache = pages.make_cache(np.asarray(k), np.asarray(v), lengths, page_size=64)
    dense = attention(q, k, v, is_causal=True, query_offset="end", key_value_seq_lengths=lengths)
    np.testing.assert_array_equal(paged_attention(q, cache), dense)
