"""What the custom calls of all platforms share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_flashattn._sharding import result_aval
from jax_flashattn._spec import AUX_NAMES, AttentionSpec

# The class has a public name in jax.extend.core, but importing jax.extend imports Pallas, which
# takes longer than all of this package.
Primitive: Any = type(lax.add_p)


def forward_avals(q: Any, v: Any, out_dtype: str | None = None) -> list[Any]:
    """Types of `out [B, T, N, Hv]`, of q's dtype unless given, and `lse [B, N, T]`.

    v may be pages: its last axis alone counts.
    """
    B, T, N, _ = q.shape
    return [
        result_aval(q, (B, T, N, v.shape[-1]), (0, 1, 2, None), out_dtype or q.dtype),
        result_aval(q, (B, N, T), (0, 2, 1), jnp.float32),
    ]


def mapped_size(args: Sequence[Any], dims: Sequence[Any]) -> int:
    """The size of the axis that a batching rule is to map."""
    return next(x.shape[d] for x, d in zip(args, dims, strict=True) if isinstance(d, int))


def mapped_first(x: Any, dim: Any, size: int) -> jax.Array:
    """An operand of a batching rule with the mapped axis in front, repeated if it has none."""
    if isinstance(dim, int):
        return jnp.moveaxis(x, dim, 0)
    return jnp.broadcast_to(x, (size, *x.shape))


def num_sequences(spec: AttentionSpec, aux: Sequence[Any]) -> int:
    """How many sequences a packed batch element holds; 0 if it isn't packed."""
    if "cu_seqlens_kv" not in spec.aux:
        return 0
    after = len(spec.aux) - spec.aux.index("cu_seqlens_kv")
    return aux[-after].shape[-1] - 1


def _side(size: int | None) -> np.int64:
    return np.int64(-1 if size is None else size)


def attributes(spec: AttentionSpec) -> dict[str, Any]:
    """What `spec` says, as scalars; -1 is an open side of the window, 0 no soft cap."""
    # Each in its numpy type: a Python int or float would arrive at a width of JAX's choice.
    return {
        "scale": np.float32(spec.scale),
        "soft_cap": np.float32(spec.soft_cap or 0),
        "is_causal": np.bool_(spec.is_causal),
        "query_offset": np.int64(spec.query_offset),
        "window_left": _side(spec.window_left),
        "window_right": _side(spec.window_right),
        "sink_tokens": np.int64(spec.sink_tokens),
        "aux": np.int64(sum(1 << AUX_NAMES.index(name) for name in spec.aux)),
    }
