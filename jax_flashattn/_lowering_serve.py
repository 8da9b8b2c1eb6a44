"""Serving on CUDA: few queries over many keys (split-KV decoding), and keys that lie in pages.

Dense operands are laid out as in `_lowering_cuda`. Pages belong to no sequence, so a paged call can
be split over its key heads alone: there `K` comes before `B` in every operand, `q [K, B, G, T, H]`
and `k [K, pages, page size, H]`. Layouts keep all memory as the caller has it.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from jax_flashattn import _fp8, _lowering_cuda, _native
from jax_flashattn._calls import Primitive, attributes
from jax_flashattn._sharding import partition_attributes, result_aval
from jax_flashattn._spec import PER_HEAD_AUX, PER_KV_HEAD_AUX, AttentionSpec, page_axes
from jax_flashattn._targets import SERVE_TARGET

# Up to here the rows of one key head, or the tokens, are few: reading keys is what costs.
_FEW_ROWS = 128
_FEW_TOKENS = 16

_serve_p = Primitive("flash_attention_serve_cuda")
_serve_p.multiple_results = True


def decodes(q: Any, v: Any, num_kv_heads: int, spec: AttentionSpec) -> bool:
    """Whether the split-KV kernel takes the call; its queries are never float8."""
    if _fp8.is_fp8(q):
        return False
    T, N, H = q.shape[-3:]
    aligned = H % 8 == 0 and v.shape[-1] % 8 == 0
    if not aligned or "q_segment_ids" in spec.aux or "cu_seqlens_q" in spec.aux:
        return False
    return T <= _FEW_TOKENS or T * (N // num_kv_heads) <= _FEW_ROWS


def num_shards(ctx: Any) -> int:
    """Into how many parts XLA may cut the operands that it sees."""
    context = ctx.module_context.axis_context
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        return getattr(context, "num_devices", None) or 1
    manual = getattr(context, "manual_axes", frozenset())
    return math.prod(size for name, size in mesh.shape.items() if name not in manual)


def _scratch(
    batch: int, num_kv_heads: int, group: int, q_len: int, kv_len: int, dim: int, shards: int
) -> int:
    """Floats per (batch, key head), such that a shard has enough for all its CTAs."""
    cells = batch * num_kv_heads
    if not isinstance(cells, int):  # exported with a symbolic batch: not to be split, and not small
        cells = 1
    local = max(1, cells // shards)
    floats = _native.cuda_decode_scratch_floats(1, local, group, q_len, kv_len, dim)
    return -(-floats // local)


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *aux: jax.Array,
    spec: AttentionSpec,
    shards: int,
) -> tuple[jax.Array, jax.Array]:
    """`fwd_p` where `decodes` says so; XLA may cut the operands into so many `shards`."""
    _lowering_cuda.check_supported(q, v)
    (B, T, N, _), K = q.shape, k.shape[2]
    rows = T * (N // K)
    _lowering_cuda.require_cached(_lowering_cuda.variant(spec, "decode", q, k, v, rows=rows))
    out, lse, _ = _serve_p.bind(
        _lowering_cuda.split_heads(q, K),
        _lowering_cuda.keys_first(k),
        _lowering_cuda.keys_first(v),
        *_lowering_cuda.aux_operands(spec, aux, K),
        spec=spec,
        rows=rows,
        layout=None,
        scratch=_scratch(B, K, N // K, T, k.shape[1], v.shape[-1], shards),
    )
    return _lowering_cuda.merge_heads(out), lse.reshape(B, N, T)


def paged(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *aux: jax.Array,
    spec: AttentionSpec,
    layout: str,
    shards: int,
) -> tuple[jax.Array, jax.Array]:
    """`paged_p`: decoding, or the forward kernel for long chunks and packed batches."""
    _lowering_cuda.check_supported(q, v)
    B, T, N, H = q.shape
    token_axis, heads_axis = page_axes(layout)
    K, page_size = k.shape[heads_axis], k.shape[token_axis]
    G = N // K
    rows = T * G if decodes(q, v, K, spec) else 0
    op = "decode" if rows else "fwd"
    heads_first = bool(rows) and layout == "HND"
    _lowering_cuda.require_cached(
        _lowering_cuda.variant(spec, op, q, k, v, rows=rows, heads_first=heads_first)
    )
    kv_len = aux[spec.aux.index("page_table")].shape[-1] * page_size
    out, lse, _ = _serve_p.bind(
        q.reshape(B, T, K, G, H).transpose(2, 0, 3, 1, 4),
        jnp.moveaxis(k, heads_axis, 0),
        jnp.moveaxis(v, heads_axis, 0),
        *_paged_aux(spec, aux, K, 1 if shards == 1 else K),
        spec=spec,
        rows=rows,
        layout=layout,
        scratch=_scratch(B, K, G, T, kv_len, v.shape[-1], shards) if rows else 1,
    )
    out = out.transpose(1, 3, 0, 2, 4).reshape(B, T, N, v.shape[-1])
    return out, lse.swapaxes(0, 1).reshape(B, N, T)


def _paged_aux(
    spec: AttentionSpec, aux: Sequence[jax.Array], K: int, table_heads: int
) -> list[jax.Array]:
    """The optional arrays with the axes K and B in front; the large one only as often as needed."""
    operands = []
    for name, x in zip(spec.aux, aux, strict=True):
        if name in PER_HEAD_AUX:
            operands.append(x.reshape(x.shape[0], K, -1).swapaxes(0, 1))
        elif name in PER_KV_HEAD_AUX:
            operands.append(x.swapaxes(0, 1))
        else:
            heads = table_heads if name == "page_table" else K
            operands.append(jnp.broadcast_to(x, (heads, *x.shape)))
    return operands


@_serve_p.def_abstract_eval
def _(
    q: Any,
    k: Any,
    v: Any,
    *aux: Any,
    spec: AttentionSpec,
    rows: int,
    layout: str | None,
    scratch: int,
) -> list[Any]:
    *leading, T, _ = q.shape
    return [
        result_aval(q, (*leading, T, v.shape[-1]), (0, 1, 2, 3, None), q.dtype),
        result_aval(q, (*leading, T), (0, 1, 2, 3), jnp.float32),
        result_aval(q, (*leading[:2], scratch), (0, 1, None), jnp.float32),
    ]


# The custom call. One letter per axis: p pages, s keys or tokens of a page, n sequences, y their
# boundaries, m entries of a row of the page table, o an axis of one.

# Memory of the pages, the slowest axis first.
_PAGE_MEMORY = {"NHD": "psk", "HND": "pks"}
_AUX_AXES = {
    "query_offset": "",
    "q_lengths": "",
    "kv_lengths": "",
    "alibi_slopes": "g",
    "sinks": "g",
    "cu_seqlens_q": "y",
    "page_table": "m",
    "qk_scale": "",
    "v_scale": "",
}


def _aux_axes(name: str, spec: AttentionSpec, table_heads: str) -> tuple[str, str]:
    """Axes of an optional array of a paged call, and how they lie in memory."""
    per_sequence = "n" if "cu_seqlens_q" in spec.aux else ""
    rest = _AUX_AXES[name]
    if name in ("query_offset", "kv_lengths", "page_table"):
        rest = per_sequence + rest
    if name == "page_table":
        return f"{table_heads}b{rest}", f"{table_heads}b{rest}"
    return f"kb{rest}", f"bk{rest}"


def _layout(axes: str, memory: str) -> tuple[int, ...]:
    """Minor to major, as XLA has it."""
    return tuple(axes.index(x) for x in reversed(memory))


def _lower_serve(
    ctx: Any,
    *operands: Any,
    spec: AttentionSpec,
    rows: int,
    layout: str | None,
    scratch: int,
) -> Any:
    split = True
    if layout is None:
        inputs = [("bkgth", "btkgh"), ("bksh", "bskh"), ("bksd", "bskd")]
        for name in spec.aux:
            axes = "bk" + _AUX_AXES[name]
            inputs.append((axes, axes))
        results = [("bkgtd", "btkgd"), ("bkgt", "bkgt"), ("bkx", "bkx")]
    else:
        memory = _PAGE_MEMORY[layout]
        table_axis = ctx.avals_in[3 + spec.aux.index("page_table")].shape[0]
        split = table_axis == ctx.avals_in[0].shape[0]
        heads = "k" if split else "o"
        inputs = [("kbgth", "btkgh"), ("kpsh", memory + "h"), ("kpsd", memory + "d")]
        inputs += [_aux_axes(name, spec, heads) for name in spec.aux]
        results = [("kbgtd", "btkgd"), ("kbgt", "bkgt"), ("kbx", "bkx")]
    partition = {}
    if split:
        axes = [x for x, _ in inputs], [x for x, _ in results]
        partition = partition_attributes(ctx, *axes, 2 if layout is None else 1)
    q, k, v = ctx.avals_in[:3]
    lower = jax.ffi.ffi_lowering(
        SERVE_TARGET,
        operand_layouts=[_layout(*x) for x in inputs],
        result_layouts=[_layout(*x) for x in results],
        extra_attributes=partition,
    )
    return lower(
        ctx,
        *operands,
        **attributes(spec),
        **_lowering_cuda.code_attributes(spec, q, v),
        fp8=_lowering_cuda.fp8_attribute(spec, q, k, v),
        rows=np.int64(rows),
        heads_first=np.bool_(layout == "HND"),
        sm_margin=np.int64(spec.sm_margin),
    )


mlir.register_lowering(_serve_p, _lower_serve, platform="cuda")
