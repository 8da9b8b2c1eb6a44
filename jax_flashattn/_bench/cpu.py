"""Speed and memory beside `jax.nn.dot_product_attention`, measured in one run.

Ours and theirs alternate, and what is reported is the median of the ratios: the machine's speed
drifts by more than the differences that matter.
"""

import datetime
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from jax_flashattn import _native
from jax_flashattn._api import attention
from jax_flashattn._bench import features
from jax_flashattn._bench.harness import measure
from jax_flashattn._bench.report import Report

Case = tuple[str, int, int, bool]  # dtype, sequence length, head dim, causal
NUM_HEADS = 8
CPU_CASES: list[Case] = [
    (dtype, seq_len, head_dim, is_causal)
    for dtype in ("float32", "bfloat16")
    for head_dim in (64, 128)
    for seq_len in (1024, 4096)
    for is_causal in (False, True)
]


def _functions(function: Callable[..., jax.Array], is_causal: bool) -> dict[str, Any]:
    def forward(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> jax.Array:
        return function(q, k, v, is_causal=is_causal)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, vjp = jax.vjp(lambda *x: function(*x, is_causal=is_causal), q, k, v)
        return out, vjp(dout)

    return {"fwd": jax.jit(forward), "fwd+bwd": jax.jit(both)}


def _inputs(dtype: str, seq_len: int, head_dim: int) -> list[jax.Array]:
    shape = (1, seq_len, NUM_HEADS, head_dim)
    return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 4)]


def _seconds(f: Any, args: list[jax.Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    return time.perf_counter() - start


def compare(case: Case) -> list[dict[str, Any]]:
    """Times one case, forward and forward with backward; a row for each."""
    dtype, seq_len, head_dim, is_causal = case
    repeats = 5 if seq_len > 1024 else 21
    args = _inputs(dtype, seq_len, head_dim)
    ours = _functions(attention, is_causal)
    theirs = _functions(jax.nn.dot_product_attention, is_causal)
    rows = []
    for name, products in (("fwd", 2), ("fwd+bwd", 7)):
        for f in (ours[name], theirs[name]):
            _seconds(f, args)
        times = [(_seconds(ours[name], args), _seconds(theirs[name], args)) for _ in range(repeats)]
        flops = products * 2 * NUM_HEADS * seq_len**2 * head_dim / (2 if is_causal else 1)
        rows.append(
            {
                "pass": name,
                "dtype": dtype,
                "seq_len": seq_len,
                "head_dim": head_dim,
                "is_causal": is_causal,
                "ms": 1e3 * statistics.median(a for a, _ in times),
                "jax_nn_ms": 1e3 * statistics.median(b for _, b in times),
                "speedup": statistics.median(b / a for a, b in times),
                "gflops": flops / statistics.median(a for a, _ in times) / 1e9,
            }
        )
    return rows


def _peak_bytes() -> int:
    # Not ru_maxrss, which a new process takes over from the one that started it.
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status).group(1))  # type: ignore


def peak_growth(dtype: str, seq_len: int, head_dim: int) -> dict[str, Any]:
    """Peak memory that forward and backward add, against inputs, outputs and gradients.

    Call it in a fresh process: the peak of a process never falls.
    """
    f = _functions(attention, True)["fwd+bwd"]
    jax.block_until_ready(f(*_inputs(dtype, 128, head_dim)))
    args = [jax.ShapeDtypeStruct((1, seq_len, NUM_HEADS, head_dim), dtype)] * 4
    compiled = f.lower(*args).compile()
    before = _peak_bytes()
    arrays = jax.block_until_ready(_inputs(dtype, seq_len, head_dim))
    jax.block_until_ready(compiled(*arrays))
    growth = _peak_bytes() - before
    needed = 8 * arrays[0].nbytes  # q, k, v, dout, out, dq, dk, dv
    return {
        "dtype": dtype,
        "seq_len": seq_len,
        "head_dim": head_dim,
        "growth_bytes": growth,
        "ratio": growth / needed,
    }


def _peak_growth_in_new_process(*args: Any) -> dict[str, Any]:
    script = (
        "import json; from jax_flashattn._bench.cpu import peak_growth;"
        f"print(json.dumps(peak_growth(*{args!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


def run(output: pathlib.Path | None) -> None:
    """Runs every case, prints a table, and writes it as JSON to `output` if given."""
    rows: list[dict[str, Any]] = []
    print("| pass | dtype | S | D | mask | ms | GFLOP/s | jax.nn ms | speedup |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CPU_CASES:
        for row in compare(case):
            rows.append(row)
            print(
                f"| {row['pass']} | {row['dtype']} | {row['seq_len']} | {row['head_dim']} | "
                f"{'causal' if row['is_causal'] else 'full'} | {row['ms']:.1f} | "
                f"{row['gflops']:.0f} | {row['jax_nn_ms']:.1f} | {row['speedup']:.2f} |",
                flush=True,
            )
    summary = {}
    for name in ("fwd", "fwd+bwd"):
        speedups = [row["speedup"] for row in rows if row["pass"] == name]
        mean, least = statistics.geometric_mean(speedups), min(speedups)
        summary[name] = {"geometric_mean": mean, "least": least}
        print(f"{name}: {mean:.2f}x in the geometric mean, {least:.2f}x at least")
    memory = [
        _peak_growth_in_new_process(dtype, seq_len, 64)
        for dtype in ("float32", "bfloat16")
        for seq_len in (8192, 16384, 32768)
    ]
    for m in memory:
        print(
            f"peak growth of forward and backward, {m['dtype']} S={m['seq_len']}: "
            f"{m['growth_bytes'] / 2**20:.0f} MiB, {m['ratio']:.2f}x of inputs and results"
        )
    feature_report = Report(None)
    feature_report.begin("features")
    measure(features.groups(heads=2, speed=1e11), feature_report)
    if output is not None:
        report = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "isa": _native.cpu_isa(),
            "jax": jax.__version__,
            "cases": rows,
            "summary": summary,
            "memory": memory,
            "features": feature_report.rows,
        }
        output.write_text(json.dumps(report, indent=1) + "\n")
