"""Calls that reach every CUDA kernel, by name; `scripts/sanitize_cuda.py` runs them checked.

    python scripts/sanitizer_cases.py CASE [FIRST LAST]

A case is a list of parts, of which those from number FIRST to before LAST run, or all.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn import PagedKVCache, attention, attention_varlen, paged_attention

# The name of a part, and what runs it and gives its results.
Part = tuple[str, Callable[[], object]]

T, S = 150, 170
IDS = np.arange(S, dtype=np.int32) // 40
HEAD_DIMS = ((64, 64), (100, 100), (128, 128), (192, 128), (256, 256))
FP8_HEAD_DIMS = LENGTH_HEAD_DIMS = ((64, 64), (128, 128), (256, 256))
FEATURES = {
    "plain": {},
    "window": dict(local_window_size=(30, 5), sink_tokens=3),
    "biases": dict(
        logits_soft_cap=5.0,
        alibi_slopes=np.ones(4, np.float32),
        sinks=np.ones(4, np.float32),
    ),
    "segments": dict(segment_ids=(IDS[:T], IDS)),
    "packed": dict(
        cu_seqlens_q=np.array([0, 60, 61, 140], np.int32),
        cu_seqlens_kv=np.array([0, 0, 90, 169], np.int32),
    ),
}


def _inputs(*shapes, dtype=jnp.bfloat16):
    # Made by numpy, so that XLA has no kernels of its own to run for them.
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape, np.float32).astype(dtype)) for shape in shapes]


def _attention(q, k, v, features, **options):
    options = dict(is_causal=True, query_offset="end", **options, **features)
    if "cu_seqlens_q" in features:
        return attention_varlen(q[0], k[0], v[0], **options)
    return attention(q, k, v, key_value_seq_lengths=np.array([S, 70], np.int32), **options)


def _forward(f, shapes, dtype=jnp.bfloat16):
    return jax.jit(f)(*_inputs(*shapes, dtype=dtype))


def _gradients(f, shapes):
    out, vjp = jax.vjp(f, *_inputs(*shapes))
    return out, vjp(out)


def train(head_dim: int, head_dim_v: int) -> Iterator[Part]:
    """Forward and backward, with each feature, fast and deterministic."""
    shapes = (2, T, 4, head_dim), (2, S, 2, head_dim), (2, S, 2, head_dim_v)
    for name, features in FEATURES.items():
        for deterministic in (False, True):
            f = partial(_attention, features=features, deterministic=deterministic)
            yield f"{name}, deterministic={deterministic}", partial(_gradients, f, shapes)


def lengths(head_dim: int, head_dim_v: int) -> Iterator[Part]:
    """The forward of more keys, which has other tiles, full and causal, and as a grid."""
    for keys in (1100, 8200):
        shapes = (1, T, 2, head_dim), (1, keys, 1, head_dim), (1, keys, 1, head_dim_v)
        for is_causal in (False, True):
            for schedule in (None, "grid"):
                f = partial(attention, is_causal=is_causal, query_offset="end", schedule=schedule)
                yield f"{keys} keys, causal={is_causal}, {schedule}", partial(_forward, f, shapes)


def fp8(head_dim: int, head_dim_v: int) -> Iterator[Part]:
    """The forward of 8-bit floats, which there is on Hopper only."""
    shapes = (2, T, 4, head_dim), (2, S, 2, head_dim), (2, S, 2, head_dim_v)
    for name, features in FEATURES.items():
        for sums in ("fast", "two_level"):
            f = partial(_attention, features=features, fp8_accumulation=sums)
            yield f"{name}, {sums}", partial(_forward, f, shapes, jnp.float8_e4m3fn)


def decode(head_dim: int, head_dim_v: int) -> Iterator[Part]:
    """One key head's rows of 16, 32, 64 and 128 a tile, by clusters and by stretches of keys."""
    for tokens, heads, num_keys in (
        *((1, 4, 3000), (3, 16, 3000), (1, 4, 15000), (3, 16, 15000)),
        *((3, 32, 3000), (2, 128, 3000)),
    ):
        keys = (2, num_keys, 2, head_dim), (2, num_keys, 2, head_dim_v)
        shapes = (2, tokens, heads, head_dim), *keys
        for name in ("plain", "window", "biases"):
            features = {
                x: np.ones(heads, np.float32) if isinstance(y, np.ndarray) else y
                for x, y in FEATURES[name].items()
            }
            lengths = np.array([num_keys, 77], np.int32)
            options = dict(is_causal=True, query_offset="end", key_value_seq_lengths=lengths)
            f = partial(attention, **options, **features)
            yield f"{name}, {tokens}x{heads}, {num_keys} keys", partial(_forward, f, shapes)


def _over_pages(pages, layout, features):
    lengths = np.array([S, 70, 0], np.int32)
    table = np.random.default_rng(1).permutation(3 * 32).reshape(3, 32).astype(np.int32)
    cache = PagedKVCache(*_inputs(*pages), jnp.asarray(table), jnp.asarray(lengths), layout)
    one, chunk = _inputs((3, 1, 4, pages[0][-1]), (3, 40, 4, pages[0][-1]))
    f = jax.jit(partial(paged_attention, **features))
    packed = f(chunk[0, :41], cache, cu_seqlens_q=np.array([0, 40, 41, 41], np.int32))
    return f(one, cache), f(chunk, cache), packed


def paged(head_dim: int, head_dim_v: int) -> Iterator[Part]:
    """Decoding, chunks and packed queries over pages of every size, in both layouts."""
    for page_size in (8, 16, 32, 64, 128, 256):
        for layout in ("NHD", "HND"):
            middle = (page_size, 2) if layout == "NHD" else (2, page_size)
            pages = (96, *middle, head_dim), (96, *middle, head_dim_v)
            for name in ("plain", "window", "biases"):
                part = partial(_over_pages, pages, layout, FEATURES[name])
                yield f"{name}, pages of {page_size} {layout}", part


def _over_8_bits(head_dim, head_dim_v, dtype, tokens, heads):
    lengths = np.array([S, 70], np.int32)
    table = np.random.default_rng(1).permutation(2 * 16).reshape(2, 16).astype(np.int32)
    k, v = _inputs((2, S, 2, head_dim), (2, S, 2, head_dim_v), dtype=dtype)
    pages = _inputs((32, 16, 2, head_dim), (32, 16, 2, head_dim_v), dtype=dtype)
    cache = PagedKVCache(*pages, jnp.asarray(table), jnp.asarray(lengths))
    [q] = _inputs((2, tokens, heads, head_dim))
    f = partial(attention, is_causal=True, query_offset="end", v_scale=0.5)
    dense = jax.jit(f)(q, k, v, key_value_seq_lengths=lengths)
    return dense, jax.jit(paged_attention)(q, cache)


def cache8(head_dim: int, head_dim_v: int) -> Iterator[Part]:
    """8-bit keys and values under 16-bit queries: decoding, longer calls, pages."""
    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        for tokens, heads in ((1, 4), (3, 16), (3, 32), (T, 4)):
            part = partial(_over_8_bits, head_dim, head_dim_v, dtype, tokens, heads)
            yield f"{jnp.dtype(dtype).name}, {tokens}x{heads}", part


CASES = {
    f"{group.__name__}-{h}x{hv}": partial(group, h, hv)
    for group, dims in (
        (train, HEAD_DIMS),
        (lengths, LENGTH_HEAD_DIMS),
        (fp8, FP8_HEAD_DIMS),
        (decode, HEAD_DIMS),
        (paged, HEAD_DIMS[::2]),
        (cache8, FP8_HEAD_DIMS),
    )
    for h, hv in dims
}


def _run(case, first=0, last=None):
    for name, part in list(CASES[case]())[first:last]:
        for x in jax.tree.leaves(part()):
            assert np.isfinite(np.asarray(x, np.float32)).all(), name
        print("ran", name, flush=True)


if __name__ == "__main__":
    _run(sys.argv[1], *map(int, sys.argv[2:]))
