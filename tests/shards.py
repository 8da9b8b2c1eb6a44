"""What tests of several devices share: meshes that fit, sharded inputs, and what to look for.

Eight virtual CPUs by default; `pytest -m multi_gpu` runs the same on the GPUs there are.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import oracle

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def dtype() -> Any:
    """What the platform's kernels take."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def inputs(seed: int, B: int, T: int, N: int, K: int) -> list[jax.Array]:
    """q, k, v and the cotangent of the output."""
    return [jnp.asarray(x) for x in oracle.make_inputs(seed, B, T, T, N, K, 8, 8, dtype())[:4]]


def make_mesh(kind: AxisType, tp: int = 2) -> Mesh:
    """Axes dp and tp; tp is smaller, and dp 1, where there aren't 8 devices."""
    count = min(8, len(jax.devices()))
    tp = min(tp, count)
    return jax.make_mesh((count // tp, tp), ("dp", "tp"), axis_types=(kind,) * 2)


def put(mesh: Mesh, *arrays_and_specs: Any) -> list[jax.Array]:
    """The arrays as the specs say; given one after the other, array and spec."""
    pairs = zip(arrays_and_specs[::2], arrays_and_specs[1::2], strict=True)
    return [jax.device_put(x, NamedSharding(mesh, P(*spec))) for x, spec in pairs]


def gradients(function: Any) -> Any:
    """From q, k, v and the output's cotangent to the gradients."""
    return lambda q, k, v, dout: jax.vjp(function, q, k, v)[1](dout)


def collectives(compiled: str) -> list[str]:
    """The communication that a compiled program does."""
    return re.findall(
        r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled,
    )


def compiled(function: Any, *args: Any) -> str:
    """The compiled program's text."""
    return jax.jit(function).lower(*args).compile().as_text()


def assert_same(got: Any, expected: Any) -> None:
    """Equal but for rounding and the order of float32 sums, which sharding changes."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        exact = np.asarray(y, np.float64)
        eps = 8 * float(jnp.finfo(x.dtype).eps) + 64 * float(jnp.finfo(jnp.float32).eps)
        atol = eps * np.abs(exact).max()
        np.testing.assert_allclose(np.asarray(x, np.float64), exact, rtol=0, atol=atol)
