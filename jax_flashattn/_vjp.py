"""Reverse-mode differentiation: which values are kept and how they become gradients.

The rules sit on the primitives themselves, not in `jax.custom_vjp`: a jvp rule that evaluates
forward and stages the linear `tangent_p`, and a transpose rule that turns `tangent_p` into `bwd_p`.
That gives the same programs and lets forward mode fail with a message of ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from jax_flashattn._primitives import bwd_p, fwd_p, tangent_p
from jax_flashattn._sharding import to_common_vma
from jax_flashattn._spec import AttentionSpec

# Names of the residuals for jax.checkpoint policies; q, k and v are kept beside them.
OUT_NAME = "flash_attention_out"
LSE_NAME = "flash_attention_lse"


def attention(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    aux: Mapping[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """`out [B, T, N, Hv]` and `lse [B, N, T]`, differentiable in q, k and v.

    The gradients follow FlashAttention-2 (Dao, 2023, arXiv:2307.08691), with the cotangent of the
    log-sum-exp subtracted from rowsum(dout * out).
    """
    operands = to_common_vma(q, k, v, *(aux[name] for name in spec.aux))
    out, lse = fwd_p.bind(*operands, spec=spec)
    return out, lse


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, spec: AttentionSpec) -> Any:
    out, lse = fwd_p.bind(*primals, spec=spec)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    dqkv = [ad.instantiate_zeros(t) for t in tangents[:3]]
    return [out, lse], tangent_p.bind(*primals, out, lse, *dqkv, spec=spec)


def _transpose(cotangents: Sequence[Any], *operands: Any, spec: AttentionSpec) -> list[Any]:
    *primals, out, lse, _, _, _ = operands
    dout, dlse = cotangents
    no_gradient = [None] * (len(operands) - 3)
    if type(dout) is ad.Zero and type(dlse) is ad.Zero:
        return [*no_gradient, *(ad.Zero(x.aval) for x in operands[-3:])]
    if type(dout) is ad.Zero:
        dout = jnp.zeros_like(out)
    has_dlse = type(dlse) is not ad.Zero
    q, k, v, *aux = primals
    gradients = bwd_p.bind(
        q, k, v, out, lse, dout, *([dlse] * has_dlse), *aux, spec=spec, has_dlse=has_dlse
    )
    return [*no_gradient, *gradients]


ad.primitive_jvps[fwd_p] = _jvp
ad.primitive_transposes[tangent_p] = _transpose
