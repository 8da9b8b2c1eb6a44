"""How each platform runs the primitives: our CPU kernels, our CUDA kernels, or dense XLA.

A rule is chosen by the platform that is lowered for, not by the machine that lowers, so that
ahead-of-time compilation and export work from anywhere. A named implementation is checked there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from jax_flashattn import _explicit, _lowering_cpu, _lowering_cuda, _lowering_serve, _reference
from jax_flashattn._spec import AttentionSpec, UnsupportedError


def _check_implementation(spec: AttentionSpec, platform: str) -> None:
    if spec.implementation not in (None, platform):
        raise UnsupportedError(
            f"implementation={spec.implementation!r} has no kernel for platform {platform}; "
            "leave implementation out for that platform's own choice, or name 'xla'"
        )


def _fwd_reference(
    q: jax.Array, k: jax.Array, v: jax.Array, *aux: jax.Array, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    return _reference.attention(spec, q, k, v, dict(zip(spec.aux, aux, strict=True)))


def _bwd_reference(
    *operands: jax.Array, spec: AttentionSpec, has_dlse: bool, has_dslopes: bool
) -> Any:
    """The gradients from lse, as the kernels have them: it may count sinks that they don't know."""
    q, k, v, out, lse, dout, *rest = operands
    dlse = rest.pop(0) if has_dlse else jnp.zeros_like(lse)
    aux = dict(zip(spec.aux, rest, strict=True))
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    queries, keys = _reference.tokens(T, S, aux)
    q, out, dout = (_reference.zero_padding(x, queries.exists) for x in (q, out, dout))
    k, v = (_reference.zero_padding(x, keys.exists) for x in (k, v))
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    rows = lambda x: x.reshape(B, T, K, N // K, -1)  # noqa: E731 (five uses)
    scalars = lambda x: x.reshape(B, K, N // K, T, 1)  # noqa: E731 (two uses)

    x, slope = _reference.logits(spec, dot("btkgh,bskh->bkgts", rows(q), k), T, S, aux)
    mask = _reference.visible(spec, T, S, aux)[:, None, None]
    # Masked before exp: where nothing is visible lse is -inf.
    weights = jnp.exp(jnp.where(mask, x - scalars(jnp.where(lse == -jnp.inf, 0, lse)), -jnp.inf))
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    delta -= jnp.where(queries.exists[:, None, :], dlse, 0)
    dx = weights * (dot("btkgd,bskd->bkgts", rows(dout), v) - scalars(delta))
    ds = (dx * slope).astype(q.dtype)
    gradients = [
        dot("bkgts,bskh->btkgh", ds, k).reshape(q.shape).astype(q.dtype),
        dot("bkgts,btkgh->bskh", ds, rows(q)).astype(k.dtype),
        dot("bkgts,btkgd->bskd", weights.astype(v.dtype), rows(dout)).astype(v.dtype),
    ]
    if has_dslopes:
        distances = _reference.distances(spec, T, S, aux, dx.dtype)[:, None, None]
        gradients.append(-jnp.sum(dx * distances, axis=(3, 4)).reshape(B, N))
    return gradients


def _paged_reference(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *aux: jax.Array,
    spec: AttentionSpec,
    layout: str,
) -> tuple[jax.Array, jax.Array]:
    arrays = dict(zip(spec.aux, aux, strict=True))
    return _reference.paged_attention(spec, q, k_pages, v_pages, arrays, layout=layout)


def _name_of(platform: str | None, ctx: Any) -> str:
    """Of a platform without kernels only `ctx` knows the name."""
    return platform or "/".join(ctx.platforms or ctx.module_context.platforms)


def _lower(
    platform: str | None,
    function: Callable[..., Any],
    axes: Callable[..., Any],
    ctx: Any,
    *operands: Any,
    **params: Any,
) -> Any:
    """The rule of a platform; None is for those without kernels."""
    _check_implementation(params["spec"], _name_of(platform, ctx))
    run = partial(_explicit.on_shards, partial(function, **params), *axes(**params), ctx.avals_out)
    return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


_fwd, _bwd = _explicit.forward_axes, _explicit.backward_axes
fwd_dense = partial(_lower, None, _fwd_reference, _fwd)
bwd_dense = partial(_lower, None, _bwd_reference, _bwd)
fwd_cpu = partial(_lower, "cpu", _lowering_cpu.forward, _fwd)
bwd_cpu = partial(_lower, "cpu", _lowering_cpu.backward, _bwd)
bwd_cuda = partial(_lower, "cuda", _lowering_cuda.backward, _bwd)


def fwd_cuda(ctx: Any, *operands: Any, spec: AttentionSpec) -> Any:
    """Few queries have a kernel of their own."""
    q, k, v = ctx.avals_in[:3]
    function: Callable[..., Any] = _lowering_cuda.forward
    if _lowering_serve.decodes(q, v, k.shape[2], spec):
        function = partial(_lowering_serve.decode, shards=_lowering_serve.num_shards(ctx))
    return _lower("cuda", function, _fwd, ctx, *operands, spec=spec)


def _lower_paged(
    platform: str | None, function: Callable[..., Any], ctx: Any, *operands: Any, **params: Any
) -> Any:
    """Pages belong to no sequence: in explicit mode too they are left to the partitioner."""
    _check_implementation(params["spec"], _name_of(platform, ctx))
    return mlir.lower_fun(partial(function, **params), multiple_results=True)(ctx, *operands)


def paged_cuda(ctx: Any, *operands: Any, **params: Any) -> Any:
    """Decoding, chunks of prefill and mixed batches."""
    function = partial(_lowering_serve.paged, shards=_lowering_serve.num_shards(ctx))
    return _lower_paged("cuda", function, ctx, *operands, **params)


paged_dense = partial(_lower_paged, None, _paged_reference)
paged_cpu = partial(_lower_paged, "cpu", _lowering_cpu.paged_forward)
