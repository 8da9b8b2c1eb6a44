"""How the forward's tiles are dealt out on a GPU, and how lengths choose tiles; no GPU needed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_flashattn import UnsupportedError, _native, attention, attention_varlen, explain
from jax_flashattn._targets import FWD_TARGET

SHAPES = [jax.ShapeDtypeStruct((2, n, 4, 128), jnp.bfloat16) for n in (500, 700, 700)]
HOPPER = dict(platform="cuda", arch=90)
MULTIPROCESSORS = 132


def lowered(*shapes, monkeypatch, arch=90, **options):
    """The program for a GPU of that architecture."""
    monkeypatch.setenv("JFA_CUDA_ARCH", str(arch))
    f = jax.jit(lambda *x: attention(*x, **options))
    return f.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def attribute(text, name):
    return int(re.search(rf"\b{name} = (-?\d+) : i64", text).group(1))


@pytest.mark.parametrize(
    ("options", "schedule", "margin"),
    [
        ({}, 0, 0),
        (dict(schedule="grid"), 1, 0),
        (dict(schedule="persistent"), 2, 0),
        (dict(sm_margin=np.int64(8)), 2, 8),
        (dict(schedule="persistent", sm_margin=10**20), 2, 2**30),
    ],
)
def test_attributes(options, schedule, margin, monkeypatch):
    text = lowered(*SHAPES, monkeypatch=monkeypatch, **options)
    assert attribute(text, "schedule") == schedule
    assert attribute(text, "sm_margin") == margin
    assert attribute(text, "kv_len") == 700


def test_decoding_knows_the_margin(monkeypatch):
    q = jax.ShapeDtypeStruct((2, 1, 4, 128), jnp.bfloat16)
    text = lowered(q, *SHAPES[1:], monkeypatch=monkeypatch, sm_margin=20)
    assert "jfa_serve_v2" in text
    assert attribute(text, "sm_margin") == 20


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(schedule="stream"), ValueError, r"schedule must be None or one of .*, got 'stream'"),
        (dict(schedule=1), ValueError, "schedule must be .*, got 1"),
        (dict(sm_margin=-1), ValueError, "sm_margin must be at least 0, got -1"),
        (dict(sm_margin=2.0), TypeError, "sm_margin must be a Python int, got float"),
        (dict(sm_margin=True), TypeError, "sm_margin must be a Python int, got bool"),
        (dict(sm_margin=3, schedule="grid"), ValueError, "sm_margin must be 0 with .*, got 3"),
    ],
)
def test_errors(options, error, message):
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(error, match=message):
        attention(x, x, x, **options)
    with pytest.raises(error, match=message):
        attention_varlen(x[0], x[0], x[0], cu_seqlens_q=jnp.array([0, 4]), **options)


def test_traced_margin():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(TypeError, match="sm_margin must be a Python int, got a traced value"):
        jax.jit(lambda n: attention(x, x, x, sm_margin=n))(3)


@pytest.mark.parametrize("options", [dict(schedule="persistent"), dict(sm_margin=7)])
def test_needs_hopper(options, monkeypatch):
    message = "schedule 'persistent', or an sm_margin: expected .* sm_90 .*, got sm_80"
    with pytest.raises(UnsupportedError, match=message):
        lowered(*SHAPES, monkeypatch=monkeypatch, arch=80, **options)
    with pytest.raises(UnsupportedError, match=message):
        explain(*SHAPES, platform="cuda", arch=80, **options)
    odd = [jax.ShapeDtypeStruct((2, 500, 4, 100), jnp.bfloat16)] * 3
    with pytest.raises(UnsupportedError, match="head dims 100, 100"):
        explain(*odd, **HOPPER, **options)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_ignored_without_gpu(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 9, 4, 8)), jnp.float32) for _ in range(3))
    common = dict(is_causal=True, implementation=implementation)
    loss = lambda q, **options: attention(q, k, v, **common, **options).sum()
    expected = jax.value_and_grad(loss)(q)
    for options in (dict(schedule="grid"), dict(schedule="persistent"), dict(sm_margin=5)):
        for x, y in zip(jax.value_and_grad(loss)(q, **options), expected, strict=True):
            np.testing.assert_array_equal(x, y)


def schedules(*shapes, **options):
    return [kernel["schedule"] for kernel in explain(*shapes, **HOPPER, **options).kernels]


def test_explain_shows_the_schedule():
    assert schedules(*SHAPES) == ["persistent", "grid", "grid", "grid"]
    assert schedules(*SHAPES, schedule="grid")[0] == "grid"
    ends = dict(cu_seqlens_q=jnp.array([0, 3, 9]), cu_seqlens_kv=jnp.array([0, 5, 8]))
    packed = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in SHAPES]
    assert schedules(*packed, **ends)[0] == "persistent"
    assert schedules(*packed, **ends, schedule="grid")[0] == "grid"
    assert schedules(*packed, **ends, sm_margin=1)[0] == "persistent"
    found = explain(*SHAPES, **HOPPER, schedule="grid")
    assert "KiB shared memory, grid" in str(found)
    assert found.variants[0]["features"] == ["grid"]
    old = explain(*SHAPES, platform="cuda", arch=80, schedule="grid")
    assert old.kernels[0]["schedule"] == "grid"


def test_schedule_is_in_no_key():
    keys = [
        [kernel["key"] for kernel in explain(*SHAPES, **HOPPER, **options).kernels]
        for options in ({}, dict(schedule="grid"), dict(sm_margin=3))
    ]
    assert keys[0] == keys[1] == keys[2]


def test_persistent_takes_hopper_kernels():
    """Where the plan itself would prefer the older family."""
    q = jax.ShapeDtypeStruct((2, 500, 4, 32), jnp.bfloat16)
    assert explain(q, q, q, **HOPPER).kernels[0]["file"] == "fwd_sm80.cuh"
    assert explain(q, q, q, **HOPPER, sm_margin=1).kernels[0]["file"] == "fwd_sm90.cuh"


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_ctas(mask):
    def ctas(*features, heads=16, length=4096, left=0):
        return _native.cuda_forward_share(
            128, mask, features, 90, heads, length, length, MULTIPROCESSORS - left
        )[0]

    assert ctas() == ctas("persistent") == MULTIPROCESSORS
    assert ctas("grid") == 16 * 4096 // 128
    assert ctas("persistent", left=100) == MULTIPROCESSORS - 100
    assert ctas("persistent", left=MULTIPROCESSORS - 1) == 1
    assert ctas("persistent", heads=1, length=100) == 1  # no more than tiles
    assert ctas("persistent", heads=0) == 0


def test_who_counts_tiles():
    def share(mask, heads, length, *features, head_dim=128):
        return _native.cuda_forward_share(
            head_dim, mask, features, 90, heads, length, length, MULTIPROCESSORS
        )

    assert share("causal", 16, 4096) == (MULTIPROCESSORS, True, False)
    assert share("full", 16, 4096) == (MULTIPROCESSORS, True, False)
    # Few keys come in pairs of tiles, and full masks at head dim 256 in turn.
    for head_dim in (128, 256):
        assert share("causal", 500, 1024, head_dim=head_dim) == (MULTIPROCESSORS, False, True)
    assert share("causal", 32, 4096, head_dim=256) == (MULTIPROCESSORS, True, False)
    assert share("full", 32, 4096, head_dim=256) == (MULTIPROCESSORS, False, False)
    # One tile for each CTA needs neither a counter nor pairs.
    for mask in ("causal", "full"):
        assert share(mask, 4, 32 * 128) == (4 * 32, False, False)
        assert share(mask, 1, 1100)[1:] == (False, False)
    # Without CTAs that stay there is nothing to count.
    assert share("causal", 16, 4096, "grid") == (16 * 32, False, False)
    # 8-bit floats: where a head has few row tiles.
    for mask in ("causal", "full"):
        assert share(mask, 64, 1024, "fp8") == (MULTIPROCESSORS, True, False)
    assert share("full", 64, 4096, "fp8") == (MULTIPROCESSORS, False, False)
    assert share("causal", 64, 4096, "fp8") == (MULTIPROCESSORS, False, True)


def symbol(S, H=64, T=300, **options):
    q, k = (jax.ShapeDtypeStruct((2, n, 4, H), jnp.bfloat16) for n in (T, S))
    return explain(q, k, k, **HOPPER, **options).kernels[0]["symbol"]


def test_lengths_choose_tiles_by_class():
    assert symbol(5) == symbol(1024) == "jfa_fwd_sm90_bf16_d64_full_short"
    assert symbol(1025) == symbol(10**6) == "jfa_fwd_sm90_bf16_d64_full"
    assert symbol(512, H=96, is_causal=True, query_offset=0).endswith("_d96_causal")
    assert symbol(512, H=128) == "jfa_fwd_sm90_bf16_d128_full_short"
    assert symbol(8192, H=128) == symbol(4096, H=128) == "jfa_fwd_sm90_bf16_d128_full"
    causal = {"H": 128, "is_causal": True, "query_offset": 0}
    assert symbol(4096, **causal) == "jfa_fwd_sm90_bf16_d128_causal"
    assert symbol(4097, **causal) == "jfa_fwd_sm90_bf16_d128_causal_long"
    assert symbol(1000, H=256) == "jfa_fwd_sm90_bf16_d256_full_short"


def test_symbolic_length(monkeypatch):
    """A length that nobody knows gets the tiles of medium ones."""
    monkeypatch.setenv("JFA_CUDA_ARCH", "90")
    (n,) = export.symbolic_shape("n", constraints=["n >= 200", "n <= 4000"])
    shape = jax.ShapeDtypeStruct((2, n, 4, 64), jnp.bfloat16)
    exported = export.export(
        jax.jit(attention),
        platforms=("cuda",),
        disabled_checks=[export.DisabledSafetyCheck.custom_call(FWD_TARGET)],
    )(shape, shape, shape)
    assert attribute(str(exported.mlir_module()), "kv_len") == 0
