"""Results of the benchmarks on a GPU: rows, what they sum up to, and the file that keeps them.

A file may hold several runs of the same sources on the same GPU, day and versions; each row says
which one it is from. Rows of a section that is run again take the place of the old ones.
"""

import datetime
import importlib.metadata
import json
import pathlib
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from jax_flashattn import _native

OURS = "jax_flashattn"
PEER_PACKAGES = (
    "torch",
    "tokamax",
    "dew-flash-attn-cu13",
    "flash-attn-4",
    "flash-attn3-jax",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
)
# What tells one cell from another.
CELL = (
    "set",
    "op",
    "head_dim",
    "head_dim_v",
    "heads",
    "kv_heads",
    "batch",
    "seq_q",
    "seq_kv",
    "causal",
    "dtype",
    "feature",
)

Row = dict[str, Any]


def is_ours(impl: str) -> bool:
    """Whether an implementation is this project's kernels, of a forced family too."""
    return impl.startswith(OURS)


def _driver() -> str:
    version = pathlib.Path("/sys/module/nvidia/version")
    return version.read_text().strip() if version.exists() else "unknown"


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def identity() -> dict[str, Any]:
    """What runs must have in common to be in one file."""
    try:
        cuda = _native.cuda_devices()
        gpu, version = cuda["devices"][0]["name"], cuda["driver_version"]
        nvrtc = _native.nvrtc_version()
    except RuntimeError:
        gpu, version, nvrtc = "none", 0, "none"
    return {
        "gpu": gpu,
        "driver": _driver(),
        "cuda": version,
        "nvrtc": nvrtc,
        "jax": jax.__version__,
        "peers": _versions(PEER_PACKAGES),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "source_sha256": _native.kernel_sources_sha256(),
    }


def _mean_and_least(values: list[float]) -> dict[str, Any]:
    return {
        "geometric_mean": statistics.geometric_mean(values),
        "least": min(values),
        "cells": len(values),
    }


def summarize(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Our speed over each peer and over the best one of each cell, by set of cells and pass.

    Also the ratios between our own rows, such as of pages over dense keys (`over`).
    """
    ratios: dict[tuple[str, ...], list[float]] = {}
    cells: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        group = row["set"], row["op"]
        if "our_speedup" in row:
            ratios.setdefault((*group, row["ours"], row["impl"]), []).append(row["our_speedup"])
            cell = *(row[name] for name in CELL), row["ours"]
            cells.setdefault(cell, []).append(row["our_speedup"])
        elif "speed_over" in row:
            name = f"{row['impl']} {row['feature']} {row['dtype']}"
            ratios.setdefault((*group, name, row["over"]), []).append(row["speed_over"])
    for cell, found in cells.items():
        ratios.setdefault((cell[0], cell[1], cell[-1], "best peer"), []).append(min(found))
    return [
        dict(zip(("set", "op", "impl", "over"), key, strict=True)) | _mean_and_least(values)
        for key, values in ratios.items()
    ]


def summary_lines(summary: Iterable[Mapping[str, Any]]) -> list[str]:
    """The summary, one line of text for each entry."""
    return [
        f"{x['set']}, {x['op']}: {x['impl']} over {x['over']}: {x['geometric_mean']:.3f}x in the "
        f"geometric mean, {x['least']:.3f}x at least, {x['cells']} cells"
        for x in summary
    ]


class Report:
    """Rows of one file.

    Args:
      path: the JSON file, or None to keep nothing. A file that is there is continued if it is of
        the same sources, GPU, versions and day, and replaced otherwise.
    """

    def __init__(self, path: pathlib.Path | None):
        self.path = path
        self.identity = identity()
        self.runs: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        self.skipped: list[dict[str, Any]] = []
        if path is not None and path.exists():
            old = json.loads(path.read_text())
            if all(old.get(name) == value for name, value in self.identity.items()):
                self.runs, self.rows, self.skipped = old["runs"], old["rows"], old["skipped"]

    def begin(
        self, section: str, family: str | None = None, peers: Sequence[str] | None = None
    ) -> None:
        """Starts a run of a section, and drops the rows that the same run had before."""
        kind = {
            "section": section,
            "family": family,
            "peers": None if peers is None else sorted(peers),
        }
        gone = {
            run["run"]
            for run in self.runs
            if all(run[name] == value for name, value in kind.items())
        }
        self.runs = [run for run in self.runs if run["run"] not in gone]
        self.rows = [row for row in self.rows if row["run"] not in gone]
        self.skipped = [x for x in self.skipped if x["run"] not in gone]
        self._number = 1 + max((run["run"] for run in self.runs), default=0)
        self._started = time.perf_counter()
        self.runs.append(
            {
                "run": self._number,
                **kind,
                "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "seconds": 0.0,
                "complete": False,
            }
        )

    def add(self, rows: Iterable[Row]) -> None:
        """Adds rows of this run."""
        self.rows += [{**row, "run": self._number} for row in rows]

    def skip(self, impl: str, cell: str, error: BaseException) -> None:
        """Notes what could not be timed, and why."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self.skipped.append({"run": self._number, "impl": impl, "cell": cell, "reason": reason})
        print(f"skipped {impl}, {cell}: {reason}", flush=True)

    def write(self, *, complete: bool = False) -> None:
        """Writes what there is, so that a time limit loses little."""
        self.runs[-1]["seconds"] = round(time.perf_counter() - self._started, 1)
        self.runs[-1]["complete"] = complete
        if self.path is None:
            return
        report = {
            **self.identity,
            "runs": self.runs,
            "summary": summarize(self.rows),
            "skipped": self.skipped,
            "rows": self.rows,
        }
        self.path.write_text(json.dumps(report, indent=1) + "\n")

    def print_summary(self) -> None:
        """Prints the summary of the current run."""
        rows = (row for row in self.rows if row["run"] == self._number)
        print("\n".join(summary_lines(summarize(rows))), flush=True)
