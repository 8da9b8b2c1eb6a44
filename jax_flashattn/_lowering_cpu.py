"""The CPU kernels: plain `[B, T, N, H]` arrays, which XLA may split over the batch."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from jax_flashattn import _fp8, _native
from jax_flashattn._calls import Primitive, attributes, forward_avals, num_sequences
from jax_flashattn._sharding import partition_attributes, result_aval
from jax_flashattn._spec import PER_KV_HEAD_AUX, AttentionSpec, Dims, page_axes
from jax_flashattn._targets import BWD_TARGET, FWD_TARGET, PAGED_TARGET

_fwd_p = Primitive("flash_attention_fwd_cpu")
_bwd_p = Primitive("flash_attention_bwd_cpu")
_paged_p = Primitive("paged_attention_cpu")
for _p in (_fwd_p, _bwd_p, _paged_p):
    _p.multiple_results = True

# Axes of the optional arrays; z: sequences of a packed batch, y: their boundaries.
_AUX_AXES = {
    "q_lengths": "b",
    "kv_lengths": "b",
    "q_segment_ids": "bt",
    "kv_segment_ids": "bs",
    "alibi_slopes": "bn",
    "sinks": "bn",
    "cu_seqlens_q": "by",
    "cu_seqlens_kv": "by",
}


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, *aux: jax.Array, spec: AttentionSpec
) -> list[jax.Array]:
    """`fwd_p` by the CPU kernels, which take float8 inputs as float32."""
    if not _fp8.is_fp8(k):
        return _fwd_p.bind(q, k, v, *aux, spec=spec)
    out_dtype = spec.out_dtype or q.dtype
    arrays = dict(zip(spec.aux, aux, strict=True))
    plain = spec.without_aux(*PER_KV_HEAD_AUX)
    q, k, v = _fp8.dequantize(q, k, v, arrays)
    out, lse = _fwd_p.bind(q, k, v, *(arrays[name] for name in plain.aux), spec=plain)
    return [out.astype(out_dtype), lse]


def backward(
    *operands: jax.Array, spec: AttentionSpec, has_dlse: bool, has_dslopes: bool
) -> list[jax.Array]:
    """`bwd_p` by the CPU kernels."""
    dq, dk, dv, *rest = _bwd_p.bind(*operands, spec=spec, has_dlse=has_dlse)
    # The kernels give what each query row adds to its head's slope.
    return [dq, dk, dv, *([jnp.sum(rest[0], axis=-1)] if has_dslopes else [])]


@_fwd_p.def_abstract_eval
def _(q: Any, k: Any, v: Any, *aux: Any, spec: AttentionSpec) -> list[Any]:
    return forward_avals(q, v)


@_bwd_p.def_abstract_eval
def _(q: Any, k: Any, v: Any, *rest: Any, spec: AttentionSpec, has_dlse: bool) -> list[Any]:
    d = Dims.of(q, k, v)
    results = [result_aval(x, x.shape, range(4), x.dtype) for x in (q, k, v)]
    if "alibi_slopes" in spec.aux:
        results.append(result_aval(q, (d.B, d.N, d.T), (0, 2, 1), jnp.float32))
    # The kernels' scratch is one more result, which XLA plans.
    floats = _native.cpu_bwd_scratch_floats(d.T, d.N, d.K, d.H, num_sequences(spec, rest))
    return [*results, result_aval(q, (d.B, floats), (0, None), jnp.float32)]


def _partition(
    ctx: Any, spec: AttentionSpec, operands: Sequence[str], results: Sequence[str]
) -> dict[str, Any]:
    offset_axes = {"query_offset": "bz" if "cu_seqlens_q" in spec.aux else "b"}
    axes = [{**_AUX_AXES, **offset_axes}[name] for name in spec.aux]
    return partition_attributes(ctx, [*operands, *axes], results, 1)


def _lower_fwd(ctx: Any, *operands: Any, spec: AttentionSpec) -> Any:
    partition = _partition(ctx, spec, ["btnh", "bskh", "bskd"], ["btnd", "bnt"])
    lower = jax.ffi.ffi_lowering(FWD_TARGET, extra_attributes=partition)
    return lower(ctx, *operands, **attributes(spec))


def _lower_bwd(ctx: Any, *operands: Any, spec: AttentionSpec, has_dlse: bool) -> Any:
    dlse = ["bnt"] if has_dlse else []
    rows = ["bnt"] if "alibi_slopes" in spec.aux else []
    partition = _partition(
        ctx,
        spec,
        ["btnh", "bskh", "bskd", "btnd", "bnt", "btnd", *dlse],
        ["btnh", "bskh", "bskd", *rows, "bx"],
    )
    lower = jax.ffi.ffi_lowering(BWD_TARGET, extra_attributes=partition)
    return lower(ctx, *operands, **attributes(spec), has_dlse=np.bool_(has_dlse))


# Pages: where they lie, without a copy. Nothing is said about partitioning, because no axis leads
# every operand: XLA gathers what is sharded, and `shard_map` is the way to split.


def paged_forward(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *aux: jax.Array,
    spec: AttentionSpec,
    layout: str,
) -> list[jax.Array]:
    """`paged_p` by the CPU kernels; float8 pages are converted, all of them in each call."""
    if not _fp8.is_fp8(k_pages):
        return _paged_p.bind(q, k_pages, v_pages, *aux, spec=spec, layout=layout)
    arrays = dict(zip(spec.aux, aux, strict=True))
    plain = spec.without_aux(*PER_KV_HEAD_AUX)
    group = q.shape[2] // k_pages.shape[page_axes(layout)[1]]

    def scaled(x: jax.Array, name: str) -> jax.Array:
        # Pages belong to no sequence, so their scales go to the queries and the output.
        x = x.astype(jnp.float32)
        if name not in arrays:
            return x
        return x * jnp.repeat(arrays[name], group, axis=1)[:, None, :, None]

    out, lse = _paged_p.bind(
        scaled(q, "qk_scale"),
        k_pages.astype(jnp.float32),
        v_pages.astype(jnp.float32),
        *(arrays[name] for name in plain.aux),
        spec=plain,
        layout=layout,
    )
    return [scaled(out, "v_scale").astype(q.dtype), lse]


@_paged_p.def_abstract_eval
def _(q: Any, k_pages: Any, v_pages: Any, *aux: Any, spec: AttentionSpec, layout: str) -> list[Any]:
    return forward_avals(q, v_pages)


def _lower_paged(ctx: Any, *operands: Any, spec: AttentionSpec, layout: str) -> Any:
    lower = jax.ffi.ffi_lowering(PAGED_TARGET)
    return lower(ctx, *operands, **attributes(spec), heads_first=np.bool_(layout == "HND"))


mlir.register_lowering(_paged_p, _lower_paged, platform="cpu")
mlir.register_lowering(_fwd_p, _lower_fwd, platform="cpu")
mlir.register_lowering(_bwd_p, _lower_bwd, platform="cpu")
