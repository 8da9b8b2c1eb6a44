"""What XLA makes of our calls on GPUs: communication, copies, CUDA graphs.

Compiled for an H100 by XLA's own GPU compiler, on any machine; nothing runs. Needs
jax-cuda13-plugin of jaxlib's version, which `.ci/run` installs.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashattn import attention, paged_attention
from shards import collectives, compiled, gradients
from test_fp8_cache import make_cache

pytest.importorskip("jax_cuda13_plugin", reason="needs jax-cuda13-plugin of jaxlib's version")

# What XLA asks to know of a device that isn't there: an H100's data sheet.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 85899345920
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "H100"
"""
HEADS = ("dp", None, "tp")
BATCH = ("dp",)
# Neither moves nor computes.
FREE = {"parameter", "bitcast", "custom-call", "get-tuple-element", "tuple"}


def causal(q, k, v):
    return attention(q, k, v, is_causal=True)


def repeated(q, k, v):
    return causal(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))


@pytest.fixture(scope="module", autouse=True)
def compile_for_h100(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JFA_CUDA_ARCH", "90")
        patch.setenv("JFA_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="module")
def devices():
    jax.devices()  # finds the plugin
    return topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x4").devices


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def mesh(request, devices):
    mesh = Mesh(np.array(devices).reshape(2, 2), ("dp", "tp"), axis_types=(request.param,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def shapes(mesh, K, q_spec, kv_spec):
    """q, k, v and the output's cotangent."""
    like = lambda heads, spec: jax.ShapeDtypeStruct(
        (4, 256, heads, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec))
    )
    q, k = like(8, q_spec), like(K, kv_spec)
    return q, k, k, q


def instructions(text):
    return set(re.findall(r"^\s+(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([a-z-]+)\(", text, re.MULTILINE))


@pytest.mark.parametrize(
    "spec", [BATCH, HEADS, (("dp", "tp"),), (None, None, ("dp", "tp"))], ids=str
)
def test_batch_and_heads_cost_nothing(spec, mesh):
    args = shapes(mesh, 4, spec, spec)
    for text in (compiled(causal, *args[:3]), compiled(gradients(causal), *args)):
        assert "jfa_fwd_v4" in text
        assert instructions(text) <= FREE


def test_replicated_keys_with_a_head_for_each_device(mesh):
    """Each device takes its slice; where types say that gradients are replicated, they are."""
    args = shapes(mesh, 4, HEADS, BATCH)
    assert collectives(compiled(causal, *args[:3])) == []
    explicit = mesh.axis_types[0] == AxisType.Explicit
    found = collectives(compiled(gradients(causal), *args))
    assert found == (["all-gather"] if explicit else [])


def test_fewer_key_heads_than_devices(mesh):
    """Multi-query: free in explicit mode but for the sum of gradients, gathered in automatic."""
    args = shapes(mesh, 1, HEADS, BATCH)
    forward = compiled(causal, *args[:3])
    backward = compiled(gradients(causal), *args)
    if mesh.axis_types[0] == AxisType.Explicit:
        assert instructions(forward) <= FREE
        assert collectives(backward) == ["all-reduce"]
    else:
        assert set(collectives(forward)) == set(collectives(backward)) == {"all-gather"}


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_float8_pool_is_not_copied(layout, devices):
    """It is written in place as bytes, and read where it lies."""
    cache = jax.eval_shape(lambda: make_cache(layout, k_scale=0.5))
    one = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), P())
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
    q, k = (jax.ShapeDtypeStruct((3, 1, heads, 16), jnp.bfloat16, sharding=one) for heads in (4, 2))

    def step(cache, q, k):
        cache = cache.append(k, k)
        return cache, paged_attention(q, cache)

    text = (
        jax.jit(step, donate_argnums=0).lower(jax.tree.map(like, cache), q, k).compile().as_text()
    )
    alias = re.search(r"input_output_alias=\{(.*?) \},", text).group(1)
    assert "{0}: (0" in alias and "{1}: (1" in alias
    [program] = re.findall(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL)
    shape = ",".join(map(str, cache.k_pages.shape))
    made = re.findall(rf"%(\S+) = (?:u8|f8e4m3fn)\[{shape}\]\S* ([a-z-]+)\(", program)
    assert {operation for _, operation in made} <= {"parameter", "bitcast", "fusion"}
    fusions = [name for name, operation in made if operation == "fusion"]
    assert len(fusions) == 2 and all("scatter" in name for name in fusions)


@pytest.mark.parametrize("mesh", [AxisType.Auto], indirect=True, ids=["Auto"])
def test_repeated_keys(mesh):
    """The way out in automatic mode costs what explicit mode does: the repeat itself is free."""
    args = shapes(mesh, 1, HEADS, BATCH)
    assert instructions(compiled(repeated, *args[:3])) <= FREE
    assert collectives(compiled(gradients(repeated), *args)) == ["all-reduce"]


@pytest.mark.parametrize("mesh", [AxisType.Auto], indirect=True, ids=["Auto"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, mesh):
    in_specs = (P(*HEADS), P(*BATCH), P(*BATCH))
    f = jax.shard_map(causal, in_specs=in_specs, out_specs=P(*HEADS), check_vma=check_vma)
    args = shapes(mesh, 1, HEADS, BATCH)
    assert instructions(compiled(f, *args[:3])) <= FREE
    assert collectives(compiled(gradients(f), *args)) == ["all-reduce"]


@pytest.mark.parametrize("mesh", [AxisType.Auto], indirect=True, ids=["Auto"])
@pytest.mark.parametrize("spec", [("dp", "tp"), ("dp", None, None, "tp")], ids=str)
def test_sequence_and_head_dim_are_gathered(spec, mesh):
    for q_spec, kv_spec in ((spec, BATCH), (BATCH, spec)):
        args = shapes(mesh, 4, q_spec, kv_spec)
        assert "all-gather" in collectives(compiled(causal, *args[:3]))
        assert "all-gather" in collectives(compiled(gradients(causal), *args))


@pytest.mark.parametrize(("saved", "num_forward"), [(False, 2), (True, 1)])
def test_checkpoint_policies(saved, num_forward, mesh):
    names = ("flash_attention_out", "flash_attention_lse") if saved else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(x, k, v, weight):
        layer = jax.checkpoint(lambda x, _: (x + causal(x, k, v), None), policy=policy)
        return jnp.sum(jax.lax.scan(layer, x, length=3)[0] * weight)

    text = compiled(jax.grad(loss, (0, 1, 2)), *shapes(mesh, 4, HEADS, HEADS))
    assert len(re.findall(r'custom_call_target="jfa_fwd_v4"', text)) == num_forward
    assert len(re.findall(r'custom_call_target="jfa_bwd_v3"', text)) == 1


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="plans CUDA graphs only when a program is loaded"
)
def test_calls_go_into_cuda_graphs(devices, tmp_path):
    one = Mesh(np.array(devices[:1]).reshape(1, 1), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)

    def f(q, k, v, dout):
        for _ in range(3):
            q, _, _ = gradients(causal)(q, k, v, dout)
        return q

    lowered = jax.jit(f).lower(*shapes(one, 4, (), ()))
    lowered.compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True})
    [plan] = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    lines = plan.read_text().split("\n")
    assert re.match(r"\d+: kCommandBuffer", lines[0])
    inside = [line for line in lines if re.match(r"\s+\d+: kCustomCall", line)]
    assert len(inside) == 6
    assert not [line for line in lines if re.match(r"\d+: kCustomCall", line)]


def test_jfa_cuda_arch_is_a_number(devices, monkeypatch):
    monkeypatch.setenv("JFA_CUDA_ARCH", "sm_90")
    one = Mesh(np.array(devices[:1]).reshape(1, 1), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=r"JFA_CUDA_ARCH must be a number .* got 'sm_90'"):
        jax.jit(partial(attention, scale=0.5)).lower(*shapes(one, 4, (), ())[:3])
