"""Paged attention under JAX's transformations, and over eight virtual devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import oracle
import pages
from jax_flashattn import PagedKVCache, UnsupportedError, paged_attention

LAYOUTS = ["NHD", "HND"]


def inputs(B=2, T=3, S=40, layout="NHD", lengths=None, seed=0):
    q, k, v, _, _ = oracle.make_inputs(seed, B, T, S, 4, 2, 8, 8, jnp.float32)
    lengths = [S, S - 11, 0, 5, S - 1, 8, 17, 2][:B] if lengths is None else lengths
    return jnp.asarray(q), pages.make_cache(k, v, lengths, page_size=8, layout=layout, seed=seed)


def with_lse(q, cache, **options):
    return paged_attention(q, cache, return_lse=True, **options)


def assert_same(got, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, expected)


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def pair(layout):
    """Two calls of equal shapes: queries and caches."""
    calls = [inputs(lengths=n, layout=layout, seed=s) for s, n in enumerate([[40, 7], [33, 16]])]
    num_pages = max(cache.num_pages for _, cache in calls)

    def pad(pool):
        return jnp.pad(pool, [(0, num_pages - pool.shape[0]), *[(0, 0)] * 3])

    for i, (q, cache) in enumerate(calls):
        pools = dict(k_pages=pad(cache.k_pages), v_pages=pad(cache.v_pages))
        calls[i] = q, dataclasses.replace(cache, **pools)
    return calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_vmap_over_caches(layout, implementation):
    """Each with a pool of its own; numbers out of range must not reach the next pool."""
    calls = pair(layout)
    q, cache = stack([x for x, _ in calls]), stack([x for _, x in calls])
    wild = cache.page_table.at[0, 0, 0].set(10**6)
    cache = dataclasses.replace(cache, page_table=wild)
    f = jax.jit(lambda *x: with_lse(*x, implementation=implementation))
    expected = [f(q[i], jax.tree.map(lambda x, i=i: x[i], cache)) for i in range(2)]
    assert_same(jax.vmap(f)(q, cache), tuple(stack(expected)))


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_vmap_over_queries_and_tables(packed):
    """Of one pool."""
    _, cache = inputs(B=4, lengths=[40, 7, 33, 16])
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 6, 4, 8) if packed else (2, 2, 3, 4, 8)), jnp.float32)
    options = dict(cu_seqlens_q=jnp.array([0, 2, 5])) if packed else {}

    def f(q, table, lengths):
        return with_lse(q, dataclasses.replace(cache, page_table=table, lengths=lengths), **options)

    rows = cache.page_table.reshape(2, 2, -1), cache.lengths.reshape(2, 2)
    expected = stack([f(q[i], rows[0][i], rows[1][i]) for i in range(2)])
    assert_same(jax.vmap(f)(q, *rows), tuple(expected))
    expected = stack([f(q[i], rows[0][0], rows[1][0]) for i in range(2)])
    got = jax.vmap(f, in_axes=(0, None, None))(q, rows[0][0], rows[1][0])
    assert_same(got, tuple(expected))


def test_vmap_of_append():
    calls = pair("NHD")
    cache = stack([x for _, x in calls])
    k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 4, 2, 8)), jnp.float32)
    counts = jnp.array([[4, 1], [0, 3]])
    f = jax.jit(lambda cache, k, n: cache.append(k, -k, num_tokens=n))
    expected = stack([f(calls[i][1], k[i], counts[i]) for i in range(2)])
    assert_same(jax.vmap(f)(cache, k, counts), expected)


def test_scan_over_tokens():
    """Decoding as a loop on the device, with the cache as carry."""
    q, k, v, _, _ = oracle.make_inputs(0, 2, 12, 12, 4, 2, 8, 8, jnp.float32)
    cache = pages.make_cache(k, v, [12, 12], page_size=8)
    start = dataclasses.replace(cache, lengths=jnp.zeros(2, jnp.int32))
    cache, out = pages.generate(start, q, k, v)
    np.testing.assert_array_equal(cache.lengths, [12, 12])
    assert_same(out, paged_attention(jnp.asarray(q), cache))


@pytest.mark.parametrize("wrt", ["q", "pages"])
@pytest.mark.parametrize("mode", ["grad", "jvp"])
def test_no_derivatives(wrt, mode):
    q, cache = inputs()
    if wrt == "q":
        x, f = q, lambda q: paged_attention(q, cache).sum()
    else:
        x = cache.k_pages
        f = lambda x: paged_attention(q, dataclasses.replace(cache, k_pages=x)).sum()
    with pytest.raises(UnsupportedError, match=r"for inference: .* or implementation='xla'"):
        jax.jit(jax.grad(f))(x) if mode == "grad" else jax.jvp(f, (x,), (x,))
    # Beside it, derivatives go on.
    assert jax.grad(lambda y: y * jax.lax.stop_gradient(f(x)))(2.0) != 0


def test_lowers_for_every_platform():
    """Where there is no kernel for pages the definition stands in, unless one was named."""
    q, cache = inputs()
    trace = lambda **options: jax.jit(lambda *x: paged_attention(*x, **options)).trace(q, cache)
    text = trace().lower(lowering_platforms=("tpu",)).as_text()
    assert "custom_call" not in text
    assert "jfa_paged_v1" in trace().lower(lowering_platforms=("cpu",)).as_text()
    with pytest.raises(UnsupportedError, match=r"implementation='cpu' has no kernel for .* tpu"):
        trace(implementation="cpu").lower(lowering_platforms=("tpu",))
    with pytest.raises(UnsupportedError, match=r"CUDA kernels take float16, bfloat16"):
        trace().lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_cuda_call_has_the_memory_of_its_operands(layout):
    """Axes move, bytes don't: only the table and small arrays are made anew."""
    q, cache = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs(layout=layout))
    cache = dataclasses.replace(
        cache, page_table=jnp.zeros((2, 5), jnp.int32), lengths=jnp.zeros(2, jnp.int32)
    )
    lowered = jax.jit(paged_attention).trace(q, cache).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("jfa_serve_v2") == 1
    call = next(line for line in text.splitlines() if "jfa_serve_v2" in line)
    pages = "[3, 0, 2, 1]" if layout == "NHD" else "[3, 2, 0, 1]"
    assert call.count(f"dense<{pages}>") >= 2
    assert f"heads_first = {str(layout == 'HND').lower()}" in call


# Eight devices: 4 for sequences, 2 for heads.


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(kind,) * 2)


def cache_specs(layout, pages=None, heads=None, sequences=None):
    pool = P(pages, None, heads) if layout == "NHD" else P(pages, heads)
    return PagedKVCache(pool, pool, P(sequences), P(sequences), layout)


def step(cache, q, k, v):
    cache = cache.append(k, v)
    return cache, *with_lse(q, cache)


def tokens(B=8, T=3):
    rng = np.random.default_rng(1)
    shapes = (B, T, 4, 8), (B, T, 2, 8), (B, T, 2, 8)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_by_shard_map(layout):
    _, cache = inputs(B=8, layout=layout)
    heads, specs = P(None, None, "tp"), cache_specs(layout, heads="tp")
    sharded = jax.shard_map(
        step,
        mesh=mesh(),
        in_specs=(specs, heads, heads, heads),
        out_specs=(specs, heads, P(None, "tp")),
    )
    assert_same(jax.jit(sharded)(cache, *tokens()), jax.jit(step)(cache, *tokens()))


def test_sequences_by_shard_map():
    """Each shard has a pool of its own, and page numbers within it."""
    shards = [
        inputs(lengths=n, seed=s)[1] for s, n in enumerate([[40, 3], [9, 16], [0, 39], [8, 8]])
    ]
    num_pages = max(cache.num_pages for cache in shards)
    pools = [
        jnp.concatenate([jnp.pad(x, [(0, num_pages - len(x)), (0, 0), (0, 0), (0, 0)]) for x in xs])
        for xs in ([c.k_pages for c in shards], [c.v_pages for c in shards])
    ]
    cache = PagedKVCache(
        *pools,
        jnp.concatenate([c.page_table for c in shards]),
        jnp.concatenate([c.lengths for c in shards]),
    )
    specs = cache_specs("NHD", pages="dp", heads="tp", sequences="dp")
    rows = P("dp", None, "tp")
    sharded = jax.shard_map(
        step,
        mesh=mesh(),
        in_specs=(specs, rows, rows, rows),
        out_specs=(specs, rows, P("dp", "tp")),
    )
    q, k, v = tokens()
    new, out, lse = jax.jit(sharded)(cache, q, k, v)
    for i, shard in enumerate(shards):
        part = slice(2 * i, 2 * i + 2)
        alone, *expected = jax.jit(step)(shard, q[part], k[part], v[part])
        assert_same([out[part], lse[part]], expected)
        np.testing.assert_array_equal(new.lengths[part], alone.lengths)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda x: x.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_by_the_compiler(kind, layout):
    _, cache = inputs(B=8, layout=layout)
    expected = jax.jit(step)(cache, *tokens())
    m = mesh(kind)
    with jax.set_mesh(m):
        put = lambda x, s: jax.device_put(x, NamedSharding(m, s))
        heads = P(None, None, "tp")
        arrays = [put(x, heads) for x in tokens()]
        sharded = jax.tree.map(put, cache, cache_specs(layout, heads="tp"))
        new, out, lse = jax.jit(step)(sharded, *arrays)
    assert_same((new, out, lse), expected)
    if kind == AxisType.Explicit:
        assert jax.typeof(out).sharding.spec == P(None, None, "tp", None)
        assert jax.typeof(lse).sharding.spec == P(None, "tp", None)


def test_sequences_by_the_compiler():
    """Queries, table and lengths sharded, the pool replicated."""
    _, cache = inputs(B=8)
    m = mesh()
    put = lambda x, s: jax.device_put(x, NamedSharding(m, s))
    arrays = [put(x, P("dp")) for x in tokens()]
    sharded = jax.tree.map(put, cache, cache_specs("NHD", sequences="dp"))
    assert_same(jax.jit(step)(sharded, *arrays), jax.jit(step)(cache, *tokens()))
