"""Few queries over many keys, which the CPU kernels share out in parts of 1024 keys and more."""

import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pages

S = 4500  # five parts of 1024 keys, the last one short


def inputs(B=1, T=1, N=4, K=1, H=40, Hv=24, dtype=jnp.bfloat16):
    return oracle.make_inputs(0, B, T, S, N, K, H, Hv, dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize(("T", "N", "K"), [(1, 1, 1), (1, 8, 2), (7, 8, 1), (64, 1, 1)])
def test_dtypes_and_rows(T, N, K, dtype):
    oracle.check(*inputs(1, T, N, K, dtype=dtype), is_causal=True, query_offset="end")


@pytest.mark.parametrize(
    "options",
    [
        dict(key_value_seq_lengths=np.array([S, 0, 1025])),
        dict(key_value_seq_lengths=np.array([1023, 1024, 2049]), query_offset="end"),
        dict(is_causal=True, query_offset=np.array([-1, 1500, 4000], np.int32)),
        dict(local_window_size=(1500, 0), query_offset=4000),
        dict(local_window_size=(10, 0), sink_tokens=3, query_offset="end"),
        dict(logits_soft_cap=5.0, alibi_slopes=np.array([0.1, 0.01, 0.001, 0], np.float32)),
        dict(sinks=np.array([-3, 0, 3, 30], np.float32)),
        dict(
            segment_ids=(
                np.array([[1] * 2, [7] * 2, [2, 3]], np.int32),
                np.repeat([[0, 1, 2, 3]], 3, axis=0).repeat(S // 4, axis=1).astype(np.int32),
            )
        ),
    ],
    ids="-".join,
)
def test_masks_and_logits(options):
    oracle.check(*inputs(3, 2), **{"is_causal": False, **options})


def test_packed():
    """A long sequence, two short ones, an empty one and a tail."""
    oracle.check(
        *inputs(1, 6),
        cu_seqlens_q=np.array([[0, 2, 3, 4, 5]], np.int32),
        cu_seqlens_kv=np.array([[0, 3000, 3100, 3100, 4400]], np.int32),
        is_causal=True,
        query_offset="end",
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda d: d.__name__)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pages(layout, dtype):
    lengths = [S, 0, 2100]
    q, k, v = inputs(3, 2, dtype=dtype)[:3]
    cache = pages.make_cache(k, v, lengths, page_size=8, layout=layout)
    pages.check(q, k, v, lengths, cache)
    pages.check(q, k, v, lengths, cache, local_window_size=(1100, 0), sink_tokens=4)


def test_results_do_not_depend_on_the_number_of_workers(run_python):
    script = """
        import os
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:{cpus}])
        import hashlib
        import numpy as np
        import oracle
        from jax_flashattn import attention
        q, k, v = oracle.make_inputs(0, 2, 1, 9000, 4, 2, 64, 64, np.float32)[:3]
        out, lse = attention(q, k, v, return_lse=True)
        print(hashlib.sha256(np.asarray(out).tobytes() + np.asarray(lse).tobytes()).hexdigest())
        """
    assert run_python(script.format(cpus=1)) == run_python(script.format(cpus=8))
