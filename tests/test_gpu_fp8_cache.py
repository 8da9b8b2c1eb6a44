"""16-bit queries over 8-bit keys and values on a GPU against the float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import draws
import oracle
import oracle_fp8
import pages
from jax_flashattn import PagedKVCache, attention
from oracle_fp8 import DTYPES, E4M3
from test_fp8 import per_head
from test_fp8_cache import KEYS, QUERIES, make_cache, make_inputs

pytestmark = pytest.mark.gpu

HEAD_DIMS = [*((d, d) for d in (16, 48, 64, 80, 96, 128, 192, 240, 256)), (64, 128), (192, 128)]
LONG = pytest.mark.parametrize("T", [1, 150], ids=["decode", "forward"])


@LONG
@QUERIES
@pytest.mark.parametrize(("H", "Hv"), HEAD_DIMS, ids=str)
def test_head_dims(H, Hv, dtype, T):
    q, k, v = make_inputs(1, 2, T, 467, 4, 2, H, Hv, dtype=dtype)
    scales = dict(k_scale=per_head(0), v_scale=per_head(1))
    oracle_fp8.check(q, k, v, is_causal=True, query_offset="end", **scales)
    cache = pages.make_cache(k, v, [467, 130], page_size=16)
    cache = pages.with_scales(cache, [0.5, 1.5], [2.0, 0.1])
    pages.check(q, k, v, [467, 130], cache)


@LONG
@QUERIES
@KEYS
def test_dtypes(keys, dtype, T):
    inputs = make_inputs(2, 2, T, 200, 4, 2, 128, 64, dtype=dtype, keys=keys)
    oracle_fp8.check(*inputs, k_scale=per_head(1), v_scale=0.5)


@pytest.mark.parametrize("T", [16, 150], ids=["decode", "forward"])
@pytest.mark.parametrize("keys", DTYPES, ids=lambda d: d.__name__)
def test_every_value(keys, T):
    """Each finite number of the type, subnormal ones too, is read as what it is.

    A query sees one key: its value is the output, one of its elements the log-sum-exp.
    """
    values = np.arange(256, dtype=np.uint8).view(keys)
    values = values[np.isfinite(values.astype(np.float32))]
    count = len(values) // T * T
    kv = np.stack([np.roll(values, -dim) for dim in range(256)], axis=-1)[None, :, None]
    q = np.zeros((1, T, 1, 256), np.float32)
    element = 7 * np.arange(T) % 256
    q[0, np.arange(T), 0, element] = 1
    q, kv = jnp.asarray(q, jnp.bfloat16), jnp.asarray(kv)
    options = dict(scale=1.0, local_window_size=0, return_lse=True)
    f = jax.jit(lambda offset: attention(q, kv, kv, query_offset=offset, **options))
    for first in range(0, count, T):
        out, lse = f(jnp.int32(first))
        seen = np.asarray(kv[0, first : first + T, 0], np.float32)
        np.testing.assert_array_equal(np.asarray(out[0, :, 0], np.float32), seen)
        read = np.asarray(lse[0, 0]).astype(keys).astype(np.float32)
        np.testing.assert_array_equal(read, seen[np.arange(T), element])


@LONG
@pytest.mark.parametrize("size", [2.0**-100, 2.0**-20, 2.0**100])
def test_queries_of_any_size(size, T):
    """bfloat16 reaches far beyond float16, in which products are computed."""
    q, k, v = make_inputs(3, 2, T, 300, 4, 2, 128, 128)
    q = (q.astype(np.float32) * size).astype(jnp.bfloat16)
    oracle_fp8.check(q, k, v, k_scale=np.float32(1 / size))


@pytest.mark.parametrize("T", [1, 2, 5, 16])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (24, 1), (128, 1)], ids=str)
def test_rows_of_a_key_head(heads, T):
    inputs = make_inputs(4, 2, T, 333, *heads, 64, 64)
    oracle_fp8.check(*inputs, is_causal=True, query_offset="end")


@pytest.mark.parametrize("heads", [(2, 2), (6, 3), (16, 2), (40, 5)], ids=str)
@pytest.mark.parametrize("T", [1, 3, 16])
def test_pairs_of_key_heads(T, heads):
    """At head dim 64 two share a tile, and each has scales of its own."""
    q, k, v = make_inputs(10, 2, T, 333, *heads, 64, 64)
    scales = dict(k_scale=per_head(2, 2, heads[1]), v_scale=per_head(3, 2, heads[1]))
    slopes = np.linspace(0, 0.1, heads[0], dtype=np.float32)
    options = dict(is_causal=True, query_offset="end", alibi_slopes=slopes)
    oracle_fp8.check(q, k, v, sinks=slopes, **scales, **options)


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("S", [1, 63, 64, 65, 4096, 70001])
def test_key_lengths(S, H):
    oracle_fp8.check(*make_inputs(5, 1, 1, S, 8, 2, H, H))


@QUERIES
@pytest.mark.parametrize("H", [64, 80, 128, 192, 256])
def test_long_calls(H, dtype):
    """Full masks over more than 1024 keys have tiles of their own."""
    q, k, v = make_inputs(12, 2, 500, 1500, 4, 2, H, H, dtype=dtype)
    oracle_fp8.check(q, k, v, k_scale=per_head(4), v_scale=per_head(5))


@pytest.mark.parametrize("page_size", [8, 16, 64, 256])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("T", [1, 200])
def test_page_sizes(T, layout, page_size):
    lengths = [900, 0, 257, 33, 512]
    q, k, v = make_inputs(6, 5, T, 900, 8, 2, 128, 128)
    cache = pages.make_cache(k, v, lengths, page_size=page_size, layout=layout)
    pages.check(q, k, v, lengths, pages.with_scales(cache, 0.5, 2.0))


SIZES = [
    (3, 1, 400, 8, 1, 64, 64),
    (2, 5, 300, 8, 2, 128, 128),
    (2, 130, 130, 4, 2, 64, 64),
    (1, 213, 313, 4, 4, 128, 64),
    (2, 65, 300, 4, 4, 256, 256),
    (1, 9, 500, 16, 2, 96, 80),
]


@pytest.mark.parametrize("seed", range(60))
def test_any_combination(seed):
    choose = draws.from_seed(seed)
    inputs, options = draws.draw(choose, sizes=SIZES, dtypes=[jnp.bfloat16, jnp.float16])
    del options["deterministic"]
    q, k, v = inputs[:3]
    k, v = k.astype(choose(DTYPES)), v.astype(choose(DTYPES))
    options["k_scale"] = choose([0.5, per_head(seed, *k.shape[::2][:2])])
    # Padding that is finite and large must not say how queries are scaled.
    poison = draws.poison(options, choose([np.nan, 6e4]))
    oracle_fp8.check(q, k, v, poison=poison, **options)


def test_padding_does_not_scale_queries():
    q, k, v = make_inputs(11, 2, 4, 200, 4, 2, 128, 128)
    options = dict(query_seq_lengths=np.array([1, 3], np.int32))
    oracle_fp8.check(q, k, v, poison=draws.poison(options, 1e30), **options)


HEADS = [(8, 2, 128, 128), (4, 1, 64, 64), (2, 2, 256, 256), (6, 3, 96, 48), (6, 3, 64, 64)]


@pytest.mark.parametrize("seed", range(100))
def test_any_paged_call(seed):
    choose = draws.from_seed(2000 + seed)
    heads, dtype = choose(HEADS), choose([jnp.bfloat16, jnp.float16])
    pages.check_any(choose, heads, [1, 1, 3, 16, 70, 300], 700, dtype, choose(DTYPES))


def test_the_other_family(run_python):
    """What sm_80 to sm_89 run, but for the conversion, which is sm_90's here."""
    run_python(
        """
        import jax.numpy as jnp
        import test_gpu_fp8_cache as t
        for seed in range(20):
            t.test_any_combination(seed)
        for seed in range(40):
            t.test_any_paged_call(seed)
        """,
        JAX_PLATFORMS="cuda",
        JFA_FORCE_FAMILY="sm80",
    )


def test_append_as_on_a_cpu():
    """The same bytes as ml_dtypes makes of the quotients."""
    rng = np.random.default_rng(7)
    k = (rng.standard_normal((3, 5, 2, 16)) * np.exp2(rng.integers(-20, 20, (3, 5, 2, 16)))).astype(
        np.float32
    )
    cache = jax.jit(PagedKVCache.append)(make_cache(k_scale=0.03), k, k)
    page = np.asarray(cache.k_pages)[np.asarray(cache.page_table[:, 0]), :5]
    expected = np.clip(k / np.float32(0.03), -448, 448).astype(E4M3)
    np.testing.assert_array_equal(page.astype(np.float32), expected.astype(np.float32))


def test_bitwise_repeatable():
    oracle.check_repeatable(*map(jnp.asarray, make_inputs(8, 3, 2, 9000, 16, 2, 128, 128)))


def test_generation_in_a_scan():
    """Append and attend, step by step in one program, as one causal call over what was stored."""
    q, k, v = (
        jnp.asarray(x) for x in oracle.make_inputs(9, 3, 30, 30, 4, 2, 16, 16, jnp.bfloat16)[:3]
    )
    cache = make_cache(k_scale=0.25, v_scale=0.5)
    _, out = pages.generate(cache, q, k, v)
    k8, v8 = (4 * k).astype(E4M3), (2 * v).astype(E4M3)
    expected = attention(q, k8, v8, is_causal=True, k_scale=0.25, v_scale=0.5)
    pages.check_generated(out, expected)
