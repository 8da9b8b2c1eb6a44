"""Speed on a GPU beside what else is installed: cuDNN through jax.nn, FlashAttention-2 in PyTorch.

Every figure is GPU time: calls are repeated inside one CUDA graph or queue, so that launching costs
nothing. Ours and a peer's alternate and the median of the ratios is reported, since a hot GPU
lowers its clocks by up to a third.
"""

import datetime
import importlib.util
import json
import pathlib
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashattn import _bench_features, _bench_serve, _native
from jax_flashattn._api import attention
from jax_flashattn._timing import Timer, repeats_for, timers

NUM_TOKENS, HIDDEN = 16384, 2048
TORCH_REPEATS = 20  # calls between two events
ROUNDS = 5
SPEED = 5e14  # about what the device does, FLOP/s

CASES = [
    (head_dim, is_causal, seq_len)
    for head_dim in (64, 80, 96, 128, 192, 256)
    for is_causal in (False, True)
    for seq_len in ((1024, 4096, 16384) if head_dim in (64, 128, 256) else (4096,))
]


def _jax_timers(function: Callable[..., jax.Array], shape: tuple[int, ...]) -> dict[str, Timer]:
    batch, seq_len, heads, head_dim = shape
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    seconds = 4 * batch * heads * seq_len**2 * head_dim / SPEED
    return timers(function, inputs, repeats_for(seconds))


def _torch_timers(is_causal: bool, shape: tuple[int, ...]) -> dict[str, Timer]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, dout = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)
    )
    inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))

    def forward(*x: Any) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(*x, is_causal=is_causal)

    out = forward(*inputs)

    def timer(call: Callable[[], Any]) -> Timer:
        def seconds() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            call()
            start.record()
            for _ in range(TORCH_REPEATS):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / TORCH_REPEATS

        seconds()
        return seconds

    return {
        "fwd": timer(lambda: forward(q, k, v)),
        "bwd": timer(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)),
    }


def _peers(is_causal: bool, shape: tuple[int, ...]) -> dict[str, dict[str, Timer]]:
    cudnn = partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation="cudnn")
    timers = {"jax_cudnn": _jax_timers(cudnn, shape)}
    if importlib.util.find_spec("torch") is not None:
        timers["torch_fa2"] = _torch_timers(is_causal, shape)
    return timers


def run(output: pathlib.Path | None) -> None:
    """Runs every case, prints a table, and writes rows as JSON to `output` if given."""
    rows: list[dict[str, Any]] = []
    ratios: dict[tuple[str, str], list[float]] = {}
    print("| pass | head dim | mask | S | ours TF/s | peers TF/s (our speed over theirs) |")
    print("|---|---|---|---|---|---|")
    for head_dim, is_causal, seq_len in CASES:
        batch, heads = NUM_TOKENS // seq_len, HIDDEN // head_dim
        shape = (batch, seq_len, heads, head_dim)
        ours = _jax_timers(partial(attention, is_causal=is_causal), shape)
        peers = _peers(is_causal, shape)
        for op, products in (("fwd", 4), ("bwd", 10)):
            flops = products * batch * heads * seq_len**2 * head_dim / (2 if is_causal else 1)
            timed = {"jax_flashattn": ours[op], **{name: t[op] for name, t in peers.items()}}
            rounds = [{name: t() for name, t in timed.items()} for _ in range(ROUNDS)]
            cells = []
            for name in timed:
                seconds = statistics.median(r[name] for r in rounds)
                rows.append(
                    {
                        "op": op,
                        "impl": name,
                        "head_dim": head_dim,
                        "head_dim_v": head_dim,
                        "heads": heads,
                        "kv_heads": heads,
                        "batch": batch,
                        "seq_q": seq_len,
                        "seq_kv": seq_len,
                        "causal": is_causal,
                        "dtype": "bfloat16",
                        "feature": "plain",
                        "ms": seconds * 1e3,
                        "tflops": flops / seconds / 1e12,
                    }
                )
                if name != "jax_flashattn":
                    ratio = statistics.median(r[name] / r["jax_flashattn"] for r in rounds)
                    rows[-1]["our_speedup"] = ratio
                    ratios.setdefault((op, name), []).append(ratio)
                    cells.append(f"{name} {rows[-1]['tflops']:.0f} ({ratio:.2f}x)")
            own = rows[-len(timed)]["tflops"]
            mask = "causal" if is_causal else "full"
            print(f"| {op} | {head_dim} | {mask} | {seq_len} | {own:.0f} | {', '.join(cells)} |")
    for (op, name), values in ratios.items():
        mean = statistics.geometric_mean(values)
        print(f"{op} over {name}: {mean:.2f}x in the geometric mean, {min(values):.2f}x at least")
    features = _bench_features.run(heads=HIDDEN // 128, speed=SPEED)
    rows += _bench_serve.run()
    if output is not None:
        cuda = _native.cuda_devices()
        report = {
            "gpu": cuda["devices"][0]["name"],
            "cuda": cuda["driver_version"],
            "nvrtc": _native.nvrtc_version(),
            "jax": jax.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "source_sha256": _native.kernel_sources_sha256(),
            "rows": rows,
            "features": features,
        }
        output.write_text(json.dumps(report, indent=1) + "\n")
