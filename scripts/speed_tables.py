"""Prints a report of the benchmark on a GPU as Markdown tables.

    python scripts/speed_tables.py benchmarks/results/h100_plain.json [--sets grid windows]

One table for each set of cells and pass, a row for each cell: our rate, each peer's with our speed
over it, and our speed over the best of them. Then what all of it sums up to.
"""

import argparse
import json
import pathlib
from typing import Any

from jax_flashattn._bench.report import CELL, Row, is_ours


def rate(row: Row) -> str:
    """TFLOP/s or GB/s, or microseconds where neither is told."""
    for unit in ("tflops", "gbs"):
        if unit in row:
            return f"{row[unit]:.0f}"
    return f"{row['ms'] * 1e3:.1f} us"


def name(cell: dict[str, Any]) -> str:
    """Of a cell, as short as it can be told."""
    heads = f"{cell['heads']}/{cell['kv_heads']}"
    mask = "causal" if cell["causal"] else "full"
    kind = mask if cell["seq_q"] > 1 else f"{cell['batch']}x{cell['seq_kv']}"
    parts = [str(cell["head_dim"]), heads, kind]
    if cell["seq_q"] > 1:
        queries = "" if cell["seq_q"] == cell["seq_kv"] else f"{cell['seq_q']} on "
        parts.append(queries + str(cell["seq_kv"]))
    if cell["dtype"] != "bfloat16":
        parts.append(cell["dtype"])
    if cell["feature"] != "plain":
        parts.append(cell["feature"])
    return " ".join(parts)


def table(rows: list[Row], set: str, op: str) -> list[str]:
    """Lines of the table of one set and pass."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if (row["set"], row["op"]) == (set, op):
            cell = cells.setdefault(tuple(row[x] for x in CELL), {})
            cell.setdefault(row["impl"], row)  # of several runs the first
    impls = list(dict.fromkeys(impl for cell in cells.values() for impl in cell))
    own = [impl for impl in impls if is_ours(impl)]
    peers = [impl for impl in impls if impl not in own]
    heads = ["head dim, heads, case", *own, *(peers or ["over"])]
    lines = [" | ".join([*heads, "over the best"]) if peers else " | ".join(heads)]
    lines.append("|".join(["---"] * (len(heads) + bool(peers))))
    for key, cell in cells.items():
        parts = [name(dict(zip(CELL, key, strict=True)))]
        parts += [rate(cell[impl]) if impl in cell else "" for impl in own]
        ratios = []
        for impl in peers:
            ratio = cell.get(impl, {}).get("our_speedup")
            text = rate(cell[impl]) if impl in cell else ""
            parts.append(text if ratio is None else f"{text} ({ratio:.2f}x)")
            ratios += [] if ratio is None else [ratio]
        if peers:
            parts.append(f"{min(ratios):.2f}x" if ratios else "")
        else:
            row = cell[own[0]]
            over = "" if "over" not in row else f"{row['speed_over']:.2f}x {row['over']}"
            more = f", {row['over_us']:+.1f} us" if "over_us" in row else ""
            parts.append(over + more)
        lines.append(" | ".join(parts))
    return [f"| {line} |" if "---" not in line else f"|{line}|" for line in lines]


def lines(report: dict[str, Any], sets: list[str] | None = None) -> list[str]:
    """Everything that is printed."""
    rows = [row for row in report["rows"] if sets is None or row["set"] in sets]
    found = [f"{report['gpu']}, driver {report['driver']}, jax {report['jax']}, {report['date']}"]
    for key in dict.fromkeys((row["set"], row["op"]) for row in rows):
        found += ["", f"{key[0]}, {key[1]}:", "", *table(rows, *key)]
    found += ["", "| set | pass | speed of | over | geometric mean | least | cells |"]
    found.append("|---|---|---|---|---|---|---|")
    for x in report["summary"]:
        if sets is None or x["set"] in sets:
            found.append(
                f"| {x['set']} | {x['op']} | {x['impl']} | {x['over']} | "
                f"{x['geometric_mean']:.3f} | {x['least']:.3f} | {x['cells']} |"
            )
    return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--sets", nargs="+", help="only these sets of cells")
    args = parser.parse_args()
    print("\n".join(lines(json.loads(args.report.read_text()), args.sets)))


if __name__ == "__main__":
    main()
