"""Explicit sharding mode: types say how arrays lie, calls keep to it, and cost what they must."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import oracle_fp8
from jax_flashattn import attention, attention_varlen
from shards import assert_same, collectives, compiled, gradients, inputs, make_mesh, put

pytestmark = pytest.mark.multi_gpu
HEADS = ("dp", None, "tp")
BATCH = ("dp",)


@pytest.fixture(params=[2, 4], ids=["tp2", "tp4"])
def mesh(request):
    mesh = make_mesh(AxisType.Explicit, request.param)
    with jax.set_mesh(mesh):
        yield mesh


def causal(q, k, v):
    return attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    ("N", "K", "q_spec", "kv_spec", "communication"),
    [
        (8, 4, BATCH, BATCH, set()),
        (8, 4, HEADS, HEADS, set()),
        (8, 4, (("dp", "tp"),), (("dp", "tp"),), set()),
        (8, 4, (None, None, "tp"), (None, None, "tp"), set()),
        # Key heads for all: each device takes its own, and gradients are gathered.
        (8, 4, HEADS, BATCH, {"all-gather"}),
        # Fewer key heads than devices, or heads that don't divide evenly: one sum.
        (8, 1, HEADS, BATCH, {"all-reduce"}),
        (8, 1, (None, None, "tp"), (), {"all-reduce"}),
        (12, 3, HEADS, BATCH, {"all-reduce"}),
        # Keys that aren't split over the batch: their gradients are gathered.
        (8, 4, HEADS, (None, None, "tp"), {"all-gather"}),
    ],
    ids=str,
)
def test_types_values_and_communication(N, K, q_spec, kv_spec, communication, mesh):
    q, k, v, dout = inputs(0, 8, 16, N, K)
    sharded = put(mesh, q, q_spec, k, kv_spec, v, kv_spec, dout, q_spec)
    out, grads = jax.jit(causal)(*sharded[:3]), jax.jit(gradients(causal))(*sharded)
    assert_same((out, grads), (causal(q, k, v), gradients(causal)(q, k, v, dout)))
    for x, like in zip((out, *grads), (sharded[0], *sharded[:3]), strict=True):
        assert jax.typeof(x).sharding.spec == jax.typeof(like).sharding.spec
    assert collectives(compiled(causal, *sharded[:3])) == []
    found = collectives(compiled(gradients(causal), *sharded))
    assert set(found) <= communication
    if mesh.devices.size == 8:
        assert set(found) == communication
    assert found.count("all-reduce") <= 1


def test_key_heads_sharded_over_a_part_of_the_queries_axes():
    """Two key heads, each shared by four devices."""
    mesh = jax.make_mesh(
        (2, len(jax.devices()) // 2), ("of_k", "further"), axis_types=(AxisType.Explicit,) * 2
    )
    q, k, v, dout = inputs(1, 2, 16, 8, 2)
    with jax.set_mesh(mesh):
        q_spec, kv_spec = (None, None, ("of_k", "further")), (None, None, "of_k")
        sharded = put(mesh, q, q_spec, k, kv_spec, v, kv_spec, dout, q_spec)
        f = gradients(causal)
        assert_same(jax.jit(f)(*sharded), f(q, k, v, dout))
        assert collectives(compiled(causal, *sharded[:3])) == []
        assert collectives(compiled(f, *sharded)) == ["all-reduce"] * (mesh.shape["further"] > 1)


def test_every_optional_array(mesh):
    q, k, v, dout = inputs(2, 8, 16, 8, 1)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 16)))
    sinks, slopes = jnp.linspace(-1, 1, 8), jnp.linspace(0, 0.2, 8)

    def f(q, k, v, sinks, slopes, ids, lengths):
        out, lse = attention(
            q,
            k,
            v,
            is_causal=True,
            query_offset=jnp.arange(8),
            segment_ids=ids,
            key_value_seq_lengths=lengths,
            sinks=sinks,
            alibi_slopes=slopes,
            return_lse=True,
        )
        return jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32)) + jnp.sum(lse)

    f = jax.value_and_grad(f, (0, 1, 2, 3, 4))
    lengths = jnp.arange(4, 12)
    expected = f(q, k, v, sinks, slopes, ids, lengths)
    (dout,) = put(mesh, dout, HEADS)
    given = put(mesh, q, HEADS, k, BATCH, v, BATCH)
    for of_batch in ((), BATCH):
        arrays = put(mesh, ids, of_batch, lengths, of_batch)
        assert_same(jax.jit(f)(*given, sinks, slopes, *arrays), expected)


@pytest.mark.parametrize(("N", "K", "kv_spec"), [(8, 4, HEADS), (8, 4, BATCH), (12, 3, BATCH)])
def test_float8(N, K, kv_spec, mesh):
    """Scales follow their key heads, and k and v keep dtypes of their own."""
    dtypes = (jnp.float8_e4m3fn, jnp.float8_e4m3fn, jnp.float8_e5m2)
    q, k, v = oracle_fp8.make_inputs(4, 8, 16, 16, N, K, 16, 16, dtypes=dtypes)
    scales = jnp.linspace(0.5, 2, 8 * K).reshape(8, K)
    f = lambda q, k, v, s: attention(q, k, v, k_scale=s, v_scale=s)
    expected = f(q, k, v, scales)
    given = put(mesh, q, HEADS, k, kv_spec, v, kv_spec, scales, kv_spec[::2])
    assert_same(jax.jit(f)(*given), expected)


def test_packed(mesh):
    q, k, v, dout = inputs(3, 8, 32, 8, 1)
    ends = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 33, (8, 4)), axis=1))
    f = gradients(lambda *x: attention_varlen(*x, cu_seqlens_q=ends, query_offset="end"))
    sharded = put(mesh, q, HEADS, k, BATCH, v, BATCH, dout, HEADS)
    assert_same(jax.jit(f)(*sharded), f(q, k, v, dout))


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap(axis, mesh):
    """A mapped axis and the batch become one, of which the sharded one leads."""
    q, k, v, dout = inputs(4, 8, 16, 8, 1)
    stack = lambda x: jnp.stack([x, 2 * x], axis)
    mapped = lambda spec: (*spec[:axis], None, *spec[axis:])
    sharded = put(
        mesh,
        *(stack(q), mapped(HEADS), stack(k), mapped(BATCH)),
        *(stack(v), mapped(BATCH), stack(dout), mapped(HEADS)),
    )
    f = jax.vmap(gradients(causal), axis)
    assert_same(jax.jit(f)(*sharded), f(*(stack(x) for x in (q, k, v, dout))))


def test_vmap_of_a_sharded_axis(mesh):
    q, k, v, _ = inputs(5, 8, 16, 8, 1)
    sharded = put(mesh, q, BATCH, k, BATCH, v, BATCH)
    f = jax.vmap(causal)
    assert_same(jax.jit(f)(*sharded), f(q, k, v))
    assert collectives(compiled(f, *sharded)) == []
    of_queries = jax.vmap(causal, (0, None, None))
    assert_same(jax.jit(of_queries)(sharded[0], k[0], v[0]), of_queries(q, k[0], v[0]))


def test_batch_by_hand(mesh):
    """`shard_map` over one axis, explicit types over the other."""
    q, k, v, dout = inputs(6, 8, 16, 8, 1)
    over_batch = dict(in_specs=P("dp"), out_specs=P("dp"), axis_names={"dp"})
    by_hand = jax.shard_map(causal, **over_batch)
    sharded = put(mesh, q, HEADS, k, BATCH, v, BATCH, dout, HEADS)
    assert_same(jax.jit(gradients(by_hand))(*sharded), gradients(causal)(q, k, v, dout))
    found = collectives(compiled(gradients(by_hand), *sharded))
    # JAX 0.10 gathers whatever enters or leaves such a `shard_map`.
    if collectives(compiled(jax.shard_map(lambda x: 2 * x, **over_batch), sharded[0])):
        found = [name for name in found if name != "all-gather"]
    assert found == ["all-reduce"]


def test_beside_an_automatic_axis():
    shape = make_mesh(AxisType.Explicit).devices.shape
    mesh = jax.make_mesh(shape, ("dp", "tp"), axis_types=(AxisType.Auto, AxisType.Explicit))
    # bfloat16: XLA's CPU compiler is touchy about sums of it here.
    q, k, v, dout = (x.astype(jnp.bfloat16) for x in inputs(7, 8, 16, 8, 1))
    with jax.set_mesh(mesh):
        sharded = put(mesh, q, HEADS, k, BATCH, v, BATCH, dout, HEADS)
        assert_same(jax.jit(gradients(causal))(*sharded), gradients(causal)(q, k, v, dout))
        assert collectives(compiled(gradients(causal), *sharded)) == ["all-reduce"]


@pytest.mark.parametrize(("saved", "num_forward"), [(False, 2), (True, 1)])
def test_checkpoint(saved, num_forward, mesh):
    names = ("flash_attention_out", "flash_attention_lse") if saved else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    q, k, v, dout = put(
        mesh,
        *(
            y
            for x, s in zip(inputs(8, 8, 16, 8, 1), (HEADS, BATCH, BATCH, HEADS), strict=True)
            for y in (x, s)
        ),
    )

    def loss(x):
        layer = jax.checkpoint(lambda x, _: (x + causal(x, k, v), None), policy=policy)
        return jnp.sum(jax.lax.scan(layer, x, length=3)[0] * dout)

    # XLA for GPUs may run a call once more for what is stored (docs/sharding.md).
    again = re.compile(r"\n%dynamic-slice-fusion.*?\n}", re.DOTALL)
    text = again.sub("", compiled(jax.grad(loss), q))
    # So few queries are decoded on a GPU.
    forward = r'custom_call_target="jfa_(fwd_v4|serve_v2)"'
    assert len(re.findall(forward, text)) == num_forward


@pytest.mark.parametrize(
    ("q_spec", "k_spec", "v_spec", "message"),
    [
        (("dp", "tp"), BATCH, BATCH, r"q .* over the sequence,.*P\('dp', 'tp', .*query_offset"),
        (BATCH, ("dp", "tp"), BATCH, r"k .* over the sequence,.*jax.reshard"),
        (BATCH, BATCH, ("dp", "tp"), r"v .* over the sequence"),
        (("dp", None, None, "tp"), BATCH, BATCH, r"q .* over the head dim,.*jax.reshard"),
        (BATCH, BATCH, ("dp", None, None, "tp"), r"v .* over the head dim"),
        (HEADS, ("tp",), BATCH, r"k .* over the batch as q is, \('dp',\), .* got \('tp',\)"),
        (BATCH, HEADS, HEADS, r"k and v .* over the heads as q is, \(\), .* got \('tp',\)"),
        (HEADS, HEADS, BATCH, r"k and v .* got \('tp',\) for k and \(\) for v"),
    ],
    ids=str,
)
def test_refused(q_spec, k_spec, v_spec, message):
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        q, k, v, _ = inputs(9, 8, 16, 8, 8)
        sharded = put(mesh, q, q_spec, k, k_spec, v, v_spec)
        with pytest.raises(TypeError, match=message):
            jax.eval_shape(attention, *sharded)
        with pytest.raises(TypeError, match=message):
            attention(*sharded)
