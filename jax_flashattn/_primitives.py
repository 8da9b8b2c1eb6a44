"""The primitives: types and batching of forward, tangent and backward.

Operands are `q [B, T, N, H]`, `k [B, S, K, H]`, `v [B, S, K, Hv]` and then the optional arrays that
`spec.aux` names. `tangent_p` is the linear map from input to output tangents (of q, k, v and of the
optional arrays in `wrt`); it exists to be transposed into `bwd_p` and can't be evaluated.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir, xla

from jax_flashattn import _explicit, _lowering
from jax_flashattn._calls import Primitive, forward_avals, mapped_first, mapped_size
from jax_flashattn._sharding import result_aval
from jax_flashattn._spec import PER_HEAD_AUX, AttentionSpec, UnsupportedError

FORWARD_MODE_ADVICE = (
    "forward-mode differentiation (jax.jvp, jax.jacfwd, jax.linearize) and second derivatives "
    "(jax.hessian, grad of grad) are not defined for the attention kernels; use reverse mode "
    "(jax.grad, jax.vjp) or implementation='xla', which differentiates in any mode and order"
)

fwd_p = Primitive("flash_attention_fwd")
tangent_p = Primitive("flash_attention_tangent")
bwd_p = Primitive("flash_attention_bwd")
for _p in (fwd_p, tangent_p, bwd_p):
    _p.multiple_results = True
    _p.def_impl(partial(xla.apply_primitive, _p))


# Types.


def _fwd_abstract(q: Any, k: Any, v: Any, *aux: Any, spec: AttentionSpec) -> list[Any]:
    _explicit.check(q, k, v)
    return forward_avals(q, v, spec.out_dtype)


def _tangent_abstract(
    q: Any, k: Any, v: Any, *rest: Any, spec: AttentionSpec, wrt: tuple[str, ...]
) -> list[Any]:
    return forward_avals(q, v)


def _bwd_abstract(
    q: Any, k: Any, v: Any, *rest: Any, spec: AttentionSpec, has_dlse: bool, has_dslopes: bool
) -> list[Any]:
    gradients = [result_aval(x, x.shape, range(4), x.dtype) for x in (q, k, v)]
    if has_dslopes:
        slopes = rest[3 + has_dlse + spec.aux.index("alibi_slopes")]
        gradients.append(result_aval(slopes, slopes.shape, (0, 1), jnp.float32))
    return gradients


fwd_p.def_abstract_eval(_fwd_abstract)
tangent_p.def_abstract_eval(_tangent_abstract)
bwd_p.def_abstract_eval(_bwd_abstract)


# Batching: a mapped axis becomes part of B, or of the heads when only the queries are mapped.


def _batch(primitive: Any, args: Sequence[Any], dims: Sequence[Any], **params: Any) -> Any:
    size = mapped_size(args, dims)
    stacked = [mapped_first(x, d, size) for x, d in zip(args, dims, strict=True)]
    # Of two axes that become one, explicit mode wants a sharded one to be the first.
    mapped = 1 if any(_explicit.is_sharded(x, 1) for x in stacked) else 0
    stacked = [jnp.moveaxis(x, 0, mapped) for x in stacked]
    leading = stacked[0].shape[:2]
    folded = [x.reshape(leading[0] * leading[1], *x.shape[2:]) for x in stacked]
    results = primitive.bind(*folded, **params)
    return [x.reshape(*leading, *x.shape[1:]) for x in results], [mapped] * len(results)


def _batch_fwd(args: Sequence[Any], dims: Sequence[Any], *, spec: AttentionSpec) -> Any:
    queries_alone = isinstance(dims[0], int) and not any(isinstance(d, int) for d in dims[1:])
    if not queries_alone or _explicit.is_sharded(args[0], dims[0]):
        return _batch(fwd_p, args, dims, spec=spec)
    # More query heads per key head, so that k and v aren't copied.
    q = jnp.moveaxis(args[0], dims[0], 3)  # [B, T, N, X, H]
    B, T, N, X, H = q.shape
    aux = [
        jnp.repeat(x, X, axis=1) if name in PER_HEAD_AUX else x
        for name, x in zip(spec.aux, args[3:], strict=True)
    ]
    out, lse = fwd_p.bind(q.reshape(B, T, N * X, H), *args[1:3], *aux, spec=spec)
    return [out.reshape(B, T, N, X, out.shape[-1]), lse.reshape(B, N, X, T)], [3, 2]


batching.primitive_batchers[fwd_p] = _batch_fwd
batching.primitive_batchers[tangent_p] = partial(_batch, tangent_p)
batching.primitive_batchers[bwd_p] = partial(_batch, bwd_p)


# Differentiation that isn't defined.


def _no_forward_mode(*args: Any, **params: Any) -> Any:
    raise UnsupportedError(FORWARD_MODE_ADVICE)


tangent_p.def_impl(_no_forward_mode)
mlir.register_lowering(tangent_p, _no_forward_mode)
ad.primitive_jvps[tangent_p] = _no_forward_mode
ad.primitive_jvps[bwd_p] = _no_forward_mode


# Lowering: a platform without rules of its own gets the dense definition.

for _p, _dense, _cpu, _cuda in (
    (fwd_p, _lowering.fwd_dense, _lowering.fwd_cpu, _lowering.fwd_cuda),
    (bwd_p, _lowering.bwd_dense, _lowering.bwd_cpu, _lowering.bwd_cuda),
):
    mlir.register_lowering(_p, _dense)
    mlir.register_lowering(_p, _cpu, platform="cpu")
    mlir.register_lowering(_p, _cuda, platform="cuda")
