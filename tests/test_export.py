"""Programs that outlive their process: export, persistent cache, compiling ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import oracle
from jax_flashattn import PagedKVCache, attention, paged_attention
from jax_flashattn._targets import BWD_TARGET, FWD_TARGET, PAGED_TARGET, SERVE_TARGET

# The names are versioned: a program exported today means the same to later releases.
TARGETS = FWD_TARGET, BWD_TARGET, PAGED_TARGET, SERVE_TARGET
CHECKS = [export.DisabledSafetyCheck.custom_call(name) for name in TARGETS]


def f(q, k, v, slopes, lengths):
    return attention(
        q, k, v, is_causal=True, alibi_slopes=slopes, key_value_seq_lengths=lengths, sinks=slopes
    )


def arguments():
    q, k, v, dout, _ = oracle.make_inputs(0, 4, 16, 16, 4, 2, 8, 8, jnp.float32)
    return (q, k, v, jnp.full(4, 0.1), jnp.array([16, 9, 1, 0])), dout


@pytest.mark.parametrize("symbolic", [False, True])
def test_export_round_trip(symbolic):
    args, dout = arguments()
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    if symbolic:
        (batch,) = export.symbolic_shape("b")
        of_batch = [0, 1, 2, 4]
        for i in of_batch:
            shapes[i] = jax.ShapeDtypeStruct((batch, *shapes[i].shape[1:]), shapes[i].dtype)
    exported = export.export(jax.jit(f), disabled_checks=CHECKS)(*shapes)
    restored = export.deserialize(exported.serialize(vjp_order=1))
    np.testing.assert_allclose(restored.call(*args), f(*args), atol=1e-6)
    loss = lambda function: lambda *x: jnp.vdot(function(*x, args[4]), dout)
    gradients = jax.grad(loss(restored.call), (0, 1, 2, 3))(*args[:4])
    for x, y in zip(gradients, jax.grad(loss(f), (0, 1, 2, 3))(*args[:4]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_export_for_other_platforms():
    args, _ = arguments()
    args = [x.astype(jnp.bfloat16) if x.ndim == 4 else x for x in args]
    exported = export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"), disabled_checks=CHECKS)(
        *args
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_array_equal(
        np.asarray(exported.call(*args), np.float32), np.asarray(f(*args), np.float32)
    )


@pytest.mark.parametrize("symbolic", [False, True])
def test_export_of_a_serving_step(symbolic):
    """With any number of sequences and of pages in the pool."""

    def step(q, k, k_pages, v_pages, page_table, lengths):
        cache = PagedKVCache(k_pages, v_pages, page_table, lengths).append(k, k)
        return paged_attention(q, cache), cache.k_pages, cache.lengths

    rng = np.random.default_rng(0)
    q, k, pages = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((3, 2, 4, 8), (3, 2, 2, 8), (7, 8, 2, 8))
    )
    table, lengths = jnp.array([[5, 0], [2, 3], [1, 6]]), jnp.array([13, 7, 0])
    args = q, k, pages, pages, table, lengths
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    if symbolic:
        b, p = export.symbolic_shape("b, p")
        leading = (b, b, p, p, b, b)
        shapes = [
            jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
            for n, x in zip(leading, shapes, strict=True)
        ]
    exported = export.export(jax.jit(step), disabled_checks=CHECKS)(*shapes)
    restored = export.deserialize(exported.serialize())
    for x, y in zip(restored.call(*args), step(*args), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_persistent_compilation_cache(tmp_path, run_python):
    script = """
        import jax, oracle, jax.numpy as jnp
        from jax_flashattn import attention
        hits = []
        jax.monitoring.register_event_listener(
            lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
        x = [jnp.asarray(y) for y in oracle.make_inputs(0, 1, 8, 8, 2, 1, 8, 8, jnp.float32)[:3]]
        loss = lambda *x: attention(*x, is_causal=True).sum()
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(*x).compile()
        print(len(hits))
        """
    settings = dict(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
    first, second = (int(run_python(script, **settings)) for _ in range(2))
    assert second > first


def test_donation():
    args, _ = arguments()
    expected = f(*args)
    donating = jax.jit(f, donate_argnums=0)
    np.testing.assert_array_equal(donating(jnp.array(args[0]), *args[1:]), expected)
