"""What attention is, written out in numpy: in float64, and as the low-precision twin.

It shares no line with the package. Each operation rounds to one dtype, that of the inputs for the
twin; matrix products and sums accumulate in float32 (float64 for the exact one).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn import attention, attention_varlen
from tolerances import assert_close

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
DIFFERENTIABLE_OPTIONS = ("alibi_slopes", "sinks")


def make_inputs(seed: int, B: int, T: int, S: int, N: int, K: int, H: int, Hv: int, dtype: Any):
    """q, k, v, and cotangents of out and lse, all normal."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, Hv), (B, T, N, Hv), (B, N, T))
    *arrays, dlse = (rng.standard_normal(s, np.float32) for s in shapes)
    return *(x.astype(dtype) for x in arrays), dlse


def rising(q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same with positive logits that grow to the left, the way in which kernels visit keys."""
    ramp = np.linspace(4, 0.02, k.shape[1], dtype=np.float32)[None, :, None, None]
    q_wide, k_wide = (np.abs(x.astype(np.float32)) for x in (q, k))
    return q_wide.astype(q.dtype), (k_wide * ramp).astype(k.dtype)


class Tokens(NamedTuple):
    """Where the tokens of one side stand: int64 `[B, length]`."""

    position: np.ndarray  # in the sequence
    sequence: np.ndarray  # its number, -1 for padding


def _tokens(B: int, length: int, lengths: Any, boundaries: Any) -> Tokens:
    position = np.tile(np.arange(length), (B, 1))
    if boundaries is None:
        end = length if lengths is None else np.reshape(lengths, (-1, 1))
        return Tokens(position, np.where(position < end, 0, -1))
    sequence = np.full((B, length), -1)
    for b, ends in enumerate(np.broadcast_to(boundaries, (B, np.shape(boundaries)[-1]))):
        begin = 0
        for number, boundary in enumerate(ends[1:]):
            end = max(begin, min(int(boundary), length))
            position[b, begin:end] -= begin
            sequence[b, begin:end] = number
            begin = end
    return Tokens(position, sequence)


def _lengths_of_sequences(tokens: Tokens, count: int) -> np.ndarray:
    return np.stack([(tokens.sequence == i).sum(axis=1) for i in range(count)], axis=1)


def _visible(
    queries: Tokens,
    keys: Tokens,
    distance: np.ndarray,
    is_causal: bool,
    window: Any,
    sink_tokens: int,
    segment_ids: Any,
) -> np.ndarray:
    """Bool `[B, T, S]`; `distance` is the key's position minus the query's, offset counted."""
    mask = queries.sequence[:, :, None] == keys.sequence[:, None, :]
    mask &= (queries.sequence >= 0)[:, :, None]
    if is_causal:
        mask &= distance <= 0
    left, right = window if isinstance(window, tuple) else (window, window)
    near = np.ones_like(mask)
    if left is not None:
        near &= distance >= -left
    if right is not None:
        near &= distance <= right
    mask &= near | (keys.position < sink_tokens)[:, None, :]
    if segment_ids is not None:
        of_q, of_kv = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        mask &= np.asarray(of_q)[..., :, None] == np.asarray(of_kv)[..., None, :]
    return mask


def _round_weights(weights: np.ndarray, visible: np.ndarray, position: np.ndarray, dtype: Any):
    """Weights `[B, K, G, T, S]` as a kernel rounds them that visits keys from right to left.

    It scales a row by a reference: 2^4 for the largest weight when that is in the first block that
    it visits, whose size is a multiple of 32. Else the reference may lag behind, and the largest
    weight is any number up to 2^8: one here that rounds badly.
    """
    block = np.where(visible, position[:, None, None, None, :] // 32, -1)
    highest = weights.max(axis=-1, keepdims=True)
    in_first = (weights == highest) & (block == block.max(axis=-1, keepdims=True))
    largest = np.where(in_first.any(axis=-1, keepdims=True), 16, 13.5).astype(weights.dtype)
    # Sinks may leave next to nothing.
    factor = largest / np.maximum(highest, np.finfo(weights.dtype).tiny * 2.0**10)
    return (weights * factor).astype(dtype).astype(weights.dtype) / factor


@partial(np.errstate, all="ignore")()
def results(
    dtype: Any,
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    dlse: Any,
    *,
    scale: Any = None,
    is_causal: bool = False,
    query_offset: Any = None,
    local_window_size: Any = None,
    sink_tokens: int = 0,
    sinks: Any = None,
    alibi_slopes: Any = None,
    logits_soft_cap: Any = None,
    segment_ids: Any = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    implementation: Any = None,
    weight_dtype: Any = None,
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """`[out, lse, dq, dk, dv]` and the gradients `[B, N]` of slopes and sinks that are given.

    Also what the latter are sums of, since their rounding is that of their largest term. Weights
    are rounded to `weight_dtype` for their product with v.
    """
    wide = np.float64 if dtype == np.float64 else np.float32
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    q, k, v, dout, dlse = (np.asarray(x).astype(dtype) for x in (q, k, v, dout, dlse))
    dot = lambda *x: np.einsum(x[0], *(y.astype(wide) for y in x[1:]), optimize=True).astype(dtype)
    total = lambda x, axis: x.astype(wide).sum(axis=axis).astype(dtype)
    rows = lambda x: x.reshape(B, T, K, N // K, -1)
    scalars = lambda x: x.reshape(B, K, N // K, T, 1)
    heads = lambda x: np.broadcast_to(x, (B, N)).reshape(B, K, N // K, 1, 1).astype(dtype)

    if cu_seqlens_kv is None:
        cu_seqlens_kv = cu_seqlens_q
    queries = _tokens(B, T, query_seq_lengths, cu_seqlens_q)
    keys = _tokens(B, S, key_value_seq_lengths, cu_seqlens_kv)
    count = 1 if cu_seqlens_q is None else np.shape(cu_seqlens_q)[-1] - 1
    if isinstance(query_offset, str):
        offset = _lengths_of_sequences(keys, count) - _lengths_of_sequences(queries, count)
    else:
        offset = np.asarray(0 if query_offset is None else query_offset, np.int64)
        if cu_seqlens_q is None:
            offset = offset.reshape(-1, 1)
        offset = np.broadcast_to(offset, (B, count))
    offset = np.take_along_axis(offset, np.maximum(queries.sequence, 0), axis=1)
    distance = keys.position[:, None, :] - (queries.position + offset)[:, :, None]
    mask = _visible(
        queries, keys, distance, is_causal, local_window_size, sink_tokens, segment_ids
    )[:, None, None]
    distance = abs(distance)[:, None, None].astype(dtype)

    scale = np.asarray(1 / np.sqrt(H) if scale is None else scale, wide).astype(dtype)
    x = dot("btkgh,bskh->bkgts", rows(q), k) * scale
    slope = np.full_like(x, scale)
    if logits_soft_cap is not None:
        cap = np.asarray(logits_soft_cap, dtype)
        tanh = np.tanh(x / cap)
        x, slope = cap * tanh, slope * (1 - tanh * tanh).astype(dtype)
    if alibi_slopes is not None:
        x = x - heads(alibi_slopes) * distance
    x = np.where(mask, x, np.asarray(-np.inf, dtype))
    sink = np.full((1, 1, 1, 1, 1), -np.inf, dtype)
    if sinks is not None:
        exists = (queries.sequence >= 0)[:, None, None, :, None]
        sink = np.where(exists, heads(sinks), sink)
    top = np.maximum(x.max(axis=-1, keepdims=True), sink)
    top = np.where(top == -np.inf, np.asarray(0, dtype), top)
    weights = np.exp(x - top)
    denominator = total(weights, -1)[..., None] + np.exp(sink - top)
    empty = denominator == 0
    denominator = np.where(empty, np.asarray(1, dtype), denominator)
    rounded = weights
    if weight_dtype is not None:
        rounded = _round_weights(weights, x > -np.inf, keys.position, weight_dtype)
    out = dot("bkgts,bskd->btkgd", rounded / denominator, v).reshape(B, T, N, -1)
    lse = np.where(empty, np.asarray(-np.inf, dtype), top + np.log(denominator))

    # Backward recomputes the weights from lse, as the kernels do.
    finite = np.where(np.isinf(lse), np.asarray(0, dtype), lse)
    weights = np.where(mask, np.exp(x.astype(wide) - finite.astype(wide)), 0).astype(dtype)
    delta = total(dout * out, -1).swapaxes(1, 2) - dlse
    dx = weights * (dot("btkgd,bskd->bkgts", rows(dout), v) - scalars(delta))
    dscores = dx * slope
    found = [out, lse.reshape(B, N, T).astype(wide)]
    found += [dot("bkgts,bskh->btkgh", dscores, k).reshape(q.shape)]
    found += [dot("bkgts,btkgh->bskh", dscores, rows(q))]
    found += [dot("bkgts,btkgd->bskd", weights, rows(dout))]
    terms = {}
    if alibi_slopes is not None:
        pairs = np.where(mask, dx * distance, np.asarray(0, dtype))
        terms["alibi_slopes"] = total(abs(pairs), -1)
        found += [-total(pairs, (3, 4)).reshape(B, N)]
    if sinks is not None:
        of_sink = np.where(np.isinf(lse), np.asarray(0, dtype), np.exp(sink - finite))
        terms["sinks"] = (of_sink * scalars(delta))[..., 0]
        found += [-total(terms["sinks"], -1).reshape(B, N)]
    return found, terms


def references(*inputs, **options):
    """Results in float64, the same by the low-precision twin, and terms as `results` has them."""
    exact, terms = results(np.float64, *inputs, **options)
    return exact, results(inputs[0].dtype, *inputs, **options)[0], terms


@partial(jax.jit, static_argnames="options")
def run(q, k, v, dout, dlse, arrays, options):
    """The same by the package."""
    wrt = {x: arrays[x] for x in DIFFERENTIABLE_OPTIONS if x in arrays}
    function = attention_varlen if "cu_seqlens_q" in arrays else attention

    def f(q, k, v, wrt):
        return function(q, k, v, return_lse=True, **dict(options), **{**arrays, **wrt})

    (out, lse), vjp = jax.vjp(f, q, k, v, wrt)
    *gradients, of_aux = vjp((dout, dlse))
    return out, lse, *gradients, *(of_aux[name] for name in wrt)


def _is_array(x: Any) -> bool:
    if isinstance(x, tuple):
        return any(map(_is_array, x))
    return isinstance(x, (jax.Array, np.ndarray))


def check(q, k, v, dout, dlse, *, poison=None, **options) -> None:
    """Compares the package, forward and backward, with the references.

    Args:
      q: queries; k, v, dout, dlse likewise.
      k: keys.
      v: values.
      dout: cotangent of the output.
      dlse: cotangent of the log-sum-exp.
      poison: maps (q, k, v, dout) to what the package gets instead, such as NaN in the padding.
      **options: arguments of `attention`, or of `attention_varlen` if `cu_seqlens_q` is there.
    """
    arrays = {k: x for k, x in options.items() if _is_array(x)}
    static = tuple((k, x) for k, x in options.items() if k not in arrays)
    exact, twin, terms = references(q, k, v, dout, dlse, **options)
    given = (q, k, v, dout) if poison is None else poison(q, k, v, dout)
    got = run(*given, dlse, arrays, static)
    names = ("out", "lse", "dq", "dk", "dv", *(x for x in DIFFERENTIABLE_OPTIONS if x in arrays))
    for name, x, reference, low in zip(names, got, exact, twin, strict=True):
        assert x.dtype == (q.dtype if name in ("out", "dq", "dk", "dv") else jnp.float32), name
        # Slopes and sinks of shape [N] are shared by the batch.
        shared = x.shape != reference.shape
        alike = [y.astype(np.float64).sum(axis=0) if shared else y for y in (reference, low)]
        assert_close(x, *alike, dtype=q.dtype, what=name, terms=terms.get(name))


def check_repeatable(q: Any, k: Any, v: Any) -> None:
    """Asserts that a call gives the same bits each time."""
    f = jax.jit(lambda *x: attention(*x, return_lse=True))
    first = f(q, k, v)
    for _ in range(20):
        for x, y in zip(first, f(q, k, v), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
