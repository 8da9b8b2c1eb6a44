"""Decoding and paged attention on a GPU against the float64 oracle: `pytest -m gpu`."""

import re
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

import draws
import oracle
import pages
from jax_flashattn import PagedKVCache, attention

pytestmark = pytest.mark.gpu

HEAD_DIMS = [8, 40, 64, 72, 96, 128, 192, 256, (192, 128), (64, 128), (128, 64), 33]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_head_dims(dims, dtype):
    H, Hv = dims if isinstance(dims, tuple) else (dims, dims)
    inputs = oracle.make_inputs(1, 2, 1, 700, 4, 2, H, Hv, dtype)
    oracle.check(*inputs, is_causal=True, query_offset="end")
    q, k, v = inputs[:3]
    cache = pages.make_cache(k, v, [700, 130], page_size=16)
    pages.check(q, k, v, [700, 130], cache)


@pytest.mark.parametrize("T", [1, 2, 5, 16])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (24, 1), (32, 1), (128, 1)], ids=str)
def test_rows_of_a_key_head(heads, T):
    """From one row to more than a tile has, and to several tiles."""
    inputs = oracle.make_inputs(2, 2, T, 333, *heads, 64, 64, jnp.bfloat16)
    oracle.check(*inputs, is_causal=True, query_offset="end")


@pytest.mark.parametrize("S", [1, 63, 64, 65, 4096, 70001])
def test_key_lengths(S):
    inputs = oracle.make_inputs(3, 1, 1, S, 8, 2, 128, 128, jnp.bfloat16)
    oracle.check(*inputs)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("T", [1, 200])
def test_page_sizes(T, layout, page_size):
    lengths = [900, 0, 257, 33, 512]
    q, k, v = oracle.make_inputs(4, 5, T, 900, 8, 2, 128, 128, jnp.bfloat16)[:3]
    cache = pages.make_cache(k, v, lengths, page_size=page_size, layout=layout)
    pages.check(q, k, v, lengths, cache)


@pytest.mark.parametrize("B", [1, 31, 33, 500])
def test_mixed_lengths(B):
    """Work is shared out by what lengths say, with more sequences than lanes and CTAs."""
    rng = np.random.default_rng(B)
    lengths = np.minimum(rng.lognormal(4, 2, B), 600).astype(np.int32)
    q, k, v = oracle.make_inputs(5, B, 1, 600, 4, 2, 64, 64, jnp.bfloat16)[:3]
    cache = pages.make_cache(k, v, lengths, page_size=16)
    pages.check(q, k, v, lengths, cache)


SIZES = [
    ((3, 1, 400, 8, 1, 64, 64), jnp.bfloat16),
    ((2, 5, 300, 8, 2, 128, 128), jnp.bfloat16),
    ((1, 16, 900, 4, 4, 128, 64), jnp.float16),
    ((2, 2, 257, 4, 1, 256, 256), jnp.bfloat16),
    ((1, 9, 500, 16, 2, 96, 80), jnp.float16),
]


@pytest.mark.parametrize("seed", range(100))
def test_any_decoding(seed):
    """Backward too, which is that of any other attention."""
    draws.check_seed(seed, SIZES)


HEADS = [
    ((8, 2, 128, 128), jnp.bfloat16),
    ((4, 1, 64, 64), jnp.float16),
    ((2, 2, 256, 256), jnp.bfloat16),
    ((6, 3, 96, 40), jnp.bfloat16),
    ((3, 1, 33, 57), jnp.bfloat16),
]


@pytest.mark.parametrize("seed", range(200))
def test_any_paged_call(seed):
    choose = draws.from_seed(1000 + seed)
    heads, dtype = choose(HEADS)
    pages.check_any(choose, heads, [1, 1, 3, 16, 70, 300], 700, dtype)


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_families(family, run_python):
    """The plan chooses one kernel family for a variant; the other one must do the same."""
    run_python(
        """
        import jax.numpy as jnp
        import test_gpu_serving as t
        for seed in range(40):
            t.test_any_decoding(seed)
        for seed in range(80):
            t.test_any_paged_call(seed)
        for T in (1, 200):
            for page_size in (8, 32, 256):
                t.test_page_sizes(T, "HND", page_size)
        for dims in (40, 64, 128, 256, (192, 128)):
            t.test_head_dims(dims, jnp.bfloat16)
        """,
        JAX_PLATFORMS="cuda",
        JFA_FORCE_FAMILY=family,
    )


# Fewer blocks of keys than a cluster has CTAs, empty sequences, windows, all page sizes, several
# tiles of rows, all tile classes.
CLUSTER_CASES = {
    "lengths": """
        for S in (1, 63, 65, 300, 4097):
            t.test_key_lengths(S)
        t.test_mixed_lengths(33)
        t.test_numbers_out_of_range_are_clamped()
        t.test_bitwise_repeatable()
        """,
    "pages": """
        lengths = [700, 0, 257, 1, 64]
        q, k, v = oracle.make_inputs(9, 5, 2, 700, 8, 2, 128, 128, jnp.bfloat16)[:3]
        sinks = np.linspace(-2, 2, 8, dtype=np.float32)
        window = dict(local_window_size=(100, 0), sink_tokens=5, sinks=sinks)
        for page_size in (8, 16, 32, 64, 128, 256):
            for layout in ("NHD", "HND"):
                cache = pages.make_cache(k, v, lengths, page_size=page_size, layout=layout)
                pages.check(q, k, v, lengths, cache)
            pages.check(q, k, v, lengths, cache, logits_soft_cap=5.0, **window)
        """,
    "tiles": """
        for heads in ((24, 1), (128, 1)):
            for T in (1, 5):
                t.test_rows_of_a_key_head(heads, T)
        for dims in (40, 64, 256, (192, 128), (64, 128)):
            t.test_head_dims(dims, jnp.float16)
        """,
    "any": """
        for seed in range(12):
            t.test_any_decoding(seed)
        for seed in range(24):
            t.test_any_paged_call(seed)
        """,
}


@pytest.mark.parametrize("size", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("cases", CLUSTER_CASES)
def test_clusters(cases, size, run_python):
    """Clusters of any size may share a tile, or none, whatever the plan would choose."""
    modules = "import jax.numpy as jnp, numpy as np, oracle, pages, test_gpu_serving as t\n"
    run_python(
        modules + textwrap.dedent(CLUSTER_CASES[cases]),
        JAX_PLATFORMS="cuda",
        JFA_FORCE_CLUSTER=str(size),
    )


def test_numbers_out_of_range_are_clamped():
    pages.check_clamped(*oracle.make_inputs(6, 3, 1, 64, 4, 2, 64, 64, jnp.bfloat16)[:3])


def test_bitwise_repeatable():
    oracle.check_repeatable(*oracle.make_inputs(7, 3, 2, 9000, 16, 2, 128, 128, jnp.bfloat16)[:3])


@pytest.mark.parametrize(
    "lengths", [None, [9000, 5001, 0], [9000, 1, 8999], [5001] * 3, [0] * 3], ids=str
)
@pytest.mark.parametrize("dim", [64, 128])
def test_few_multiprocessors(lengths, dim):
    """Of 132 three are left, which have many blocks each, and parts of few tiles."""
    inputs = oracle.make_inputs(9, 3, 1, 9000, 8, 2, dim, dim, jnp.bfloat16)
    lengths = {} if lengths is None else dict(key_value_seq_lengths=np.array(lengths))
    oracle.check(*inputs, **lengths, sm_margin=129)


@pytest.mark.parametrize("lengths", [None, [300, 300], [12000, 12000], [12000, 0]], ids=str)
@pytest.mark.parametrize("window", [None, (100, 0), (9000, 0)], ids=str)
@pytest.mark.parametrize("rows", [1, 20, 128])
def test_parts_of_long_tiles(lengths, window, rows):
    """Equal parts: fewer blocks than parts, windows, few rows and many; and unequal lengths."""
    inputs = oracle.make_inputs(10, 2, 1, 12000, 2 * rows, 2, 64, 64, jnp.bfloat16)
    lengths = {} if lengths is None else dict(key_value_seq_lengths=np.array(lengths))
    window = dict(is_causal=True, query_offset="end", local_window_size=window)
    oracle.check(*inputs, **lengths, **window)


@pytest.mark.parametrize("lengths", [None, [300] * 128], ids=["full", "short"])
def test_several_whole_tiles_for_each_cta(lengths):
    inputs = oracle.make_inputs(11, 128, 1, 2048, 8, 8, 64, 64, jnp.bfloat16)
    lengths = {} if lengths is None else dict(key_value_seq_lengths=np.array(lengths))
    oracle.check(*inputs, **lengths)


def test_generation_in_a_scan():
    """Append and attend, step by step in one program, as one causal call over all tokens."""
    B, T, N, K, H = 3, 40, 8, 2, 64
    q, k, v = (jnp.asarray(x) for x in oracle.make_inputs(8, B, T, T, N, K, H, H, jnp.bfloat16)[:3])
    cache = PagedKVCache.create(
        batch=B,
        max_pages=5,
        num_pages=16,
        page_size=8,
        num_kv_heads=K,
        head_dim=H,
        dtype=jnp.bfloat16,
    )
    table = np.random.default_rng(0).permutation(15).reshape(B, 5)
    cache = PagedKVCache(cache.k_pages, cache.v_pages, jnp.asarray(table, jnp.int32), cache.lengths)
    _, out = pages.generate(cache, q, k, v)
    expected = attention(q, k, v, is_causal=True)
    pages.check_generated(out, expected)


@pytest.mark.parametrize("S", [700, 30000], ids=["a cluster", "two kernels"])
def test_captured_into_a_cuda_graph(S, tmp_path, run_python):
    """Command buffers hold the kernels of a decoding step; replays give what launches give."""
    run_python(
        f"""
        import jax, jax.numpy as jnp, numpy as np, oracle
        from jax_flashattn import attention
        q, k, v, _, _ = oracle.make_inputs(0, 2, 1, {S}, 8, 2, 128, 128, jnp.bfloat16)
        def f(q):
            for _ in range(8):
                q = attention(q, k, v)
            return q
        graph = jax.jit(f)
        launches = jax.jit(f).lower(q).compile(
            compiler_options={{"xla_gpu_enable_command_buffer": ""}})
        expected = np.asarray(launches(q), np.float32)
        for _ in range(20):
            np.testing.assert_array_equal(np.asarray(graph(q), np.float32), expected)
        """,
        JAX_PLATFORMS="cuda",
        XLA_FLAGS=f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
    )
    text = "".join(path.read_text() for path in tmp_path.glob("*thunk_sequence*"))
    assert re.search(r"kCommandBuffer[\s\S]*kCustomCall", text)
