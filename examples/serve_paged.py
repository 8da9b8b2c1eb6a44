"""Serves a small GPT with continuous batching over a paged key/value cache.

    python examples/serve_paged.py

Requests with prompts of different lengths arrive over time. They begin with the same text, whose
pages they share. Each step computes one packed batch: a token of every sequence that decodes, and
chunks of prompts in what is left of the step's budget. Sequences that are done free their pages for
those that wait. In the end every output is compared with what the model says without a cache.

The model is that of train_char_gpt.py, trained for less than a minute and kept in outputs/.
"""

import argparse
import dataclasses
import time
from collections import deque
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from gpt import GPT, GPTConfig
from tqdm import tqdm
from train_char_gpt import load_text, sample_batch, train_step

from jax_flashattn import OutOfPagesError, PageAllocator, PagedKVCache, paged_attention

PAGE_SIZE = 16
NUM_PAGES = 96  # of all sequences together; about half of what the slots could use
MAX_PAGES = 24  # of one sequence
SLOTS = 8  # sequences at a time
BUDGETS = (16, 128)  # tokens of a step, padded to one of these: two compilations serve all steps
PREFIX = b"import os\nimport sys\n\n\nclass Request:\n    def __init__(self, name):\n        self."

Pools = list[tuple[jax.Array, jax.Array]]  # pages of keys and values of each layer


@dataclasses.dataclass
class Request:
    """A prompt, and what the server makes of it."""

    tokens: list[int]  # the prompt, then also the output
    prompt_length: int
    total_length: int
    arrival: int  # step
    num_cached: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)


@nnx.jit(donate_argnames="pools")
def forward(
    model: GPT,
    pools: Pools,
    page_table: jax.Array,
    lengths: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    ends: jax.Array,
) -> tuple[jax.Array, Pools]:
    """One step of all sequences.

    Args:
      model: the model.
      pools: the pages, donated, so that they are written in place.
      page_table: int32 `[SLOTS, MAX_PAGES]`, the same for all layers.
      lengths: int32 `[SLOTS]`, tokens of each slot that are in its pages already.
      tokens: int32 `[1, budget]`, the new tokens of one slot after the other, and padding.
      positions: int32 `[1, budget]`, their positions.
      ends: int32 `[SLOTS + 1]`, where each slot's tokens begin and end.

    Returns:
      The most likely token `[SLOTS]` after each slot's last, and the pages.
    """
    pools = list(pools)

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        cache = PagedKVCache(*pools[layer], page_table, lengths)
        cache = cache.append(k[0], v[0], cu_seqlens=ends)
        pools[layer] = cache.k_pages, cache.v_pages
        return paged_attention(q[0], cache, cu_seqlens_q=ends)[None]

    x = model.embed(tokens)
    for layer, block in enumerate(model.blocks):
        x = block(x, positions, partial(attend, layer))
    return jnp.argmax(model.logits(x[0, ends[1:] - 1]), axis=-1), pools


class Server:
    """Slots for sequences, and the pages behind them."""

    def __init__(self, model: GPT, config: GPTConfig):
        self.model = model
        self.allocator = PageAllocator(NUM_PAGES, PAGE_SIZE)
        self.slots: list[Request | None] = [None] * SLOTS
        self.waiting: deque[Request] = deque()
        shape = (NUM_PAGES, PAGE_SIZE, config.num_kv_heads, config.head_dim)
        zeros = partial(jnp.zeros, shape, config.dtype)
        self.pools: Pools = [(zeros(), zeros()) for _ in range(config.num_layers)]
        # The common prefix is a request that keeps its pages.
        self.prefix = Request([*PREFIX], len(PREFIX), len(PREFIX) + 1, arrival=0)
        self.waiting.append(self.prefix)
        while not self.step()[0]:
            pass

    def admit(self) -> None:
        """Gives waiting requests a slot, in order, as long as there are slots and pages."""
        while self.waiting and None in self.slots:
            request = self.waiting[0]
            shared = self.allocator.share(self.prefix.pages, self.prefix.prompt_length)
            try:
                # All it will ever need, so that no sequence must be stopped for lack of pages.
                request.pages = self.allocator.extend(shared, request.total_length)
            except OutOfPagesError:
                self.allocator.free(shared)
                return
            request.num_cached = len(shared) * PAGE_SIZE
            self.slots[self.slots.index(None)] = self.waiting.popleft()

    def schedule(self) -> list[int]:
        """How many tokens of each slot to compute: first who decodes, then chunks of prompts."""
        missing = [0 if r is None else len(r.tokens) - r.num_cached for r in self.slots]
        counts, left = [0] * SLOTS, BUDGETS[-1]
        for slot in sorted(range(SLOTS), key=missing.__getitem__):
            counts[slot] = min(missing[slot], left)
            left -= counts[slot]
        return counts

    def step(self) -> tuple[list[Request], int]:
        """Computes one batch; returns the requests that it finished, and the tokens computed."""
        self.admit()
        counts = self.schedule()
        ends = np.cumsum([0, *counts]).astype(np.int32)
        budget = next(size for size in BUDGETS if size >= ends[-1])
        tokens, positions = np.zeros((2, 1, budget), np.int32)
        page_table = np.full((SLOTS, MAX_PAGES), NUM_PAGES, np.int32)
        lengths = np.zeros(SLOTS, np.int32)
        for slot, request in enumerate(self.slots):
            if request is not None:
                begin, end = request.num_cached, request.num_cached + counts[slot]
                tokens[0, ends[slot] : ends[slot + 1]] = request.tokens[begin:end]
                positions[0, ends[slot] : ends[slot + 1]] = np.arange(begin, end)
                page_table[slot, : len(request.pages)] = request.pages
                lengths[slot] = begin
        arrays = map(jnp.asarray, (page_table, lengths, tokens, positions, ends))
        following, self.pools = forward(self.model, self.pools, *arrays)
        following = np.asarray(following)

        done = []
        for slot, request in enumerate(self.slots):
            if request is None:
                continue
            request.num_cached += counts[slot]
            if request.num_cached == len(request.tokens):  # else the prompt goes on
                request.tokens.append(int(following[slot]))
            if len(request.tokens) == request.total_length:
                self.slots[slot] = None
                if request is not self.prefix:
                    self.allocator.free(request.pages)
                done.append(request)
        return done, int(ends[-1])


def make_requests(rng: np.random.Generator, text: np.ndarray, count: int) -> list[Request]:
    """Prompts of 4 to 200 characters after the prefix, for outputs of 20 to 80."""
    requests, arrival = [], 0
    for _ in range(count):
        start, length = rng.integers(len(text) - 200), int(rng.integers(4, 200))
        tokens = [*PREFIX, *text[start : start + length].tolist()]
        total = len(tokens) + int(rng.integers(20, 80))
        requests.append(Request(tokens, len(tokens), total, arrival))
        arrival += int(rng.integers(0, 8))
    return requests


def check(model: GPT, requests: list[Request]) -> None:
    """Asserts that greedy generation without a cache gives the same outputs.

    One pass over all final sequences says it: if the model's choice after every prefix is the token
    that follows, then generating token by token would have chosen them, too.
    """
    tokens = np.zeros((len(requests), MAX_PAGES * PAGE_SIZE), np.int32)
    for row, request in zip(tokens, requests, strict=True):
        row[: len(request.tokens)] = request.tokens
    choices = np.asarray(nnx.jit(lambda model, x: jnp.argmax(model(x), axis=-1))(model, tokens))
    for row, request in zip(choices, requests, strict=True):
        begin, end = request.prompt_length, request.total_length
        assert request.tokens[begin:] == row[begin - 1 : end - 1].tolist()


def load_or_train(path: Path, config: GPTConfig, steps: int) -> GPT:
    """The model from a checkpoint; without one, a model trained for some steps, and kept."""
    model = GPT(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    if path.exists():
        with np.load(path) as saved:
            return nnx.merge(graph, tree.unflatten([jnp.asarray(saved[x]) for x in saved.files]))
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps, 1.5e-4)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, b2=0.95), wrt=nnx.Param)
    rng, (text, _) = np.random.default_rng(0), load_text()
    with tqdm(range(steps), desc="training", unit="step") as progress:
        for _ in progress:
            batch = jnp.asarray(sample_batch(rng, text, 4, 256))
            progress.set_postfix(loss=f"{float(train_step(model, optimizer, batch)):.3f}")
    leaves = jax.tree.leaves(nnx.state(model))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, *leaves)
    return model


def main() -> None:
    """Trains if need be, serves, checks."""
    parser = argparse.ArgumentParser(description="Serves a small GPT from a paged cache.")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--train-steps", type=int, default=200)
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/serve_paged.npz"))
    args = parser.parse_args()
    config = GPTConfig()
    model = load_or_train(args.checkpoint, config, args.train_steps)
    requests = make_requests(np.random.default_rng(1), load_text()[1], args.requests)
    server = Server(model, config)
    arriving, num_finished, step, computed = deque(requests), 0, 0, 0
    start = time.perf_counter()
    with tqdm(total=len(requests), desc="serving", unit="request") as progress:
        while num_finished < len(requests):
            while arriving and arriving[0].arrival <= step:
                server.waiting.append(arriving.popleft())
            done, tokens = server.step()
            step, computed, num_finished = step + 1, computed + tokens, num_finished + len(done)
            rate = computed / (time.perf_counter() - start)
            waiting, free = len(server.waiting), server.allocator.num_free
            progress.set_postfix(waiting=waiting, free_pages=free, tokens_per_s=f"{rate:.0f}")
            progress.update(len(done))
    seconds = time.perf_counter() - start

    check(model, requests)
    server.allocator.free(server.prefix.pages)
    assert server.allocator.num_free == NUM_PAGES
    shared = len(PREFIX) // PAGE_SIZE
    output = sum(r.total_length - r.prompt_length for r in requests)
    print(f"\nA request and its output:\n{bytes(requests[0].tokens).decode('ascii')}\n")
    print(
        f"{len(requests)} requests in {step} steps and {seconds:.1f} s: {computed / seconds:.0f} "
        f"tokens/s, {output / seconds:.0f} of them generated, with {shared} pages of each shared; "
        "the outputs are those without a cache"
    )


if __name__ == "__main__":
    main()
