"""Explicit sharding mode, where types say how arrays lie over the mesh.

There nothing needs to be left to the partitioner: `on_shards` runs a lowering rule's function on
what each device has, under `shard_map` over the explicit axes. Batch and heads cost no
communication then, also where there are fewer key heads than devices and on platforms whose custom
call XLA splits over the batch only. It happens while lowering, so that differentiation, vmap and
checkpoint policies see the primitives alone, and under a `shard_map` of the user's too (JAX does
not differentiate nested ones).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jax_flashattn._sharding import to_common_vma
from jax_flashattn._spec import PER_HEAD_AUX, PER_KV_HEAD_AUX, AttentionSpec

MeshAxes = tuple[str, ...]


def _mesh_axes(aval: Any) -> list[MeshAxes]:
    """The explicit mesh axes over which each axis of a type is sharded."""
    spec = aval.sharding.spec
    as_tuple = lambda entry: entry if isinstance(entry, tuple) else (entry,)  # noqa: E731
    found = [as_tuple(entry) if isinstance(entry, (str, tuple)) else () for entry in spec]
    return found + [()] * (aval.ndim - len(found))


def is_sharded(x: jax.Array, axis: int) -> bool:
    """Whether the type of x shards this axis."""
    return bool(_mesh_axes(jax.typeof(x))[axis])


def check(q: Any, k: Any, v: Any) -> None:
    """Raises TypeError where the types of q, k and v ask for communication within a call."""
    advice = {
        1: "gather it with jax.reshard, or use jax.shard_map, and query_offset to say where a "
        "shard's queries stand",
        3: "gather it with jax.reshard",
    }
    shardings = [_mesh_axes(x) for x in (q, k, v)]
    for name, x, axes in zip("qkv", (q, k, v), shardings, strict=True):
        for axis, what in ((1, "the sequence"), (3, "the head dim")):
            if axes[axis]:
                raise TypeError(
                    f"{name} must not be sharded over {what}, axis {axis} of "
                    f"[batch, length, heads, head dim], got {x.sharding.spec}; {advice[axis]}"
                )
        if axes[0] not in ((), shardings[0][0]):
            raise TypeError(
                f"{name} must be sharded over the batch as q is, {shardings[0][0]}, or not at all, "
                f"got {axes[0]}; jax.reshard one of them"
            )
    of_q, of_k, of_v = (axes[2] for axes in shardings)
    if of_k != of_q[: len(of_k)] or of_v != of_k:
        raise TypeError(
            f"k and v must be sharded over the heads as q is, {of_q}, or over the first of these "
            f"mesh axes only, or not at all, got {of_k} for k and {of_v} for v; jax.reshard them"
        )


def forward_axes(spec: AttentionSpec) -> tuple[list[str], list[str]]:
    """For `on_shards`: what leads operands and results of the forward."""
    return ["b.n", "b.k", "b.k", *_aux_axes(spec)], ["b.n", "bn"]


def backward_axes(spec: AttentionSpec, has_dlse: bool, has_dslopes: bool) -> Any:
    """The same for the backward."""
    inputs = ["b.n", "b.k", "b.k", "b.n", "bn", "b.n", *(["bn"] * has_dlse), *_aux_axes(spec)]
    return inputs, ["b.n", "b.k", "b.k", *(["bn"] * has_dslopes)]


def _aux_axes(spec: AttentionSpec) -> list[str]:
    axes = {**dict.fromkeys(PER_HEAD_AUX, "bn"), **dict.fromkeys(PER_KV_HEAD_AUX, "bk")}
    return [axes.get(name, "b") for name in spec.aux]


def per_head_like(q: Any, x: jax.Array) -> jax.Array:
    """`x [B, N]` with the sharding of q's batch and heads, which is that of its gradient."""
    aval = jax.typeof(q)
    batch, _, heads, _ = _mesh_axes(aval)
    if not (batch or heads):
        return x
    return jax.reshard(x, aval.sharding.update(spec=PartitionSpec(batch or None, heads or None)))


def on_shards(
    function: Callable[..., Any],
    inputs: Sequence[str],
    results: Sequence[str],
    result_avals: Sequence[Any],
    *operands: Any,
) -> Any:
    """`function(*operands)`, on each device for its shards if the types are sharded explicitly.

    Args:
      function: takes q, k, v and more; the results that are like k and v are their gradients.
      inputs: what the axes of each operand are: b batch, n query heads, k key heads, a point for
        what isn't split; from the first axis on.
      results: the same for each result.
      result_avals: types of the results.
      *operands: q, k, v and more.
    """
    q, k = operands[:2]
    (batch, _, of_q, _), (_, _, of_k, _) = (_mesh_axes(jax.typeof(x)) for x in (q, k))
    if not (batch or of_q or of_k):
        return function(*operands)
    mesh = jax.typeof(q).sharding.mesh
    shards = math.prod(mesh.shape[name] for name in of_q)
    # Enough key heads for all: a slice of them, and an all-gather of their gradients, are cheaper
    # than replicated ones and an all-reduce.
    of_k = of_q if k.shape[2] % shards == 0 else of_k
    axes = {"b": batch, "n": of_q, "k": of_k, ".": ()}
    further = of_q[len(of_k) :]
    group = q.shape[2] // k.shape[2]

    def partition(letters: str) -> PartitionSpec:
        return PartitionSpec(*(axes[x] or None for x in letters))

    def on_shard(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> Any:
        def of_queries(k: jax.Array, v: jax.Array) -> list[jax.Array]:
            # Gradients are summed over devices as float32, as all sums are; beside automatic axes
            # XLA's CPU compiler aborts on an all-reduce of bfloat16.
            wide = [x.astype(jnp.float32) if further else x for x in (k, v)]
            wide = to_common_vma(q, *wide)[1:]
            shared = [x.astype(like.dtype) for x, like in zip(wide, (k, v), strict=True)]
            return [_heads_of_shard(x, q.shape[2], group, further) for x in shared]

        def of_key_heads(x: jax.Array) -> jax.Array:
            return _heads_of_shard(x[:, None, :, None], q.shape[2], group, further)[:, 0, :, 0]

        local, vjp = jax.vjp(of_queries, k, v)
        rest = tuple(
            of_key_heads(x) if axes == "bk" else x for x, axes in zip(rest, inputs[3:], strict=True)
        )
        found = list(function(q, *local, *rest))
        if "b.k" in results:
            # Sums over the devices that share a key head.
            found[1:3] = vjp(found[1:3])
        return found

    run = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=tuple(partition(x) for x in inputs),
        out_specs=[partition(x) for x in results],
        axis_names=set(mesh.explicit_axes),
    )
    like_q = jax.typeof(q).sharding
    given = [
        jax.reshard(x, like_q.update(spec=partition(letters)))
        for x, letters in zip(operands, inputs, strict=True)
    ]
    return [
        jax.reshard(x, like_q.update(spec=aval.sharding.spec))
        for x, aval in zip(run(*given), result_avals, strict=True)
    ]


def _heads_of_shard(x: jax.Array, num_heads: int, group: int, further: MeshAxes) -> jax.Array:
    """The key heads `[B, S, K, H]` of a device's queries, where only those are split `further`."""
    if not further or x.shape[2] == 1:
        return x
    # This many query heads in a row share a key head, and all groups of them are full.
    shared = math.gcd(num_heads, group)
    per_group = jnp.repeat(x, group // shared, axis=2)
    first = lax.axis_index(further) * (num_heads // shared)
    return lax.dynamic_slice_in_dim(per_group, first, num_heads // shared, axis=2)
