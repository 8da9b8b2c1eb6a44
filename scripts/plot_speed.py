"""Draws TFLOP/s over the sequence length, ours and the peers', from a report of the benchmark.

    python scripts/plot_speed.py benchmarks/results/h100_plain.json docs/speed

writes docs/speed_fwd.svg and docs/speed_bwd.svg. Needs matplotlib, of the extra 'bench'.
"""

import argparse
import json
import pathlib
from typing import Any

HEAD_DIMS = (64, 128, 256)
MASKS = {False: "full", True: "causal"}
PASSES = {"fwd": "forward", "bwd": "backward"}
# In the order of the legend; each keeps its colour in every plot.
IMPLS = {
    "jax_flashattn": ("jax_flashattn", "#d62728"),
    "dew_fa3": ("FlashAttention-3 (dew-flash-attn)", "#1f77b4"),
    "flash_attn_4": ("flash-attn-4 (PyTorch)", "#17becf"),
    "torch_cudnn": ("cuDNN (PyTorch)", "#8c564b"),
    "jax_cudnn": ("cuDNN (jax.nn)", "#2ca02c"),
    "tokamax": ("tokamax", "#9467bd"),
    "torch_fa2": ("FlashAttention-2 (PyTorch)", "#ff7f0e"),
    "jax_xla": ("XLA (jax.nn)", "#7f7f7f"),
}
Series = dict[str, list[tuple[int, float]]]  # points (sequence length, TFLOP/s) of each impl


def series(rows: list[dict[str, Any]], op: str, head_dim: int, causal: bool) -> Series:
    """Points of one panel, by implementation, in the order of the lengths."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        panel = row["set"], row["op"], row["head_dim"], row["causal"]
        if panel == ("grid", op, head_dim, causal) and row["impl"] in IMPLS:
            # Of several runs the first: ratios are of one run, and the plot should be too.
            found.setdefault(row["impl"], {}).setdefault(row["seq_q"], row["tflops"])
    return {impl: sorted(found[impl].items()) for impl in IMPLS if impl in found}


def draw(report: dict[str, Any], op: str, path: pathlib.Path) -> None:
    """Writes the panels of one pass: a column for each head dim, a row for each mask."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "jax_flashattn"  # the same file for the same data
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(MASKS), len(HEAD_DIMS), figsize=(11, 6), sharex=True, squeeze=False
    )
    lengths = sorted({row["seq_q"] for row in report["rows"] if row["set"] == "grid"})
    handles = {}
    for row, (causal, mask) in zip(axes, MASKS.items(), strict=True):
        for ax, head_dim in zip(row, HEAD_DIMS, strict=True):
            panel = series(report["rows"], op, head_dim, causal)
            for impl, points in panel.items():
                label, color = IMPLS[impl]
                width = 2.5 if impl == "jax_flashattn" else 1.2
                x, y = zip(*points, strict=True)
                (handles[label],) = ax.plot(
                    x, y, marker="o", markersize=3, linewidth=width, color=color
                )
            ax.set_xscale("log", base=2)
            ax.set_xticks(lengths, [str(length) for length in lengths])
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            ax.set_title(f"head dim {head_dim}, {mask}", fontsize=10)
        row[0].set_ylabel("TFLOP/s")
    for ax in axes[-1]:
        ax.set_xlabel("sequence length")
    figure.suptitle(f"{report['gpu']}, bfloat16, 16k tokens, hidden size 2048: {PASSES[op]}")
    figure.legend(handles.values(), handles, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    """Draws a file for each pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("prefix", help="of the files: PREFIX_fwd.svg and PREFIX_bwd.svg")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    args = parser.parse_args()
    report = json.loads(args.report.read_text())
    for op in PASSES:
        draw(report, op, pathlib.Path(f"{args.prefix}_{op}.{args.format}"))


if __name__ == "__main__":
    main()
