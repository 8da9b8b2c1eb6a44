"""The primitive of paged attention: types and batching; it has no derivatives.

Operands are `q [B, T, N, H]`, `k_pages` and `v_pages` as `layout` says (`_spec.LAYOUTS`), and then
the optional arrays that `spec.aux` names, among them always `kv_lengths` and `page_table`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir, xla

from jax_flashattn import _lowering
from jax_flashattn._calls import Primitive, forward_avals, mapped_first, mapped_size
from jax_flashattn._sharding import to_common_vma
from jax_flashattn._spec import AttentionSpec, UnsupportedError

paged_p = Primitive("paged_attention")
paged_p.multiple_results = True
paged_p.def_impl(partial(xla.apply_primitive, paged_p))


def attention(
    spec: AttentionSpec,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    aux: Mapping[str, jax.Array],
    *,
    layout: str,
) -> tuple[jax.Array, jax.Array]:
    """`out [B, T, N, Hv]` in q's dtype and `lse [B, N, T]`, float32."""
    operands = to_common_vma(q, k_pages, v_pages, *(aux[name] for name in spec.aux))
    out, lse = paged_p.bind(*operands, spec=spec, layout=layout)
    return out, lse


@paged_p.def_abstract_eval
def _(q: Any, k_pages: Any, v_pages: Any, *aux: Any, spec: AttentionSpec, layout: str) -> list[Any]:
    return forward_avals(q, v_pages)


def _batch(
    args: Sequence[Any], dims: Sequence[Any], *, spec: AttentionSpec, layout: str
) -> tuple[list[jax.Array], list[int]]:
    """A mapped axis becomes part of B. Mapped pools become one, whose pages count on."""
    size = mapped_size(args, dims)

    def lead(i: int) -> jax.Array:
        return mapped_first(args[i], dims[i], size)

    def fold(x: jax.Array) -> jax.Array:
        return x.reshape(size * x.shape[1], *x.shape[2:])

    q, *aux = (lead(i) for i in (0, *range(3, len(args))))
    k_pages, v_pages = args[1:3]
    if any(isinstance(d, int) for d in dims[1:3]):
        k_pages, v_pages = lead(1), lead(2)
        num_pages = k_pages.shape[1]
        place = spec.aux.index("page_table")
        first = jnp.arange(size, dtype=jnp.int32) * num_pages
        # Clamped first, as the kernels do: a number out of range must not reach the next pool.
        table = jnp.clip(aux[place], 0, num_pages - 1)
        aux[place] = table + jnp.expand_dims(first, range(1, table.ndim))
        k_pages, v_pages = fold(k_pages), fold(v_pages)
    results = paged_p.bind(fold(q), k_pages, v_pages, *map(fold, aux), spec=spec, layout=layout)
    return [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in results], [0, 0]


batching.primitive_batchers[paged_p] = _batch


def _no_derivatives(*args: Any, **params: Any) -> Any:
    raise UnsupportedError(
        "paged attention is for inference: its kernels have no derivatives; use attention or "
        "attention_varlen for training, or implementation='xla', which differentiates in any mode"
    )


ad.primitive_jvps[paged_p] = _no_derivatives
ad.primitive_transposes[paged_p] = _no_derivatives

mlir.register_lowering(paged_p, _lowering.paged_dense)
mlir.register_lowering(paged_p, _lowering.paged_cpu, platform="cpu")
mlir.register_lowering(paged_p, _lowering.paged_cuda, platform="cuda")
