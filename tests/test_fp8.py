"""8-bit floats: what they mean (the CPU kernels and the dense definition), and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import draws
import oracle_fp8
from jax_flashattn import (
    PagedKVCache,
    UnsupportedError,
    _native,
    attention,
    attention_varlen,
    explain,
    paged_attention,
)
from oracle_fp8 import E4M3, E5M2

BACKENDS = pytest.mark.parametrize("implementation", [None, "xla"])
NAMES = lambda x: "_".join(d.__name__[7:11] for d in x)


@BACKENDS
@pytest.mark.parametrize("dtypes", oracle_fp8.MIXES, ids=NAMES)
def test_dtypes(dtypes, implementation):
    inputs = oracle_fp8.make_inputs(0, 2, 70, 90, 4, 2, 32, 48, dtypes=dtypes)
    options = dict(is_causal=True, query_offset="end", implementation=implementation)
    oracle_fp8.check(*inputs, **options)


def per_head(seed, B=2, K=2):
    return np.random.default_rng(seed).uniform(0.1, 3, (B, K)).astype(np.float32)


@BACKENDS
@pytest.mark.parametrize(
    "scales",
    [
        dict(q_scale=0.25),
        dict(k_scale=per_head(1)),
        dict(v_scale=per_head(2)),
        dict(q_scale=per_head(3), k_scale=np.float32(3), v_scale=0.5),
        dict(q_scale=per_head(4), k_scale=per_head(5), v_scale=per_head(6)),
        dict(k_scale=0.0),
    ],
    ids=lambda x: " ".join(f"{name}{np.ndim(s)}" for name, s in x.items()),
)
def test_scales(scales, implementation):
    inputs = oracle_fp8.make_inputs(1, 2, 40, 50, 4, 2, 16, 32)
    oracle_fp8.check(*inputs, **scales, out_dtype=jnp.float16, implementation=implementation)


@settings(max_examples=60)
@given(data=st.data())
def test_any_combination(data):
    choose = lambda choices: data.draw(st.sampled_from(choices))
    sizes = [(2, 70, 70, 4, 2, 48, 80), (2, 33, 130, 4, 2, 16, 16)]
    inputs, options = draws.draw(choose, sizes=sizes, dtypes=[np.float32])
    del options["deterministic"]
    inputs = [x.astype(d) for x, d in zip(inputs, choose(oracle_fp8.MIXES), strict=False)]
    options["v_scale"] = choose([0.5, per_head(0)])
    oracle_fp8.check(*inputs, poison=draws.poison(options, np.nan), **options)


def test_negative_scale():
    q, k, v = oracle_fp8.make_inputs(2, 1, 20, 20, 2, 2, 16, 16)
    np.testing.assert_array_equal(attention(q, k, v, scale=-0.3), attention(-q, k, v, scale=0.3))


def test_unbatched_and_packed_scales():
    q, k, v = (x[0] for x in oracle_fp8.make_inputs(3, 1, 30, 30, 4, 2, 16, 16))
    scale = per_head(7)[0]
    out = attention(q, k, v, k_scale=scale)
    np.testing.assert_array_equal(out, attention(q[None], k[None], v[None], k_scale=scale[None])[0])
    ends = jnp.array([0, 30])
    packed = attention_varlen(q, k, v, cu_seqlens_q=ends, k_scale=scale)
    np.testing.assert_array_equal(out, packed)


def test_vmap():
    q, k, v = (jnp.stack([x, x[::-1]]) for x in oracle_fp8.make_inputs(4, 2, 9, 11, 4, 2, 16, 16))
    scales = jnp.stack([per_head(8), per_head(9)])
    f = lambda q, k, v, s: attention(q, k, v, v_scale=s)
    expected = jnp.stack([f(*x) for x in zip(q, k, v, scales, strict=True)])
    np.testing.assert_array_equal(jax.vmap(f)(q, k, v, scales), expected)
    only_q = jax.vmap(lambda q: f(q, k[0], v[0], scales[0]))(q)
    np.testing.assert_array_equal(only_q[1], f(q[1], k[0], v[0], scales[0]))


def test_no_tokens():
    q, k, v = oracle_fp8.make_inputs(5, 1, 3, 0, 2, 1, 16, 16)
    out, lse = attention(q, k, v, return_lse=True, out_dtype=jnp.float16)
    assert out.dtype == jnp.float16 and not out.any()
    assert (lse == -jnp.inf).all()


def arrays(dtypes=(E4M3,) * 3, H=16, Hv=16):
    shapes = ((2, 5, 4, H), (2, 7, 2, H), (2, 7, 2, Hv))
    return [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]


def trace(*operands, **options):
    return jax.eval_shape(lambda *x: attention(*x, **options), *operands)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(q_scale="1"), TypeError, r"q_scale must be a number or a floating array, got str"),
        (dict(q_scale=True), TypeError, r"q_scale must be a number or a floating array, got bool"),
        (dict(v_scale=np.ones((2, 2), int)), TypeError, r"v_scale must have a floating dtype"),
        (dict(k_scale=np.ones(2)), ValueError, r"k_scale must be a scalar .*\(2, 2\).* got \(2,\)"),
        (dict(q_scale=np.ones((2, 4))), ValueError, r"q_scale must be .* per key head, got"),
        (dict(out_dtype=jnp.float32), ValueError, r"out_dtype must be bfloat16 or float16, got"),
        (dict(fp8_accumulation="exact"), ValueError, r"fp8_accumulation must be one of .* 'exact'"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        trace(*arrays(), **options)


@pytest.mark.parametrize(
    "option",
    [dict(q_scale=1.0), dict(out_dtype=jnp.float16), dict(fp8_accumulation="fast")],
    ids=str,
)
def test_options_of_other_dtypes(option):
    [name] = option
    with pytest.raises(ValueError, match=f"{name} is for float8 inputs, got it with bfloat16"):
        trace(*arrays((jnp.bfloat16,) * 3), **option)


def test_dtypes_that_do_not_mix():
    with pytest.raises(TypeError, match=r"k must have the dtype of q, float8_e4m3fn, got bfloat16"):
        trace(*arrays((E4M3, jnp.bfloat16, E4M3)))
    with pytest.raises(TypeError, match=r"q must have dtype .*float8_e5m2, got float8_e4m3b11fnuz"):
        trace(*arrays((jnp.float8_e4m3b11fnuz,) * 3))


@pytest.mark.parametrize(("H", "Hv"), [(24, 16), (16, 8), (272, 16)])
def test_head_dims(H, Hv):
    with pytest.raises(UnsupportedError, match=r"multiples of 16 up to 256, got \d+ for"):
        trace(*arrays(H=H, Hv=Hv))


def test_no_gradient():
    q, k, v = oracle_fp8.make_inputs(6, 1, 4, 4, 2, 2, 16, 16)
    loss = lambda v, s: attention(q, k, v, v_scale=s).astype(jnp.float32).sum()
    for argnums in (0, 1):
        with pytest.raises(UnsupportedError, match=r"float8 inputs is not differentiable"):
            jax.eval_shape(jax.grad(loss, argnums), v, jnp.float32(1))


def lower(*operands, **options):
    f = jax.jit(lambda *x: attention(*x, **options))
    return f.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100a"])
def test_only_hopper(arch, monkeypatch):
    with pytest.raises(UnsupportedError, match=r"float8: expected sm_90 \(Hopper\), got sm_80"):
        explain(*arrays(), platform="cuda", arch=80)
    monkeypatch.setattr(_native, "cuda_devices", lambda: {"devices": [{"arch": arch}]})
    with pytest.raises(UnsupportedError, match=rf"expected sm_90 \(Hopper\), got {arch[:-1]}"):
        lower(*arrays())


def test_architecture_to_compile_for(monkeypatch):
    monkeypatch.setenv("JFA_CUDA_ARCH", "80")
    with pytest.raises(UnsupportedError, match=r"expected sm_90 \(Hopper\), got sm_80"):
        lower(*arrays())
    monkeypatch.setenv("JFA_CUDA_ARCH", "90")
    assert "arch = 90 : i64" in lower(*arrays())


@pytest.mark.parametrize("features", [["paged"], []], ids=str)
def test_no_serving_kernel(features):
    op = "fwd" if features else "decode"
    plan = _native.cuda_explain(op, "bfloat16", 64, 64, "full", ["fp8", *features], 90, 16)
    assert plan["error"].startswith("float8 queries: expected float16 or bfloat16")


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_no_queries_over_pages(implementation):
    cache = PagedKVCache.create(
        batch=2, max_pages=4, num_pages=9, page_size=8, num_kv_heads=2, head_dim=16, dtype=E4M3
    )
    with pytest.raises(UnsupportedError, match=r"q must be of 16 bits .* got float8_e4m3fn"):
        paged_attention(jnp.zeros((2, 1, 4, 16), E4M3), cache, implementation=implementation)


def test_custom_call():
    text = lower(*arrays((E4M3, E5M2, E4M3)), v_scale=2.0, fp8_accumulation="two_level")
    assert "jfa_fwd_v4" in text  # few queries too: decoding knows no float8
    assert "fp8 = 21 : i64" in text
    assert "f8E5M2" in text


def test_explain():
    found = explain(*arrays((E5M2, E4M3, E5M2), 128, 64), platform="cuda", arch=90)
    assert [x["symbol"] for x in found.kernels] == ["jfa_fwd_sm90_e5m2_e4m3_e5m2_bf16_d128x64_full"]


def test_values_share_a_kernel():
    def kernels(**options):
        found = explain(*arrays(), platform="cuda", arch=90, **options).kernels
        return [(x["symbol"], x["config"]) for x in found]

    assert kernels() == kernels(q_scale=2.0) == kernels(v_scale=jnp.ones((2, 2)))
    assert kernels() != kernels(out_dtype=jnp.float16) != kernels(fp8_accumulation="two_level")
