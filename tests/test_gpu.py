"""The CUDA kernels on a GPU against the float64 reference: `pytest -m gpu --gpu-report FILE`."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import draws
import oracle
from jax_flashattn import UnsupportedError, _native, attention, attention_varlen
from tolerances import assert_close

pytestmark = pytest.mark.gpu
DTYPES = (jnp.bfloat16, jnp.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
LENGTHS = [(1, 1), (113, 203), (799, 3), (64, 64), (1, 300), (257, 511), (1024, 1024)]


@dtypes
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_lengths(T, S, is_causal, dtype):
    inputs = oracle.make_inputs(0, 2, T, S, 4, 2, 64, 64, dtype)
    oracle.check(*inputs, is_causal=is_causal, query_offset="end")


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("H", [64, 96, 128, 256])
@pytest.mark.parametrize(("T", "S"), [(257, 1500), (700, 1025), (300, 8200)])
def test_longer_keys(T, S, H, is_causal):
    """Tiles depend on the length of the keys."""
    inputs = oracle.make_inputs(0, 1, T, S, 2, 1, H, H, jnp.bfloat16)
    oracle.check(*inputs, is_causal=is_causal, query_offset="end")


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("H", "S"), [(64, 700), (64, 1500), (128, 900), (256, 1200)])
def test_schedules_give_the_same_bits(H, S, is_causal):
    q, k, v, *_ = oracle.make_inputs(0, 3, 450, S, 16, 8, H, H, jnp.bfloat16)
    lengths = np.array([S, 0, 77], np.int32)
    run = partial(
        attention,
        is_causal=is_causal,
        query_offset="end",
        key_value_seq_lengths=lengths,
        return_lse=True,
    )
    ends = jnp.array([0, 3, 3, 200, 450])
    packed = partial(attention_varlen, q[0], k[0], v[0], cu_seqlens_q=ends, cu_seqlens_kv=ends)
    # One multiprocessor always works.
    for options in (dict(schedule="persistent"), dict(sm_margin=100), dict(sm_margin=10**6)):
        for x, y in zip(run(q, k, v, **options), run(q, k, v, schedule="grid"), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        if H > 64:  # below, the plan prefers an older kernel to a grid of the newer one
            x, y = (packed(is_causal=is_causal, **z) for z in (options, dict(schedule="grid")))
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_packed_and_persistent():
    """At a head dim where the plan would not choose the kernel that this takes."""
    q, k, v, dout, _ = oracle.make_inputs(0, 1, 450, 450, 16, 8, 64, 64, jnp.bfloat16)
    dlse = np.zeros((1, 16, 450), np.float32)
    ends = np.array([0, 3, 3, 200, 433], np.int32)
    exact, twin, _ = oracle.references(q, k, v, dout, dlse, cu_seqlens_q=ends, cu_seqlens_kv=ends)
    out = attention_varlen(q, k, v, cu_seqlens_q=ends, sm_margin=120)
    assert_close(out, exact[0], twin[0], dtype=q.dtype, what="out")


@pytest.mark.parametrize("margin", [1, 131, 10**6])
def test_decoding_with_a_margin(margin):
    inputs = oracle.make_inputs(0, 2, 1, 3000, 8, 2, 128, 128, jnp.bfloat16)
    exact, twin, _ = oracle.references(*inputs)
    out = attention(*inputs[:3], sm_margin=margin)
    assert_close(out, exact[0], twin[0], dtype=out.dtype, what="out")


HEAD_DIMS = [8, 17, 32, 40, 64, 72, 80, 96, 100, 128, 160, 192, 256]
UNEQUAL = [(192, 128), (64, 128), (128, 64), (40, 256), (256, 24), (33, 57)]


@dtypes
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("H", "Hv"), [*((d, d) for d in HEAD_DIMS), *UNEQUAL], ids=str)
def test_head_dims(H, Hv, is_causal, dtype):
    inputs = oracle.make_inputs(1, 1, 150, 267, 2, 1, H, Hv, dtype)
    oracle.check(*inputs, is_causal=is_causal, query_offset="end")


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (6, 6), (6, 2), (8, 1), (32, 1)])
@pytest.mark.parametrize("T", [1, 5, 150])
def test_grouped_query(T, N, K, deterministic):
    inputs = oracle.make_inputs(2, 2, T, 300, N, K, 64, 64, jnp.bfloat16)
    oracle.check(*inputs, is_causal=True, query_offset="end", deterministic=deterministic)


@pytest.mark.parametrize("offset", [-200, -64, -1, 0, 1, 63, 1000, 2**31 - 1, -(2**31), 10**12])
def test_static_offset(offset):
    inputs = oracle.make_inputs(3, 1, 150, 200, 2, 1, 64, 64, jnp.bfloat16)
    oracle.check(*inputs, is_causal=True, query_offset=offset)


def test_offset_per_sequence():
    inputs = oracle.make_inputs(4, 6, 170, 290, 2, 1, 64, 64, jnp.bfloat16)
    offsets = np.array([-(2**31), -71, -3, 0, 20, 2**31 - 1], np.int32)
    oracle.check(*inputs, is_causal=True, query_offset=offsets)


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("offset", [0, "end"])
@pytest.mark.parametrize("H", [64, 100, 128, 256])
def test_padding_never_leaks(H, offset, value, dtype):
    lengths = dict(
        query_seq_lengths=np.array([0, 1, 63, 64, 65, 150, 999, -4], np.int32),
        key_value_seq_lengths=np.array([170, 0, 64, 1, 129, 170, 2**31 - 1, 20], np.int32),
    )
    inputs = oracle.make_inputs(5, 8, 150, 170, 2, 1, H, 64, dtype)
    poison = draws.poison(lengths, value)
    oracle.check(*inputs, poison=poison, is_causal=True, query_offset=offset, **lengths)


@pytest.mark.parametrize("S", [900, 1500, 4200])
@pytest.mark.parametrize("H", [64, 96, 128, 256])
def test_logits_that_rise(H, S):
    """Each block of keys has larger logits than those before, so that references must follow."""
    q, k, v, dout, dlse = oracle.make_inputs(7, 1, 200, S, 2, 1, H, H, jnp.bfloat16)
    oracle.check(*oracle.rising(q, k), v, dout, dlse, scale=16 / H)


@pytest.mark.parametrize("scale", [1e-4, -0.3, 2.0])
def test_scale(scale):
    q, k, v, dout, dlse = oracle.make_inputs(8, 1, 170, 170, 2, 2, 64, 64, jnp.bfloat16)
    if scale < 0:
        out = attention(q, k, v, scale=scale)
        np.testing.assert_array_equal(out, attention(-q, k, v, scale=-scale))
    else:
        oracle.check(q, k, v, dout, dlse, scale=scale)


# Every draw may need kernels of its own, so a size has one dtype.
SIZES = [
    ((2, 130, 130, 4, 2, 64, 64), jnp.bfloat16),
    ((1, 513, 513, 4, 4, 128, 128), jnp.bfloat16),
    ((2, 257, 65, 3, 1, 96, 80), jnp.float16),
    ((2, 65, 300, 4, 4, 256, 256), jnp.bfloat16),
    ((3, 1, 400, 8, 1, 64, 64), jnp.bfloat16),
    ((1, 700, 700, 2, 1, 192, 128), jnp.float16),
]


@pytest.mark.parametrize("seed", range(600))
def test_any_combination(seed):
    draws.check_seed(seed, SIZES)


@pytest.mark.parametrize("first", range(0, 120, 30))
@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_families(family, first, run_python):
    """The plan chooses one kernel family for a variant; the other one must do the same."""
    run_python(
        f"""
        from test_gpu import test_any_combination
        for seed in range({first}, {first} + 30):
            test_any_combination(seed)
        """,
        JAX_PLATFORMS="cuda",
        JFA_FORCE_FAMILY=family,
    )


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("H", [64, 128, 256])
def test_more_tiles_than_multiprocessors(H, is_causal):
    """CTAs that stay take tiles one after the other, among them many without any key."""
    B, T, N = 8, 450, 16
    lengths = dict(
        query_seq_lengths=np.array([450, 450, 3, 0, 450, 64, 300, 450], np.int32),
        key_value_seq_lengths=np.array([450, 0, 0, 131, 7, 0, 449, 0], np.int32),
    )
    inputs = oracle.make_inputs(7, B, T, T, N, 4, H, H, jnp.bfloat16)
    oracle.check(*inputs, poison=draws.poison(lengths, np.nan), is_causal=is_causal, **lengths)


def test_rows_that_see_nothing():
    q, k, v, _, _ = oracle.make_inputs(6, 1, 4, 4, 1, 1, 64, 64, jnp.bfloat16)
    out, lse = attention(q, k, v, is_causal=True, query_offset=-2, return_lse=True)
    np.testing.assert_array_equal(np.asarray(out[0, :2], np.float32), np.zeros((2, 1, 64)))
    np.testing.assert_array_equal(lse[0, 0, :2], [-np.inf, -np.inf])


@pytest.mark.parametrize("H", [64, 128, 256])
def test_deterministic_is_bitwise_repeatable(H):
    inputs = oracle.make_inputs(11, 2, 1000, 1000, 6, 2, H, H, jnp.bfloat16)
    options = (("is_causal", True), ("deterministic", True))
    first = oracle.run(*inputs, {}, options)
    for _ in range(5):
        for x, y in zip(first, oracle.run(*inputs, {}, options), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_float32_is_refused():
    q, k, v, _, _ = oracle.make_inputs(12, 1, 8, 8, 1, 1, 64, 64, jnp.float32)
    with pytest.raises(UnsupportedError, match=r"float32.*implementation='xla'"):
        attention(q, k, v)


def layer(x, weight):
    return x + weight * attention(x, x, x, is_causal=True), None


def test_scan_and_checkpoint():
    x = oracle.make_inputs(13, 2, 200, 200, 4, 4, 64, 64, jnp.bfloat16)[0]
    weights = jnp.array([0.1, 0.2, 0.3], jnp.bfloat16)

    def gradient(layer):
        def loss(x):
            y = jax.lax.scan(layer, x, weights)[0]
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return np.asarray(jax.jit(jax.grad(loss))(x), np.float32)

    plain, remat = gradient(layer), gradient(jax.checkpoint(layer))
    assert np.isfinite(plain).all()
    np.testing.assert_allclose(plain, remat, atol=0.02 * np.abs(plain).max())


def test_several_streams():
    f = jax.jit(lambda *x: attention(*x, is_causal=True))
    many = [oracle.make_inputs(i, 2, 300, 300, 4, 2, 64, 64, jnp.bfloat16)[:3] for i in range(8)]
    expected = [np.asarray(f(*x), np.float32) for x in many]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for got, one in zip(pool.map(lambda x: f(*x), many), expected, strict=True):
                np.testing.assert_array_equal(np.asarray(got, np.float32), one)


def test_captured_into_a_cuda_graph(tmp_path, run_python):
    """Command buffers hold the custom calls, and replays give what separate launches give."""
    run_python(
        """
        import jax, jax.numpy as jnp, numpy as np, oracle
        from jax_flashattn import attention
        q, k, v, _, _ = oracle.make_inputs(0, 2, 200, 200, 4, 2, 64, 64, jnp.bfloat16)
        def f(q):
            for _ in range(8):
                q = attention(q, k, v, is_causal=True)
            return q
        graph = jax.jit(f)
        launches = jax.jit(f).lower(q).compile(
            compiler_options={"xla_gpu_enable_command_buffer": ""})
        expected = np.asarray(launches(q), np.float32)
        for _ in range(5):
            np.testing.assert_array_equal(np.asarray(graph(q), np.float32), expected)
        """,
        JAX_PLATFORMS="cuda",
        XLA_FLAGS=f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
    )
    dumps = list(tmp_path.glob("*thunk_sequence*"))
    text = "".join(path.read_text() for path in dumps)
    assert "kCommandBuffer" in text, [path.name for path in tmp_path.iterdir()]
    assert re.search(r"kCommandBuffer[\s\S]*kCustomCall", text)


def test_no_compile_for_new_values():
    """What is a run-time value compiles no kernel, whatever it changes to."""
    rng = np.random.default_rng(0)

    def call(T, S, window, sink_tokens, cap, offset, scale):
        q, k, v, _, _ = oracle.make_inputs(0, 2, T, S, 2, 1, 64, 64, jnp.bfloat16)
        loss = lambda q, slopes, sinks: jnp.sum(
            attention(
                q,
                k,
                v,
                is_causal=True,
                local_window_size=window,
                sink_tokens=sink_tokens,
                logits_soft_cap=cap,
                query_offset=offset,
                scale=scale,
                alibi_slopes=slopes,
                sinks=sinks,
                key_value_seq_lengths=rng.integers(0, S, 2),
                segment_ids=(rng.integers(0, 3, (2, T)), rng.integers(0, 3, (2, S))),
            ).astype(jnp.float32)
        )
        slopes, sinks = (jnp.asarray(rng.random(2), jnp.float32) for _ in range(2))
        jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2)))(q, slopes, sinks))

    call(10, 20, (5, 0), 1, 10.0, 0, 0.1)
    before = _native.jit_stats()["compiles"]
    for values in (
        (10, 20, (7, 0), 1, 10.0, 0, 0.1),
        (10, 20, (5, 0), 0, 20.0, 0, 0.1),
        (300, 700, (64, 0), 3, 30.0, 5, 0.1),
        (1, 1, (0, 0), 0, 1.0, np.array([-3, 9]), 7.0),
    ):
        call(*values)
    assert _native.jit_stats()["compiles"] == before


def test_no_compile_for_new_boundaries():
    q, k, v, _, _ = (x[0] for x in oracle.make_inputs(0, 1, 500, 500, 2, 1, 64, 64, jnp.bfloat16))
    f = jax.jit(lambda ends: attention_varlen(q, k, v, cu_seqlens_q=ends, is_causal=True))
    f(jnp.array([0, 100, 500]))
    before = _native.jit_stats()["compiles"]
    f(jnp.array([0, 499, 499]))
    f(jnp.array([0, 1, 2, 3, 444]))
    assert _native.jit_stats()["compiles"] == before
