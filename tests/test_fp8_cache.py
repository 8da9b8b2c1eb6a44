"""16-bit queries over 8-bit keys and values: their meaning, the cache of them, what is refused."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import draws
import oracle
import oracle_fp8
import pages
from jax_flashattn import (
    PagedKVCache,
    UnsupportedError,
    _native,
    attention,
    attention_varlen,
    explain,
    paged_attention,
)
from oracle_fp8 import DTYPES, E4M3, E5M2
from test_fp8 import BACKENDS, NAMES, per_head

QUERIES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
KEYS = pytest.mark.parametrize("keys", [(a, b) for a in DTYPES for b in DTYPES], ids=NAMES)
LAYOUTS = ["NHD", "HND"]


def make_inputs(seed, *sizes, dtype=jnp.bfloat16, keys=(E4M3, E4M3)):
    q, k, v = oracle.make_inputs(seed, *sizes, np.float32)[:3]
    return q.astype(dtype), k.astype(keys[0]), v.astype(keys[1])


@BACKENDS
@QUERIES
@KEYS
def test_dtypes(keys, dtype, implementation):
    inputs = make_inputs(0, 2, 70, 90, 4, 2, 32, 48, dtype=dtype, keys=keys)
    options = dict(is_causal=True, query_offset="end", implementation=implementation)
    oracle_fp8.check(*inputs, k_scale=per_head(0), v_scale=0.5, **options)


@settings(max_examples=40)
@given(data=st.data())
def test_any_combination(data):
    choose = lambda choices: data.draw(st.sampled_from(choices))
    sizes = [(2, 70, 70, 4, 2, 48, 80), (2, 1, 130, 4, 2, 16, 16)]
    inputs, options = draws.draw(choose, sizes=sizes, dtypes=[jnp.bfloat16, jnp.float16])
    del options["deterministic"]
    q, k, v = inputs[:3]
    k, v = k.astype(choose(DTYPES)), v.astype(choose(DTYPES))
    options["k_scale"] = choose([0.5, per_head(0)])
    oracle_fp8.check(q, k, v, poison=draws.poison(options, np.nan), **options)


def test_packed_scales():
    q, k, v = (x[0] for x in make_inputs(1, 1, 30, 30, 4, 2, 16, 16))
    scales = dict(k_scale=per_head(7)[0], v_scale=per_head(8)[0])
    packed = attention_varlen(q, k, v, cu_seqlens_q=jnp.array([0, 30]), **scales)
    np.testing.assert_array_equal(packed, attention(q, k, v, **scales))


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", DTYPES, ids=lambda d: d.__name__)
def test_pages(keys, layout, implementation):
    q, k, v = make_inputs(2, 3, 5, 90, 4, 2, 16, 32, keys=(keys, keys))
    lengths = [90, 31, 0]
    cache = pages.make_cache(k, v, lengths, page_size=16, layout=layout)
    cache = pages.with_scales(cache, 0.5, [2.0, 0.3])
    pages.check(q, k, v, lengths, cache, implementation=implementation)
    ends = np.array([0, 9, 10, 13])
    options = dict(cu_seqlens_q=ends, implementation=implementation)
    pages.check(q.reshape(15, 4, 16), k, v, lengths, cache, **options)


@settings(max_examples=40)
@given(data=st.data())
def test_any_paged_call(data):
    choose = lambda choices: data.draw(st.sampled_from(choices))
    dtype = choose([jnp.bfloat16, jnp.float16])
    pages.check_any(choose, (4, 2, 32, 48), [1, 1, 7, 70], 90, dtype, choose(DTYPES))


def test_vmap_over_pools():
    q, k, v = make_inputs(3, 4, 1, 20, 4, 2, 16, 16)
    caches = [
        pages.with_scales(pages.make_cache(k[i : i + 2], v[i : i + 2], [20, 9], page_size=8), s, s)
        for i, s in ((0, [0.5, 1.5]), (2, [1.0, 2.0]))
    ]
    caches = [jax.tree.map(jnp.nan_to_num, cache) for cache in caches]
    queries = jnp.stack([q[:2], q[2:]])
    expected = jnp.stack([paged_attention(x, c) for x, c in zip(queries, caches, strict=True)])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    np.testing.assert_array_equal(jax.vmap(paged_attention)(queries, stacked), expected)


# The cache.


def make_cache(layout="NHD", dtype=E4M3, **scales):
    cache = PagedKVCache.create(
        batch=3,
        max_pages=4,
        num_pages=13,
        page_size=8,
        num_kv_heads=2,
        head_dim=16,
        dtype=dtype,
        layout=layout,
        **scales,
    )
    table = np.random.default_rng(0).permutation(13)[:12].reshape(3, 4)
    return dataclasses.replace(cache, page_table=jnp.asarray(table, jnp.int32))


def first_tokens(cache, pool, count):
    """`[B, count, K, H]` of the first page of each sequence, in float32."""
    pool = np.asarray(pool if cache.layout == "NHD" else pool.swapaxes(1, 2)).astype(np.float32)
    return pool[np.asarray(cache.page_table[:, 0]), :count]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pages_of", DTYPES, ids=lambda d: d.__name__)
def test_append_rounds_to_nearest_even(pages_of, layout, dtype):
    """As ml_dtypes rounds the quotient in float32, and within the range of the type."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((3, 5, 2, 16)).astype(dtype).astype(np.float32)
    v = k * np.exp2(rng.integers(-20, 20, k.shape)).astype(np.float32)
    v[0, 0, 0, :4] = [np.inf, -np.inf, np.nan, 0]
    cache = make_cache(layout, pages_of, k_scale=0.01, v_scale=np.array([3.0, 0.5], np.float32))
    append = jax.jit(PagedKVCache.append)
    cache = append(cache, jnp.asarray(k, dtype), jnp.asarray(v, dtype))
    largest = float(jnp.finfo(pages_of).max)
    for pool, x, scale in (
        (cache.k_pages, k, np.float32(0.01)),
        (cache.v_pages, v, np.array([[3.0], [0.5]], np.float32)),
    ):
        assert pool.dtype == pages_of
        expected = np.clip(x / scale, -largest, largest).astype(pages_of).astype(np.float32)
        np.testing.assert_array_equal(first_tokens(cache, pool, 5), expected)


def test_append_rounds_ties_to_even_and_keeps_subnormals():
    exact = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    exact = np.sort(exact[np.isfinite(exact) & (exact > 0)])
    x = np.concatenate([exact, (exact[1:] + exact[:-1]) / 2, [449.0, 1e9]]).astype(np.float32)
    k = np.resize(x, (3, 5, 2, 16))
    cache = jax.jit(PagedKVCache.append)(make_cache(), jnp.asarray(k), jnp.asarray(k))
    got = first_tokens(cache, cache.k_pages, 5)
    np.testing.assert_array_equal(got, np.minimum(k, 448).astype(E4M3).astype(np.float32))


def test_generation_in_a_scan():
    """Append and attend in one program, as one causal call over what was stored."""
    inputs = oracle.make_inputs(4, 3, 20, 20, 4, 2, 16, 16, jnp.bfloat16)[:3]
    q, k, v = (jnp.asarray(x) for x in inputs)
    cache = make_cache(k_scale=0.25, v_scale=jnp.array([0.5, 1.0]))
    cache, out = pages.generate(cache, q, k, v)
    np.testing.assert_array_equal(cache.lengths, [20, 20, 20])
    k8 = (4 * k).astype(E4M3)
    v8 = (v * jnp.array([2, 1], v.dtype)[None, None, :, None]).astype(E4M3)
    expected = attention(
        q, k8, v8, is_causal=True, k_scale=0.25, v_scale=jnp.array([[0.5, 1.0]] * 3)
    )
    pages.check_generated(out, expected)


def test_donation():
    cache = make_cache(k_scale=0.5)
    k = jnp.ones((3, 1, 2, 16), jnp.bfloat16)
    text = jax.jit(PagedKVCache.append, donate_argnums=0).lower(cache, k, k).compile().as_text()
    alias = re.search(r"input_output_alias=\{(.*?) \},", text).group(1)
    assert "{0}: (0" in alias and "{1}: (1" in alias


def test_shard_map_over_heads():
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v = make_inputs(5, 3, 1, 40, 4, 2, 16, 16)
    lengths = [40, 17, 3]
    cache = pages.make_cache(k, v, lengths, page_size=8)
    cache = jax.tree.map(jnp.nan_to_num, pages.with_scales(cache, [0.5, 2.0], [1.5, 0.3]))
    pool, of_q = P(None, None, "heads"), P(None, None, "heads")
    specs = PagedKVCache(pool, pool, P(), P(), "NHD", P("heads"), P("heads"))  # type: ignore
    new = (k[:, :1].astype(jnp.bfloat16), v[:, :1].astype(jnp.bfloat16))

    def step(q, cache, k, v):
        cache = cache.append(k, v)
        return paged_attention(q, cache), cache

    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(of_q, specs, of_q, of_q), out_specs=(of_q, specs)
    )
    for x, y in zip(
        jax.tree.leaves(jax.jit(sharded)(q, cache, *new)),
        jax.tree.leaves(jax.jit(step)(q, cache, *new)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


# What is refused.


def arrays(dtypes=(jnp.bfloat16, E4M3, E4M3), H=16):
    shapes = ((2, 5, 4, H), (2, 7, 2, H), (2, 7, 2, H))
    return [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]


def trace(*operands, **options):
    return jax.eval_shape(lambda *x: attention(*x, **options), *operands)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ((jnp.float32, E4M3, E4M3), r"q must have dtype bfloat16, float16 .* got float32"),
        ((E4M3, jnp.bfloat16, jnp.bfloat16), r"k must have the dtype of q, float8_e4m3fn, got bf"),
        ((E5M2, E4M3, jnp.bfloat16), r"v must have the dtype of q, float8_e5m2, got bfloat16"),
        ((jnp.bfloat16, E4M3, jnp.bfloat16), r"k must .* or k and v both be float8, got float8_e4"),
        ((jnp.float16, jnp.float16, E5M2), r"v must .* or k and v both be float8, got float8_e5m2"),
    ],
    ids=lambda x: NAMES(x) if isinstance(x, tuple) else "",
)
def test_dtypes_that_do_not_mix(dtypes, message):
    for implementation in (None, "xla"):
        with pytest.raises(TypeError, match=message):
            trace(*arrays(dtypes), implementation=implementation)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(q_scale=1.0), ValueError, r"q_scale is for float8 queries, got it with bfloat16"),
        (dict(out_dtype=jnp.float16), ValueError, r"out_dtype is for float8 queries, got it with"),
        (dict(fp8_accumulation="fast"), ValueError, r"fp8_accumulation is for float8 queries"),
        (dict(k_scale=np.ones(2)), ValueError, r"k_scale must be a scalar .*\(2, 2\).* got \(2,\)"),
        (dict(v_scale="1"), TypeError, r"v_scale must be a number or a floating array, got str"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        trace(*arrays(), **options)


def test_head_dims():
    with pytest.raises(UnsupportedError, match=r"multiples of 16 up to 256, got 24 for q and k"):
        trace(*arrays(H=24))


def test_no_gradient():
    q, k, v = make_inputs(6, 1, 4, 4, 2, 2, 16, 16)
    loss = lambda q, s: attention(q, k, v, v_scale=s).astype(jnp.float32).sum()
    for argnums in (0, 1):
        with pytest.raises(UnsupportedError, match=r"float8 inputs is not differentiable"):
            jax.eval_shape(jax.grad(loss, argnums), q, jnp.float32(1))
    cache = pages.make_cache(k, v, [4], page_size=8)
    loss = lambda q: paged_attention(q, cache).astype(jnp.float32).sum()
    with pytest.raises(UnsupportedError, match=r"paged attention is for inference"):
        jax.eval_shape(jax.grad(loss), q)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (dict(k_scale=np.ones(3)), ValueError, r"k_scale must .* shape \(2,\), .* got \(3,\)"),
        (dict(v_scale=np.ones((1, 2))), ValueError, r"v_scale must .* shape \(2,\), .* \(1, 2\)"),
        (dict(v_scale=np.ones(2, int)), TypeError, r"v_scale must have a floating dtype, got int"),
        (dict(k_scale="1"), TypeError, r"k_scale must be a number or a floating array, got str"),
        (dict(k_scale=1.0, dtype=jnp.bfloat16), ValueError, r"k_scale is for float8 pages, got it"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_scales_of_a_cache(sizes, error, message):
    with pytest.raises(error, match=message):
        make_cache(**sizes)
    dtype = sizes.pop("dtype", E4M3)
    cache = dataclasses.replace(make_cache(dtype=dtype), **sizes)
    with pytest.raises(error, match=message):
        paged_attention(jnp.zeros((3, 1, 4, 16), jnp.bfloat16), cache)


def test_queries_over_pages():
    with pytest.raises(TypeError, match=r"q must have dtype bfloat16, float16 .* got float32"):
        paged_attention(jnp.zeros((3, 1, 4, 16)), make_cache())


# CUDA: which kernels, and what they are called with.


def lower(f, *operands, monkeypatch):
    monkeypatch.setenv("JFA_CUDA_ARCH", "80")
    return jax.jit(f).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def test_explain():
    def symbols(T, arch, keys=(E4M3, E4M3)):
        q, k, v = (
            jax.ShapeDtypeStruct((2, n, heads, 128), d)
            for n, heads, d in ((T, 8, jnp.bfloat16), (999, 2, keys[0]), (999, 2, keys[1]))
        )
        return [x["symbol"] for x in explain(q, k, v, platform="cuda", arch=arch).kernels]

    combine = "jfa_decode_combine_bf16_r16"
    main = "jfa_decode_sm90_bf16_e4m3_d128_full_r16"
    assert symbols(1, 90) == [main, combine, main + "_parts"]
    assert symbols(1, 80, (E5M2, E4M3)) == ["jfa_decode_sm80_bf16_e5m2_e4m3_d128_full_r16", combine]
    for arch in (80, 89):
        assert symbols(500, arch) == ["jfa_fwd_sm80_bf16_e4m3_d128_full"]
    assert symbols(500, 90) == ["jfa_fwd_sm90_bf16_e4m3_d128_full_short"]


def test_two_heads_of_64_share_a_tile():
    """Unless they lie apart, as in pages with the heads first, or no copy engine reads them."""

    def symbol(arch=90, features=(), dims=(64, 64)):
        features = ["fp8_kv", *features]
        plan = _native.cuda_explain("decode", "bfloat16", *dims, "full", features, arch, 4)
        return plan["kernels"][0]["symbol"]

    assert symbol() == "jfa_decode_sm90_bf16_e4m3_d64_full_pairs_r16"
    for apart in (dict(features=["heads_first"]), dict(arch=80), dict(dims=(64, 128))):
        assert "pairs" not in symbol(**apart)


def test_custom_calls(monkeypatch):
    f = partial(attention, v_scale=2.0)
    text = lower(f, *arrays((jnp.float16, E5M2, E4M3)), monkeypatch=monkeypatch)
    assert "jfa_serve_v2" in text
    assert f"fp8 = {1 + 4 + 32} : i64" in text and "is_bf16 = false" in text
    long = [jax.ShapeDtypeStruct((1, 900, 4, 16), d) for d in (jnp.bfloat16, E4M3, E4M3)]
    text = lower(f, *long, monkeypatch=monkeypatch)
    assert "jfa_fwd_v4" in text and f"fp8 = {1 + 32} : i64" in text


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_paged_custom_call(packed, monkeypatch):
    cache = jax.eval_shape(lambda: make_cache(k_scale=0.5, v_scale=jnp.ones(2)))
    shape = (9, 4, 16) if packed else (3, 1, 4, 16)
    options = dict(cu_seqlens_q=jnp.arange(4)) if packed else {}
    f = lambda q, cache: paged_attention(q, cache, **options)
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    text = lower(f, q, cache, monkeypatch=monkeypatch)
    assert text.count("jfa_serve_v2") == 1 and f"fp8 = {1 + 32} : i64" in text
    scale = "tensor<2x1xf32>" if packed else "tensor<2x3xf32>"  # key heads before sequences
    call = next(line for line in text.splitlines() if "jfa_serve_v2" in line)
    assert call.count(scale) == 2
