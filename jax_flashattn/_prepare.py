"""From the arguments of the public functions to one canonical call, with every check."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_flashattn import _fp8, _spec
from jax_flashattn._spec import AUX_NAMES, IMPLEMENTATIONS, SCHEDULES, AttentionSpec

MAX_WINDOW = np.iinfo(np.int32).max  # beyond, a side is open


class Call(NamedTuple):
    """One call, canonical: what every backend takes."""

    spec: AttentionSpec
    q: jax.Array  # [B, T, N, H]
    k: jax.Array  # [B, S, K, H], or pages
    v: jax.Array  # [B, S, K, Hv], or pages
    aux: dict[str, jax.Array]  # as AUX_NAMES says


def dense(
    q: Any,
    k: Any,
    v: Any,
    *,
    query_offset: Any = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    segment_ids: Any = None,
    **options: Any,
) -> Call:
    """The canonical form of a call of `attention`; `options` are those of `_finish`."""
    q, k, v, batch = _arrays(q, k, v, options.get("implementation"))
    T, S = q.shape[-3], k.shape[-3]
    aux: dict[str, jax.Array] = {}
    if query_seq_lengths is not None:
        aux["q_lengths"] = _spec.int32_per_sequence("query_seq_lengths", query_seq_lengths, batch)
    if key_value_seq_lengths is not None:
        aux["kv_lengths"] = _spec.int32_per_sequence(
            "key_value_seq_lengths", key_value_seq_lengths, batch
        )
    if segment_ids is not None:
        aux["q_segment_ids"], aux["kv_segment_ids"] = _segment_ids(segment_ids, batch, T, S)
    if query_offset is None and T != S and options.get("is_causal") is True:
        warnings.warn(
            f"causal attention with {T} queries and {S} keys and no query_offset: query 0 is at "
            "position 0 (top-left, as in jax.nn). Pass query_offset=0 to say so, or 'end' for "
            "FlashAttention's bottom-right alignment",
            stacklevel=3,
        )
    offset = _static_offset(query_offset)
    if offset == "end" and "q_lengths" not in aux and "kv_lengths" not in aux:
        offset = S - T
    if offset == "end":
        q_length = jnp.clip(aux.get("q_lengths", jnp.int32(T)), 0, T)
        kv_length = jnp.clip(aux.get("kv_lengths", jnp.int32(S)), 0, S)
        offset = jnp.broadcast_to(kv_length - q_length, batch)
    elif offset is None:
        offset = _spec.int32_per_sequence("query_offset", query_offset, batch)
    return _finish(q, k, v, batch, k.shape[-2], offset, aux, **options)


def packed(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any = None,
    query_offset: Any = None,
    **options: Any,
) -> Call:
    """The canonical form of a call of `attention_varlen`; `options` are those of `_finish`."""
    q, k, v, batch = _arrays(q, k, v, options.get("implementation"))
    T, S = q.shape[-3], k.shape[-3]
    if cu_seqlens_kv is None and T != S:
        raise ValueError(
            f"cu_seqlens_kv must be given where q and k differ in length, got {T} and {S} tokens"
        )
    ends_q = boundaries("cu_seqlens_q", cu_seqlens_q, batch, T)
    ends_kv = (
        ends_q if cu_seqlens_kv is None else boundaries("cu_seqlens_kv", cu_seqlens_kv, batch, S)
    )
    if ends_q.shape != ends_kv.shape:
        raise ValueError(
            f"cu_seqlens_kv must have as many sequences as cu_seqlens_q, {ends_q.shape[-1] - 1}, "
            f"got {ends_kv.shape[-1] - 1}"
        )
    aux = {"cu_seqlens_q": ends_q, "cu_seqlens_kv": ends_kv}
    num_sequences = ends_q.shape[-1] - 1
    offset = _static_offset(query_offset)
    if offset == "end" and cu_seqlens_kv is None:
        offset = 0
    elif offset == "end":
        offset = jnp.diff(ends_kv) - jnp.diff(ends_q)
    elif offset is None:
        offset = _offset_per_packed_sequence(query_offset, batch, num_sequences)
    return _finish(q, k, v, batch, k.shape[-2], offset, aux, **options)


def paged(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    layout: str,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    cu_seqlens_q: Any = None,
    query_offset: Any = None,
    query_seq_lengths: Any = None,
    **options: Any,
) -> Call:
    """The canonical form of a call of `paged_attention`; `options` are those of `_finish`."""
    _check_implementation(options.get("implementation"))
    q = jnp.asarray(q) if isinstance(q, np.ndarray) else q
    packed = cu_seqlens_q is not None
    dense = options.get("implementation") == "xla"
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    _spec.check_pages(
        q, k_pages, v_pages, page_table, lengths, layout, **scales, packed=packed, dense=dense
    )
    capacity = page_table.shape[1] * k_pages.shape[_spec.page_axes(layout)[0]]
    num_sequences, T = page_table.shape[0], q.shape[-3]
    lengths = jnp.clip(lengths, 0, capacity)
    aux: dict[str, jax.Array] = {"kv_lengths": lengths, "page_table": page_table}
    if packed:
        if query_seq_lengths is not None:
            raise ValueError(
                "query_seq_lengths must be left out with cu_seqlens_q, which says the same"
            )
        ends = boundaries_in_cache("cu_seqlens_q", cu_seqlens_q, num_sequences, T)
        aux["cu_seqlens_q"], q_lengths = ends, jnp.diff(ends)
    elif query_seq_lengths is not None:
        q_lengths = _spec.int32_per_sequence(
            "query_seq_lengths", query_seq_lengths, (num_sequences,)
        )
        q_lengths = aux["q_lengths"] = jnp.clip(q_lengths, 0, T)
    else:
        q_lengths = jnp.int32(T)
    offset = _static_offset(query_offset)
    if offset == "end":
        offset = lengths - q_lengths
    elif offset is None:
        offset = _spec.int32_per_sequence("query_offset", query_offset, (num_sequences,))
    # Packed sequences are one element of the batch.
    batch = () if packed else (num_sequences,)
    # Its scales are the same for all sequences.
    num_kv_heads = k_pages.shape[_spec.page_axes(layout)[1]]
    for name, scale in scales.items():
        if scale is not None:
            options[name] = jnp.broadcast_to(jnp.asarray(scale), (*batch, num_kv_heads))
    return _finish(q, k_pages, v_pages, batch, num_kv_heads, offset, aux, **options)


def _finish(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    batch: tuple[int, ...],
    num_kv_heads: int,
    offset: Any,
    aux: dict[str, jax.Array],
    *,
    scale: Any = None,
    is_causal: Any = False,
    local_window_size: Any = None,
    sink_tokens: Any = 0,
    sinks: Any = None,
    alibi_slopes: Any = None,
    logits_soft_cap: Any = None,
    deterministic: Any = False,
    schedule: Any = None,
    sm_margin: Any = 0,
    implementation: Any = None,
    **of_fp8: Any,
) -> Call:
    """What dense, packed and paged calls share."""
    is_causal = _spec.static_bool("is_causal", is_causal)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    scale = _spec.static_number("scale", scale, "multiply q by it instead")
    if scale <= 0:
        # Kernels take the maximum before they scale, which needs a positive factor.
        q, scale = q * jnp.asarray(math.copysign(1, scale) if scale else 0, q.dtype), -scale or 1.0
    fp8_fields, fp8_aux = _fp8.options(q, k, v, batch, num_kv_heads, **of_fp8)
    aux.update(fp8_aux)
    soft_cap = None
    if logits_soft_cap is not None:
        soft_cap = _spec.static_number("logits_soft_cap", logits_soft_cap, "it must be static")
        if soft_cap <= 0:
            raise ValueError(f"logits_soft_cap must be positive, got {soft_cap}")
    left, right = _window(local_window_size)
    has_window = left is not None or right is not None
    sink_tokens = min(_spec.static_int("sink_tokens", sink_tokens, 0), _spec.MAX_LENGTH)
    if sink_tokens and not is_causal and not has_window:
        raise ValueError(
            f"sink_tokens must come with a window or a causal mask, got {sink_tokens} without: "
            "all keys are visible already"
        )
    left, right = (None if x is None or x > MAX_WINDOW else x for x in (left, right))
    if is_causal:
        right = None  # what causality hides anyway
    elif right == 0 and left is None and not sink_tokens:
        is_causal, right = True, None  # the same mask, for which there are faster kernels
    if left is None and right is None:
        sink_tokens = 0  # nothing that they would be exempt from

    N = q.shape[-2]
    if alibi_slopes is not None:
        aux["alibi_slopes"] = _spec.float32_per_head("alibi_slopes", alibi_slopes, batch, N)
    if sinks is not None:
        if jnp.ndim(sinks) != 1:
            raise ValueError(
                f"sinks must have shape ({N},), one value per query head, got {jnp.shape(sinks)}"
            )
        aux["sinks"] = _spec.float32_per_head("sinks", sinks, batch, N)

    # Positions matter to masks and ALiBi alone: without them, no operand and no recompilation.
    if not (is_causal or left is not None or right is not None or "alibi_slopes" in aux):
        offset = 0
    if not isinstance(offset, int):
        aux["query_offset"] = offset

    spec = AttentionSpec(
        scale=scale,
        soft_cap=soft_cap,
        is_causal=is_causal,
        window_left=left,
        window_right=right,
        sink_tokens=sink_tokens,
        query_offset=offset if isinstance(offset, int) else 0,
        aux=tuple(name for name in AUX_NAMES if name in aux),
        deterministic=_spec.static_bool("deterministic", deterministic),
        implementation=implementation,
        **_launch_options(schedule, sm_margin),
        **fp8_fields,
    )
    B = math.prod(batch)
    q = q.reshape(B, *q.shape[-3:])
    if "page_table" not in aux:  # pages belong to no batch element
        k, v = (x.reshape(B, *x.shape[-3:]) for x in (k, v))
    aux = {name: x.reshape(B, *x.shape[len(batch) :]) for name, x in aux.items()}
    return Call(spec, q, k, v, aux)


def _arrays(q: Any, k: Any, v: Any, implementation: Any) -> tuple[Any, Any, Any, tuple[int, ...]]:
    """q, k and v, checked, and their batch axes."""
    _check_implementation(implementation)
    q, k, v = (jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in (q, k, v))
    _spec.check_arrays(q, k, v, dense=implementation == "xla")
    return q, k, v, tuple(q.shape[:-3])


def _check_implementation(name: Any) -> None:
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {name!r}")


def _launch_options(schedule: Any, sm_margin: Any) -> dict[str, Any]:
    """The fields of the spec that say how the forward's tiles are dealt out on a GPU."""
    if schedule is not None and schedule not in SCHEDULES:
        raise ValueError(f"schedule must be None or one of {SCHEDULES}, got {schedule!r}")
    # More than any GPU has means the same as all but one.
    sm_margin = min(_spec.static_int("sm_margin", sm_margin, 0), _spec.MAX_LENGTH)
    if sm_margin and schedule == "grid":
        raise ValueError(
            f"sm_margin must be 0 with schedule='grid', which uses all multiprocessors, "
            f"got {sm_margin}"
        )
    return {"schedule": schedule or ("persistent" if sm_margin else None), "sm_margin": sm_margin}


def _window(size: Any) -> tuple[int | None, int | None]:
    """`local_window_size` as (left, right), of which None is open."""
    left, right = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    if isinstance(left, (tuple, list)):
        raise ValueError(f"local_window_size must be an int or (left, right), got {size!r}")

    def side(x: Any) -> int | None:
        return None if x is None else _spec.static_int("local_window_size", x, 0)

    return side(left), side(right)


def _static_offset(query_offset: Any) -> int | str | None:
    """The offset where it is the same for all and known now, 'end', or None for an array."""
    if query_offset is None:
        return 0
    if isinstance(query_offset, str):
        if query_offset != "end":
            raise ValueError(
                f"query_offset must be an int, 'end' or an int array, got {query_offset!r}"
            )
        return query_offset
    if isinstance(query_offset, (int, np.integer)) and not isinstance(query_offset, bool):
        info = np.iinfo(np.int32)
        return int(min(max(query_offset, info.min), info.max))
    return None


def _offset_per_packed_sequence(offset: Any, batch: Sequence[int], num_sequences: int) -> jax.Array:
    """int32 `[*batch, num_sequences]`; the batch axes may be left out."""
    shape = (*batch, num_sequences)
    x = _spec.int32_array(
        "query_offset",
        offset,
        [(), (num_sequences,), shape],
        f"be a scalar or have shape ({num_sequences},) or {shape}, one value per sequence",
    )
    return jnp.broadcast_to(x, shape)


def _segment_ids(ids: Any, batch: tuple[int, ...], T: int, S: int) -> tuple[jax.Array, jax.Array]:
    """Ids of queries and keys, int32 `[*batch, T]` and `[*batch, S]`."""
    if not isinstance(ids, (tuple, list)):
        if T != S:
            raise ValueError(
                f"segment_ids must be a pair (of queries, of keys) where their lengths differ, "
                f"got one array for {T} and {S}"
            )
        ids = (ids, ids)
    if len(ids) != 2:
        raise ValueError(f"segment_ids must be one array or a pair, got {len(ids)} items")

    def canonical(name: str, x: Any, length: int) -> jax.Array:
        shapes = [(*batch, length), (length,)]
        what = f"have shape {shapes[0]} or ({length},)"
        x = _spec.int32_array(f"segment_ids of {name}", x, shapes, what)
        return jnp.broadcast_to(x, shapes[0])

    return canonical("queries", ids[0], T), canonical("keys", ids[1], S)


def boundaries(name: str, x: Any, batch: tuple[int, ...], total: int) -> jax.Array:
    """Where sequences begin and end: int32 `[*batch, n + 1]`, rising from 0, at most `total`.

    What isn't so is made so: an end before its begin is an empty sequence.
    """
    if np.ndim(x) not in (1, 1 + len(batch)) or np.shape(x)[-1] < 2:
        raise ValueError(
            f"{name} must have shape [n + 1] or {[*batch, 'n + 1']} with n >= 1 sequences, "
            f"got {np.shape(x)}"
        )
    shape = (*batch, np.shape(x)[-1])
    x = _spec.int32_array(
        name, x, [shape, shape[-1:]], f"have shape {shape} or {shape[-1:]} (sequences + 1)"
    )
    x = lax.cummax(jnp.clip(x, 0, total).at[..., 0].set(0), axis=x.ndim - 1)
    return jnp.broadcast_to(x, shape)


def boundaries_in_cache(name: str, x: Any, num_sequences: int, total: int) -> jax.Array:
    """Where the tokens of a cache's sequences begin and end: int32 `[num_sequences + 1]`."""
    ends = boundaries(name, x, (), total)
    if ends.shape[0] != num_sequences + 1:
        raise ValueError(
            f"{name} must have shape ({num_sequences + 1},), one more than the sequences of the "
            f"cache, got {ends.shape}"
        )
    return ends
