"""What is static about one attention call, and its checks.

`AttentionSpec` is a value that travels unchanged from the public function to the lowering rule;
everything else is arrays.
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
FP8_DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
SCHEDULES = ("grid", "persistent")
FP8_QUERY_DTYPES = (jnp.bfloat16, jnp.float16)  # of queries over float8 keys, if not float8 too
MAX_HEAD_DIM = 512

PAGE_SIZES = (8, 16, 32, 64, 128, 256)
# Axes of a pool of pages, in FlashInfer's names: [num_pages, page_size, K, H] or
# [num_pages, K, page_size, H].
LAYOUTS = ("NHD", "HND")

MAX_LENGTH = 2**30  # the kernels add positions in int32

# Optional arrays in the order in which they follow q, k, v as operands. The position in this tuple
# is the array's bit in the custom calls' attribute `aux`.
AUX_NAMES = (
    "query_offset",  # int32 [B]; [B, n] with cu_seqlens
    "q_lengths",  # int32 [B]
    "kv_lengths",  # int32 [B]; [B, n] with cu_seqlens_q and page_table
    "q_segment_ids",  # int32 [B, T]
    "kv_segment_ids",  # int32 [B, S]
    "alibi_slopes",  # float32 [B, N]
    "sinks",  # float32 [B, N]
    "cu_seqlens_q",  # int32 [B, n + 1]: packed sequences, T and S count all tokens
    "cu_seqlens_kv",  # int32 [B, n + 1]; not with page_table
    "page_table",  # int32 [B, M], pages of each sequence; [B, n, M] with cu_seqlens_q
    "qk_scale",  # float32 [B, K]: factor of the scores of float8 inputs; B 1 if pages are packed
    "v_scale",  # float32 [B, K]
)
PER_HEAD_AUX = DIFFERENTIABLE_AUX = ("alibi_slopes", "sinks")
PER_KV_HEAD_AUX = ("qk_scale", "v_scale")


class UnsupportedError(NotImplementedError):
    """A valid call that the chosen implementation or platform can't serve."""


class KernelNotCachedError(RuntimeError):
    """`JFA_DISABLE_JIT=1` forbids to compile a kernel that the cache doesn't hold."""


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Static description of one call.

    Attributes:
      scale: positive factor of the logits.
      soft_cap: c of `c * tanh(logit / c)`, or None.
      is_causal: hides key j from query i unless j <= i + offset.
      window_left: hides key j unless i + offset - window_left <= j; None is open.
      window_right: hides key j unless j <= i + offset + window_right; None is open.
      sink_tokens: keys below are not hidden by the window.
      query_offset: the offset where no `query_offset` array is given.
      aux: names of the optional arrays that are given, a subsequence of `AUX_NAMES`.
      deterministic: gradients are bitwise repeatable, also where that is slower.
      implementation: the implementation that the caller named, or None for the platform's own.
      out_dtype: name of the output's dtype, or None for q's; given for 8-bit inputs.
      two_level: products of 8-bit weights and values are added in float32, block by block.
      schedule: 'grid' or 'persistent', or None for the kernels' own choice; on GPUs only.
      sm_margin: multiprocessors that the forward leaves to others; with it, never a grid.
    """

    scale: float
    soft_cap: float | None = None
    is_causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    sink_tokens: int = 0
    query_offset: int = 0
    aux: tuple[str, ...] = ()
    deterministic: bool = False
    implementation: str | None = None
    out_dtype: str | None = None
    two_level: bool = False
    schedule: str | None = None
    sm_margin: int = 0

    @property
    def mask_kind(self) -> str:
        """What the mask does to the code of a kernel: 'full', 'causal' or 'local'."""
        if self.window_left is not None or self.window_right is not None:
            return "local"
        return "causal" if self.is_causal else "full"

    def without_aux(self, *names: str) -> "AttentionSpec":
        """The same call without some of the optional arrays."""
        return dataclasses.replace(self, aux=tuple(x for x in self.aux if x not in names))


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


def check_arrays(
    q: Any,
    k: Any,
    v: Any,
    *,
    dense: bool,
    names: tuple[str, str, str] = ("q", "k", "v"),
) -> None:
    """Raises unless q, k, v are a valid `[*B, T|S, heads, dim]` triple.

    `dense` is for implementation='xla', which also takes float64 and any head dim.
    """
    _, k_name, v_name = names
    dtypes = (*DTYPES, *FP8_DTYPES)
    *others, last = (jnp.dtype(x).name for x in dtypes)
    for name, x in zip(names, (q, k, v), strict=True):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if x.ndim < 3:
            raise ValueError(
                f"{name} must have at least 3 axes [*batch, length, heads, head_dim], "
                f"got shape {tuple(x.shape)}"
            )
        if x.dtype not in dtypes and not (dense and x.dtype == jnp.float64):
            raise TypeError(f"{name} must have dtype {', '.join(others)} or {last}, got {x.dtype}")
        if x.ndim != q.ndim or x.shape[:-3] != q.shape[:-3]:
            raise ValueError(
                f"{name} must have the batch axes of q, {tuple(q.shape[:-3])}, "
                f"got {tuple(x.shape[:-3])} (shape {tuple(x.shape)})"
            )
        for axis, what in ((-2, "heads"), (-1, "head dim")):
            if x.shape[axis] == 0:
                raise ValueError(
                    f"{name} must have at least 1 in axis {axis} ({what}), "
                    f"got shape {tuple(x.shape)}"
                )
    _check_dtypes(q, k, v, names)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{k_name} must have the head dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[-3:-1] != k.shape[-3:-1]:
        raise ValueError(
            f"{v_name} must have the length and heads of {k_name}, {tuple(k.shape[-3:-1])}, "
            f"got {tuple(v.shape[-3:-1])}"
        )
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"the heads of q must be a multiple of the heads of {k_name} (grouped-query "
            f"attention), got {q.shape[-2]} and {k.shape[-2]}"
        )
    if not dense and max(q.shape[-3], k.shape[-3]) > MAX_LENGTH:
        raise UnsupportedError(
            f"lengths up to 2**30 are supported, got {q.shape[-3]} for q and {k.shape[-3]} for k"
        )
    if not dense and max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"head dims up to {MAX_HEAD_DIM} are supported, got {q.shape[-1]} for q and k, "
            f"{v.shape[-1]} for v; implementation='xla' takes any"
        )


def _check_dtypes(q: Any, k: Any, v: Any, names: tuple[str, str, str]) -> None:
    """Raises TypeError unless the dtypes of q, k and v go together.

    One dtype, or any of float8 for k and v, and for q one of float8 or of 16 bits.
    """
    q_name, k_name, v_name = names
    if is_fp8(k) and is_fp8(v):
        if not is_fp8(q) and q.dtype not in FP8_QUERY_DTYPES:
            raise TypeError(
                f"{q_name} must have dtype bfloat16, float16 or a float8 one where {k_name} and "
                f"{v_name} are float8, got {q.dtype}"
            )
        return
    for name, x in ((k_name, k), (v_name, v)):
        if x.dtype != q.dtype and not (is_fp8(x) and is_fp8(q)):
            both = f", or {k_name} and {v_name} both be float8" if is_fp8(x) else ""
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}{both}, got {x.dtype}")


def is_fp8(x: Any) -> bool:
    """Whether an array is of an 8-bit float dtype that the kernels take."""
    return x.dtype in FP8_DTYPES


def page_axes(layout: str) -> tuple[int, int]:
    """The axes of tokens and of heads in a pool of pages."""
    return (1, 2) if layout == "NHD" else (2, 1)


def check_cache(
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    layout: Any,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
) -> None:
    """Raises unless the arrays are a valid paged cache.

    Any floating dtype will do: of what is attended to, `check_pages` says more.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    token_axis, head_axis = page_axes(layout)
    axes = "page_size, K" if layout == "NHD" else "K, page_size"
    for name, x, last in (("k_pages", k_pages, "H"), ("v_pages", v_pages, "Hv")):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must have shape [num_pages, {axes}, {last}] and no axis of 0, "
                f"got {tuple(x.shape)}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
        if x.shape[token_axis] not in PAGE_SIZES:
            raise ValueError(
                f"the page size of {name} must be one of {PAGE_SIZES}, got {x.shape[token_axis]} "
                f"in axis {token_axis} of layout {layout!r} (shape {tuple(x.shape)})"
            )
        for axis, what in ((0, "pages"), (token_axis, "page size"), (head_axis, "heads")):
            if x.shape[axis] != k_pages.shape[axis]:
                raise ValueError(
                    f"{name} must have the {what} of k_pages, {k_pages.shape[axis]}, "
                    f"got {x.shape[axis]} in axis {axis}"
                )
        if x.dtype != k_pages.dtype:
            raise TypeError(
                f"{name} must have the dtype of k_pages, {k_pages.dtype}, got {x.dtype}"
            )
    for name, x in (("page_table", page_table), ("lengths", lengths)):
        if getattr(x, "dtype", None) != jnp.int32:
            got = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"{name} must be an int32 array, got {got}")
    if page_table.ndim != 2 or page_table.shape[1] == 0:
        raise ValueError(
            f"page_table must have shape [B, M] with at least 1 page per sequence, "
            f"got {tuple(page_table.shape)}"
        )
    if lengths.shape != page_table.shape[:1]:
        raise ValueError(
            f"lengths must have shape {tuple(page_table.shape[:1])}, one value per row of "
            f"page_table, got {tuple(lengths.shape)}"
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        if not is_fp8(k_pages):
            raise ValueError(f"{name} is for float8 pages, got it with {k_pages.dtype}")
        fp8_scale(name, scale, (k_pages.shape[head_axis],))
    if page_table.shape[1] * k_pages.shape[token_axis] > MAX_LENGTH:
        raise UnsupportedError(
            f"lengths up to 2**30 are supported, got {page_table.shape[1]} pages of "
            f"{k_pages.shape[token_axis]} tokens per sequence"
        )


def check_pages(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    layout: str,
    *,
    k_scale: Any,
    v_scale: Any,
    packed: bool,
    dense: bool,
) -> None:
    """Raises unless q can attend to the paged cache; `dense` as for `check_arrays`."""
    check_cache(k_pages, v_pages, page_table, lengths, layout, k_scale=k_scale, v_scale=v_scale)
    if not hasattr(q, "shape") or not hasattr(q, "dtype"):
        raise TypeError(f"q must be an array, got {type(q).__name__}")
    if q.ndim != (3 if packed else 4):
        shape = "[total, N, H] with cu_seqlens_q" if packed else "[B, T, N, H]"
        raise ValueError(f"q must have shape {shape}, got {tuple(q.shape)}")
    if not packed and q.shape[0] != page_table.shape[0]:
        raise ValueError(
            f"q must have the batch of the cache, {page_table.shape[0]}, got {q.shape[0]} "
            f"(shape {tuple(q.shape)})"
        )
    # One token stands for the keys: heads, head dims and dtypes are checked as for any.
    heads = k_pages.shape[page_axes(layout)[1]]
    k, v = (jax.ShapeDtypeStruct((1, heads, x.shape[-1]), x.dtype) for x in (k_pages, v_pages))
    queries = jax.ShapeDtypeStruct(q.shape[-3:], q.dtype)
    names = ("q", "k_pages", "v_pages")
    if is_fp8(q):
        raise UnsupportedError(
            f"q must be of 16 bits over float8 pages, which are read as they are, got {q.dtype}; "
            "convert it to bfloat16"
        )
    check_arrays(queries, k, v, dense=dense, names=names)


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


def static_int(name: str, x: Any, least: int) -> int:
    """`x` as an int from `least` on; TypeError for a tracer or a non-integer."""
    if isinstance(x, Tracer):
        raise TypeError(f"{name} must be a Python int, got a traced value; mark it static in jit")
    if isinstance(x, bool) or not isinstance(x, (int, np.integer)):
        raise TypeError(f"{name} must be a Python int, got {type(x).__name__}")
    if x < least:
        raise ValueError(f"{name} must be at least {least}, got {x}")
    return int(x)


def int32_array(name: str, x: Any, shapes: Sequence[tuple[int, ...]], what: str) -> jax.Array:
    """`x` as int32, of one of `shapes`; `what` says in words what these are."""
    if not isinstance(x, (jax.Array, np.ndarray, np.integer, int, list, tuple)) or isinstance(
        x, bool
    ):
        raise TypeError(f"{name} must be an integer array, got {type(x).__name__}")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {x.dtype}")
    if x.shape not in shapes:
        raise ValueError(f"{name} must {what}, got shape {x.shape}")
    # Wider or unsigned values saturate instead of wrapping into another meaning.
    info = jnp.iinfo(jnp.int32)
    if jnp.iinfo(x.dtype).max > info.max:
        x = jnp.clip(x, max(info.min, jnp.iinfo(x.dtype).min), info.max)
    return x.astype(jnp.int32)


def int32_per_sequence(name: str, x: Any, shape: Sequence[int]) -> jax.Array:
    """`x` as int32 of that shape, one value per sequence; a scalar serves every sequence."""
    what = f"be a scalar or have shape {tuple(shape)}, one value per sequence"
    return jnp.broadcast_to(int32_array(name, x, [(), tuple(shape)], what), shape)


def fp8_scale(name: str, x: Any, shape: tuple[int, ...]) -> jax.Array:
    """`x`, a scalar or of that shape, whose last axis is that of key heads, in float32."""
    if isinstance(x, bool) or not isinstance(
        x, (jax.Array, np.ndarray, int, float, np.integer, np.floating)
    ):
        raise TypeError(f"{name} must be a number or a floating array, got {type(x).__name__}")
    x = jnp.asarray(x) if not isinstance(x, (int, float)) else jnp.float32(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
    if x.shape not in ((), shape):
        raise ValueError(
            f"{name} must be a scalar or have shape {shape}, one value per key head, got {x.shape}"
        )
    return x.astype(jnp.float32)


def float32_per_head(name: str, x: Any, batch: Sequence[int], num_heads: int) -> jax.Array:
    """`x` as float32 `[*batch, num_heads]`, one value per query head; `[num_heads]` serves all."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
    shape = (*batch, num_heads)
    if x.shape not in ((num_heads,), shape):
        raise ValueError(
            f"{name} must have shape ({num_heads},) or {shape}, one value per query head, "
            f"got {x.shape}"
        )
    x = jnp.asarray(x, jnp.float32)
    return jnp.broadcast_to(x, shape)
