"""What is static about one attention call, and its checks.

`AttentionSpec` is a value that travels unchanged from the public function to the lowering rule;
everything else is arrays. Masks, biases and scales that come later are fields here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

IMPLEMENTATIONS = ("cuda", "cpu", "xla")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
MAX_HEAD_DIM = 512

# Optional arrays in the order in which they follow q, k, v as operands; all int32 [B].
AUX_NAMES = ("query_offset", "q_lengths", "kv_lengths")


class UnsupportedError(NotImplementedError):
    """A valid call that the chosen implementation or platform can't serve."""


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Static description of one call.

    Attributes:
      scale: positive factor of the logits.
      is_causal: key j is visible to query i iff j <= i + offset.
      query_offset: the offset where no `query_offset` array is given.
      aux: names of the optional arrays that are given, a subsequence of `AUX_NAMES`.
      deterministic: gradients are bitwise repeatable, also where that is slower.
      implementation: the implementation that the caller named, or None for the platform's own.
    """

    scale: float
    is_causal: bool = False
    query_offset: int = 0
    aux: tuple[str, ...] = ()
    deterministic: bool = False
    implementation: str | None = None


class Dims(NamedTuple):
    """Sizes of one call, in the letters of the documentation."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int

    @classmethod
    def of(cls, q: Any, k: Any, v: Any) -> "Dims":
        """Sizes from `q [B, T, N, H]`, `k [B, S, K, H]`, `v [B, S, K, Hv]` or their avals."""
        (B, T, N, H), (_, S, K, _) = q.shape, k.shape
        return cls(B, T, S, N, K, H, v.shape[-1])


def check_arrays(q: Any, k: Any, v: Any, *, dense: bool) -> None:
    """Raises unless q, k, v are a valid `[*B, T|S, heads, dim]` triple.

    `dense` is for implementation='xla', which also takes float64 and any head dim.
    """
    dtypes = (*DTYPES, jnp.float64) if dense else DTYPES
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if x.ndim < 3:
            raise ValueError(
                f"{name} must have at least 3 axes [*batch, length, heads, head_dim], "
                f"got shape {tuple(x.shape)}"
            )
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must have dtype float32, bfloat16 or float16, got {x.dtype}")
        if x.ndim != q.ndim or x.shape[:-3] != q.shape[:-3]:
            raise ValueError(
                f"{name} must have the batch axes of q, {tuple(q.shape[:-3])}, "
                f"got {tuple(x.shape[:-3])} (shape {tuple(x.shape)})"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        for axis, what in ((-2, "heads"), (-1, "head dim")):
            if x.shape[axis] == 0:
                raise ValueError(
                    f"{name} must have at least 1 in axis {axis} ({what}), "
                    f"got shape {tuple(x.shape)}"
                )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the head dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[-3:-1] != k.shape[-3:-1]:
        raise ValueError(
            f"v must have the length and heads of k, {tuple(k.shape[-3:-1])}, "
            f"got {tuple(v.shape[-3:-1])}"
        )
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"the heads of q must be a multiple of the heads of k (grouped-query attention), "
            f"got {q.shape[-2]} and {k.shape[-2]}"
        )
    if not dense and max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"head dims up to {MAX_HEAD_DIM} are supported, got {q.shape[-1]} for q and k, "
            f"{v.shape[-1]} for v; implementation='xla' takes any"
        )


def static_number(name: str, x: Any, advice: str) -> float:
    """`x` as a finite float; TypeError for a tracer or a non-number."""
    if isinstance(x, Tracer):
        raise TypeError(f"{name} must be a Python number, got a traced value; {advice}")
    if isinstance(x, bool) or not isinstance(x, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a Python number, got {type(x).__name__}")
    if not np.isfinite(x):
        raise ValueError(f"{name} must be finite, got {x}")
    return float(x)


def static_bool(name: str, x: Any) -> bool:
    """`x` as a bool; TypeError for a tracer or anything but a bool."""
    if isinstance(x, Tracer):
        raise TypeError(f"{name} must be a Python bool, got a traced value; mark it static in jit")
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name} must be a Python bool, got {type(x).__name__}")
    return bool(x)


def int32_per_sequence(name: str, x: Any, batch_shape: Sequence[int]) -> jax.Array:
    """`x` as int32 of shape `batch_shape`; a scalar serves every sequence."""
    if not isinstance(x, (jax.Array, np.ndarray, np.integer, int, list, tuple)) or isinstance(
        x, bool
    ):
        raise TypeError(f"{name} must be an integer array, got {type(x).__name__}")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {x.dtype}")
    if x.shape not in ((), tuple(batch_shape)):
        raise ValueError(
            f"{name} must be a scalar or have shape {tuple(batch_shape)}, one value per sequence, "
            f"got shape {x.shape}"
        )
    # Wider or unsigned values saturate instead of wrapping into another meaning.
    info = jnp.iinfo(jnp.int32)
    if jnp.iinfo(x.dtype).max > info.max:
        x = jnp.clip(x, max(info.min, jnp.iinfo(x.dtype).min), info.max)
    return jnp.broadcast_to(x.astype(jnp.int32), batch_shape)
