"""The FFI handlers refuse what Python would never send, and never crash on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashattn  # noqa: F401 (registers the targets)
from jax_flashattn import _calls, _spec

PAGES = jnp.zeros((3, 8, 2, 8))
TABLE = jnp.zeros((2, 4), jnp.int32)
LENGTHS = jnp.array([7, 32])
ATTRIBUTES = _calls.attributes(_spec.AttentionSpec(scale=1.0))
Q, K, V = (jnp.zeros(s) for s in ((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)))
OUT, LSE = (2, 5, 4, 6), (2, 4, 5)


def forward(*operands, out=OUT, lse=LSE, out_dtype=jnp.float32, **attributes):
    results = (jax.ShapeDtypeStruct(out, out_dtype), jax.ShapeDtypeStruct(lse, jnp.float32))
    return jax.ffi.ffi_call("jfa_fwd_v4", results)(*operands, **{**ATTRIBUTES, **attributes})


def given(*names):
    return {"aux": np.int64(sum(1 << _spec.AUX_NAMES.index(name) for name in names))}


def test_valid_call():
    out, lse = forward(Q, K, V)
    np.testing.assert_allclose(lse, np.full(LSE, np.log(7)), rtol=1e-6)
    np.testing.assert_array_equal(out, np.zeros(OUT))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forward(Q, K), "operand v is missing"),
        (lambda: forward(Q, K, V, V), "expected 3 operands, got 4"),
        (lambda: forward(Q[0], K, V), "q must have 4 axes, got 3"),
        (
            lambda: forward(Q, K[:, :, :1], V),
            r"v must be float32\[2, 7, 1, 6\], got float32\[2, 7, 2, 6\]",
        ),
        (lambda: forward(Q[:, :, :3], K, V), "must be a multiple of the heads of k, got 3 and 2"),
        (lambda: forward(Q, K.astype(jnp.bfloat16), V), r"k must be float32\[.*got bfloat16"),
        (
            lambda: forward(Q.astype(jnp.int32), K, V),
            "q must be float32, bfloat16 or float16, got int32",
        ),
        (lambda: forward(Q, K, V, out=(2, 5, 4, 8)), r"out must be float32\[2, 5, 4, 6\]"),
        (lambda: forward(Q, K, V, lse=(2, 5, 4)), r"lse must be float32\[2, 4, 5\]"),
        (lambda: forward(Q, K, V, scale=np.float32(-1)), "scale must be positive"),
        (lambda: forward(Q, K, V, soft_cap=np.float32(-1)), "soft_cap must be"),
        (lambda: forward(Q, K, V, window_left=np.int64(-2)), "window_left must be"),
        (lambda: forward(Q, K, V, sink_tokens=np.int64(-1)), "sink_tokens must be"),
        (lambda: forward(Q, K, V, aux=np.int64(1 << 12)), "aux must be a set of 12 bits"),
        (lambda: forward(Q, K, V, **given("v_scale")), "aux must be without scales"),
        (lambda: forward(Q, K, V, TABLE, **given("page_table")), "aux must be without page_table"),
        (lambda: forward(Q, K, V, **given("q_lengths")), "operand q_lengths is missing"),
        (
            lambda: forward(Q, K, V, jnp.zeros(3, jnp.int32), **given("q_lengths")),
            r"q_lengths must be int32\[2\], got int32\[3\]",
        ),
        (
            lambda: forward(Q, K, V, jnp.zeros(2), **given("kv_lengths")),
            r"kv_lengths must be int32\[2\], got float32\[2\]",
        ),
        (
            lambda: forward(Q, K, V, jnp.zeros((2, 5)), **given("alibi_slopes")),
            r"alibi_slopes must be float32\[2, 4\], got float32\[2, 5\]",
        ),
        (
            lambda: forward(Q, K, V, jnp.zeros((2, 5), jnp.int32), **given("q_segment_ids")),
            "attribute aux must be with segment ids of both sides",
        ),
        (
            lambda: forward(Q, K, V, jnp.zeros((2, 5), jnp.int32), **given("cu_seqlens_q")),
            "cu_seqlens",
        ),
        (lambda: forward(Q, K, V, extra=np.int32(1)), "number of attributes"),
    ],
)
def test_bad_forward(call, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call())


def paged(
    *operands, q=Q, k=PAGES, v=PAGES[..., :6], names=("kv_lengths", "page_table"), **attributes
):
    results = (jax.ShapeDtypeStruct(OUT, jnp.float32), jax.ShapeDtypeStruct(LSE, jnp.float32))
    attributes = {**ATTRIBUTES, "heads_first": np.bool_(False), **given(*names), **attributes}
    return jax.ffi.ffi_call("jfa_paged_v1", results)(q, k, v, *operands, **attributes)


def test_valid_paged_call():
    _, lse = paged(LENGTHS, TABLE)
    np.testing.assert_allclose(lse[:, 0, 0], np.log([7, 32]), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paged(LENGTHS, names=["kv_lengths"]), "aux must be with page_table"),
        (lambda: paged(TABLE, names=["page_table"]), "aux must be with page_table and kv_lengths"),
        (lambda: paged(LENGTHS), "page_table must have 2 axes, got 1"),
        (lambda: paged(LENGTHS, TABLE, TABLE), "expected 5 operands, got 6"),
        (lambda: paged(LENGTHS[:1], TABLE), r"kv_lengths must be int32\[2\], got int32\[1\]"),
        (lambda: paged(LENGTHS, TABLE[:1]), r"page_table must be int32\[2, 4\], got int32\[1, 4\]"),
        (lambda: paged(LENGTHS, TABLE[:, :0]), "at least 1 sequence and 1 page"),
        (lambda: paged(LENGTHS, TABLE, k=PAGES[:0]), "at least 1 page of at least 1 token"),
        (
            lambda: paged(LENGTHS, TABLE, v=PAGES[:, :4]),
            r"v must be float32\[3, 8, 2, 8\], got float32\[3, 4, 2, 8\]",
        ),
        (
            lambda: paged(LENGTHS, TABLE, heads_first=np.bool_(True)),
            "the heads of q must be a multiple of the heads of k, got 4 and 8",
        ),
        (
            lambda: paged(TABLE, TABLE, TABLE, names=["kv_lengths", "cu_seqlens_kv", "page_table"]),
            "without segment ids and cu_seqlens_kv if paged",
        ),
    ],
)
def test_bad_paged_call(call, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call())


def test_bad_backward():
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (Q, K, V)]
    scratch = jax.ShapeDtypeStruct((2, 1), jnp.float32)
    out, lse = jnp.zeros(OUT), jnp.zeros(LSE)
    attributes = {**ATTRIBUTES, "has_dlse": np.bool_(False)}
    call = jax.ffi.ffi_call("jfa_bwd_v3", (*results, scratch))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"scratch must be float32\[2, "):
        jax.block_until_ready(call(Q, K, V, out, lse, out, **attributes))
    with pytest.raises(jax.errors.JaxRuntimeError, match="operand dout is missing"):
        jax.block_until_ready(call(Q, K, V, out, lse, **attributes))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"lse must be float32\[2, 4, 5\]"):
        jax.block_until_ready(call(Q, K, V, out, out, out, **attributes))
