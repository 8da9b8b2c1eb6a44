"""Several devices: eight virtual CPUs, or the GPUs there are. Explicit mode: test_explicit.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_flashattn import attention, attention_varlen
from shards import assert_same, collectives, compiled, gradients, inputs, make_mesh, put

pytestmark = pytest.mark.multi_gpu
BATCH = ("dp",)
HEADS = ("dp", None, "tp")


def causal(q, k, v):
    return attention(q, k, v, is_causal=True)


def test_batch_sharded_without_collectives():
    mesh = make_mesh(AxisType.Auto, tp=1)
    q, k, v, dout = inputs(0, 8, 16, 4, 2)
    lengths = jnp.arange(9, 17, dtype=jnp.int32)

    def f(q, k, v, dout, lengths):
        call = lambda q, k, v: attention(q, k, v, is_causal=True, key_value_seq_lengths=lengths)
        out, vjp = jax.vjp(call, q, k, v)
        return out, vjp(dout)

    args = (q, k, v, dout, lengths)
    sharded = put(mesh, *(y for x in args for y in (x, BATCH)))
    got = jax.jit(f)(*sharded)
    assert collectives(compiled(f, *sharded)) == []
    assert_same(got, jax.jit(f)(*args))
    for x in jax.tree.leaves(got):
        assert x.sharding.spec[0] == "dp"


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_sums_gradients_of_replicated_keys(check_vma):
    """Multi-query: the one key head is on every device, its gradient is a sum over them."""
    mesh = make_mesh(AxisType.Auto)
    q, k, v, dout = inputs(1, 8, 16, 4, 1)
    sharded = jax.shard_map(
        causal,
        mesh=mesh,
        in_specs=(P(*HEADS), P(*BATCH), P(*BATCH)),
        out_specs=P(*HEADS),
        check_vma=check_vma,
    )
    args = put(mesh, q, HEADS, k, BATCH, v, BATCH, dout, HEADS)
    assert_same(jax.jit(gradients(sharded))(*args), gradients(causal)(q, k, v, dout))
    assert collectives(compiled(sharded, *args[:3])) == []
    assert collectives(compiled(gradients(sharded), *args)) == ["all-reduce"]


@pytest.mark.parametrize("K", [1, 2])
def test_heads_sharded_by_the_compiler(K):
    """Right in any case; what it costs on a GPU is in test_xla_gpu.py."""
    mesh = make_mesh(AxisType.Auto)
    q, k, v, dout = inputs(2, 8, 16, 4, K)
    kv_spec = HEADS if K == 2 else BATCH
    args = put(mesh, q, HEADS, k, kv_spec, v, kv_spec, dout, HEADS)
    f = gradients(causal)
    assert_same(jax.jit(f)(*args), f(q, k, v, dout))


def test_repeated_keys():
    """The way out for few key heads in automatic mode: one for each device."""
    mesh = make_mesh(AxisType.Auto)
    q, k, v, dout = inputs(3, 8, 16, 4, 1)
    repeat = lambda x: jnp.repeat(x, mesh.shape["tp"], axis=2)
    args = put(mesh, q, HEADS, k, BATCH, v, BATCH, dout, HEADS)
    f = gradients(lambda q, k, v: causal(q, repeat(k), repeat(v)))
    assert_same(jax.jit(f)(*args), gradients(causal)(q, k, v, dout))


def test_partial_manual_shard_map():
    """Data parallel by hand, heads by the compiler."""
    mesh = make_mesh(AxisType.Auto)
    q, k, v, dout = inputs(4, 8, 16, 4, 2)
    by_hand = jax.shard_map(
        causal, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"), axis_names={"dp"}
    )
    args = put(mesh, *(y for x in (q, k, v, dout) for y in (x, HEADS)))
    assert_same(jax.jit(gradients(by_hand))(*args), gradients(causal)(q, k, v, dout))


def test_queries_sharded_over_the_sequence():
    """Under shard_map the offset says where a shard's queries stand."""
    mesh = jax.make_mesh((len(jax.devices()),), ("sp",), axis_types=(AxisType.Auto,))
    q, k, v, dout = inputs(5, 2, 64, 4, 2)

    def shard(q, k, v):
        offset = jax.lax.axis_index("sp") * q.shape[1]
        return attention(q, k, v, is_causal=True, query_offset=offset)

    spec = P(None, "sp")
    f = jax.shard_map(shard, mesh=mesh, in_specs=(spec, P(), P()), out_specs=spec)
    assert_same(jax.jit(f)(q, k, v), causal(q, k, v))
    assert_same(jax.jit(gradients(f))(q, k, v, dout), gradients(causal)(q, k, v, dout))


@pytest.mark.parametrize("axis", [1, 3], ids=["sequence", "head dim"])
def test_sequence_and_head_dim_shards_are_gathered(axis):
    mesh = make_mesh(AxisType.Auto)
    q, k, v, dout = inputs(6, 8, 16, 4, 2)
    spec = (*BATCH, *(None,) * (axis - 1), "tp")
    args = put(mesh, *(y for x in (q, k, v, dout) for y in (x, spec)))
    f = gradients(causal)
    assert_same(jax.jit(f)(*args), f(q, k, v, dout))
    assert "all-gather" in collectives(compiled(f, *args))


def test_packed_batch_sharded_without_collectives():
    mesh = make_mesh(AxisType.Auto, tp=1)
    q, k, v, _ = inputs(7, 8, 32, 4, 2)
    ends = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 33, (8, 4)), axis=1))
    f = lambda q, k, v, ends: attention_varlen(q, k, v, cu_seqlens_q=ends)
    sharded = put(mesh, *(y for x in (q, k, v, ends) for y in (x, BATCH)))
    assert collectives(compiled(f, *sharded)) == []
    assert_same(jax.jit(f)(*sharded), f(q, k, v, ends))


def test_vmap_over_a_sharded_axis():
    mesh = make_mesh(AxisType.Auto, tp=1)
    q, k, v, _ = inputs(8, 8, 16, 4, 2)
    f = jax.vmap(causal, spmd_axis_name="dp")
    sharded = put(mesh, *(y for x in (q, k, v) for y in (x, BATCH)))
    assert collectives(compiled(f, *sharded)) == []
    assert_same(jax.jit(f)(*sharded), causal(q, k, v))


def test_pmap():
    q, k, v, dout = inputs(9, 8, 16, 4, 2)
    count = min(4, len(jax.devices()))
    split = lambda x: x.reshape(count, 8 // count, *x.shape[1:])
    f = jax.pmap(gradients(causal), devices=jax.devices()[:count])
    got = [x.reshape(8, *x.shape[2:]) for x in f(*map(split, (q, k, v, dout)))]
    assert_same(got, list(gradients(causal)(q, k, v, dout)))
