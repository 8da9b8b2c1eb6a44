"""One test per misuse: at trace time, naming the argument, what was expected and what came."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashattn import UnsupportedError, attention, attention_varlen


def arrays(q=(2, 5, 4, 8), k=(2, 7, 2, 8), v=(2, 7, 2, 8), dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k, v)]


def trace(*operands, **options):
    return jax.eval_shape(lambda *x: attention(*x, **options), *operands)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (dict(q=(5, 8)), r"q must have at least 3 axes .* got shape \(5, 8\)"),
        (dict(k=(7, 2, 8)), r"k must have the batch axes of q, \(2,\), got \(\)"),
        (dict(k=(3, 7, 2, 8)), r"k must have the batch axes of q, \(2,\), got \(3,\)"),
        (dict(v=(3, 7, 2, 8)), r"v must have the batch axes of q, \(2,\), got \(3,\)"),
        (dict(k=(2, 7, 2, 16)), r"k must have the head dim of q, 8, got 16"),
        (dict(v=(2, 6, 2, 8)), r"v must have the length and heads of k, \(7, 2\), got \(6, 2\)"),
        (dict(v=(2, 7, 4, 8)), r"v must have the length and heads of k, \(7, 2\), got \(7, 4\)"),
        (dict(k=(2, 7, 3, 8), v=(2, 7, 3, 8)), r"heads of q must be a multiple .* got 4 and 3"),
        (dict(q=(2, 5, 0, 8)), r"q must have at least 1 in axis -2 \(heads\)"),
        (dict(k=(2, 7, 0, 8), v=(2, 7, 0, 8)), r"k must have at least 1 in axis -2 \(heads\)"),
        (dict(q=(2, 5, 4, 0), k=(2, 7, 2, 0)), r"q must have at least 1 in axis -1 \(head dim\)"),
        (dict(v=(2, 7, 2, 0)), r"v must have at least 1 in axis -1 \(head dim\)"),
    ],
    ids=str,
)
def test_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        trace(*arrays(**shapes))


def test_dtype_mix():
    q, k, v = arrays()
    with pytest.raises(TypeError, match=r"v must have the dtype of q, float32, got bfloat16"):
        trace(q, k, v.update(dtype=jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3b11fnuz, jnp.complex64])
def test_unsupported_dtype(dtype):
    with pytest.raises(TypeError, match=r"q must have dtype float32, bfloat16, .*float8"):
        trace(*arrays(dtype=dtype))


def test_not_an_array():
    _, k, v = arrays()
    with pytest.raises(TypeError, match=r"q must be an array, got list"):
        jax.eval_shape(lambda k, v: attention([[[1.0]]], k, v), k, v)


@pytest.mark.parametrize(
    "name",
    ["scale", "is_causal", "return_lse", "local_window_size", "sink_tokens", "logits_soft_cap"],
)
def test_tracer_where_a_python_value_is_needed(name):
    q, k, v = (jnp.zeros(x.shape) for x in arrays())
    with pytest.raises(TypeError, match=rf"{name} must be a Python \w+, got a traced value"):
        jax.jit(lambda x: attention(q, k, v, **{name: x}))(1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(scale="0.1"), TypeError, r"scale must be a Python number, got str"),
        (dict(scale=float("nan")), ValueError, r"scale must be finite, got nan"),
        (dict(is_causal=1), TypeError, r"is_causal must be a Python bool, got int"),
        (dict(return_lse=None), TypeError, r"return_lse must be a Python bool, got NoneType"),
        (dict(query_offset="start"), ValueError, r"query_offset must be .* got 'start'"),
        (dict(query_offset=1.5), TypeError, r"query_offset must be an integer array, got float"),
        (dict(query_offset=np.ones(2)), TypeError, r"query_offset must have an integer dtype"),
        (dict(query_offset=np.arange(3)), ValueError, r"query_offset .* shape \(2,\).* \(3,\)"),
        (dict(local_window_size=-1), ValueError, r"local_window_size must be at least 0, got -1"),
        (dict(local_window_size=(2, -1)), ValueError, r"local_window_size must be at least 0"),
        (dict(local_window_size=(1, 2, 3)), ValueError, r"local_window_size must be .*got \(1, 2"),
        (dict(local_window_size=1.5), TypeError, r"local_window_size must be a Python int"),
        (dict(sink_tokens=1), ValueError, r"sink_tokens must come with a window or a causal mask"),
        (dict(sink_tokens=-1), ValueError, r"sink_tokens must be at least 0, got -1"),
        (dict(sinks=np.ones(3)), ValueError, r"sinks must have shape \(4,\).* got \(3,\)"),
        (dict(sinks=np.ones((2, 4))), ValueError, r"sinks must have shape \(4,\), .* got \(2, 4\)"),
        (dict(sinks=np.arange(4)), TypeError, r"sinks must have a floating dtype, got int"),
        (dict(alibi_slopes=[1.0]), TypeError, r"alibi_slopes must be an array, got list"),
        (dict(alibi_slopes=np.ones((4, 1))), ValueError, r"alibi_slopes must have shape \(4,\) or"),
        (dict(logits_soft_cap=0), ValueError, r"logits_soft_cap must be positive, got 0"),
        (dict(logits_soft_cap=np.inf), ValueError, r"logits_soft_cap must be finite, got inf"),
        (dict(segment_ids=np.zeros(7, int)), ValueError, r"segment_ids must be a pair"),
        (
            dict(segment_ids=(np.zeros(7, int), np.zeros(7, int))),
            ValueError,
            r"segment_ids of queries must have shape \(2, 5\) or \(5,\), got shape \(7,\)",
        ),
        (
            dict(segment_ids=(np.zeros(5), np.zeros(7, int))),
            TypeError,
            r"segment_ids of queries must have an integer dtype, got float",
        ),
        (dict(deterministic=1), TypeError, r"deterministic must be a Python bool, got int"),
        (dict(implementation="cudnn"), ValueError, r"implementation must be None or one of"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        trace(*arrays(), **options)


@pytest.mark.parametrize("name", ["query_seq_lengths", "key_value_seq_lengths"])
def test_lengths(name):
    with pytest.raises(TypeError, match=rf"{name} must have an integer dtype, got float32"):
        trace(*arrays(), **{name: jnp.ones(2)})
    with pytest.raises(TypeError, match=rf"{name} must be an integer array, got str"):
        trace(*arrays(), **{name: "5"})
    with pytest.raises(
        ValueError, match=rf"{name} must be a scalar or have shape \(2,\).*\(2, 1\)"
    ):
        trace(*arrays(), **{name: jnp.ones((2, 1), jnp.int32)})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(cu_seqlens_q=np.zeros(1, int), cu_seqlens_kv=np.zeros(1, int)),
            ValueError,
            r"cu_seqlens_q must have shape \[n \+ 1\] .* got \(1,\)",
        ),
        (
            dict(cu_seqlens_q=np.zeros(3), cu_seqlens_kv=np.zeros(3)),
            TypeError,
            r"cu_seqlens_q must have an integer dtype, got float",
        ),
        (dict(cu_seqlens_q=np.zeros(3, int)), ValueError, r"cu_seqlens_kv must be given where"),
        (
            dict(cu_seqlens_q=np.zeros(3, int), cu_seqlens_kv=np.zeros(4, int)),
            ValueError,
            r"cu_seqlens_kv must have as many sequences as cu_seqlens_q, 2, got 3",
        ),
        (
            dict(
                cu_seqlens_q=np.zeros(3, int),
                cu_seqlens_kv=np.zeros(3, int),
                query_offset=np.zeros(3, int),
            ),
            ValueError,
            r"query_offset must be a scalar or have shape \(2,\) or .* got shape \(3,\)",
        ),
    ],
)
def test_varlen(options, error, message):
    q, k, v = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays())
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda *x: attention_varlen(*x, **options), q, k, v)


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_dense_arrays_are_refused_by_name(name):
    with pytest.raises(UnsupportedError, match=rf"{name} is not supported"):
        trace(*arrays(), **{name: jnp.ones((5, 7))})


def test_large_head_dim():
    q, k, v = arrays(q=(1, 2, 1, 513), k=(1, 2, 1, 513), v=(1, 2, 1, 8))
    with pytest.raises(
        UnsupportedError, match=r"head dims up to 512 .* got 513 for q and k, 8 for v"
    ):
        trace(q, k, v)
    assert trace(q, k, v, implementation="xla").shape == (1, 2, 1, 8)


def test_causal_of_unequal_lengths_warns():
    with pytest.warns(UserWarning, match=r"5 queries and 7 keys and no query_offset"):
        trace(*arrays(), is_causal=True)
    trace(*arrays(), is_causal=True, query_offset=0)
    trace(*arrays())


def test_named_implementation_on_another_platform():
    f = jax.jit(lambda *x: attention(*x, implementation="cpu"))
    with pytest.raises(
        UnsupportedError, match=r"implementation='cpu' has no kernel for platform tpu"
    ):
        f.trace(*arrays()).lower(lowering_platforms=("tpu",))


x = jnp.ones((1, 3, 1, 4))


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f: jax.jvp(f, (x,), (x,)),
        lambda f: jax.jvp(jax.jit(f), (x,), (x,)),
        lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
        lambda f: jax.jacfwd(f)(x),
        lambda f: jax.linearize(f, x)[1](x),
        lambda f: jax.hessian(lambda x: f(x).sum())(x),
        lambda f: jax.grad(lambda x: jax.grad(lambda x: f(x).sum())(x).sum())(x),
    ],
    ids=["jvp", "jvp-jit", "jit-jvp", "jacfwd", "linearize", "hessian", "grad-grad"],
)
def test_forward_mode_and_second_derivatives(differentiate):
    with pytest.raises(UnsupportedError, match=r"use reverse mode .* or implementation='xla'"):
        differentiate(lambda q: attention(q, x, x))
    differentiate(lambda q: attention(q, x, x, implementation="xla"))
