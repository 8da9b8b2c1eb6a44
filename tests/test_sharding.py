"""Several devices: eight virtual CPUs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import oracle
from jax_flashattn import attention

AUTO = (AxisType.Auto,) * 2


def collectives(compiled: str) -> list[str]:
    return re.findall(
        r"\b(all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", compiled
    )


def test_batch_sharded_without_collectives():
    mesh = jax.make_mesh((4, 2), ("dp", "other"), axis_types=AUTO)
    q, k, v, dout, _ = oracle.make_inputs(0, 8, 16, 16, 4, 2, 8, 8, jnp.float32)
    lengths = jnp.arange(9, 17, dtype=jnp.int32)

    def f(q, k, v, dout, lengths):
        call = lambda q, k, v: attention(q, k, v, is_causal=True, key_value_seq_lengths=lengths)
        out, vjp = jax.vjp(call, q, k, v)
        return out, vjp(dout)

    expected = jax.jit(f)(q, k, v, dout, lengths)
    sharded = jax.device_put((q, k, v, dout, lengths), NamedSharding(mesh, PartitionSpec("dp")))
    compiled = jax.jit(f).lower(*sharded).compile()
    assert collectives(compiled.as_text()) == []
    for x, y in zip(jax.tree.leaves(compiled(*sharded)), jax.tree.leaves(expected), strict=True):
        assert x.sharding.spec[0] == "dp"
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_shard_map_sums_gradients_of_replicated_keys():
    """Multi-query: the one key head is on every device, its gradient is a sum over them."""
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=AUTO)
    q, k, v, dout, _ = oracle.make_inputs(1, 4, 16, 16, 4, 1, 8, 8, jnp.float32)
    spec, kv_spec = PartitionSpec("dp", None, "tp"), PartitionSpec("dp")
    sharded = jax.shard_map(attention, mesh=mesh, in_specs=(spec, kv_spec, kv_spec), out_specs=spec)

    def gradients(function):
        return jax.jit(jax.grad(lambda *x: jnp.vdot(function(*x), dout), (0, 1, 2)))(q, k, v)

    for x, y in zip(gradients(sharded), gradients(attention), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_pmap():
    q, k, v, _, _ = oracle.make_inputs(2, 8, 16, 16, 4, 2, 8, 8, jnp.float32)
    split = lambda x: x.reshape(4, 2, *x.shape[1:])
    got = jax.pmap(attention, devices=jax.devices()[:4])(split(q), split(k), split(v))
    np.testing.assert_allclose(got.reshape(8, 16, 4, 8), attention(q, k, v), atol=1e-6)
