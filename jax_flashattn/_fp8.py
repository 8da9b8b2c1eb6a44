"""8-bit floats: what is asked of their arguments, and what they mean.

An operand is `x * scale`, the scale one value per tensor or per batch element and key head. The
scales of q and k are one factor of the scores, and reach every backend as one array. All three of
q, k and v are of 8 bits, or k and v alone, as those of a cache.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashattn._spec import UnsupportedError, fp8_scale, is_fp8

OUT_DTYPES = (jnp.bfloat16, jnp.float16)
ACCUMULATIONS = ("fast", "two_level")

NO_GRADIENT_ADVICE = (
    "attention of float8 inputs is not differentiable; differentiate it in bfloat16, or name "
    "implementation='xla', whose gradients come in the inputs' dtypes"
)


def options(
    q: Any,
    k: Any,
    v: Any,
    batch: Sequence[int],
    num_kv_heads: int,
    *,
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    out_dtype: Any = None,
    fp8_accumulation: Any = None,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Fields of `AttentionSpec`, and optional arrays; both are empty without 8-bit inputs."""
    given = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    given = {name: x for name, x in given.items() if x is not None}
    if not is_fp8(q):
        others = {"out_dtype": out_dtype, "fp8_accumulation": fp8_accumulation}
        for name in (*given, *(name for name, x in others.items() if x is not None)):
            if not is_fp8(k):
                raise ValueError(f"{name} is for float8 inputs, got it with {q.dtype}")
            if name not in ("k_scale", "v_scale"):
                raise ValueError(f"{name} is for float8 queries, got it with {q.dtype} ones")
    if not is_fp8(k):
        return {}, {}
    for name, x in (("q and k", q), ("v", v)):
        if x.shape[-1] % 16 or x.shape[-1] > 256:
            raise UnsupportedError(
                f"float8 takes head dims that are multiples of 16 up to 256, got {x.shape[-1]} "
                f"for {name}"
            )
    out = jnp.dtype(jnp.bfloat16 if out_dtype is None else out_dtype)
    if out not in OUT_DTYPES:
        raise ValueError(f"out_dtype must be bfloat16 or float16, got {out}")
    accumulation = ACCUMULATIONS[0] if fp8_accumulation is None else fp8_accumulation
    if accumulation not in ACCUMULATIONS:
        raise ValueError(f"fp8_accumulation must be one of {ACCUMULATIONS}, got {accumulation!r}")
    shape = (*batch, num_kv_heads)
    scales = {name: jnp.broadcast_to(fp8_scale(name, x, shape), shape) for name, x in given.items()}
    aux = {}
    if "q_scale" in scales or "k_scale" in scales:
        aux["qk_scale"] = scales.get("q_scale", 1.0) * scales.get("k_scale", 1.0)
    if "v_scale" in scales:
        aux["v_scale"] = scales["v_scale"]
    if not is_fp8(q):
        return {}, aux  # the output is of q's dtype
    return {"out_dtype": out.name, "two_level": accumulation == "two_level"}, aux


def quantize(x: jax.Array, dtype: Any, scale: Any) -> jax.Array:
    """`x [..., K, H] / scale` in an 8-bit dtype, to nearest even; beyond its range it saturates.

    `scale` is None, a scalar or `[K]`. NaN stays NaN, infinity becomes the largest number.
    """
    x = x.astype(jnp.float32)
    if scale is not None:
        scale = jnp.asarray(scale, jnp.float32)
        x = x / jnp.broadcast_to(scale[:, None] if scale.ndim else scale, x.shape)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def dequantize(
    q: jax.Array, k: jax.Array, v: jax.Array, aux: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v of a canonical call in float32, with their scales applied."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if "qk_scale" in aux:
        k = k * aux["qk_scale"][:, None, :, None]
    if "v_scale" in aux:
        v = v * aux["v_scale"][:, None, :, None]
    return q, k, v
