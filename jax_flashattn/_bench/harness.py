"""Cells of a benchmark: what is timed side by side, and how that becomes rows."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn._bench.report import OURS, Report, Row, is_ours
from jax_flashattn._bench.timing import Build, Start, Timer, alternate

ROUNDS = 9
CELLS_AT_ONCE = 24  # whose programs are compiled before the first of them is timed
SPEED = 5e14  # about what a Hopper GPU does, FLOP/s
BANDWIDTH = 3e12  # about what it reads, bytes per second


@dataclasses.dataclass(frozen=True)
class Cell:
    """Shapes and meaning of one call, as they stand in its row.

    Attributes:
      set: name of the set of cells that a mean is taken over.
      pairs: visible pairs of query and key of one head, all sequences together, or None.
      moved: bytes of keys and values that a call reads, or None.
      speed: about what the device does, FLOP/s; shorter calls are repeated more.
      op: in the row, where that is not the name of the timer.
    """

    set: str
    head_dim: int
    heads: int
    kv_heads: int
    batch: int
    seq_q: int
    seq_kv: int
    causal: bool = False
    dtype: str = "bfloat16"
    feature: str = "plain"
    pairs: float | None = None
    moved: int | None = None
    speed: float = SPEED
    op: str = ""

    @property
    def seconds(self) -> float:
        """About what a forward takes."""
        if self.moved is not None:
            return self.moved / BANDWIDTH + 5e-6
        return self.flops("fwd") / self.speed + 2e-6

    def flops(self, op: str) -> float:
        """Of all products of a call."""
        assert self.pairs is not None
        return (10 if op == "bwd" else 4) * self.heads * self.pairs * self.head_dim

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Of q, k and v."""
        B, D = self.batch, self.head_dim
        kv = (B, self.seq_kv, self.kv_heads, D)
        shapes = (B, self.seq_q, self.heads, D), kv, kv
        return [jax.ShapeDtypeStruct(shape, self.dtype) for shape in shapes]

    def row(self, op: str, impl: str, seconds: float) -> Row:
        """The row of a result."""
        row = {
            "set": self.set,
            "op": self.op or op,
            "impl": impl,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "batch": self.batch,
            "seq_q": self.seq_q,
            "seq_kv": self.seq_kv,
            "causal": self.causal,
            "dtype": self.dtype,
            "feature": self.feature,
            "ms": seconds * 1e3,
        }
        if self.moved is not None:
            return row | {"moved_bytes": self.moved, "gbs": self.moved / seconds / 1e9}
        return row if self.pairs is None else row | {"tflops": self.flops(op) / seconds / 1e12}

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return (
            f"{self.set}: D {self.head_dim}, {self.heads}/{self.kv_heads} heads, {mask}, "
            f"B {self.batch}, T {self.seq_q}, S {self.seq_kv}"
        )


@dataclasses.dataclass(frozen=True)
class Entry:
    """One implementation in one cell.

    Attributes:
      impl: its name.
      build: makes its timers.
      cell: what its row says.
      name: tells entries of a group apart; `impl` by default.
      base: the entry it is compared with: of a peer ours, of ours another of ours.
      per_work: compare the rates, not the times of a call; the two differ in their work.
      inputs: numbers of the group's inputs that it takes; all by default.
    """

    impl: str
    build: Build
    cell: Cell
    name: str = ""
    base: str = OURS
    per_work: bool = False
    inputs: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        return self.name or self.impl


@dataclasses.dataclass(frozen=True)
class Group:
    """Entries that alternate, all on the same inputs: random ones of `shapes`, and `arrays`."""

    cell: Cell
    shapes: Sequence[jax.ShapeDtypeStruct]
    entries: Sequence[Entry]
    arrays: Sequence[np.ndarray] = ()


def _random(shapes: Sequence[jax.ShapeDtypeStruct]) -> Callable[[], list[jax.Array]]:
    """Compiles a program that draws one array; those of one shape share it."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        wide = dtype if jnp.dtype(dtype).itemsize > 1 else jnp.bfloat16
        return jax.random.normal(key, shape, wide).astype(dtype)

    # Not the default generator, which takes XLA far longer to compile.
    keys = [jax.random.key(i, impl="rbg") for i in range(len(shapes))]
    programs = {}
    for x in shapes:
        if (x.shape, x.dtype) not in programs:
            draws = jax.jit(draw, static_argnums=(1, 2))
            programs[x.shape, x.dtype] = draws.lower(keys[0], x.shape, x.dtype).compile()
    return lambda: [programs[x.shape, x.dtype](k) for x, k in zip(shapes, keys, strict=True)]


def _work(cell: Cell) -> float:
    return cell.flops("fwd") if cell.moved is None else cell.moved


def _time_group(
    group: Group, inputs: Sequence[Any], starts: dict[str, Start], report: Report
) -> list[Row]:
    timers: dict[str, dict[str, Timer]] = {}
    entries = {entry.key: entry for entry in group.entries}
    for key, start in starts.items():
        try:
            taken = entries[key].inputs
            timers[key] = start(inputs if taken is None else [inputs[i] for i in taken])
        except Exception as error:
            report.skip(entries[key].impl, str(entries[key].cell), error)
    rows = []
    for op in dict.fromkeys(op for passes in timers.values() for op in passes):
        found = alternate({key: t[op] for key, t in timers.items() if op in t}, ROUNDS)
        for key, seconds in found.items():
            entry = entries[key]
            row = entry.cell.row(op, entry.impl, statistics.median(seconds))
            if entry.base != key and entry.base in found:
                ratio = statistics.median(
                    a / b for a, b in zip(seconds, found[entry.base], strict=True)
                )
                if entry.per_work:
                    ratio *= _work(entries[entry.base].cell) / _work(entry.cell)
                if is_ours(entry.impl):
                    row |= {"over": entry.base, "speed_over": 1 / ratio}
                    if entry.cell.op == "overhead":
                        more = (a - b for a, b in zip(seconds, found[entry.base], strict=True))
                        row["over_us"] = statistics.median(more) * 1e6
                else:
                    row |= {"ours": entries[entry.base].impl, "our_speedup": ratio}
            rows.append(row)
    return rows


def _print_rows(cell: Cell, rows: Sequence[Row]) -> None:
    for op in dict.fromkeys(row["op"] for row in rows):
        parts = []
        for row in rows:
            if row["op"] == op:
                rate = row.get("tflops") or row.get("gbs")
                ratio = row.get("our_speedup") or row.get("speed_over")
                name = row["impl"] if row["feature"] == "plain" else row["feature"]
                if row["feature"] != "plain" and not is_ours(row["impl"]):
                    name = f"{row['impl']} {row['feature']}"
                figure = f"{row['ms'] * 1e3:.1f} us" + ("" if rate is None else f" {rate:.0f}")
                parts.append(f"{name} {figure}" + ("" if ratio is None else f" ({ratio:.3f})"))
        print(f"{op} {cell} | {' | '.join(parts)}", flush=True)


def with_peers(groups: Sequence[Group], peers: Sequence[str]) -> list[Group]:
    """The groups in which one of `peers` takes part, without the others, or several of our own."""
    found = []
    for group in groups:
        entries = [x for x in group.entries if is_ours(x.impl) or x.impl in peers]
        ours = sum(is_ours(x.impl) for x in entries)
        if len(entries) > ours or (ours > 1 and ours == len(group.entries)):
            found.append(dataclasses.replace(group, entries=entries))
    return found


def spread(groups: Sequence[Group], limit: int | None) -> Sequence[Group]:
    """At most `limit` of the groups, evenly spaced."""
    if limit is None or limit >= len(groups):
        return groups
    return [groups[i * len(groups) // limit] for i in range(limit)]


def measure(groups: Sequence[Group], report: Report) -> None:
    """Times every group; prints rows as they come, adds them to the report and writes it."""
    for first in range(0, len(groups), CELLS_AT_ONCE):
        batch = groups[first : first + CELLS_AT_ONCE]
        spent: dict[str, list[float]] = {}

        def timed_build(entry: Entry, spent: dict[str, list[float]] = spent) -> Start:
            start = time.perf_counter()
            try:
                return entry.build()
            finally:
                spent.setdefault(entry.impl, []).append(time.perf_counter() - start)

        begin = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            makers = [pool.submit(_random, group.shapes) for group in batch]
            futures: list[list[Future[Start]]] = [
                [pool.submit(timed_build, entry) for entry in group.entries] for group in batch
            ]
        by_impl = ", ".join(f"{impl} {sum(s):.0f}" for impl, s in spent.items())
        print(
            f"compiled {sum(map(len, spent.values()))} entries of {len(batch)} cells in "
            f"{time.perf_counter() - begin:.1f} s (seconds of threads: {by_impl})",
            flush=True,
        )
        begin = time.perf_counter()
        for group, maker, builds in zip(batch, makers, futures, strict=True):
            starts = {}
            for entry, future in zip(group.entries, builds, strict=True):
                error = future.exception()
                if error is not None:
                    report.skip(entry.impl, str(entry.cell), error)
                else:
                    starts[entry.key] = future.result()
            try:
                inputs = (*maker.result()(), *map(jnp.asarray, group.arrays))
                rows = _time_group(group, inputs, starts, report)
            except Exception as error:
                report.skip("all", str(group.cell), error)
                continue
            finally:
                inputs = None  # frees the memory before the next group's are made
            _print_rows(group.cell, rows)
            report.add(rows)
        report.write()
        print(f"timed in {time.perf_counter() - begin:.1f} s", flush=True)
