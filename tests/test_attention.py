"""Forward and backward of the CPU kernels against the float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import draws
import oracle
from jax_flashattn import attention


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (113, 203), (799, 3), (64, 64), (1, 300), (257, 511)])
def test_lengths(T, S, is_causal, dtype):
    inputs = oracle.make_inputs(0, 2, T, S, 4, 2, 64, 64, dtype)
    oracle.check(*inputs, is_causal=is_causal, query_offset="end")


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    ("H", "Hv"), [(1, 1), (3, 5), (17, 16), (40, 40), (80, 96), (128, 64), (192, 128), (512, 512)]
)
def test_head_dims(H, Hv, dtype):
    oracle.check(
        *oracle.make_inputs(1, 1, 70, 131, 2, 1, H, Hv, dtype), is_causal=True, query_offset=0
    )


@pytest.mark.parametrize(("N", "K"), [(1, 1), (6, 6), (6, 2), (8, 1)])
@pytest.mark.parametrize("T", [1, 5, 150])
def test_grouped_query(N, K, T):
    oracle.check(
        *oracle.make_inputs(2, 2, T, 150, N, K, 32, 32, jnp.float32),
        is_causal=True,
        query_offset="end",
    )


@pytest.mark.parametrize("offset", [-200, -64, -1, 0, 1, 63, 64, 1000, 2**31 - 1, -(2**31), 10**12])
def test_static_offset(offset):
    inputs = oracle.make_inputs(3, 1, 100, 130, 2, 1, 16, 16, jnp.float32)
    oracle.check(*inputs, is_causal=True, query_offset=offset)


def test_offset_per_sequence():
    inputs = oracle.make_inputs(4, 6, 70, 90, 2, 1, 16, 16, jnp.float32)
    offsets = np.array([-(2**31), -71, -3, 0, 20, 2**31 - 1], np.int32)
    oracle.check(*inputs, is_causal=True, query_offset=offsets)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("offset", [0, "end"])
def test_padding_never_leaks(dtype, value, offset):
    lengths = dict(
        query_seq_lengths=np.array([0, 1, 63, 64, 65, 150, 999, -4], np.int32),
        key_value_seq_lengths=np.array([170, 0, 64, 1, 129, 170, 2**31 - 1, 20], np.int32),
    )
    inputs = oracle.make_inputs(5, 8, 150, 170, 2, 1, 24, 40, dtype)
    poison = draws.poison(lengths, value)
    oracle.check(*inputs, poison=poison, is_causal=True, query_offset=offset, **lengths)


def test_rows_that_see_nothing():
    q, k, v, _, _ = oracle.make_inputs(6, 1, 4, 4, 1, 1, 8, 8, jnp.float32)
    out, lse = attention(q, k, v, is_causal=True, query_offset=-2, return_lse=True)
    np.testing.assert_array_equal(out[0, :2], np.zeros((2, 1, 8)))
    np.testing.assert_array_equal(lse[0, 0, :2], [-np.inf, -np.inf])
    assert np.isfinite(lse[0, 0, 2:]).all()


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(B, T, S, implementation):
    q, k, v, _, _ = oracle.make_inputs(7, B, T, S, 2, 1, 8, 4, jnp.bfloat16)
    f = lambda *x: attention(*x, return_lse=True, implementation=implementation)
    (out, lse), vjp = jax.vjp(f, q, k, v)
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.zeros((B, T, 2, 4)))
    np.testing.assert_array_equal(lse, np.full((B, 2, T), -np.inf))
    for x, dx in zip((q, k, v), vjp((out, lse)), strict=True):
        np.testing.assert_array_equal(np.asarray(dx, np.float32), np.zeros(x.shape))


@pytest.mark.parametrize("scale", [1e-4, 7.0, np.float32(0.25), 1])
def test_scale(scale):
    oracle.check(*oracle.make_inputs(8, 1, 70, 70, 2, 2, 16, 16, jnp.float32), scale=scale)


def test_scale_not_positive():
    q, k, v, _, _ = oracle.make_inputs(8, 1, 70, 70, 2, 2, 16, 16, jnp.float32)
    f = jax.value_and_grad(lambda q, scale: attention(q, k, v, scale=scale).sum())
    negative, positive = f(q, -0.3), f(-q, 0.3)
    np.testing.assert_array_equal(negative[0], positive[0])
    np.testing.assert_array_equal(negative[1], -positive[1])
    out = attention(q, k, v, scale=0.0)
    mean = np.broadcast_to(np.mean(v, axis=1, keepdims=True), out.shape)
    np.testing.assert_allclose(out, mean, atol=1e-6)
    np.testing.assert_array_equal(f(q, 0.0)[1], np.zeros(q.shape))


def test_large_logits():
    inputs = oracle.make_inputs(9, 1, 100, 200, 1, 1, 32, 32, jnp.float32)
    oracle.check(inputs[0] * 100, *inputs[1:])


def test_unbatched_and_extra_axes():
    q, k, v, _, _ = oracle.make_inputs(10, 6, 9, 11, 4, 2, 8, 8, jnp.float32)
    lengths = jnp.array([1, 2, 3, 4, 5, 6])
    options = dict(key_value_seq_lengths=lengths, return_lse=True)
    out, lse = attention(q, k, v, **options)
    split = lambda x: x.reshape(2, 3, *x.shape[1:])
    out2, lse2 = attention(
        *(split(x) for x in (q, k, v)), **{**options, "key_value_seq_lengths": split(lengths)}
    )
    np.testing.assert_array_equal(out2, split(out))
    np.testing.assert_array_equal(lse2, split(lse))
    out1, lse1 = attention(q[3], k[3], v[3], **{**options, "key_value_seq_lengths": 4})
    np.testing.assert_array_equal(out1, out[3])
    np.testing.assert_array_equal(lse1, lse[3])


def test_repeatable():
    q, k, v, dout, dlse = oracle.make_inputs(11, 2, 300, 300, 6, 2, 64, 64, jnp.bfloat16)
    first = oracle.run(q, k, v, dout, dlse, {}, (("is_causal", True),))
    for _ in range(3):
        again = oracle.run(q, k, v, dout, dlse, {}, (("is_causal", True),))
        for x, y in zip(first, again, strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa, run_python):
    """The wheel serves machines with less than this one has."""
    run_python(
        """
        import oracle
        from jax_flashattn import _native
        assert _native.cpu_isa() == ISA
        for dtype in oracle.DTYPES:
            for H in (64, 17):
                oracle.check(*oracle.make_inputs(0, 1, 150, 200, 4, 2, H, 24, dtype),
                             is_causal=True, query_offset="end")
        """.replace("ISA", repr(isa)),
        JFA_CPU_ISA=isa,
    )


def test_check_grads():
    from jax.test_util import check_grads

    q, k, v, _, _ = oracle.make_inputs(12, 1, 9, 13, 2, 1, 8, 8, jnp.float32)

    def f(q, k, v):
        out, lse = attention(q, k, v, is_causal=True, query_offset="end", return_lse=True)
        return out.sum(-1) * 0.3 + lse.swapaxes(1, 2)

    check_grads(f, (q, k, v), order=1, modes=("rev",), atol=2e-2, rtol=2e-2, eps=1e-2)


def test_agrees_with_jax_nn():
    q, k, v, _, _ = oracle.make_inputs(13, 2, 50, 50, 4, 2, 16, 16, jnp.float32)
    lengths = jnp.array([50, 17])
    ours = attention(q, k, v, is_causal=True, key_value_seq_lengths=lengths)
    # jax.nn averages the keys in a row that sees none; here every row sees key 0.
    theirs = jax.nn.dot_product_attention(q, k, v, is_causal=True, key_value_seq_lengths=lengths)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_no_quadratic_array():
    q, k, v, _, _ = oracle.make_inputs(14, 1, 512, 768, 1, 1, 8, 8, jnp.float32)
    loss = lambda *x: attention(*x, is_causal=True, query_offset=0).sum()
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().as_text()
    assert "jfa_bwd_v3" in text
    assert "512,768" not in text and "768,512" not in text
