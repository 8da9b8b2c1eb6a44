"""Inputs, the float64 reference and its low-precision twin, and the comparison with a kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn import _api, _reference, attention
from tolerances import assert_close

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def make_inputs(seed: int, B: int, T: int, S: int, N: int, K: int, H: int, Hv: int, dtype: Any):
    """q, k, v, and cotangents of out and lse, all normal."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, Hv), (B, T, N, Hv), (B, N, T))
    *arrays, dlse = (rng.standard_normal(s, np.float32) for s in shapes)
    return *(x.astype(dtype) for x in arrays), dlse


@partial(jax.jit, static_argnames="spec")
def _exact(spec, q, k, v, aux, dout, dlse):
    (out, lse), vjp = jax.vjp(lambda *x: _reference.attention(spec, *x, aux), q, k, v)
    return out, lse, *vjp((dout.astype(out.dtype), dlse.astype(lse.dtype)))


@partial(jax.jit, static_argnames="spec")
def _twin(spec, q, k, v, aux, dout, dlse):
    """The low-precision twin; its backward recomputes the weights from lse, as flash does."""
    out, lse = _reference.attention(spec, q, k, v, aux, softmax_dtype=q.dtype)
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    dtype = q.dtype
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    rows = lambda x: x.reshape(B, T, K, N // K, -1)
    scalars = lambda x: x.reshape(B, K, N // K, T, 1)
    mask = _reference.visible(spec, T, S, aux)[:, None, None]
    scale = jnp.asarray(spec.scale, dtype)

    logits = dot("btkgh,bskh->bkgts", rows(q), k).astype(dtype) * scale
    finite_lse = scalars(jnp.where(jnp.isfinite(lse), lse, 0))
    weights = jnp.exp(logits.astype(jnp.float32) - finite_lse)
    weights = jnp.where(mask, weights, 0).astype(dtype)
    dweights = dot("btkgd,bskd->bkgts", rows(dout), v).astype(dtype)
    delta = jnp.sum(dout * out, axis=-1).swapaxes(1, 2) - dlse.astype(dtype)
    dlogits = weights * (dweights - scalars(delta)) * scale
    dq = dot("bkgts,bskh->btkgh", dlogits, k).reshape(q.shape)
    dk = dot("bkgts,btkgh->bskh", dlogits, rows(q))
    dv = dot("bkgts,btkgd->bskd", weights, rows(dout))
    return out, lse, *(x.astype(dtype) for x in (dq, dk, dv))


def references(q, k, v, dout, dlse, **options):
    """`(out, lse, dq, dk, dv)` in float64, and by the low-precision twin."""
    # On the CPU, where float64 compiles quickly, also when the kernel runs on a GPU.
    with jax.default_device(jax.devices("cpu")[0]):
        return _references(q, k, v, dout, dlse, options)


def _references(q, k, v, dout, dlse, options):
    call = _api.prepare(q, k, v, **options)
    dout = dout.reshape(-1, *dout.shape[-3:])
    dlse = dlse.reshape(-1, *dlse.shape[-2:])
    twin = _twin(*call, dout, dlse)
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (call.q, call.k, call.v)]
        exact = _exact(call.spec, *wide, call.aux, dout, dlse)
    return exact, twin


@partial(jax.jit, static_argnames="options")
def _run(q, k, v, dout, dlse, arrays, options):
    f = lambda q, k, v: attention(q, k, v, return_lse=True, **dict(options), **arrays)
    (out, lse), vjp = jax.vjp(f, q, k, v)
    return out, lse, *vjp((dout, dlse))


def check(q, k, v, dout, dlse, *, poison=None, **options) -> None:
    """Compares our kernels, forward and backward, with the references.

    Args:
      q: queries; k, v, dout, dlse likewise.
      k: keys.
      v: values.
      dout: cotangent of the output.
      dlse: cotangent of the log-sum-exp.
      poison: maps (q, k, v, dout) to what the kernel gets instead, such as NaN in the padding.
      **options: arguments of `attention`.
    """
    arrays = {k: x for k, x in options.items() if isinstance(x, (jax.Array, np.ndarray))}
    static = tuple((k, x) for k, x in options.items() if k not in arrays)
    exact, twin = references(q, k, v, dout, dlse, **options)
    given = (q, k, v, dout) if poison is None else poison(q, k, v, dout)
    got = _run(*given, dlse, arrays, static)
    names = ("out", "lse", "dq", "dk", "dv")
    for name, x, reference, low in zip(names, got, exact, twin, strict=True):
        assert x.dtype == (jnp.float32 if name == "lse" else q.dtype)
        assert_close(x, reference, low, dtype=q.dtype, what=name)
