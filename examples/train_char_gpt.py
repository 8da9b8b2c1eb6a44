"""Trains a small GPT on the source of Python's standard library, then lets it write some.

    python examples/train_char_gpt.py                   # our kernels
    python examples/train_char_gpt.py --attention xla   # the same numbers from dense attention

Characters are the tokens, so there is nothing to download. The yardstick is a bigram model, which
knows only the character before: falling clearly below it takes a model that looks further back. The
exit status says whether that happened, unless --steps cuts the run short.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from gpt import GPT, GPTConfig
from matplotlib import pyplot as plt
from text import VOCAB_SIZE, load_text, sample_batch
from tqdm import tqdm

from jax_flashattn import attention

DEFAULT_STEPS = 260
NUM_EVALUATIONS = 4
HELD_OUT_WINDOWS = 16


def held_out_windows(text: np.ndarray, seq_len: int) -> np.ndarray:
    """Evenly spread windows, the same for every model and evaluation."""
    starts = np.linspace(0, len(text) - seq_len - 1, HELD_OUT_WINDOWS).astype(int)[:, None]
    return text[starts + np.arange(seq_len + 1)].astype(np.int32)


def bigram_loss(train: np.ndarray, windows: np.ndarray) -> float:
    """Cross-entropy in nats of add-one smoothed bigram counts on the windows."""
    pairs = np.bincount(train[:-1].astype(int) * VOCAB_SIZE + train[1:], minlength=VOCAB_SIZE**2)
    counts = pairs.reshape(VOCAB_SIZE, VOCAB_SIZE) + 1
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
    return -log_p[windows[:, :-1], windows[:, 1:]].mean()


def loss_fn(model: GPT, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats of each next character."""
    logits = model(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@nnx.jit
def train_step(model: GPT, optimizer: nnx.Optimizer, windows: jax.Array) -> jax.Array:
    """One update of the model in place; returns the loss before it."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, windows)
    optimizer.update(model, grads)
    return loss


window_loss = nnx.jit(loss_fn)


def evaluate(model: GPT, windows: np.ndarray, batch: int) -> float:
    """Mean loss over all windows."""
    parts = np.split(windows, len(windows) // batch)
    return float(np.mean([window_loss(model, jnp.asarray(part)) for part in parts]))


@nnx.jit
def next_character(model: GPT, window: jax.Array, length: jax.Array, key: jax.Array) -> jax.Array:
    """Samples what follows the first `length` characters of `window [T]`."""
    # Causality hides what lies beyond `length`, so one shape, and one compilation, serves them all.
    logits = model(window[None])[0, length - 1]
    return jax.random.categorical(key, logits / 0.7)


def generate(model: GPT, prompt: str, num_characters: int, seed: int) -> str:
    """The prompt and what the model makes of it."""
    codes = [*prompt.encode("ascii")]
    window = np.zeros(len(codes) + num_characters, np.int32)
    window[: len(codes)] = codes
    for i, key in enumerate(jax.random.split(jax.random.key(seed), num_characters), len(codes)):
        window[i] = next_character(model, jnp.asarray(window), jnp.asarray(i), key)
    return bytes(window.astype(np.uint8)).decode("ascii")


def plot(path: Path, losses: list[float], held_out: dict[int, float], bigram: float) -> None:
    """Saves the losses over the steps, with the bigram model's as a line."""
    matplotlib.use("agg")
    _, axes = plt.subplots(figsize=(7, 4.5))
    axes.plot(losses, lw=0.8, alpha=0.7, label="training")
    axes.plot([*held_out], [*held_out.values()], "o-", label="held out")
    axes.axhline(bigram, color="black", ls="--", label="bigram model, held out")
    axes.set(xlabel="step", ylabel="nats per character", ylim=(0, None))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=150, bbox_inches="tight")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains a small GPT.")
    parser.add_argument("--attention", choices=["kernels", "xla"], default="kernels")
    parser.add_argument("--steps", type=int, help=f"default: {DEFAULT_STEPS}")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/train_char_gpt.png"))
    return parser.parse_args()


def main() -> None:
    """Trains, evaluates, samples and plots."""
    args = parse_arguments()
    steps = args.steps or DEFAULT_STEPS
    train, held_out = load_text()
    windows = held_out_windows(held_out, args.seq_len)
    bigram = bigram_loss(train, windows)
    print(f"{len(train):,} characters to train on, {len(held_out):,} held out")
    print(f"bigram model: {bigram:.3f} nats per held-out character")

    implementation = "xla" if args.attention == "xla" else None
    attention_fn = partial(attention, is_causal=True, implementation=implementation)
    model = GPT(GPTConfig(), attention_fn=attention_fn, rngs=nnx.Rngs(args.seed))
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps, 1.5e-4)
    adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.1)
    update = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    optimizer = nnx.Optimizer(model, update, wrt=nnx.Param)

    rng = np.random.default_rng(args.seed)
    losses: list[float] = []
    held_out_losses: dict[int, float] = {}
    seconds = 0.0
    with tqdm(total=steps, unit="step") as progress:
        for step in range(steps):
            batch = jnp.asarray(sample_batch(rng, train, args.batch, args.seq_len))
            start = time.perf_counter()
            losses.append(float(train_step(model, optimizer, batch)))
            if step > 0:  # the first one compiles
                seconds += time.perf_counter() - start
            if (step + 1) % max(1, steps // NUM_EVALUATIONS) == 0 or step + 1 == steps:
                held_out_losses[step] = evaluate(model, windows, args.batch)
                progress.write(
                    f"step {step + 1}: loss {losses[-1]:.4f}, held out {held_out_losses[step]:.4f}"
                )
            tokens_per_second = step * args.batch * args.seq_len / max(seconds, 1e-9)
            progress.set_postfix(loss=f"{losses[-1]:.3f}", tokens_per_s=f"{tokens_per_second:.0f}")
            progress.update()

    print("\nA sample:\n" + generate(model, "def ", 300, args.seed) + "\n")
    plot(args.out, losses, held_out_losses, bigram)
    final = held_out_losses[steps - 1]
    print(
        f"--attention {args.attention}: {steps} steps in {seconds:.0f} s, "
        f"{(steps - 1) * args.batch * args.seq_len / max(seconds, 1e-9):.0f} tokens/s; "
        f"held-out loss {final:.3f}, bigram {bigram:.3f}; plot in {args.out}"
    )
    if args.steps is None and final > bigram - 0.1:
        sys.exit("the loss did not fall clearly below the bigram model's")


if __name__ == "__main__":
    main()
