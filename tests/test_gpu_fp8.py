"""The 8-bit kernel on a Hopper GPU against the float64 reference: `pytest -m gpu`."""

import jax.numpy as jnp
import numpy as np
import pytest

import draws
import oracle
import oracle_fp8
from jax_flashattn import attention
from test_fp8 import NAMES, per_head

pytestmark = pytest.mark.gpu
accumulations = pytest.mark.parametrize("accumulation", ["fast", "two_level"])
masks = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


@accumulations
@masks
@pytest.mark.parametrize(("T", "S"), [(1, 1), (113, 203), (799, 3), (1, 300), (1024, 1024)])
def test_lengths(T, S, is_causal, accumulation):
    inputs = oracle_fp8.make_inputs(0, 2, T, S, 4, 2, 64, 64)
    options = dict(is_causal=is_causal, query_offset="end", fp8_accumulation=accumulation)
    oracle_fp8.check(*inputs, **options)


HEAD_DIMS = [*((d, d) for d in (16, 80, 96, 128, 192, 240, 256)), (64, 128), (192, 128)]


@accumulations
@pytest.mark.parametrize(("H", "Hv"), HEAD_DIMS, ids=str)
def test_head_dims(H, Hv, accumulation):
    inputs = oracle_fp8.make_inputs(1, 1, 150, 467, 4, 2, H, Hv)
    options = dict(is_causal=True, query_offset="end", fp8_accumulation=accumulation)
    oracle_fp8.check(*inputs, v_scale=per_head(0, 1), **options)


@pytest.mark.parametrize("dtypes", oracle_fp8.MIXES, ids=NAMES)
def test_dtypes(dtypes):
    inputs = oracle_fp8.make_inputs(2, 2, 130, 200, 4, 2, 128, 128, dtypes=dtypes)
    scales = dict(q_scale=per_head(1), k_scale=per_head(2), v_scale=per_head(3))
    oracle_fp8.check(*inputs, **scales, out_dtype=jnp.float16)


@masks
@pytest.mark.parametrize("H", [64, 128, 256])
def test_padding_never_leaks(H, is_causal):
    lengths = dict(
        query_seq_lengths=np.array([0, 1, 63, 64, 65, 150, 999, -4], np.int32),
        key_value_seq_lengths=np.array([170, 0, 64, 1, 129, 170, 2**31 - 1, 20], np.int32),
    )
    inputs = oracle_fp8.make_inputs(3, 8, 150, 170, 2, 1, H, 64)
    poison = draws.poison(lengths, np.nan)
    oracle_fp8.check(*inputs, poison=poison, is_causal=is_causal, query_offset=0, **lengths)


@pytest.mark.parametrize("H", [64, 128, 256])
def test_logits_that_rise(H):
    """Each block of keys has larger logits than those before, so that references must follow.

    Up to about 40: the tensor cores sum scores to 14 bits, so larger ones are less exact.
    """
    q, k, v = oracle_fp8.make_inputs(4, 1, 200, 900, 2, 1, H, H)
    oracle_fp8.check(*oracle.rising(q, k), v, scale=16 / H)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 300.0])
def test_scales(scale):
    inputs = oracle_fp8.make_inputs(5, 2, 100, 300, 4, 2, 128, 128)
    oracle_fp8.check(*inputs, q_scale=scale, v_scale=0.0)


# Every draw may need a kernel of its own.
SIZES = [
    (2, 130, 130, 4, 2, 64, 64),
    (1, 513, 513, 4, 4, 128, 128),
    (2, 65, 300, 4, 4, 256, 256),
    (3, 1, 400, 8, 1, 96, 80),
]


@pytest.mark.parametrize("seed", range(60))
def test_any_combination(seed):
    rng = np.random.default_rng(seed)
    choose = lambda choices: choices[rng.integers(len(choices))]
    inputs, options = draws.draw(choose, sizes=SIZES, dtypes=[np.float32])
    del options["deterministic"]
    inputs = [x.astype(oracle_fp8.E4M3) for x in inputs]
    options["fp8_accumulation"] = choose(["fast", "fast", "two_level"])
    options["k_scale"] = choose([0.5, per_head(seed, *inputs[1].shape[::2][:2])])
    oracle_fp8.check(*inputs[:3], poison=draws.poison(options, np.nan), **options)


@masks
@pytest.mark.parametrize("T", [450, 400])  # the last tile has no rows for one warpgroup, or two
@pytest.mark.parametrize("H", [64, 128, 256])
def test_more_tiles_than_multiprocessors(H, T, is_causal):
    kv_lengths = np.array([450, 0, 0, 131, 7, 0, 449, 0], np.int32)
    oracle_fp8.check(
        *oracle_fp8.make_inputs(6, 8, T, 450, 16, 4, H, H),
        is_causal=is_causal,
        query_offset=0,
        key_value_seq_lengths=kv_lengths,
    )


def test_bitwise_repeatable():
    q, k, v = oracle_fp8.make_inputs(7, 2, 1000, 1000, 6, 2, 128, 128)
    first = np.asarray(attention(q, k, v), np.float32)
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(attention(q, k, v), np.float32), first)
