"""The references of `oracle` for 8-bit inputs: what they hold is exact.

The twin of 8-bit queries computes in float32, and rounds the weights to e4m3 and the output to its
dtype. That of 16-bit queries over 8-bit keys computes in their dtype, as any.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import oracle
from jax_flashattn import attention, attention_varlen
from tolerances import assert_close

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
DTYPES = (E4M3, E5M2)
MIXES = [(a, b, c) for a in DTYPES for b in DTYPES for c in DTYPES]
OWN_OPTIONS = ("q_scale", "k_scale", "v_scale", "out_dtype", "fp8_accumulation")


def make_inputs(seed: int, *sizes: int, dtypes: Any = (E4M3,) * 3):
    """q, k and v."""
    inputs = oracle.make_inputs(seed, *sizes, np.float32)
    return tuple(x.astype(dtype) for x, dtype in zip(inputs, dtypes, strict=False))


@partial(jax.jit, static_argnames="options")
def run(q, k, v, arrays, options):
    """Output and log-sum-exp by the package."""
    function = attention_varlen if "cu_seqlens_q" in arrays else attention
    return function(q, k, v, return_lse=True, **dict(options), **arrays)


def wide(x: Any, scale: Any) -> np.ndarray:
    """What an input `[B, length, K, dim]` means, in float64; scales are `[]`, `[K]` or `[B, K]`."""
    scale = np.asarray(1.0 if scale is None else scale, np.float32).astype(np.float64)
    scale = np.atleast_2d(scale)[:, None, :, None]
    return np.asarray(x).astype(np.float64) * scale


def rows_alike(out: np.ndarray) -> list[np.ndarray]:
    """Masks `[B, T, N]` of the rows whose largest output is of one power of two.

    Rows that see few keys are large, and so are their errors, which must not hide those of others.
    What is tiny beside the largest, or even too small for a normal number, counts to those; zeros
    are on their own.
    """
    size = np.abs(out).max(axis=-1)
    largest = size.max(initial=0)
    exponent = np.frexp(np.where(size < largest * 2.0**-14, largest, size))[1]
    exponent = np.where(size == 0, -9999, exponent)
    return [exponent == x for x in np.unique(exponent)]


def references(q, k, v, **options):
    """`[out, lse]` in float64, and by the low-precision twin."""
    q_scale = options.get("q_scale")
    if np.ndim(q_scale):
        q_scale = np.repeat(np.asarray(q_scale), q.shape[2] // k.shape[2], axis=-1)
    meant = (
        wide(q, q_scale),
        wide(k, options.get("k_scale")),
        wide(v, options.get("v_scale")),
        np.zeros((*q.shape[:3], v.shape[-1])),
        np.zeros((q.shape[0], q.shape[2], q.shape[1])),
    )
    others = {name: x for name, x in options.items() if name not in OWN_OPTIONS}
    exact = oracle.results(np.float64, *meant, **others)[0][:2]
    if q.dtype not in DTYPES:
        return exact, oracle.results(q.dtype, *meant, **others)[0][:2]
    out, lse = oracle.results(np.float32, *meant, **others, weight_dtype=E4M3)[0][:2]
    return exact, [out.astype(out_dtype(q, options)), lse]


def out_dtype(q, options):
    """The dtype of the output."""
    return jnp.dtype(options.get("out_dtype") or (jnp.bfloat16 if q.dtype in DTYPES else q.dtype))


def check(q, k, v, *, poison=None, **options) -> None:
    """Compares the package with the references.

    Args:
      q: queries of 8 or 16 bits.
      k: keys of 8 bits.
      v: values of 8 bits.
      poison: maps (q, k, v, dout) to what the package gets instead.
      **options: arguments of `attention`, or of `attention_varlen` if `cu_seqlens_q` is there.
    """
    exact, twin = references(q, k, v, **options)
    given = (q, k, v) if poison is None else poison(q, k, v, q)[:3]
    arrays = {k: x for k, x in options.items() if oracle._is_array(x)}
    got = run(*given, arrays, tuple((k, x) for k, x in options.items() if k not in arrays))
    dtype = out_dtype(q, options)
    for name, x, reference, low in zip(("out", "lse"), got, exact, twin, strict=True):
        assert x.dtype == (dtype if name == "out" else jnp.float32), name
        by_size = name == "out" and q.dtype in DTYPES
        for rows in rows_alike(reference) if by_size else [...]:
            of_rows = (np.asarray(y)[rows] for y in (x, reference, low))
            assert_close(*of_rows, dtype=dtype, what=name)
