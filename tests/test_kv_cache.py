"""The paged cache: what append writes and where, its checks, and that nothing is copied."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jax_flashattn import PagedKVCache, paged_attention

LAYOUTS = ["NHD", "HND"]
SIZES = dict(batch=3, max_pages=4, num_pages=13, page_size=8, num_kv_heads=2, head_dim=4)


append = jax.jit(PagedKVCache.append)


def make(layout="NHD", lengths=(0, 0, 0), **sizes):
    """A cache whose every entry of the table is a page; the pages are in no order."""
    sizes = {**SIZES, "dtype": jnp.float32, "head_dim_v": 6, **sizes}
    cache = PagedKVCache.create(**sizes, layout=layout)
    order = np.random.default_rng(0).permutation(13)[:12].reshape(3, 4)
    return dataclasses.replace(
        cache, page_table=jnp.asarray(order, jnp.int32), lengths=jnp.array(lengths, jnp.int32)
    )


def tokens(cache, shape=(3, 5), seed=1):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.normal(size=(*shape, 2, pool.shape[-1])), jnp.float32)
        for pool in (cache.k_pages, cache.v_pages)
    )


def stored(cache, pool, b):
    """What sequence b has, `[length, K, H]`."""
    pool = np.asarray(pool if cache.layout == "NHD" else pool.swapaxes(1, 2))
    found = [pool[page] for page in np.asarray(cache.page_table[b]) if 0 <= page < len(pool)]
    return np.concatenate([*found, pool[0, :0]])[: int(cache.lengths[b])]


def assert_stores(cache, k, v):
    """k and v: per sequence what was appended."""
    for b, (x, y) in enumerate(zip(k, v, strict=True)):
        np.testing.assert_array_equal(stored(cache, cache.k_pages, b), x)
        np.testing.assert_array_equal(stored(cache, cache.v_pages, b), y)


def test_create():
    cache = PagedKVCache.create(**SIZES)
    assert cache.k_pages.dtype == jnp.bfloat16
    assert cache.k_pages.shape == cache.v_pages.shape == (13, 8, 2, 4)
    assert (cache.num_pages, cache.page_size, cache.capacity) == (13, 8, 32)
    np.testing.assert_array_equal(cache.page_table, np.full((3, 4), 13))
    cache = PagedKVCache.create(**SIZES, head_dim_v=6, layout="HND")
    assert cache.k_pages.shape == (13, 2, 8, 4) and cache.v_pages.shape == (13, 2, 8, 6)
    assert (cache.num_pages, cache.page_size, cache.capacity) == (13, 8, 32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_step_by_step(layout):
    cache = make(layout)
    steps = [tokens(cache, (3, t), t) for t in (5, 1, 9)]
    for k, v in steps:
        cache = append(cache, k, v)
    np.testing.assert_array_equal(cache.lengths, [15, 15, 15])
    assert_stores(cache, *(np.concatenate(x, axis=1) for x in zip(*steps, strict=True)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_ragged(layout):
    cache = make(layout)
    counts = [3, 0, 12]  # clamped to 5
    k, v = tokens(cache)
    cache = append(cache, k, v, num_tokens=jnp.array(counts))
    np.testing.assert_array_equal(cache.lengths, [3, 0, 5])
    assert_stores(cache, [k[0, :3], k[1, :0], k[2]], [v[0, :3], v[1, :0], v[2]])
    # Nothing else was written.
    assert np.count_nonzero(cache.k_pages) == 8 * 2 * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_packed(layout):
    cache = make(layout)
    k, v = tokens(cache, (20,))
    ends = jnp.array([0, 11, 11, 18])  # and a tail
    cache = append(cache, k, v, cu_seqlens=ends)
    np.testing.assert_array_equal(cache.lengths, [11, 0, 7])
    assert_stores(cache, [k[:11], k[:0], k[11:18]], [v[:11], v[:0], v[11:18]])
    assert np.count_nonzero(cache.k_pages) == 18 * 2 * 4


def test_append_beyond_the_room():
    """Beyond the table and where there is no page tokens are dropped, and lengths stop."""
    cache = make(lengths=(30, 6, 6))
    table = cache.page_table.at[1, 1].set(13).at[2, 2].set(-1)
    cache = dataclasses.replace(cache, page_table=table)
    k, v = tokens(cache, (3, 12))
    new = append(cache, k, v)
    np.testing.assert_array_equal(new.lengths, [32, 8, 16])
    assert np.count_nonzero(new.k_pages) == (2 + 2 + 10) * 2 * 4
    np.testing.assert_array_equal(stored(new, new.k_pages, 0)[30:], k[0, :2])
    again = append(new, k, v)
    np.testing.assert_array_equal(again.lengths, new.lengths)
    np.testing.assert_array_equal(again.k_pages, new.k_pages)


def test_append_behind_pages_that_are_gone():
    """A window has left the first tokens, and their pages were freed."""
    cache = make(lengths=(20, 0, 0))
    cache = dataclasses.replace(cache, page_table=cache.page_table.at[0, :2].set(13))
    new = append(cache, *tokens(cache))
    np.testing.assert_array_equal(new.lengths, [25, 5, 5])


def test_append_with_wild_lengths():
    """They are clamped, and no length leaves [0, capacity]."""
    cache = make(lengths=(-9, 2**31 - 1, 5))
    new = append(cache, *tokens(cache))
    np.testing.assert_array_equal(new.lengths, [5, 32, 10])


def test_append_casts():
    cache = make(dtype=jnp.bfloat16)
    k, v = tokens(cache)
    cache = append(cache, k, v)
    assert cache.k_pages.dtype == jnp.bfloat16
    np.testing.assert_array_equal(stored(cache, cache.k_pages, 0), k[0].astype(jnp.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_a_donated_pool_is_not_copied(layout, packed):
    """Neither by append nor by the attention after it."""
    cache = make(layout)
    k, v = tokens(cache, (9,) if packed else (3, 1))
    q = jnp.zeros((*k.shape[:-2], 4, 4))
    ends = jnp.array([0, 7, 8, 9])

    def step(cache, q, k, v, ends):
        cache = cache.append(k, v, cu_seqlens=ends if packed else None)
        return cache, paged_attention(q, cache, cu_seqlens_q=ends if packed else None)

    compiled = jax.jit(step, donate_argnums=0).lower(cache, q, k, v, ends).compile()
    text = compiled.as_text()
    alias = re.search(r"input_output_alias=\{(.*?) \},", text).group(1)
    assert "{0}: (0" in alias and "{1}: (1" in alias
    for pool in (cache.k_pages, cache.v_pages):
        shape = "f32[" + ",".join(map(str, pool.shape)) + "]"
        made = [x for x in text.splitlines() if re.search(rf"= {re.escape(shape)}\S* ", x)]
        made = [re.search(r"\} (\S+)\(", x).group(1) for x in made]
        assert "scatter" in made
        assert set(made) <= {"scatter", "fusion", "parameter", "get-tuple-element"}, made
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.k_pages.nbytes * 5 // 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_block_last(layout):
    cache = make(layout)
    cache = append(cache, *tokens(cache))
    axis = {"NHD": 1, "HND": 2}[layout]
    last = [jnp.moveaxis(x, axis, -1) for x in (cache.k_pages, cache.v_pages)]
    assert last[1].shape == (13, 2, 6, 8)
    got = PagedKVCache.from_block_last(*last, cache.page_table, cache.lengths, layout=layout)
    jax.tree.map(np.testing.assert_array_equal, got, cache)


VALID = make(lengths=(32, 9, 0))
INVALID = {
    "long": (dict(lengths=jnp.array([32, 33, 0])), r"within \[0, 32\], got 33 for sequence 1"),
    "negative": (dict(lengths=jnp.array([0, 9, -1])), r"within \[0, 32\], got -1 for sequence 2"),
    "no page": (
        dict(page_table=VALID.page_table.at[1, 1].set(13)),
        r"within \[0, 13\) below the lengths, got 13 for sequence 1 in column 1",
    ),
    "shared": (
        dict(page_table=VALID.page_table.at[1, 1].set(VALID.page_table[0, 2])),
        r"no page may be used twice unless allow_shared, got page \d+ 2 times",
    ),
}


def test_validate_passes():
    unused = VALID.page_table.at[1, 2:].set(13).at[2].set(VALID.page_table[0])
    for cache in (VALID, dataclasses.replace(VALID, page_table=unused)):
        cache.validate()
        error, _ = checkify.checkify(jax.jit(PagedKVCache.validate))(cache)
        error.throw()
    shared = dataclasses.replace(VALID, **INVALID["shared"][0])
    shared.validate(allow_shared=True)


@pytest.mark.parametrize("case", INVALID)
def test_validate_raises(case):
    changes, message = INVALID[case]
    cache = dataclasses.replace(VALID, **changes)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        cache.validate()
    error, _ = checkify.checkify(jax.jit(PagedKVCache.validate))(cache)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        error.throw()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_and_numpy(layout):
    """No sequences, no tokens; and a cache of numpy arrays, as one that was loaded."""
    empty = PagedKVCache.create(**{**SIZES, "batch": 0}, layout=layout)
    append(empty, jnp.zeros((0, 5, 2, 4)), jnp.zeros((0, 5, 2, 4))).validate()
    cache = make(layout)
    same = append(cache, *tokens(cache, (3, 0)))
    np.testing.assert_array_equal(same.lengths, cache.lengths)
    same = append(cache, *tokens(cache, (0,)), cu_seqlens=np.zeros(4, int))
    np.testing.assert_array_equal(same.k_pages, cache.k_pages)
    loaded = jax.tree.map(np.asarray, cache)
    k, v = tokens(cache)
    got = jax.tree.map(np.asarray, loaded.append(k, v))
    got.validate()
    assert_stores(got, k, v)
    q = np.zeros((3, 1, 4, 4), np.float32)
    assert paged_attention(q, got).shape == (3, 1, 4, 6)
