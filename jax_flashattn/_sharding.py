"""How operands are laid over devices: attributes for the partitioner, and types of results.

The custom calls are batch partitionable: XLA may split the leading `num_batch_dims` axes of every
operand and result alike, without a callback into Python. The Shardy rule says the same to sharding
propagation.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxlib.mlir import ir


def partition_attributes(
    ctx: Any, operands: Sequence[str], results: Sequence[str], num_batch_dims: int
) -> dict[str, ir.Attribute]:
    """Attributes that make a custom call batch partitionable.

    Args:
      ctx: the lowering rule's context, which knows the sizes.
      operands: one letter per axis for each operand, such as "btnh".
      results: the same for each result.
      num_batch_dims: how many leading axes, common to all, may be split.
    """
    avals = [*ctx.avals_in, *ctx.avals_out]
    sizes = {
        letter: size
        for letters, aval in zip([*operands, *results], avals, strict=True)
        for letter, size in zip(letters, aval.shape, strict=True)
    }
    if not all(isinstance(size, int) for size in sizes.values()):
        return {}  # exported with symbolic shapes, for which there are no rules: not to be split
    factor = {letter: chr(ord("i") + index) for index, letter in enumerate(sizes)}

    def axes(names: Sequence[str]) -> str:
        return ", ".join("[" + ", ".join(factor[x] for x in name) + "]" for name in names)

    split = operands[0][:num_batch_dims]
    kept = ", ".join(factor[x] for x in sizes if x not in split)
    all_sizes = ", ".join(f"{factor[x]}={size}" for x, size in sizes.items())
    rule = (
        f"#sdy.op_sharding_rule<({axes(operands)})->({axes(results)}) "
        f"{{{all_sizes}}} need_replication={{{kept}}}, custom>"
    )
    return {
        "mhlo.frontend_attributes": ir.DictAttr.get(
            {"num_batch_dims": ir.StringAttr.get(str(num_batch_dims))}
        ),
        "sdy.sharding_rule": ir.Attribute.parse(rule),
    }


def result_aval(like: Any, shape: Sequence[int], axes: Sequence[int | None], dtype: Any) -> Any:
    """Type of a result: its axis i is sharded as axis `axes[i]` of `like`, None not at all.

    Built from an operand's type, so that explicit shardings and the manual axes of `shard_map`
    survive.
    """
    spec = (*like.sharding.spec, *(None,) * (like.ndim - len(like.sharding.spec)))
    sharding = like.sharding.update(
        spec=PartitionSpec(*(None if a is None else spec[a] for a in axes))
    )
    return like.update(shape=tuple(shape), dtype=dtype, sharding=sharding, weak_type=False)


def _varying(x: jax.Array) -> frozenset[str]:
    aval = jax.typeof(x)
    # Renamed in jax 0.10.
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


def to_common_vma(*arrays: jax.Array) -> list[jax.Array]:
    """Makes all arrays vary over the same manual axes of `shard_map`.

    Without this the gradient of an operand that does not vary (a replicated key head, say) would
    miss its sum over devices; the transpose of the cast is that sum.
    """
    varying = [_varying(x) for x in arrays]
    union = frozenset().union(*varying)
    return [
        lax.pcast(x, tuple(sorted(union - vma)), to="varying") if union - vma else x
        for x, vma in zip(arrays, varying, strict=True)
    ]
