"""Plans, and the kernels they name, compiled by NVRTC for every architecture; no GPU needed.

A covering set of variants: every tile class with every mask, operation and dtype at least once. The
full product is `scripts/compile_all.py`.
"""

import itertools

import pytest

from jax_flashattn import _native

HEAD_DIMS = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256)]
ODD_HEAD_DIMS = [(40, 72), (192, 128), (17, 33), (64, 128)]
OPS = [("fwd", False), ("bwd", False), ("bwd", True)]
MAIN_ARCHS = (80, 90)
OTHER_ARCHS = (86, 89, 100, 120)


# Bytes spilled, and of stack, where no tile that spills nothing was as fast (docs/performance.md).
KNOWN_SPILLS = {("jfa_fwd_sm80_bf16_d128_causal", "sm_80"): (16, 8)}


def covering_set():
    """(op, deterministic, dtype, H, Hv, is_causal, arch): every head dim with every op on two."""
    flip = itertools.cycle([("bfloat16", True), ("float16", False), ("bfloat16", False)])
    for arch in MAIN_ARCHS:
        for (H, Hv), (op, deterministic) in itertools.product(HEAD_DIMS + ODD_HEAD_DIMS, OPS):
            dtype, is_causal = next(flip)
            yield op, deterministic, dtype, H, Hv, is_causal, arch
    for arch, (H, Hv) in itertools.product(OTHER_ARCHS, [(64, 64), (256, 256)]):
        dtype, is_causal = next(flip)
        op, deterministic = OPS[(arch + H) % 3]
        yield op, deterministic, dtype, H, Hv, is_causal, arch


@pytest.mark.parametrize("variant", list(covering_set()), ids=lambda v: "-".join(map(str, v)))
def test_compiles_and_spills_no_more_than_known(variant, tmp_path, monkeypatch):
    op, deterministic, dtype, H, Hv, is_causal, arch = variant
    monkeypatch.setenv("JFA_CACHE_DIR", str(tmp_path))
    for kernel in _native.cuda_warm(op, dtype, H, Hv, is_causal, deterministic, arch):
        known = KNOWN_SPILLS.get((kernel["symbol"], kernel["arch"]), (0, 0))
        assert (kernel["spill_bytes"], kernel["local_bytes"]) == known, kernel["symbol"]
        assert 0 < kernel["registers"] <= 255, kernel["symbol"]


def plan(op="fwd", dtype="bfloat16", H=64, Hv=64, is_causal=True, deterministic=False, arch=90):
    return _native.cuda_explain(op, dtype, H, Hv, is_causal, deterministic, arch)


SMEM_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@pytest.mark.parametrize("arch", SMEM_LIMIT)
@pytest.mark.parametrize(("op", "deterministic"), OPS)
@pytest.mark.parametrize("H", range(1, 257, 15))
def test_every_plan_fits_its_architecture(H, op, deterministic, arch):
    described = plan(op=op, H=H, Hv=257 - H, deterministic=deterministic, arch=arch)
    assert described["error"] == ""
    for kernel in described["kernels"]:
        assert kernel["smem_bytes"] <= SMEM_LIMIT[arch] * 1024, kernel["symbol"]
        assert kernel["threads"] % 32 == 0 and kernel["threads"] <= 1024


def test_symbols_say_the_variant():
    [kernel] = plan(H=128, Hv=128)["kernels"]
    assert kernel["symbol"] == "jfa_fwd_sm80_bf16_d128_causal"
    assert kernel["file"] == "fwd_sm80.cuh"


def test_head_dims_of_one_tile_class_share_a_kernel():
    assert plan(H=72, Hv=72)["kernels"] == plan(H=96, Hv=96)["kernels"]
    assert plan(H=64, Hv=64)["kernels"] != plan(H=96, Hv=96)["kernels"]


def test_unsupported():
    assert "257" in plan(H=257)["error"]
    assert "80" in plan(arch=75)["error"]
