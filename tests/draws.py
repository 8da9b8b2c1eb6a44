"""Random calls from the whole cross product of shapes, dtypes and features.

One generator with two sources of choices: hypothesis on the CPU, seeds on a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import oracle

Choose = Callable[[Sequence[Any]], Any]  # picks one


def from_seed(seed: int) -> Choose:
    """Choices that a seed repeats."""
    rng = np.random.default_rng(seed)
    return lambda choices: choices[rng.integers(len(choices))]


def _lengths(choose: Choose, count: int, total: int) -> np.ndarray:
    """Lengths of sequences: none, all, a few, or beyond the array, where they are clamped."""
    choices = [0, 1, total // 3, 64, total - 1, total, total + 7, -3]
    return np.array([choose(choices) for _ in range(count)], np.int32)


def _boundaries(choose: Choose, count: int, total: int) -> np.ndarray:
    """Where packed sequences end: empty ones, a tail, and now and then boundaries that fall."""
    choices = [0, 0, 1, 17, total // 4, total // 2, 64]
    ends = np.cumsum([0, *(choose(choices) for _ in range(count))])
    kind = choose(["tail", "tail", "all", "falling"])
    if kind == "all":
        ends[-1] = total
    elif kind == "falling":
        ends[-1], ends[count // 2] = total // 2, total + 9
    else:
        ends = np.minimum(ends, total)
    return ends.astype(np.int32)


def _segments(choose: Choose, B: int, T: int, S: int, rng: np.random.Generator) -> Any:
    """Ids of queries and keys: sorted, with gaps, in any order, or all their own."""
    kind = choose(["sorted", "gaps", "any", "apart"])
    q, kv = (rng.integers(0, 4, (B, n)).astype(np.int32) for n in (T, S))
    if kind in ("sorted", "gaps"):
        q, kv = np.sort(q, axis=1), np.sort(kv, axis=1)
    if kind == "gaps":
        kv[kv == 1] = -7
    if kind == "apart":
        kv += 3
    return q, kv


def draw(
    choose: Choose,
    *,
    sizes: Sequence[tuple[int, ...]],
    dtypes: Sequence[Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One call.

    Args:
      choose: the source of choices.
      sizes: B, T, S, N, K, H, Hv to choose from; few on a CPU, where the reference is compiled for
        each.
      dtypes: likewise.

    Returns:
      the inputs (as `oracle.make_inputs`) and the options that `oracle.check` takes.
    """
    maybe = lambda f: f() if choose([False, False, True]) else None
    B, T, S, N, K, H, Hv = choose(sizes)
    seed = choose(range(2**16))
    rng = np.random.default_rng(seed)
    inputs = oracle.make_inputs(seed, B, T, S, N, K, H, Hv, choose(dtypes))
    side = lambda: choose([None, 0, 1, 15, 64, 100, 2**40])
    is_causal = choose([False, True])
    window = maybe(lambda: choose([(side(), side()), (side(), side()), 20]))
    open_window = window is None or window == (None, None)
    options = {
        "is_causal": is_causal,
        "local_window_size": window,
        "sink_tokens": 0 if open_window and not is_causal else choose([0, 0, 1, 5, 90]),
        "logits_soft_cap": maybe(lambda: choose([0.5, 5.0, 50.0])),
        "alibi_slopes": maybe(
            lambda: rng.uniform(-0.02, 0.5, choose([(N,), (B, N)])).astype(np.float32)
        ),
        "sinks": maybe(lambda: rng.normal(size=N).astype(np.float32) * choose([1, 10])),
        "deterministic": choose([False, True]),
    }
    layout = choose(["dense", "dense", "segments", "packed"])
    if layout == "packed":
        count = choose([1, 3, 6])
        options["cu_seqlens_q"] = np.stack([_boundaries(choose, count, T) for _ in range(B)])
        if T != S or choose([False, True]):
            options["cu_seqlens_kv"] = np.stack([_boundaries(choose, count, S) for _ in range(B)])
        options["query_offset"] = choose(
            [None, 0, "end", 5, -20, rng.integers(-80, 300, (B, count)).astype(np.int32)]
        )
    else:
        if layout == "segments":
            options["segment_ids"] = _segments(choose, B, T, S, rng)
        options["query_seq_lengths"] = maybe(lambda: _lengths(choose, B, T))
        options["key_value_seq_lengths"] = maybe(lambda: _lengths(choose, B, S))
        # Distances must fit float16, in which the twin computes.
        far = 2**31 - 1 if options["alibi_slopes"] is None else 300
        options["query_offset"] = choose(
            [0, "end", 5, -20, far, rng.integers(-80, 300, B).astype(np.int32)]
        )
    return inputs, {name: x for name, x in options.items() if x is not None}


def check_seed(seed: int, sizes: Sequence[Any]) -> None:
    """Checks the call that a seed draws; `sizes` are pairs of sizes and a dtype."""
    choose = from_seed(seed)
    size, dtype = choose(sizes)
    inputs, options = draw(choose, sizes=[size], dtypes=[dtype])
    oracle.check(*inputs, poison=poison(options, choose([np.nan, np.inf])), **options)


def poison(options: dict[str, Any], value: float) -> Callable[..., Any]:
    """What `oracle.check` takes: puts `value` into all padding of q, k, v and dout."""

    def end(boundaries: Any, lengths: str, total: int) -> Any:
        if boundaries is None:
            return options.get(lengths, total)
        return np.clip(boundaries.max(axis=-1), 0, total)  # where the last sequence ends

    def fill(x: Any, length: Any) -> Any:
        beyond = np.arange(x.shape[1])[None, :] >= np.reshape(length, (-1, 1))
        return jnp.where(beyond[:, :, None, None], jnp.asarray(value, x.dtype), x)

    def apply(q: Any, k: Any, v: Any, dout: Any) -> Any:
        boundaries = options.get("cu_seqlens_q")
        of_q = end(boundaries, "query_seq_lengths", q.shape[1])
        boundaries = options.get("cu_seqlens_kv", boundaries)
        of_kv = end(boundaries, "key_value_seq_lengths", k.shape[1])
        return fill(q, of_q), fill(k, of_kv), fill(v, of_kv), fill(dout, of_q)

    return apply
