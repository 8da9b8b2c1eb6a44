"""Trains the small GPT on several devices, data-parallel times tensor-parallel.

    python examples/train_sharded.py           # the GPUs there are, else eight virtual CPUs
    python examples/train_sharded.py --tp 4    # four devices share the heads

Three times the same training: on one device; on all with shardings of the parameters and the batch
alone, from which the compiler finds the rest; and on all with attention under `shard_map`, which
leaves it nothing to find. The losses are equal but for rounding, or the exit status says otherwise.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from gpt import GPT, AttentionFn, GPTConfig, causal_attention
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from text import load_text, sample_batch

# By columns (their outputs are split over the devices) and by rows (their inputs are).
BY_COLUMNS = {"query", "key", "value", "gate", "up"}
BY_ROWS = {"out", "down"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training gives.

    Attributes:
      losses: of each step, before its update.
      tokens_per_second: over all devices, without the first two steps.
    """

    losses: list[float]
    tokens_per_second: float


def make_mesh(devices: Sequence[Any], tp: int) -> Mesh:
    """Axes "dp" (the batch is split) and "tp" (heads and hidden features are)."""
    grid = np.array(devices).reshape(-1, tp)
    return Mesh(grid, ("dp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))


def parameter_spec(path: Sequence[Any]) -> P:
    """How a parameter is split; what isn't a matrix of attention or MLP is on every device."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    layer = names[names.index("kernel") - 1] if "kernel" in names else ""
    if layer in BY_COLUMNS:
        return P(None, "tp")
    return P("tp", None) if layer in BY_ROWS else P()


def sharded_attention(mesh: Mesh) -> AttentionFn:
    """Each device attends with its sequences and heads; key heads are split as query heads are."""
    spec = P("dp", None, "tp")
    return jax.shard_map(causal_attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)


def make_step(
    graph: Any, optimizer: optax.GradientTransformation
) -> Callable[[Any, jax.Array], tuple[Any, jax.Array]]:
    """A training step: from parameters and optimizer state, and windows, to new ones and loss."""

    def loss_fn(params: Any, windows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def step(state: Any, windows: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state
        loss, grads = jax.value_and_grad(loss_fn)(params, windows)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    return step


def train(
    config: GPTConfig,
    mesh: Mesh,
    batches: Sequence[np.ndarray],
    attention_fn: AttentionFn = causal_attention,
) -> Run:
    """Trains from the same start on the same batches `[batch, seq_len + 1]`, whatever the mesh."""
    model = GPT(config, attention_fn=attention_fn, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, NamedSharding(mesh, parameter_spec(path))), params
    )
    optimizer = optax.adamw(1e-3, b2=0.95)
    # Moments lie as the parameters do; the number of steps is everywhere.
    state = jax.tree.map(
        lambda x: x if x.ndim else jax.device_put(x, NamedSharding(mesh, P())),
        (params, optimizer.init(params)),
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(make_step(graph, optimizer), donate_argnums=0, out_shardings=(shardings, None))
    losses: list[jax.Array] = []
    start = 0.0
    for i, batch in enumerate(batches):
        state, loss = step(state, jax.device_put(batch, NamedSharding(mesh, P("dp"))))
        losses.append(loss)
        if i == 1:  # compiled, and CUDA graphs recorded
            loss.block_until_ready()
            start = time.perf_counter()
    losses[-1].block_until_ready()
    seconds = time.perf_counter() - start
    tokens = sum(x.shape[0] * (x.shape[1] - 1) for x in batches[2:])
    return Run([float(x) for x in losses], tokens / seconds)


def largest_difference(runs: dict[str, Run]) -> float:
    """Over all steps and runs, relative."""
    losses = np.array([run.losses for run in runs.values()])
    return float(np.max(np.ptp(losses, axis=0) / losses.min(axis=0)))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains a small GPT on several devices.")
    parser.add_argument("--tp", type=int, default=2, help="devices that share the heads")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    if args.steps < 3:
        parser.error("--steps must be at least 3: the first two aren't timed")
    return args


def main() -> None:
    """Trains on one device and on all, and compares."""
    args = parse_arguments()
    jax.config.update("jax_num_cpu_devices", 8)
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    config = GPTConfig(num_kv_heads=4, dtype=jnp.float32 if on_cpu else jnp.bfloat16)
    if (
        len(devices) % args.tp
        or config.num_kv_heads % args.tp
        or args.batch % (len(devices) // args.tp)
    ):
        sys.exit(
            f"--tp {args.tp} must divide the {len(devices)} devices and {config.num_kv_heads} key "
            f"heads, and the batch of {args.batch} what remains of the devices"
        )
    text, _ = load_text()
    rng = np.random.default_rng(0)
    batches = [sample_batch(rng, text, args.batch, args.seq_len) for _ in range(args.steps)]

    one, mesh = make_mesh(devices[:1], 1), make_mesh(devices, args.tp)
    print(f"{len(devices)} x {devices[0].device_kind}, dp {mesh.shape['dp']}, tp {args.tp}")
    runs = {
        "one device": train(config, one, batches),
        "jit": train(config, mesh, batches),
        "shard_map": train(config, mesh, batches, sharded_attention(mesh)),
    }
    print("step   " + "".join(f"{name:>12}" for name in runs))
    for i in range(args.steps):
        print(f"{i:4}   " + "".join(f"{run.losses[i]:12.5f}" for run in runs.values()))
    print("tokens/s" + "".join(f"{run.tokens_per_second:11.0f} " for run in runs.values()))
    difference = largest_difference(runs)
    tolerance = 1e-4 if on_cpu else 1e-2
    print(f"losses differ by {difference:.1e} at most; {tolerance:.0e} is rounding")
    if not difference <= tolerance:
        sys.exit("the losses differ by more than rounding")


if __name__ == "__main__":
    main()
