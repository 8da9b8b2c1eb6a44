"""How each platform runs the primitives: our CPU kernels, our CUDA kernels, or dense XLA.

A rule is chosen by the platform that is lowered for, not by the machine that lowers, so that
ahead-of-time compilation and export work from anywhere. A named implementation is checked there.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_flashattn import _native, _reference
from jax_flashattn._sharding import partition_attributes, result_aval
from jax_flashattn._spec import AUX_NAMES, AttentionSpec, Dims, UnsupportedError
from jax_flashattn._targets import BWD_TARGET, FWD_TARGET


def _check_implementation(spec: AttentionSpec, platform: str) -> None:
    if spec.implementation not in (None, platform):
        raise UnsupportedError(
            f"implementation={spec.implementation!r} has no kernel for platform {platform}; "
            "leave implementation out for that platform's own choice, or name 'xla'"
        )


def _attributes(spec: AttentionSpec) -> dict[str, Any]:
    # Every scalar in its numpy type: a Python int or float would arrive at a width of JAX's choice.
    return {
        "scale": np.float32(spec.scale),
        "is_causal": np.bool_(spec.is_causal),
        "query_offset": np.int64(spec.query_offset),
        **{f"has_{name}": np.bool_(name in spec.aux) for name in AUX_NAMES},
    }


def _sizes(d: Dims) -> dict[str, int]:
    return {"b": d.B, "t": d.T, "s": d.S, "n": d.N, "k": d.K, "h": d.H, "d": d.Hv}


# Dense.


def _fwd_reference(
    q: jax.Array, k: jax.Array, v: jax.Array, *aux: jax.Array, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    return _reference.attention(spec, q, k, v, dict(zip(spec.aux, aux, strict=True)))


def _bwd_reference(*operands: jax.Array, spec: AttentionSpec, has_dlse: bool) -> Any:
    q, k, v, _, lse, dout, *rest = operands
    dlse = rest.pop(0) if has_dlse else jnp.zeros_like(lse)
    _, vjp = jax.vjp(lambda q, k, v: _fwd_reference(q, k, v, *rest, spec=spec), q, k, v)
    return vjp((dout, dlse))


def _lower_dense(function: Callable[..., Any], ctx: Any, *operands: Any, **params: Any) -> Any:
    _check_implementation(params["spec"], "/".join(ctx.platforms or ctx.module_context.platforms))
    return mlir.lower_fun(function, multiple_results=True)(ctx, *operands, **params)


fwd_dense = partial(_lower_dense, _fwd_reference)
bwd_dense = partial(_lower_dense, _bwd_reference)


# CPU: plain BTNH arrays, split over the batch.


def fwd_cpu(ctx: Any, *operands: Any, spec: AttentionSpec) -> Any:
    """Lowers `fwd_p` to the CPU kernels."""
    _check_implementation(spec, "cpu")
    sizes = _sizes(Dims.of(*ctx.avals_in[:3]))
    partition = partition_attributes(
        ["btnh", "bskh", "bskd", *("b" for _ in spec.aux)], ["btnd", "bnt"], sizes, 1
    )
    lower = jax.ffi.ffi_lowering(FWD_TARGET, extra_attributes=partition)
    return lower(ctx, *operands, **_attributes(spec))


def bwd_cpu(ctx: Any, *operands: Any, spec: AttentionSpec, has_dlse: bool) -> Any:
    """Lowers `bwd_p` to the CPU kernels; their scratch is one more result, which XLA plans."""
    _check_implementation(spec, "cpu")
    d = Dims.of(*ctx.avals_in[:3])
    scratch = _native.cpu_bwd_scratch_floats(d.T, d.N, d.K, d.H)
    dlse = ["bnt"] if has_dlse else []
    partition = partition_attributes(
        ["btnh", "bskh", "bskd", "btnd", "bnt", "btnd", *dlse, *("b" for _ in spec.aux)],
        ["btnh", "bskh", "bskd", "bx"],
        {**_sizes(d), "x": scratch},
        1,
    )
    scratch_aval = result_aval(ctx.avals_in[0], (d.B, scratch), (0, None), jnp.float32)
    lower = jax.ffi.ffi_lowering(BWD_TARGET, extra_attributes=partition)
    ctx = ctx.replace(avals_out=[*ctx.avals_out, scratch_aval])
    return lower(ctx, *operands, **_attributes(spec), has_dlse=np.bool_(has_dlse))[:3]


# CUDA: logical q [B, K, G, T, H] and k [B, K, S, H] in layouts that equal BTNH memory, so that
# batch and key heads lead every operand and may be split alike, at the cost of bitcasts.

MAX_HEAD_DIM_CUDA = 256
_Q_LAYOUT = (4, 2, 1, 3, 0)  # minor to major: memory is B, T, K, G, H
_K_LAYOUT = (3, 1, 2, 0)  # B, S, K, H

_fwd_cuda_p = Primitive("flash_attention_fwd_cuda")
_bwd_cuda_p = Primitive("flash_attention_bwd_cuda")
for _p in (_fwd_cuda_p, _bwd_cuda_p):
    _p.multiple_results = True


def _split_heads(x: jax.Array, num_kv_heads: int) -> jax.Array:
    B, T, N, H = x.shape
    return x.reshape(B, T, num_kv_heads, N // num_kv_heads, H).transpose(0, 2, 3, 1, 4)


def _merge_heads(x: jax.Array) -> jax.Array:
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _keys_first(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 1, 3)


def _per_kv_head(aux: Sequence[jax.Array], num_kv_heads: int) -> list[jax.Array]:
    return [jnp.broadcast_to(x[:, None], (x.shape[0], num_kv_heads)) for x in aux]


def _fwd_cuda_outer(
    q: jax.Array, k: jax.Array, v: jax.Array, *aux: jax.Array, spec: AttentionSpec
) -> Any:
    B, T, N, _ = q.shape
    K = k.shape[2]
    out, lse = _fwd_cuda_p.bind(
        _split_heads(q, K), _keys_first(k), _keys_first(v), *_per_kv_head(aux, K), spec=spec
    )
    return _merge_heads(out), lse.reshape(B, N, T)


def _bwd_cuda_outer(*operands: jax.Array, spec: AttentionSpec, has_dlse: bool) -> Any:
    q, k, v, out, lse, dout, *rest = operands
    B, T, N, _ = q.shape
    K = k.shape[2]
    rows = lambda x: x.reshape(B, K, N // K, T)  # noqa: E731 (two uses, one line)
    dlse, aux = rest[:has_dlse], rest[has_dlse:]
    dq, dk, dv, _ = _bwd_cuda_p.bind(
        _split_heads(q, K),
        _keys_first(k),
        _keys_first(v),
        _split_heads(out, K),
        rows(lse),
        _split_heads(dout, K),
        *(rows(x) for x in dlse),
        *_per_kv_head(aux, K),
        spec=spec,
        has_dlse=has_dlse,
    )
    return _merge_heads(dq), _keys_first(dk), _keys_first(dv)


@_fwd_cuda_p.def_abstract_eval
def _(q: Any, k: Any, v: Any, *aux: Any, spec: AttentionSpec) -> list[Any]:
    B, K, G, T, _ = q.shape
    return [
        result_aval(q, (B, K, G, T, v.shape[-1]), (0, 1, 2, 3, None), q.dtype),
        result_aval(q, (B, K, G, T), (0, 1, 2, 3), jnp.float32),
    ]


@_bwd_cuda_p.def_abstract_eval
def _(q: Any, k: Any, v: Any, *rest: Any, spec: AttentionSpec, has_dlse: bool) -> list[Any]:
    B, K, G, T, H = q.shape
    floats = _native.cuda_scratch_floats(
        str(q.dtype), H, v.shape[-1], spec.is_causal, spec.deterministic, G, T, k.shape[2]
    )
    scratch = result_aval(q, (B, K, max(1, floats)), (0, 1, None), jnp.float32)
    return [*(result_aval(x, x.shape, range(x.ndim), x.dtype) for x in (q, k, v)), scratch]


def _cuda_sizes(avals: Sequence[Any]) -> dict[str, int]:
    q, k, v = avals[:3]
    B, K, G, T, H = q.shape
    return {"b": B, "k": K, "g": G, "t": T, "h": H, "s": k.shape[2], "d": v.shape[3]}


def _cuda_attributes(spec: AttentionSpec) -> dict[str, Any]:
    # arch 0 is the device at hand, whose context is current while XLA compiles for it.
    return {
        **_attributes(spec),
        "arch": np.int64(0),
        "deterministic": np.bool_(spec.deterministic),
    }


def _lower_fwd_cuda(ctx: Any, *operands: Any, spec: AttentionSpec) -> Any:
    aux = ["bk"] * len(spec.aux)
    lower = jax.ffi.ffi_lowering(
        FWD_TARGET,
        operand_layouts=[_Q_LAYOUT, _K_LAYOUT, _K_LAYOUT, *((1, 0) for _ in aux)],
        result_layouts=[_Q_LAYOUT, (3, 2, 1, 0)],
        extra_attributes=partition_attributes(
            ["bkgth", "bksh", "bksd", *aux], ["bkgtd", "bkgt"], _cuda_sizes(ctx.avals_in), 2
        ),
    )
    return lower(ctx, *operands, **_cuda_attributes(spec))


def _lower_bwd_cuda(ctx: Any, *operands: Any, spec: AttentionSpec, has_dlse: bool) -> Any:
    aux = ["bk"] * len(spec.aux)
    row_layout = (3, 2, 1, 0)
    scratch = ctx.avals_out[3].shape[2]
    lower = jax.ffi.ffi_lowering(
        BWD_TARGET,
        operand_layouts=[
            *(_Q_LAYOUT, _K_LAYOUT, _K_LAYOUT, _Q_LAYOUT, row_layout, _Q_LAYOUT),
            *([row_layout] * has_dlse),
            *((1, 0) for _ in aux),
        ],
        result_layouts=[_Q_LAYOUT, _K_LAYOUT, _K_LAYOUT, (2, 1, 0)],
        extra_attributes=partition_attributes(
            ["bkgth", "bksh", "bksd", "bkgtd", "bkgt", "bkgtd", *(["bkgt"] * has_dlse), *aux],
            ["bkgth", "bksh", "bksd", "bkx"],
            {**_cuda_sizes(ctx.avals_in), "x": scratch},
            2,
        ),
    )
    return lower(ctx, *operands, **_cuda_attributes(spec), has_dlse=np.bool_(has_dlse))


mlir.register_lowering(_fwd_cuda_p, _lower_fwd_cuda, platform="cuda")
mlir.register_lowering(_bwd_cuda_p, _lower_bwd_cuda, platform="cuda")


def _lower_cuda(function: Callable[..., Any], ctx: Any, *operands: Any, **params: Any) -> Any:
    _check_implementation(params["spec"], "cuda")
    q, _, v = ctx.avals_in[:3]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UnsupportedError(
            f"the CUDA kernels take float16 and bfloat16, got {q.dtype}; implementation='xla' is "
            "dense and takes it"
        )
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM_CUDA:
        raise UnsupportedError(
            f"the CUDA kernels take head dims up to {MAX_HEAD_DIM_CUDA}, got {q.shape[-1]} for q "
            f"and k, {v.shape[-1]} for v; implementation='xla' is dense and takes any"
        )
    return mlir.lower_fun(function, multiple_results=True)(ctx, *operands, **params)


fwd_cuda = partial(_lower_cuda, _fwd_cuda_outer)
bwd_cuda = partial(_lower_cuda, _bwd_cuda_outer)
