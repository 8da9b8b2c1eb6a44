"""One test per misuse of the cache and of attention over it, at trace time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashattn import PagedKVCache, UnsupportedError, paged_attention

SIZES = dict(
    batch=2, max_pages=4, num_pages=9, page_size=8, num_kv_heads=2, head_dim=8, dtype=jnp.float32
)
CACHE = PagedKVCache.create(**SIZES)
Q = jnp.zeros((2, 3, 4, 8))


def trace(q=Q, cache=CACHE, **options):
    return jax.eval_shape(lambda q, cache: paged_attention(q, cache, **options), q, cache)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (dict(page_size=12), ValueError, r"page size of k_pages must be one of \(8, .* got 12"),
        (dict(page_size=4, layout="HND"), ValueError, r"page size .* got 4 in axis 2 of .*'HND'"),
        (dict(layout="NDH"), ValueError, r"layout must be one of \('NHD', 'HND'\), got 'NDH'"),
        (dict(num_pages=0), ValueError, r"num_pages must be at least 1, got 0"),
        (dict(max_pages=0), ValueError, r"max_pages must be at least 1, got 0"),
        (dict(batch=-1), ValueError, r"batch must be at least 0, got -1"),
        (dict(head_dim=0), ValueError, r"head_dim must be at least 1, got 0"),
        (dict(head_dim=8.0), TypeError, r"head_dim must be a Python int, got float"),
        (dict(dtype=jnp.int8), TypeError, r"k_pages must have a floating dtype, got int8"),
        (dict(max_pages=2**28), UnsupportedError, r"lengths up to 2\*\*30 .* 268435456 pages of 8"),
    ],
    ids=str,
)
def test_create(sizes, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: PagedKVCache.create(**{**SIZES, **sizes}))


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        (dict(k_pages=jnp.zeros((9, 8, 16))), ValueError, r"k_pages must have shape \[num_pages, "),
        (dict(v_pages=jnp.zeros((8, 8, 2, 8))), ValueError, r"v_pages must have the pages of k_p"),
        (dict(v_pages=jnp.zeros((9, 16, 2, 8))), ValueError, r"v_pages must have the page size of"),
        (dict(v_pages=jnp.zeros((9, 8, 1, 8))), ValueError, r"v_pages must have the heads of k_p"),
        (
            dict(v_pages=jnp.zeros((9, 8, 2, 8), jnp.bfloat16)),
            TypeError,
            r"v_pages must have the dtype of k_pages, float32, got bfloat16",
        ),
        (
            dict(page_table=jnp.zeros((2, 4), jnp.uint32)),
            TypeError,
            r"page_table must be an int32 array, got uint32",
        ),
        (
            dict(page_table=jnp.zeros(4, jnp.int32)),
            ValueError,
            r"page_table must have shape \[B, M\] .* got \(4,\)",
        ),
        (
            dict(lengths=jnp.zeros(3, jnp.int32)),
            ValueError,
            r"lengths must have shape \(2,\), one value per row of page_table, got \(3,\)",
        ),
        (dict(lengths=[1, 2]), TypeError, r"lengths must be an int32 array, got list"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_arrays_of_the_cache(arrays, error, message):
    cache = dataclasses.replace(CACHE, **arrays)
    with pytest.raises(error, match=message):
        paged_attention(Q, cache)
    with pytest.raises(error, match=message):
        cache.append(Q[:, :, :2], Q[:, :, :2])


def test_from_block_last():
    x = jnp.zeros((9, 2, 8))
    with pytest.raises(ValueError, match=r"k_pages must have shape \[num_pages, K, head_dim, page"):
        PagedKVCache.from_block_last(x, x, CACHE.page_table, CACHE.lengths)


K = jnp.zeros((2, 3, 2, 8))
PACKED = jnp.zeros((6, 2, 8))
ENDS = np.array([0, 2, 5])


@pytest.mark.parametrize(
    ("k", "v", "options", "error", "message"),
    [
        (K[:1], K, {}, ValueError, r"k must have shape \[2, t, 2, 8\], got \(1, 3, 2, 8\)"),
        (K, K[..., :4], {}, ValueError, r"v must have shape \[2, t, 2, 8\], got \(2, 3, 2, 4\)"),
        (K, K[:, :2], {}, ValueError, r"v must have the tokens of k, \(2, 3\), got \(2, 2\)"),
        (PACKED, PACKED, {}, ValueError, r"k must have shape \[2, t, 2, 8\], got \(6, 2, 8\)"),
        (K, K, dict(cu_seqlens=ENDS), ValueError, r"k must have shape \[total, 2, 8\] with cu_seq"),
        (K.astype(int), K, {}, TypeError, r"k must have a floating dtype, got int"),
        ([1.0], K, {}, TypeError, r"k must be an array, got list"),
        (K, K, dict(num_tokens=1.5), TypeError, r"num_tokens must be an integer array, got float"),
        (K, K, dict(num_tokens=np.arange(3)), ValueError, r"num_tokens .* shape \(2,\).* \(3,\)"),
        (
            PACKED,
            PACKED,
            dict(cu_seqlens=np.arange(4)),
            ValueError,
            r"cu_seqlens must have shape \(3,\), one more than the sequences .* got \(4,\)",
        ),
        (
            PACKED,
            PACKED,
            dict(cu_seqlens=ENDS, num_tokens=1),
            ValueError,
            r"num_tokens must be left out with cu_seqlens",
        ),
    ],
)
def test_append(k, v, options, error, message):
    with pytest.raises(error, match=message):
        CACHE.append(k, v, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(q=Q[0]), ValueError, r"q must have shape \[B, T, N, H\], got \(3, 4, 8\)"),
        (dict(cu_seqlens_q=ENDS), ValueError, r"q must have shape \[total, N, H\] with cu_seqlens"),
        (dict(q=Q[:1]), ValueError, r"q must have the batch of the cache, 2, got 1"),
        (dict(q=Q[..., :4]), ValueError, r"k_pages must have the head dim of q, 4, got 8"),
        (
            dict(q=Q[:, :, :3]),
            ValueError,
            r"heads of q must be a multiple of the heads of k_pages .* got 3 and 2",
        ),
        (
            dict(q=Q.astype(jnp.bfloat16)),
            TypeError,
            r"k_pages must have the dtype of q, bfloat16, got float32",
        ),
        (dict(q=Q.astype(int)), TypeError, r"q must have dtype float32, .*float8_e5m2, got"),
        (
            dict(q=Q[0], cu_seqlens_q=np.arange(4)),
            ValueError,
            r"cu_seqlens_q must have shape \(3,\), one more than the sequences .* got \(4,\)",
        ),
        (
            dict(q=Q[0], cu_seqlens_q=ENDS, query_seq_lengths=1),
            ValueError,
            r"query_seq_lengths must be left out with cu_seqlens_q",
        ),
        (dict(query_offset=np.arange(3)), ValueError, r"query_offset .* shape \(2,\).* \(3,\)"),
        (dict(query_offset="start"), ValueError, r"query_offset must be .* got 'start'"),
        (dict(query_seq_lengths=np.ones(2)), TypeError, r"query_seq_lengths must have an integer"),
        (dict(scale="1"), TypeError, r"scale must be a Python number, got str"),
        (dict(return_lse=1), TypeError, r"return_lse must be a Python bool, got int"),
        (dict(local_window_size=-1), ValueError, r"local_window_size must be at least 0, got -1"),
        (dict(implementation="gpu"), ValueError, r"implementation must be None or one of"),
        (dict(sinks=jnp.zeros(3)), ValueError, r"sinks must have shape \(4,\)"),
        (dict(alibi_slopes=jnp.zeros(3)), ValueError, r"alibi_slopes must have shape \(4,\)"),
    ],
)
def test_attention(call, error, message):
    with pytest.raises(error, match=message):
        trace(**call)


def test_not_an_array():
    with pytest.raises(TypeError, match=r"q must be an array, got list"):
        paged_attention([1.0], CACHE)  # type: ignore
    with pytest.raises(TypeError, match=r"cache must be a PagedKVCache, got tuple"):
        paged_attention(Q, (Q, Q))  # type: ignore


def test_large_head_dim():
    cache = jax.eval_shape(lambda: PagedKVCache.create(**{**SIZES, "head_dim": 513}))
    q = jax.ShapeDtypeStruct((2, 1, 4, 513), jnp.float32)
    with pytest.raises(UnsupportedError, match=r"head dims up to 512 are supported, got 513"):
        trace(q, cache)
    assert trace(q, cache, implementation="xla").shape == (2, 1, 4, 513)
