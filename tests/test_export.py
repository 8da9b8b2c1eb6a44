"""Programs that outlive their process: export, persistent cache, compiling ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import oracle
from jax_flashattn import attention
from jax_flashattn._targets import BWD_TARGET, FWD_TARGET

# The names are versioned: a program exported today means the same to later releases.
CHECKS = [export.DisabledSafetyCheck.custom_call(name) for name in (FWD_TARGET, BWD_TARGET)]


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
