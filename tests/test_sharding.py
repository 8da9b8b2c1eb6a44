"""Several devices: eight virtual CPUs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import oracle
from jax_flashattn import attention, attention_varlen

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
    sharded = jax.device_put((q, k, v, dout, lengths), NamedSharding(mesh, P("dp")))
    compiled = jax.jit(f).lower(*sharded).compile()
    assert collectives(compiled.as_text()) == []
    for x, y in zip(jax.tree.leaves(compiled(*sharded)), jax.tree.leaves(expected), strict=True):
        assert x.sharding.spec[0] == "dp"
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_shard_map_sums_gradients_of_replicated_keys():
    """Multi-query: the one key head is on every device, its gradient is a sum over them."""
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=AUTO)
    q, k, v, dout, _ = oracle.make_inputs(1, 4, 16, 16, 4, 1, 8, 8, jnp.float32)
    spec, kv_spec = P("dp", None, "tp"), P("dp")
    sharded = jax.shard_map(attention, mesh=mesh, in_specs=(spec, kv_spec, kv_spec), out_specs=spec)

    def gradients(function):
        return jax.jit(jax.grad(lambda *x: jnp.vdot(function(*x), dout), (0, 1, 2)))(q, k, v)

    for x, y in zip(gradients(sharded), gradients(attention), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def explicit_mesh():
    return jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)


@pytest.mark.parametrize(
    ("q_spec", "kv_spec"),
    [
        (P("dp"), P("dp")),
        (P("dp", None, "tp"), P("dp", None, "tp")),
        (P(("dp", "tp")), P(("dp", "tp"))),
        (P(None, None, "tp"), P(None, None, "tp")),
        (P("dp", None, "tp"), P("dp")),
    ],
    ids=str,
)
def test_explicit_mode_types_and_values(q_spec, kv_spec):
    q, k, v, dout, _ = oracle.make_inputs(3, 8, 16, 16, 4, 2, 8, 8, jnp.float32)
    slopes = jnp.full(4, 0.1)

    def f(q, k, v, dout):
        call = lambda q, k, v: attention(q, k, v, is_causal=True, alibi_slopes=slopes)
        out, vjp = jax.vjp(call, q, k, v)
        return out, *vjp(dout)

    expected = f(q, k, v, dout)
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        specs = (q_spec, kv_spec, kv_spec, q_spec)
        sharded = [
            jax.device_put(x, NamedSharding(mesh, s))
            for x, s in zip((q, k, v, dout), specs, strict=True)
        ]
        got = jax.jit(f)(*sharded)
    for x, y, like in zip(got, expected, [sharded[0], *sharded[:3]], strict=True):
        assert jax.typeof(x).sharding.spec == jax.typeof(like).sharding.spec
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_partial_manual_shard_map():
    """Data parallel by hand, heads by the compiler."""
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=AUTO)
    q, k, v, dout, _ = oracle.make_inputs(4, 8, 16, 16, 4, 2, 8, 8, jnp.float32)
    by_hand = jax.shard_map(
        attention, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"), axis_names={"dp"}
    )

    def gradients(function):
        loss = lambda *x: jnp.vdot(function(*x), dout)
        sharding = NamedSharding(mesh, P("dp", None, "tp"))
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*jax.device_put((q, k, v), sharding))

    for x, y in zip(gradients(by_hand), gradients(attention), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_queries_sharded_over_the_sequence():
    """Under shard_map the offset says where a shard's queries stand."""
    mesh = jax.make_mesh((8,), ("sp",), axis_types=AUTO[:1])
    q, k, v, _, _ = oracle.make_inputs(5, 2, 64, 64, 4, 2, 8, 8, jnp.float32)

    def shard(q, k, v):
        offset = jax.lax.axis_index("sp") * q.shape[1]
        return attention(q, k, v, is_causal=True, query_offset=offset)

    spec = P(None, "sp")
    f = jax.shard_map(shard, mesh=mesh, in_specs=(spec, P(), P()), out_specs=spec)
    np.testing.assert_allclose(jax.jit(f)(q, k, v), attention(q, k, v, is_causal=True), atol=1e-5)


def test_sequence_and_head_dim_shards_are_gathered():
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=AUTO)
    q, k, v, _, _ = oracle.make_inputs(6, 2, 16, 16, 4, 2, 8, 8, jnp.float32)
    for spec in (P(None, "dp"), P(None, None, None, "tp")):
        sharded = jax.device_put((q, k, v), NamedSharding(mesh, spec))
        np.testing.assert_allclose(jax.jit(attention)(*sharded), attention(q, k, v), atol=1e-5)


def test_packed_batch_sharded_without_collectives():
    mesh = jax.make_mesh((4, 2), ("dp", "other"), axis_types=AUTO)
    q, k, v, _, _ = oracle.make_inputs(7, 8, 32, 32, 4, 2, 8, 8, jnp.float32)
    ends = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 33, (8, 4)), axis=1))
    f = jax.jit(lambda q, k, v, ends: attention_varlen(q, k, v, cu_seqlens_q=ends))
    sharded = jax.device_put((q, k, v, ends), NamedSharding(mesh, P("dp")))
    compiled = f.lower(*sharded).compile()
    assert collectives(compiled.as_text()) == []
    np.testing.assert_allclose(compiled(*sharded), f(q, k, v, ends), atol=1e-6)


def test_vmap_over_a_sharded_axis():
    mesh = jax.make_mesh((4, 2), ("dp", "other"), axis_types=AUTO)
    q, k, v, _, _ = oracle.make_inputs(8, 8, 16, 16, 4, 2, 8, 8, jnp.float32)
    f = jax.jit(jax.vmap(attention, spmd_axis_name="dp"))
    sharded = jax.device_put((q, k, v), NamedSharding(mesh, P("dp")))
    compiled = f.lower(*sharded).compile()
    assert collectives(compiled.as_text()) == []
    np.testing.assert_allclose(compiled(*sharded), attention(q, k, v), atol=1e-6)


def test_pmap():
    q, k, v, _, _ = oracle.make_inputs(2, 8, 16, 16, 4, 2, 8, 8, jnp.float32)
    split = lambda x: x.reshape(4, 2, *x.shape[1:])
    got = jax.pmap(attention, devices=jax.devices()[:4])(split(q), split(k), split(v))
    np.testing.assert_allclose(got.reshape(8, 16, 4, 8), attention(q, k, v), atol=1e-6)
