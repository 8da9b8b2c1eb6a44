"""The CUDA kernels: logical `q [B, K, G, T, H]` and `k [B, K, S, H]`.

Their layouts equal `[B, T, N, H]` memory, so that batch and key heads lead every operand and may be
split alike, at the cost of bitcasts.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from jax_flashattn import _fp8, _native
from jax_flashattn._calls import Primitive, attributes, num_sequences
from jax_flashattn._sharding import partition_attributes, result_aval
from jax_flashattn._spec import (
    PER_HEAD_AUX,
    PER_KV_HEAD_AUX,
    SCHEDULES,
    AttentionSpec,
    KernelNotCachedError,
    UnsupportedError,
)
from jax_flashattn._targets import BWD_TARGET, FWD_TARGET

MAX_HEAD_DIM = 256
SEGMENT_BLOCK = 32  # tokens whose lowest and highest id are told to the kernels; theirs too
_Q_LAYOUT = (4, 2, 1, 3, 0)  # minor to major: memory is B, T, K, G, H
_K_LAYOUT = (3, 1, 2, 0)  # B, S, K, H

_fwd_p = Primitive("flash_attention_fwd_cuda")
_bwd_p = Primitive("flash_attention_bwd_cuda")
for _p in (_fwd_p, _bwd_p):
    _p.multiple_results = True


def variant(
    spec: AttentionSpec,
    op: str,
    q: Any,
    k: Any,
    v: Any,
    *,
    has_dslopes: bool = False,
    rows: int = 0,
    heads_first: bool = False,
) -> dict[str, Any]:
    """What of a call changes code, as `_native` takes it; of arrays only dtype and shape count.

    `rows` are the queries of one key head, for op 'decode'; `heads_first` says of its pages that
    heads come before tokens.
    """
    features = {
        "softcap": spec.soft_cap is not None,
        "alibi": "alibi_slopes" in spec.aux,
        "segments": "q_segment_ids" in spec.aux,
        "packed": "cu_seqlens_q" in spec.aux,
        "deterministic": op == "bwd" and spec.deterministic,
        "dslopes": has_dslopes,
        "paged": op == "fwd" and "page_table" in spec.aux,
        "fp8": _fp8.is_fp8(q),
        "fp8_kv": _fp8.is_fp8(k) and not _fp8.is_fp8(q),
        "e5m2_q": q.dtype == jnp.float8_e5m2,
        "e5m2_k": k.dtype == jnp.float8_e5m2,
        "e5m2_v": v.dtype == jnp.float8_e5m2,
        "two_level": spec.two_level,
        "grid": op == "fwd" and spec.schedule == "grid",
        "persistent": op == "fwd" and spec.schedule == "persistent",
        "heads_first": heads_first and _fp8.is_fp8(k),
    }
    dense = op == "fwd" and "page_table" not in spec.aux
    return {
        "op": op,
        "dtype": spec.out_dtype or str(q.dtype),
        "head_dim": q.shape[-1],
        "head_dim_v": v.shape[-1],
        "mask": spec.mask_kind,
        "features": [name for name, given in features.items() if given],
        "rows": rows,
        "kv_len": _known(k.shape[-3]) if dense else 0,
    }


def _known(length: Any) -> int:
    """A length that tiles may be chosen by; 0 if it is a symbol."""
    return length if isinstance(length, int) else 0


def device_archs() -> list[int]:
    """Architectures of the GPUs here, such as 80 or 90; RuntimeError without a driver."""
    names = [device["arch"] for device in _native.cuda_devices()["devices"]]
    return list(dict.fromkeys(int(name.removeprefix("sm_").rstrip("af")) for name in names))


def _local_archs() -> list[int]:
    """The same; none on a machine that compiles for another."""
    try:
        return device_archs()
    except RuntimeError:
        return []


def _arch_to_compile_for() -> int:
    """Of `JFA_CUDA_ARCH`, for compiling ahead of time; else 0, the device at hand."""
    text = os.environ.get("JFA_CUDA_ARCH", "")
    if not re.fullmatch(r"\d*", text):
        raise ValueError(f"JFA_CUDA_ARCH must be a number such as 80 or 90, got {text!r}")
    return int(text or 0)


def require_cached(variant: dict[str, Any]) -> None:
    """With `JFA_DISABLE_JIT=1`, raises KernelNotCachedError where a GPU of this machine would.

    XLA compiles later and elsewhere, and its errors have no type.
    """
    if os.environ.get("JFA_DISABLE_JIT", "0") in ("", "0"):
        return
    for arch in _local_archs():
        try:
            _native.cuda_warm(**variant, arch=arch)
        except RuntimeError as error:
            if "KernelNotCachedError" not in str(error):
                raise
            raise KernelNotCachedError(str(error).removeprefix("KernelNotCachedError: ")) from None


def _require_architecture(variant: dict[str, Any]) -> None:
    """Raises UnsupportedError if no GPU that we compile for runs it: XLA would say it later."""
    arch = _arch_to_compile_for()
    archs = [arch] if arch else _local_archs()
    errors = [_native.cuda_explain(**variant, arch=arch)["error"] for arch in archs]
    if errors and all(errors):
        raise UnsupportedError(errors[0])


def check_supported(q: Any, v: Any) -> None:
    """Raises UnsupportedError for dtypes and head dims that the kernels don't take."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) and not _fp8.is_fp8(q):
        raise UnsupportedError(
            f"the CUDA kernels take float16, bfloat16 and (on Hopper) float8, got {q.dtype}; "
            "implementation='xla' is dense and takes it"
        )
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"the CUDA kernels take head dims up to {MAX_HEAD_DIM}, got {q.shape[-1]} for q and k, "
            f"{v.shape[-1]} for v; implementation='xla' is dense and takes any"
        )


# From [B, T, N, H] to the custom call's shapes and back.


def split_heads(x: jax.Array, num_kv_heads: int) -> jax.Array:
    B, T, N, H = x.shape
    return x.reshape(B, T, num_kv_heads, N // num_kv_heads, H).transpose(0, 2, 3, 1, 4)


def merge_heads(x: jax.Array) -> jax.Array:
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def keys_first(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 1, 3)


def _segment_ranges(ids: jax.Array) -> jax.Array:
    """Lowest and highest id of each block of tokens: `[B, blocks, 2]` from `[B, length]`."""
    B, length = ids.shape
    pad = -length % SEGMENT_BLOCK
    # The last id again changes no range.
    ids = jnp.pad(ids, ((0, 0), (0, pad)), mode="edge").reshape(B, -1, SEGMENT_BLOCK)
    return jnp.stack([ids.min(axis=-1), ids.max(axis=-1)], axis=-1)


def aux_operands(
    spec: AttentionSpec, aux: Sequence[jax.Array], num_kv_heads: int
) -> list[jax.Array]:
    """The optional arrays with the axes B and K in front; ranges of segment ids after the ids."""
    operands = []
    for name, x in zip(spec.aux, aux, strict=True):
        B = x.shape[0]
        if name in PER_HEAD_AUX:
            operands.append(x.reshape(B, num_kv_heads, -1))
            continue
        if name in PER_KV_HEAD_AUX:
            operands.append(x)
            continue
        per_kv_head = [x, _segment_ranges(x)] if "segment_ids" in name else [x]
        operands += [
            jnp.broadcast_to(y[:, None], (B, num_kv_heads, *y.shape[1:])) for y in per_kv_head
        ]
    return operands


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, *aux: jax.Array, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    """`fwd_p` by the CUDA kernels."""
    check_supported(q, v)
    wanted = variant(spec, "fwd", q, k, v)
    if _fp8.is_fp8(q) or spec.schedule == "persistent":
        _require_architecture(wanted)
    require_cached(wanted)
    B, T, N, _ = q.shape
    K = k.shape[2]
    operands = split_heads(q, K), keys_first(k), keys_first(v), *aux_operands(spec, aux, K)
    out, lse, _ = _fwd_p.bind(*operands, spec=spec)
    return merge_heads(out), lse.reshape(B, N, T)


def backward(
    *operands: jax.Array, spec: AttentionSpec, has_dlse: bool, has_dslopes: bool
) -> list[jax.Array]:
    """`bwd_p` by the CUDA kernels."""
    q, k, v, out, lse, dout, *rest = operands
    check_supported(q, v)
    require_cached(variant(spec, "bwd", q, k, v, has_dslopes=has_dslopes))
    B, T, N, _ = q.shape
    K = k.shape[2]
    rows = lambda x: x.reshape(B, K, N // K, T)  # noqa: E731 (two uses, one line)
    dlse, aux = rest[:has_dlse], rest[has_dlse:]
    dq, dk, dv, *more, _ = _bwd_p.bind(
        split_heads(q, K),
        keys_first(k),
        keys_first(v),
        split_heads(out, K),
        rows(lse),
        split_heads(dout, K),
        *(rows(x) for x in dlse),
        *aux_operands(spec, aux, K),
        spec=spec,
        has_dlse=has_dlse,
        has_dslopes=has_dslopes,
    )
    # Each warp of each key tile leaves what it found for a head's slope.
    dslopes = [jnp.sum(x, axis=-1).reshape(B, N) for x in more]
    return [merge_heads(dq), keys_first(dk), keys_first(dv), *dslopes]


@_fwd_p.def_abstract_eval
def _(q: Any, k: Any, v: Any, *aux: Any, spec: AttentionSpec) -> list[Any]:
    B, K, G, T, _ = q.shape
    return [
        result_aval(q, (B, K, G, T, v.shape[-1]), (0, 1, 2, 3, None), spec.out_dtype or q.dtype),
        result_aval(q, (B, K, G, T), (0, 1, 2, 3), jnp.float32),
        result_aval(q, (B, K, 1), (0, 1, None), jnp.int32),  # the kernel's counter of tiles
    ]


@_bwd_p.def_abstract_eval
def _(
    q: Any, k: Any, v: Any, *rest: Any, spec: AttentionSpec, has_dlse: bool, has_dslopes: bool
) -> list[Any]:
    B, K, G, T, _ = q.shape
    results = [result_aval(x, x.shape, range(x.ndim), x.dtype) for x in (q, k, v)]
    sequences = num_sequences(spec, rest)
    if has_dslopes:
        partials = _native.cuda_slope_partials(k.shape[2], sequences)
        results.append(result_aval(q, (B, K, G, partials), (0, 1, 2, None), jnp.float32))
    floats = _native.cuda_bwd_scratch_floats(
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        deterministic=spec.deterministic,
        group=G,
        q_len=T,
        num_sequences=sequences,
    )
    scratch = result_aval(q, (B, K, max(1, floats)), (0, 1, None), jnp.float32)
    return [*results, scratch]


# The custom call.

# Axes of the optional arrays; z: sequences of a packed batch, y: their boundaries; u, w: blocks of
# segment ids; p: a pair.
_AUX_AXES: dict[str, tuple[str, ...]] = {
    "q_lengths": ("bk",),
    "kv_lengths": ("bk",),
    "q_segment_ids": ("bkt", "bkup"),
    "kv_segment_ids": ("bks", "bkwp"),
    "alibi_slopes": ("bkg",),
    "sinks": ("bkg",),
    "cu_seqlens_q": ("bky",),
    "cu_seqlens_kv": ("bky",),
    "qk_scale": ("bk",),
    "v_scale": ("bk",),
}


def _row_major(axes: str) -> tuple[int, ...]:
    return tuple(reversed(range(len(axes))))


def _layout(axes: str) -> tuple[int, ...]:
    if len(axes) == 5:
        return _Q_LAYOUT
    return _K_LAYOUT if axes in ("bksh", "bksd") else _row_major(axes)


def fp8_attribute(spec: AttentionSpec, q: Any, k: Any, v: Any) -> np.int64:
    """Bits of Fp8Bit in call.h.

    k and v are of 8 bits, e5m2 for each of q, k, v, two-level sums, q is not of 8 bits.
    """
    fp8, e5m2 = _fp8.is_fp8(k), (x.dtype == jnp.float8_e5m2 for x in (q, k, v))
    flags = [fp8, *e5m2, spec.two_level, fp8 and not _fp8.is_fp8(q)]
    return np.int64(sum(int(flag) << bit for bit, flag in enumerate(flags)))


def code_attributes(spec: AttentionSpec, q: Any, v: Any) -> dict[str, Any]:
    """What beside `attributes` decides the kernels, said in attributes too.

    They are compiled before a runtime need show any operand.
    """
    return {
        "is_bf16": np.bool_(jnp.dtype(spec.out_dtype or q.dtype) == jnp.bfloat16),
        "head_dim": np.int64(q.shape[-1]),
        "head_dim_v": np.int64(v.shape[-1]),
        "arch": np.int64(_arch_to_compile_for()),
    }


def _lower(
    target: str,
    ctx: Any,
    operands: Sequence[Any],
    inputs: Sequence[str],
    results: Sequence[str],
    spec: AttentionSpec,
    **more: Any,
) -> Any:
    """The custom call; `inputs` are the axes of what goes before the optional arrays."""
    packed = "cu_seqlens_q" in spec.aux
    offset_axes = {"query_offset": ("bkz" if packed else "bk",)}
    axes = [*inputs]
    for name in spec.aux:
        axes += {**_AUX_AXES, **offset_axes}[name]
    q, k, v = ctx.avals_in[:3]
    lower = jax.ffi.ffi_lowering(
        target,
        operand_layouts=[_layout(x) for x in axes],
        result_layouts=[_layout(x) for x in results],
        extra_attributes=partition_attributes(ctx, axes, results, 2),
    )
    return lower(
        ctx,
        *operands,
        **attributes(spec),
        **code_attributes(spec, q, v),
        fp8=fp8_attribute(spec, q, k, v),
        **more,
    )


def _lower_fwd(ctx: Any, *operands: Any, spec: AttentionSpec) -> Any:
    return _lower(
        FWD_TARGET,
        ctx,
        operands,
        ["bkgth", "bksh", "bksd"],
        ["bkgtd", "bkgt", "bkx"],
        spec,
        schedule=np.int64((None, *SCHEDULES).index(spec.schedule)),
        sm_margin=np.int64(spec.sm_margin),
        kv_len=np.int64(_known(ctx.avals_in[1].shape[2])),
    )


def _lower_bwd(
    ctx: Any, *operands: Any, spec: AttentionSpec, has_dlse: bool, has_dslopes: bool
) -> Any:
    return _lower(
        BWD_TARGET,
        ctx,
        operands,
        ["bkgth", "bksh", "bksd", "bkgtd", "bkgt", "bkgtd", *(["bkgt"] * has_dlse)],
        ["bkgth", "bksh", "bksd", *(["bkgc"] * has_dslopes), "bkx"],
        spec,
        deterministic=np.bool_(spec.deterministic),
        has_dlse=np.bool_(has_dlse),
        has_dslopes=np.bool_(has_dslopes),
    )


mlir.register_lowering(_fwd_p, _lower_fwd, platform="cuda")
mlir.register_lowering(_bwd_p, _lower_bwd, platform="cuda")
