"""Partial results over disjoint keys, merged, are the result over all keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pages
from jax_flashattn import attention, merge_attention, paged_attention
from tolerances import assert_close

merge = jax.jit(merge_attention)


def check(q, k, v, got, **options):
    (B, T, N, _), Hv = q.shape, v.shape[-1]
    zeros = np.zeros((B, T, N, Hv), q.dtype), np.zeros((B, N, T), np.float32)
    exact, twin, _ = oracle.references(q, k, v, *zeros, **options)
    for name, x, reference, low in zip(("out", "lse"), got, exact, twin, strict=False):
        assert_close(x, reference, low, dtype=q.dtype, what=name)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: d.__name__)
def test_split_keys(dtype):
    """Three parts, of which causality hides the last from most queries; sinks in one."""
    q, k, v, _, _ = oracle.make_inputs(0, 2, 30, 90, 4, 2, 16, 24, dtype)
    sinks = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
    parts = []
    for begin, end in ((0, 20), (20, 50), (50, 90)):
        options = dict(is_causal=True, query_offset=40 - begin, return_lse=True)
        options["sinks"] = jnp.asarray(sinks) if begin == 0 else None
        parts.append(attention(q, k[:, begin:end], v[:, begin:end], **options))
    assert np.isneginf(parts[2][1]).any()
    merged = merge(parts)
    assert merged[0].dtype == dtype and merged[1].dtype == jnp.float32
    check(q, k, v, merged, is_causal=True, query_offset=40, sinks=sinks)


def test_cascade():
    """A prefix that all sequences share is attended to once, by all queries as one sequence."""
    q, k, v, _, _ = oracle.make_inputs(1, 3, 2, 56, 4, 2, 16, 16, jnp.float32)
    k[:, :32], v[:, :32] = k[:1, :32], v[:1, :32]
    lengths = [56, 40, 33]
    cache = pages.make_cache(k[:, 32:], v[:, 32:], [n - 32 for n in lengths], page_size=8)
    prefix = attention(
        q.reshape(1, 6, 4, 16), k[:1, :32], v[:1, :32], return_lse=True, query_offset=0
    )
    out, lse = (x[0] for x in prefix)
    prefix = out.reshape(3, 2, 4, 16), lse.reshape(4, 3, 2).swapaxes(0, 1)
    # In the own part positions count from its start. The first query of the last sequence lies
    # before it, and sees the prefix without its last token in the whole; so it takes no part here.
    own = paged_attention(jnp.asarray(q), cache, return_lse=True)
    got = jax.tree.map(lambda x: x[:2], merge([prefix, own]))
    check(
        q[:2], k[:2], v[:2], got, is_causal=True, query_offset="end",
        key_value_seq_lengths=np.array(lengths[:2]),
    )  # fmt: skip


def test_nothing_to_merge():
    """Parts that saw nothing weigh nothing; where no part saw anything, neither does the result."""
    out, lse = jnp.ones((2, 3, 4, 5)), jnp.zeros((2, 4, 3))
    blind = jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf)
    for parts in ([(out, lse)], [(out, lse), blind], [blind, (out, lse), blind]):
        np.testing.assert_array_equal(merge(parts)[0], out)
        np.testing.assert_array_equal(merge(parts)[1], lse)
    for parts in ([blind], [blind, blind]):
        np.testing.assert_array_equal(merge(parts)[0], blind[0])
        np.testing.assert_array_equal(merge(parts)[1], blind[1])


def test_gradients():
    """Those of one call over all keys, also where a part sees nothing."""
    q, k, v, dout, dlse = oracle.make_inputs(2, 2, 9, 40, 4, 2, 16, 16, jnp.float32)
    options = dict(is_causal=True, return_lse=True)

    def split(q, k, v):
        parts = [attention(q, k[:, a : a + 5], v[:, a : a + 5], query_offset=5 - a, **options)
                 for a in (0, 5, 20)]  # fmt: skip
        return merge(parts)

    def whole(q, k, v):
        return attention(q, k[:, :10], v[:, :10], query_offset=5, **options)

    def gradients(f):
        return jax.jit(lambda *x: jax.vjp(f, *x)[1]((jnp.asarray(dout), jnp.asarray(dlse))))(
            q, k, v
        )

    for x, y in zip(gradients(split), gradients(whole), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_packed():
    """Two axes less: [total, N, Hv] and [N, total]."""
    q, k, v, _, _ = oracle.make_inputs(3, 1, 12, 24, 4, 2, 16, 16, jnp.float32)
    lengths = [24]
    cache = pages.make_cache(k, v, lengths, page_size=8)
    first = dataclasses.replace(cache, lengths=jnp.array([8]))
    rest = dataclasses.replace(cache, page_table=cache.page_table[:, 1:], lengths=jnp.array([16]))
    options = dict(cu_seqlens_q=np.array([0, 12]), is_causal=False, return_lse=True)
    call = lambda cache: paged_attention(jnp.asarray(q[0]), cache, **options)
    out, lse = merge([call(first), call(rest)])
    check(q, k, v, (out[None], lse[None]))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([], ValueError, r"parts must have at least 1 pair \(out, lse\), got none"),
        ([((3, 4, 5), (3, 4))], ValueError, r"lse of part 0 must have shape \(4, 3\)"),
        ([((4, 5), (4,))], ValueError, r"out of part 0 must have the shape \[\.\.\., T, N, Hv\]"),
        (
            [((3, 4, 5), (4, 3)), ((2, 4, 5), (4, 2))],
            ValueError,
            r"out of part 1 must have the shape .* \(3, 4, 5\), got \(2, 4, 5\)",
        ),
    ],
)
def test_errors(parts, error, message):
    with pytest.raises(error, match=message):
        merge_attention([(jnp.zeros(out), jnp.zeros(lse)) for out, lse in parts])


def test_dtypes_differ():
    out, lse = jnp.zeros((3, 4, 5)), jnp.zeros((4, 3))
    with pytest.raises(TypeError, match=r"out of part 1 must have the dtype of part 0, float32"):
        merge_attention([(out, lse), (out.astype(jnp.bfloat16), lse)])
