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

from jax_flashattn import _fp8
from jax_flashattn._explicit import per_head_like
from jax_flashattn._primitives import bwd_p, fwd_p, tangent_p
from jax_flashattn._sharding import to_common_vma
from jax_flashattn._spec import DIFFERENTIABLE_AUX, PER_HEAD_AUX, AttentionSpec, UnsupportedError

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
    """`out [B, T, N, Hv]` and `lse [B, N, T]`, differentiable in q, k, v, slopes and sinks.

    The gradients follow FlashAttention-2 (Dao, 2023, arXiv:2307.08691), with the cotangent of the
    log-sum-exp subtracted from rowsum(dout * out).
    """
    aux = {name: per_head_like(q, x) if name in PER_HEAD_AUX else x for name, x in aux.items()}
    operands = to_common_vma(q, k, v, *(aux[name] for name in spec.aux))
    out, lse = fwd_p.bind(*operands, spec=spec)
    return out, lse


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, spec: AttentionSpec) -> Any:
    if _fp8.is_fp8(primals[1]):
        raise UnsupportedError(_fp8.NO_GRADIENT_ADVICE)
    out, lse = fwd_p.bind(*primals, spec=spec)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    of_aux = dict(zip(spec.aux, tangents[3:], strict=True))
    wrt = tuple(x for x in DIFFERENTIABLE_AUX if x in of_aux and type(of_aux[x]) is not ad.Zero)
    linear = [ad.instantiate_zeros(t) for t in (*tangents[:3], *(of_aux[x] for x in wrt))]
    return [out, lse], tangent_p.bind(*primals, out, lse, *linear, spec=spec, wrt=wrt)


def _transpose(
    cotangents: Sequence[Any], *operands: Any, spec: AttentionSpec, wrt: tuple[str, ...]
) -> list[Any]:
    num_linear = 3 + len(wrt)
    *primals, out, lse = operands[:-num_linear]
    dout, dlse = cotangents
    no_gradient = [None] * (len(operands) - num_linear)
    if type(dout) is ad.Zero and type(dlse) is ad.Zero:
        return [*no_gradient, *(ad.Zero(x.aval) for x in operands[-num_linear:])]
    dout: Any = jnp.zeros_like(out) if type(dout) is ad.Zero else dout
    has_dlse = type(dlse) is not ad.Zero
    q, k, v = primals[:3]
    aux = dict(zip(spec.aux, primals[3:], strict=True))
    # lse counts the sinks already: the kernels need them no more.
    spec = spec.without_aux("sinks")
    has_dslopes = "alibi_slopes" in wrt
    gradients = bwd_p.bind(
        *(q, k, v, out, lse, dout, *([dlse] * has_dlse), *(aux[name] for name in spec.aux)),
        spec=spec,
        has_dlse=has_dlse,
        has_dslopes=has_dslopes,
    )
    if "sinks" in wrt:
        gradients.append(_dsinks(aux["sinks"], out, lse, dout, dlse if has_dlse else None))
    return [*no_gradient, *gradients]


def _dsinks(
    sinks: jax.Array, out: jax.Array, lse: jax.Array, dout: jax.Array, dlse: jax.Array | None
) -> jax.Array:
    """Gradient of the sinks `[B, N]`: -sum over queries of weight * (rowsum(dout * out) - dlse).

    One pass over out and dout; needs no logit.
    """
    f32 = jnp.float32
    delta = jnp.sum(dout.astype(f32) * out.astype(f32), axis=-1).swapaxes(1, 2)
    if dlse is not None:
        delta -= dlse
    # Padding has no sink, and its cotangents may hold anything.
    exists = lse != -jnp.inf
    weights = jnp.exp(sinks[:, :, None] - jnp.where(exists, lse, 0))
    return -jnp.sum(jnp.where(exists, weights * delta, 0), axis=-1)


ad.primitive_jvps[fwd_p] = _jvp
ad.primitive_transposes[tangent_p] = _transpose
