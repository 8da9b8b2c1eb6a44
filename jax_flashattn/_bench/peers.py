"""The implementations that ours is timed beside, each where its package can be imported.

A peer is one small function that calls a package as its users do, on arrays `[B, S, N, H]`. What a
peer can't do in some cell is noted there with its own error, not guessed here.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashattn._bench.harness import Cell, Entry
from jax_flashattn._bench.timing import (
    BACKWARD,
    Build,
    Start,
    Timer,
    jax_build,
    queries_for,
    queue_timer,
    repeats_for,
)

Window = tuple[int, int] | None  # keys to the left and right
MOST_XLA_KEYS, MOST_XLA = 1024, 2  # XLA keeps all scores in memory; calls in a program
# Calls in a program, and keys up to which the backward is timed: its kernels are made in Python,
# which takes seconds that no other thread can use, and beyond the backward falls far behind.
MOST_TOKAMAX, MOST_TOKAMAX_KEYS = 10, 1024
SPLITS = (1, 16, 32)  # of keys; FlashAttention-3's JAX binding leaves the choice to the caller
FP8_SCALES = [
    *(f"amax_d{name}" for name in "QKVP"),
    *(f"descale_{name}" for name in ("q", "k", "v", "s", "o", "dO", "dP")),
    *(f"scale_{name}" for name in ("s", "o", "dQ", "dK", "dV", "dP")),
]


@functools.cache
def importable(module: str) -> bool:
    """Whether a module can be found; it is not imported yet."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _jax_nn(implementation: Any, is_causal: bool, window: Window) -> Callable[..., jax.Array]:
    return functools.partial(
        jax.nn.dot_product_attention,
        is_causal=is_causal,
        local_window_size=window,
        implementation=implementation,
    )


def _tokamax(is_causal: bool, window: Window) -> Callable[..., jax.Array]:
    import tokamax

    return functools.partial(
        tokamax.dot_product_attention,
        is_causal=is_causal,
        local_window_size=window,
        implementation="mosaic",
    )


def _dew_fa3(is_causal: bool, window: Window) -> Callable[..., jax.Array]:
    from dew_flash_attn import flash_mha

    size = (-1, -1) if window is None else window
    return functools.partial(flash_mha, is_causal=is_causal, window_size=size)


def _cudnn() -> tuple[Callable[..., Any], Any]:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.dot_product_attention, cudnn.MaskType


def _jax(
    make: Callable[[], Callable[..., jax.Array]],
    cell: Cell,
    inputs: Sequence[Any] | None = None,
    **options: Any,
) -> Build:
    """Builds, its import included, what `make` returns; options are of `jax_build`."""

    def build() -> Start:
        return jax_build(make(), inputs or cell.shapes(), cell.seconds, **options)()

    return build


def _torch_start(
    call: Callable[..., Any],
    cell: Cell,
    *,
    op: str,
    backward: bool,
    heads_first: bool,
    copies: int = 1,
    queries: int = 1,
) -> Start:
    """Timers of a PyTorch function: the forward in a CUDA graph, the backward in a queue.

    The forward's calls take turns with `copies` pairs of keys and values; each keeps its result. If
    `queries` is more than 1, there are so many calls, with queries of their own, as `jax_build`'s.
    """
    import torch

    def start(_: Sequence[Any]) -> dict[str, Timer]:
        torch.cuda.empty_cache()
        dtype = getattr(torch, cell.dtype)

        def draw(tokens: int, heads: int) -> Any:
            middle = (heads, tokens) if heads_first else (tokens, heads)
            return torch.randn((cell.batch, *middle, cell.head_dim), device="cuda", dtype=dtype)

        firsts = [draw(cell.seq_q, cell.heads) for _ in range(queries)]
        keys = [[draw(cell.seq_kv, cell.kv_heads) for _ in "kv"] for _ in range(copies)]
        repeats = queries if queries > 1 else -(-repeats_for(cell.seconds) // copies) * copies

        def wait(_: Any) -> None:
            torch.cuda.synchronize()

        def forward() -> list[Any]:
            with torch.no_grad():
                return [call(firsts[i % queries], *keys[i % copies]) for i in range(repeats)]

        forward()
        wait(None)
        graph = torch.cuda.CUDAGraph()
        # JAX's threads may call the driver meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = forward()

        def replay(_: Any = (firsts, keys, results)) -> None:  # keeps what the graph uses
            graph.replay()

        timers = {op: queue_timer(replay, wait, repeats)}
        if backward:
            inputs = [x.detach().requires_grad_() for x in (firsts[0], *keys[0])]
            out = call(*inputs)
            dout = torch.randn_like(out)

            backward_repeats = -(-repeats_for(cell.seconds) // BACKWARD)

            def gradients() -> None:
                for _ in range(backward_repeats):
                    torch.autograd.grad(out, inputs, dout, retain_graph=True)

            timers["bwd"] = queue_timer(gradients, wait, backward_repeats)
        return timers

    return start


def _torch_sdpa(backend: str, cell: Cell, **options: Any) -> Build:
    def build() -> Start:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        def call(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return scaled_dot_product_attention(
                    q, k, v, is_causal=cell.causal, enable_gqa=cell.heads != cell.kv_heads
                )

        return _torch_start(call, cell, heads_first=True, **options)

    return build


def _flash_attn_4(cell: Cell, window: Window, **options: Any) -> Build:
    def build() -> Start:
        from flash_attn.cute import flash_attn_func

        size = (None, None) if window is None else window

        def call(q: Any, k: Any, v: Any) -> Any:
            out = flash_attn_func(q, k, v, causal=cell.causal, window_size=size)
            return out[0] if isinstance(out, tuple) else out

        return _torch_start(call, cell, heads_first=False, **options)

    return build


def attention(cell: Cell, window: Window, *, only: Sequence[str] | None = None) -> list[Entry]:
    """Peers of `attention`, forward and backward."""

    def made(make: Callable[..., Callable[..., jax.Array]], *first: Any, **options: Any) -> Build:
        make = functools.partial(make, *first, cell.causal, window)
        options = {"backward": 3, "queries": queries_for(cell.seconds), **options}
        return _jax(make, cell, **options)

    builds: dict[str, Build] = {"jax_cudnn": made(_jax_nn, "cudnn")}
    if cell.seq_kv <= MOST_XLA_KEYS:
        builds["jax_xla"] = made(_jax_nn, "xla", most=MOST_XLA)
    if importable("tokamax"):
        builds["tokamax"] = made(
            _tokamax, most=MOST_TOKAMAX, backward=3 if cell.seq_kv <= MOST_TOKAMAX_KEYS else 0
        )
    if importable("dew_flash_attn"):
        builds["dew_fa3"] = made(_dew_fa3)
    torch_options: dict[str, Any] = {
        "op": "fwd",
        "backward": True,
        "queries": queries_for(cell.seconds),
    }
    if importable("torch") and window is None:
        builds["torch_fa2"] = _torch_sdpa("FLASH_ATTENTION", cell, **torch_options)
        builds["torch_cudnn"] = _torch_sdpa("CUDNN_ATTENTION", cell, **torch_options)
    if importable("flash_attn.cute"):
        builds["flash_attn_4"] = _flash_attn_4(cell, window, **torch_options)
    return [
        Entry(impl, build, cell) for impl, build in builds.items() if only is None or impl in only
    ]


def packed(cell: Cell, inputs: Sequence[Any], lengths: Sequence[int]) -> list[Entry]:
    """Peers of `attention_varlen`, causal: arrays `[1, total, N, H]`, boundaries `[n + 1]`."""

    def cudnn() -> Callable[..., jax.Array]:
        call, masks = _cudnn()

        def function(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array) -> jax.Array:
            sizes, starts = (ends[1:] - ends[:-1])[None], ends[None]
            mask = masks.PADDING_CAUSAL
            scale = cell.head_dim**-0.5
            more = None, None, sizes, sizes, starts, starts
            return call(q, k, v, *more, scale=scale, mask_type=mask)[0].reshape(q.shape)

        return function

    def dew() -> Callable[..., jax.Array]:
        from dew_flash_attn import flash_mha_varlen

        def function(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array) -> jax.Array:
            return flash_mha_varlen(q[0], k[0], v[0], ends, max(lengths), is_causal=True)[None]

        return function

    makes = {"jax_cudnn": cudnn}
    if importable("dew_flash_attn"):
        makes["dew_fa3"] = dew
    return [
        Entry(
            impl,
            _jax(make, cell, inputs, backward=3, queries=queries_for(cell.seconds)),
            cell,
        )
        for impl, make in makes.items()
    ]


def _best(builds: Sequence[Build]) -> Build:
    """The fastest of several builds by one reading each."""

    def build() -> Start:
        starts = [build() for build in builds]

        def start(arrays: Sequence[Any]) -> dict[str, Timer]:
            found = [start(arrays) for start in starts]
            return {op: min((t[op] for t in found), key=lambda timer: timer()) for op in found[0]}

        return start

    return build


def _kv_cache(splits: int, page_size: int) -> Callable[..., jax.Array]:
    from flash_attn3_jax import flash_mha_with_kvcache

    def function(
        q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, table: jax.Array
    ) -> jax.Array:
        pages = {}
        if page_size:
            k, v = (x.reshape(-1, page_size, *x.shape[2:]) for x in (k, v))
            pages["page_table"] = table
        return flash_mha_with_kvcache(q, k, v, cache_seqlens=lengths, num_splits=splits, **pages)

    return function


def fa3_kv_cache(cell: Cell, inputs: Sequence[Any], *, page_size: int, op: str) -> list[Build]:
    """flash-attn3-jax over q, dense or paged keys, values, lengths and page table: one or none.

    Its library holds the kernels of head dim 128 only.
    """
    if cell.head_dim != 128 or not importable("flash_attn3_jax"):
        return []
    makes = [functools.partial(_kv_cache, splits, page_size) for splits in SPLITS]
    return [_best([_jax(make, cell, inputs, op=op) for make in makes])]


def decode(cell: Cell, *, copies: int = 1) -> list[Entry]:
    """Peers of decoding from dense keys; with `copies`, each call reads other keys than the last.

    JAX's arrays are then q and `copies` pairs of keys and values.
    """
    cudnn = _jax_nn("cudnn", False, None)
    q, k, v = cell.shapes()
    build = jax_build(take_turns(cudnn, copies), [q, *[k, v] * copies], cell.seconds, op="decode")
    entries = [Entry("jax_cudnn", build, cell)]
    options: dict[str, Any] = {"op": "decode", "backward": False, "copies": copies}
    if importable("torch"):
        for name, backend in (("fa2", "FLASH_ATTENTION"), ("cudnn", "CUDNN_ATTENTION")):
            build = _torch_sdpa(backend, cell, **options)
            entries.append(Entry(f"torch_{name}", build, cell))
    if importable("flash_attn.cute"):
        entries.append(Entry("flash_attn_4", _flash_attn_4(cell, None, **options), cell))
    return entries


def take_turns(function: Callable[..., jax.Array], copies: int) -> list[Callable[..., jax.Array]]:
    """Functions of q and `copies` pairs of keys and values, each of which reads another pair."""

    def of_pair(i: int) -> Callable[..., jax.Array]:
        return lambda q, *kv: function(q, *kv[2 * i : 2 * i + 2])

    return [of_pair(i) for i in range(copies)]


def fp8(cell: Cell, queries: int) -> list[Entry]:
    """The forward of 8-bit inputs in cuDNN, all scales 1, by JAX's private entry."""

    def build() -> Start:
        call, masks = _cudnn()
        mask = masks.CAUSAL if cell.causal else masks.NO_MASK

        def function(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            ones = {name: jnp.ones((1, 1, 1, 1), jnp.float32) for name in FP8_SCALES}
            scale = cell.head_dim**-0.5
            return call(q, k, v, scale=scale, mask_type=mask, use_fp8=True, fp8_params=ones)[0]

        return jax_build(function, cell.shapes(), cell.seconds, queries=queries)()

    return [Entry("jax_cudnn", build, cell)]
