"""Plans, and the kernels they name, compiled by NVRTC for every architecture; no GPU needed.

A covering set of variants: every pair of values of what a kernel is compiled for. The full product
is `scripts/compile_all.py`.
"""

import itertools
import os
import re

import jax
import jax.numpy as jnp
import pytest

from covering import pairwise
from jax_flashattn import KernelNotCachedError, _native, attention, explain

HEAD_DIMS = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256)]
ODD_HEAD_DIMS = [(40, 72), (192, 128), (17, 33), (64, 128)]
OPS = [("fwd", []), ("bwd", []), ("bwd", ["deterministic"]), ("bwd", ["dslopes"])]
MAIN_ARCHS = (80, 90)
OTHER_ARCHS = (86, 89, 100, 120)
FACTORS = {
    "op": OPS,
    "head_dims": HEAD_DIMS + ODD_HEAD_DIMS,
    "dtype": ["bfloat16", "float16"],
    "mask": ["full", "causal", "local"],
    "softcap": [[], ["softcap"]],
    "alibi": [[], ["alibi"]],
    "layout": [[], ["segments"], ["packed"]],
    "keys": [4096, 512, 16384],
}
FLAGS = ("softcap", "alibi", "layout", "paged")
# Kernels of serving have fewer factors, so a table of their own each.
DECODE_FACTORS = {
    "head_dims": [*HEAD_DIMS, (40, 72), (192, 128)],
    "rows": [1, 17, 64],
    **{name: FACTORS[name] for name in ("dtype", "mask", "softcap", "alibi")},
}
PAGED_FACTORS = {
    "head_dims": [(64, 64), (128, 128), (256, 256), (17, 33)],
    "layout": [[], ["packed"]],
    **{name: FACTORS[name] for name in ("dtype", "mask", "softcap", "alibi")},
}
FP8_FACTORS = {
    "head_dims": [*HEAD_DIMS[1:], (192, 128), (64, 128)],
    "dtype": ["bfloat16", "float16"],
    "sums": [[], ["two_level"]],
    "e5m2": [[], ["e5m2_q", "e5m2_v"], ["e5m2_k"]],
    **{name: FACTORS[name] for name in ("mask", "softcap", "alibi", "layout")},
}
# 8-bit keys and values for 16-bit queries: decoding, and the forward with pages or without.
FP8_KV_FACTORS = {
    "head_dims": [(48, 64), *HEAD_DIMS[1:], (192, 128)],
    "kernel": ["decode", "fwd", "paged"],
    "rows": [1, 17, 64],
    "e5m2": [[], ["e5m2_k", "e5m2_v"], ["e5m2_v"]],
    **{name: FACTORS[name] for name in ("dtype", "mask", "softcap", "alibi")},
    "layout": [[], ["packed"]],
}


def most_spilled(symbol: str) -> int:
    """Bytes of stack that a kernel may use: none, but for what docs/performance.md explains."""
    plain = re.fullmatch(r"jfa_fwd_sm\d+_b?f16_d\d+_(full|causal|local)(_short|_long)?", symbol)
    if re.fullmatch(
        r"jfa_decode_sm90_b?f16_d(128|256)_(causal|local)(_softcap)?(_alibi)?_r32", symbol
    ):
        return 16
    if plain or "process" in symbol or "decode" in symbol:
        return 0
    return 64


def variants(arch: int):
    """Arguments of `cuda_warm` for each row: all of them for two architectures, else a quarter."""
    tables = [
        *({**row, "paged": []} for row in pairwise(FACTORS)),
        *(
            {**row, "op": ("decode", []), "layout": [], "paged": []}
            for row in pairwise(DECODE_FACTORS)
        ),
        *({**row, "op": ("fwd", []), "paged": ["paged"]} for row in pairwise(PAGED_FACTORS)),
    ]
    if arch not in MAIN_ARCHS:
        tables = tables[OTHER_ARCHS.index(arch) :: 4]
    for row in tables:
        op, features = row["op"]
        features = [*features, *(x for name in FLAGS for x in row[name])]
        if "dslopes" in features and "alibi" not in features:
            features.append("alibi")
        common = op, row["dtype"], *row["head_dims"], row["mask"], features, arch
        yield *common, row.get("rows", 0), row.get("keys", 0)


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("arch", [*MAIN_ARCHS, *OTHER_ARCHS])
def test_compiles_and_spills_no_more_than_known(arch, part, tmp_path, monkeypatch):
    # CI shares what it compiles between the versions of jax, on which no kernel depends.
    monkeypatch.setenv("JFA_CACHE_DIR", os.environ.get("JFA_TEST_KERNELS", str(tmp_path)))
    for variant in itertools.islice(variants(arch), part, None, 4):
        for kernel in _native.cuda_warm(*variant):
            symbol = kernel["symbol"]
            assert kernel["local_bytes"] <= most_spilled(symbol), (symbol, kernel["arch"])
            assert 0 < kernel["registers"] <= 255, symbol
            # ptxas: setmaxnreg ignored, wgmma serialised.
            assert not re.findall(r"C75\d\d", kernel["log"]), symbol


@pytest.mark.parametrize("part", range(4))
def test_fp8_compiles_without_spills(part, tmp_path, monkeypatch):
    monkeypatch.setenv("JFA_CACHE_DIR", os.environ.get("JFA_TEST_KERNELS", str(tmp_path)))
    for row in itertools.islice(pairwise(FP8_FACTORS), part, None, 4):
        features = ["fp8", *row["sums"], *row["e5m2"], *row["softcap"], *row["alibi"]]
        [kernel] = _native.cuda_warm(
            "fwd", row["dtype"], *row["head_dims"], row["mask"], [*features, *row["layout"]], 90
        )
        assert kernel["local_bytes"] == 0, kernel["symbol"]
        assert not re.findall(r"C75\d\d", kernel["log"]), kernel["symbol"]


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_fp8_keys_compile_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("JFA_CACHE_DIR", os.environ.get("JFA_TEST_KERNELS", str(tmp_path)))
    for row in pairwise(FP8_KV_FACTORS):
        features = ["fp8_kv", *row["e5m2"], *row["softcap"], *row["alibi"]]
        decode = row["kernel"] == "decode"
        if not decode:
            features += row["layout"] + ["paged"] * (row["kernel"] == "paged")
        for kernel in _native.cuda_warm(
            "decode" if decode else "fwd",
            row["dtype"],
            *row["head_dims"],
            row["mask"],
            features,
            arch,
            row["rows"] if decode else 0,
        ):
            assert kernel["local_bytes"] == 0, (kernel["symbol"], arch)
            assert not re.findall(r"C75\d\d", kernel["log"]), kernel["symbol"]


def test_covering_set_has_every_pair():
    rows = pairwise(FACTORS)
    assert len(rows) < 60
    for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2):
        for x, y in itertools.product(xs, ys):
            assert any(row[a] == x and row[b] == y for row in rows), (a, x, b, y)


def plan(op="fwd", dtype="bfloat16", H=64, Hv=64, mask="causal", features=(), arch=90):
    return _native.cuda_explain(op, dtype, H, Hv, mask, features, arch)


SMEM_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@pytest.mark.parametrize("arch", SMEM_LIMIT)
@pytest.mark.parametrize(("op", "features"), OPS)
@pytest.mark.parametrize("H", range(1, 257, 15))
def test_every_plan_fits_its_architecture(H, op, features, arch):
    described = plan(op=op, H=H, Hv=257 - H, features=features, arch=arch)
    assert described["error"] == ""
    for kernel in described["kernels"]:
        assert kernel["smem_bytes"] <= SMEM_LIMIT[arch] * 1024, kernel["symbol"]
        assert kernel["threads"] % 32 == 0 and kernel["threads"] <= 1024


@pytest.mark.parametrize("arch", SMEM_LIMIT)
@pytest.mark.parametrize("features", [[], ["paged"], ["segments", "alibi"], ["packed"]], ids=str)
def test_every_plan_of_fp8_keys_fits_its_architecture(features, arch):
    for H, Hv in itertools.product(range(16, 257, 48), range(16, 257, 16)):
        described = plan(H=H, Hv=Hv, features=["fp8_kv", *features], arch=arch)
        assert described["error"] == ""
        [kernel] = described["kernels"]
        assert kernel["smem_bytes"] <= SMEM_LIMIT[arch] * 1024, kernel["symbol"]


def test_symbols_say_the_variant():
    [kernel] = plan(H=128, Hv=128, features=["softcap", "packed"], arch=80)["kernels"]
    assert kernel["symbol"] == "jfa_fwd_sm80_bf16_d128_causal_softcap_packed"
    assert kernel["file"] == "fwd_sm80.cuh"


def test_hopper_has_a_family_of_its_own(run_python):
    script = """
        from jax_flashattn import _native
        for H in (64, 128):
            plan = _native.cuda_explain("fwd", "bfloat16", H, H, "full", ["segments"], 90)
            print(plan["kernels"][0]["file"])
        """
    assert run_python(script, JFA_FORCE_FAMILY="").split() == ["fwd_sm80.cuh", "fwd_sm90.cuh"]
    assert run_python(script, JFA_FORCE_FAMILY="sm80").split() == ["fwd_sm80.cuh"] * 2
    assert run_python(script, JFA_FORCE_FAMILY="sm90").split() == ["fwd_sm90.cuh"] * 2
    with pytest.raises(AssertionError, match="JFA_FORCE_FAMILY: expected sm80 or sm90, got sm70"):
        run_python(script, JFA_FORCE_FAMILY="sm70")
    assert plan(H=100, Hv=100)["kernels"][0]["file"] == "fwd_sm80.cuh"  # rows of 16 bytes only


def test_head_dims_of_one_tile_class_share_a_kernel():
    assert plan(H=72, Hv=72)["kernels"] == plan(H=96, Hv=96)["kernels"]
    assert plan(H=64, Hv=64)["kernels"] != plan(H=96, Hv=96)["kernels"]


def test_unsupported():
    assert "257" in plan(H=257)["error"]
    assert "80" in plan(arch=75)["error"]
    with pytest.raises(ValueError, match="unknown feature dropout"):
        plan(features=["dropout"])


def shapes(T=500, S=700, H=64):
    return [jax.ShapeDtypeStruct((2, n, 4, H), jnp.bfloat16) for n in (T, S, S)]


def keys(**options):
    kernels = explain(*shapes(), platform="cuda", arch=90, **options).kernels
    return {x["symbol"]: x["key"] for x in kernels}


def test_explain():
    found = explain(*shapes(), platform="cuda", arch=80, is_causal=True, query_offset=0)
    assert found.implementation == "cuda"
    assert found.kernels[0]["symbol"] == "jfa_fwd_sm80_bf16_d64_causal"
    assert found.kernels[0]["key"] in str(found)
    assert explain(*shapes(), platform="cpu").kernels == []
    assert explain(*shapes(), platform="tpu").implementation == "xla"


def test_values_share_a_key_and_code_does_not():
    """The compile key holds classes, not values."""
    base = dict(local_window_size=(5, 0), logits_soft_cap=3.0, query_offset=0, scale=0.5)
    same = keys(**base)
    main = {key for symbol, key in same.items() if "process" not in symbol}
    for changed in (
        dict(local_window_size=(9, None)),
        dict(logits_soft_cap=7.0),
        dict(query_offset=3),
        dict(scale=2.0),
        dict(sink_tokens=2),
        dict(sinks=jnp.zeros(4)),
        dict(key_value_seq_lengths=jnp.array([3, 7])),
    ):
        assert keys(**{**base, **changed}) == same, changed
    for other in (
        dict(logits_soft_cap=None),
        dict(local_window_size=None),
        dict(alibi_slopes=jnp.zeros(4)),
        dict(segment_ids=(jnp.zeros(500, jnp.int32), jnp.zeros(700, jnp.int32))),
    ):
        assert main.isdisjoint(keys(**{**base, **other}).values()), other


def test_kernel_not_cached_error(tmp_path, monkeypatch):
    monkeypatch.setenv("JFA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JFA_DISABLE_JIT", "1")
    monkeypatch.setattr(_native, "cuda_devices", lambda: {"devices": [{"arch": "sm_80"}]})
    _native.jit_clear_memory()
    f = jax.jit(lambda *x: attention(*x, is_causal=True, query_offset=0))
    with pytest.raises(KernelNotCachedError, match=r"jfa_fwd_sm80_bf16_d64_causal .*warmup"):
        f.trace(*shapes()).lower(lowering_platforms=("cuda",))


def share(B, S, K=8, G=4, D=128, T=1, page_size=0, alike=True, arch=90, multiprocessors=132):
    """CTAs of a decode call, and how many of them share a tile (0: all share all tiles)."""
    return _native.cuda_decode_share(D, B, K, G, T, S, page_size, alike, arch, multiprocessors)


@pytest.mark.parametrize("alike", [True, False])
def test_short_caches_are_shared_by_clusters(alike):
    """As measured to be faster; docs/performance.md."""
    assert share(1, 1024, alike=alike) == (64, 8)
    assert share(1, 8192, alike=alike) == (64, 8)
    assert share(1, 8192, D=64, alike=alike) == (64, 8)
    assert share(1, 16384, alike=alike) == (64, 8)
    assert share(8, 4096, alike=alike) == (128, 2)
    assert share(8, 4096, D=64, alike=alike) == (128, 2)
    assert share(16, 512, alike=alike) == (128, 1)
    assert share(1, 400, K=1, alike=alike) == (4, 4)  # a block each
    assert share(1, 1000, K=1, T=2, G=16, alike=alike) == (8, 8)
    assert share(1, 1000, K=1, T=3, G=16, alike=alike) == (24, 8)  # three tiles of 16 rows


@pytest.mark.parametrize("alike", [True, False])
def test_many_rows_are_cut_into_narrow_tiles_where_that_is_short(alike):
    assert share(1, 8192, K=1, G=128, alike=alike) == (64, 8)
    assert share(1, 8192, K=1, G=128, D=64, alike=alike) == (64, 8)
    for B, S in ((8, 4096), (4, 32768), (1, 131072), (128, 2048)):
        assert share(B, S, K=1, G=128, alike=alike)[1] == 0


def test_small_pages_cost_time():
    for page_size in (16, 128):
        assert share(1, 1024, page_size=page_size) == (64, 8)
        assert share(8, 4096, page_size=page_size) == (128, 2)
        assert share(16, 512, page_size=page_size) == (128, 1)
        assert share(1, 8192, page_size=page_size) == (64, 8)
    assert share(1, 8192, page_size=8)[1] == 0


@pytest.mark.parametrize("alike", [True, False])
def test_long_caches_and_few_tiles_are_not(alike):
    assert share(1, 131072, alike=alike) == (264, 0)
    assert share(4, 32768, alike=alike) == (256, 0)
    assert share(1, 8192, K=1, alike=alike) == (128, 0)


@pytest.mark.parametrize(("B", "S"), [(1, 1024), (8, 4096), (1, 131072)])
@pytest.mark.parametrize("arch", [80, 86, 100, 120])
def test_only_hopper_has_clusters(B, S, arch):
    assert share(B, S, arch=arch)[1] == 0


def test_whole_tiles_are_not_cut():
    assert share(128, 2048) == (256, 0)  # four each
    assert share(128, 2048, alike=False) == (256, 0)  # if lengths are equal
    assert share(110, 2048) == (264, 0)


@pytest.mark.parametrize("multiprocessors", [16, 114, 132])
def test_clusters_run_at_the_same_time(multiprocessors):
    for B, K, S in itertools.product((1, 3, 16, 50), (1, 8), (1, 64, 100, 3000, 10**6)):
        ctas, cluster = share(B, S, K=K, multiprocessors=multiprocessors)
        assert cluster in (0, 1, 2, 4, 8)
        if cluster > 0:
            assert ctas == B * K * cluster <= multiprocessors
            blocks = -(-S // 64)
            # One CTA alone may have a long tile, where there is a tile for each multiprocessor.
            assert cluster == 1 or (cluster < 2 * blocks and -(-blocks // cluster) <= 32)


def test_forced_clusters(run_python):
    with pytest.raises(AssertionError, match="JFA_FORCE_CLUSTER: expected 0, 1, 2, 4 or 8, got 3"):
        run_python(
            """
            from jax_flashattn import _native
            _native.cuda_decode_share(128, 1, 8, 4, 1, 999, 0, True, 90, 132)
            """,
            JFA_FORCE_CLUSTER="3",
        )


def test_explain_shows_decoding():
    q, k = (
        jax.ShapeDtypeStruct((2, n, heads, 128), jnp.bfloat16) for n, heads in ((1, 8), (999, 2))
    )
    explanation = explain(q, k, k, platform="cuda", arch=90)
    assert [kernel["symbol"] for kernel in explanation.kernels[:3]] == [
        "jfa_decode_sm90_bf16_d128_full_r16",
        "jfa_decode_combine_bf16_r16",
        "jfa_decode_sm90_bf16_d128_full_r16_parts",
    ]
    assert explanation.variants[0]["rows"] == 4
