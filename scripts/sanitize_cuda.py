"""Runs compute-sanitizer over calls that reach every CUDA kernel, and writes what it found.

    python scripts/sanitize_cuda.py REPORT.json

Needs a GPU, `jax[cuda]` and compute-sanitizer: of the PATH, or `--program`. PyPI has the newest one
(nvidia-cuda-sanitizer-api); before 2026.1 racecheck takes barriers of warpgroups for races. Takes
five minutes on 16 cores. The exit status says whether all runs were clean.

Several GPUs take turns. A run in which the tool itself dies is made again in two halves; the report
tells the attempts.

racecheck doesn't follow a warp whose lanes meet in `__syncwarp` and of which one then arrives at an
mbarrier: under it all lanes arrive. Other tools have the kernels as they are.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import sanitizer_cases

from jax_flashattn import _native

CASES = pathlib.Path(sanitizer_cases.__file__)
KERNELS = CASES.parent.parent / "cc" / "kernels"
TOOLS = ("memcheck", "racecheck", "synccheck")
PORTS = 4  # of a run
MOST_ATTEMPTS = 6


def _copy_kernels(directory: pathlib.Path) -> None:
    """The kernels' sources, with arrivals at barriers that racecheck follows."""
    shutil.copytree(KERNELS, directory)
    path = directory / "barriers.cuh"
    text, count = re.subn("kArrivingLanes = 1;", "kArrivingLanes = 32;", path.read_text())
    assert count == 1
    path.write_text(text)


def _without_places(text: str) -> str:
    """The output without the folders of the machine that it ran on."""
    text = text.replace(f"{CASES.parent.parent}/", "")
    return re.sub(r'"/[^"]*/site-packages/', '"', text)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Parts of a case, from `first` to before `last`, under one tool."""

    tool: str
    case: str
    family: str
    first: int
    last: int

    def halves(self) -> list["_Run"]:
        """The same in two runs; the run itself if it is of one part."""
        middle = (self.first + self.last) // 2
        if middle == self.first:
            return [self]
        return [dataclasses.replace(self, last=middle), dataclasses.replace(self, first=middle)]


def _runs(tools: list[str], cases: list[str], families: tuple[str, ...]) -> list[_Run]:
    """All runs; kernel families are forced."""
    parts = {case: len(list(sanitizer_cases.CASES[case]())) for case in cases}
    return [
        _Run(tool, case, family, 0, parts[case])
        for tool in tools
        for case in cases
        for family in families
        if not case.startswith("fp8") or family == "sm90"
    ]


class _Sanitizer:
    """Runs what it is given under compute-sanitizer.

    Args:
      program: compute-sanitizer.
      work: directory with the kernels' sources, and for their cache.
      longest_seconds: of one run.
      devices: that CUDA_VISIBLE_DEVICES may name, which take turns.
    """

    def __init__(self, program: str, work: pathlib.Path, longest_seconds: int, devices: list[str]):
        self.program = program
        self.work = work
        self.longest_seconds = longest_seconds
        self._devices = itertools.cycle(devices)
        # The tool finds its process by asking all sockets from a port on, and may find another
        # run's: each run has ports of its own.
        self._ports = itertools.count(50_000, PORTS)
        self._lock = threading.Lock()

    def check(self, run: _Run, attempts: int = 1) -> list[dict]:
        """Results of the run; where the tool itself died, of its halves, a few times over."""
        result = self._check_once(run) | {"attempts": attempts}
        print(*result.values(), flush=True)
        if not result["died"] or attempts == MOST_ATTEMPTS:
            return [result]
        return [x for half in run.halves() for x in self.check(half, attempts + 1)]

    def _check_once(self, run: _Run) -> dict:
        start = time.monotonic()
        env = {
            **os.environ,
            "JFA_FORCE_FAMILY": run.family,
            "JFA_CACHE_DIR": str(self.work / "cache"),
            "JAX_PLATFORMS": "cuda",
            # A buffer for each array, or memcheck doesn't see where one ends.
            "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        }
        if run.tool == "racecheck":
            env["JFA_KERNEL_DIR"] = str(self.work / "kernels")
        with self._lock:
            port = next(self._ports)
            env["CUDA_VISIBLE_DEVICES"] = next(self._devices)
        command = [self.program, "--tool", run.tool, "--kernel-name", "kns=jfa_"]
        command += ["--error-exitcode", "9", "--port", str(port), "--max-connections", str(PORTS)]
        # Not the compilers that XLA starts.
        command += ["--target-processes", "application-only", "--launch-timeout", "120"]
        command += [sys.executable, str(CASES), run.case, str(run.first), str(run.last)]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True
            )
            try:
                code = process.wait(self.longest_seconds)
            except subprocess.TimeoutExpired:
                code = "timed out"
            finally:
                # With what it started, or a kernel that hangs goes on beside the other runs.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            log.seek(0)
            output = log.read()
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        result = dataclasses.asdict(run)
        result |= {"passed": code == 0 and len(summary) == 1, "code": code, "summary": summary}
        result |= {"died": isinstance(code, int) and code < 0 and not summary}
        result |= {"calls": output.count("\nran "), "seconds": round(time.monotonic() - start)}
        if not result["passed"]:
            result["output"] = _without_places(output)[-2000:]
            print(output[:3000], output[-1000:], flush=True)
        return result


def _symbol(path: pathlib.Path) -> str:
    """Name of the kernel in an entry of the cache: behind its length."""
    entry = path.read_bytes()
    start = entry.index(b"jfa_")
    length = int.from_bytes(entry[start - 8 : start], "little")
    return entry[start : start + length].decode()


def _version(program: str) -> str:
    """Of compute-sanitizer: "2026.4.0.0"."""
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"Version (\S+)", text)[1]


def main() -> None:
    """Runs everything, several processes at a time, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--cases", nargs="+", default=list(sanitizer_cases.CASES))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--program", default="compute-sanitizer")
    parser.add_argument("--seconds", type=int, default=300, help="at most, of one run")
    args = parser.parse_args()
    devices = _native.cuda_devices()
    is_hopper = any("90" in x["arch"] for x in devices["devices"])
    runs = _runs(args.tools, args.cases, ("sm80", "sm90") if is_hopper else ("sm80",))
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **devices,
        "nvrtc": _native.nvrtc_version(),
        "compute_sanitizer": _version(args.program),
        "source_sha256": _native.kernel_sources_sha256(),
    }
    results: list[dict] = []
    order = ("tool", "case", "family", "first")  # in the report
    symbols: dict[pathlib.Path, str] = {}  # of the cache's entries, which never change
    with (
        tempfile.TemporaryDirectory() as directory,
        concurrent.futures.ThreadPoolExecutor(args.jobs) as pool,
    ):
        work = pathlib.Path(directory)
        _copy_kernels(work / "kernels")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = visible.split(",") if visible else map(str, range(len(devices["devices"])))
        sanitizer = _Sanitizer(args.program, work, args.seconds, list(numbers))
        waiting = [pool.submit(sanitizer.check, run) for run in runs]
        for ended, found in enumerate(concurrent.futures.as_completed(waiting), 1):
            results += found.result()
            entries = (work / "cache").glob("*.jfa")
            symbols |= {x: _symbol(x) for x in entries if x not in symbols}
            report |= {
                "passed": sum(x["passed"] for x in results),
                "failed": sum(not x["passed"] for x in results),
                "not_ended": len(runs) - ended,
                "runs": sorted(results, key=lambda x: [x[y] for y in order]),
                "kernels": sorted(set(symbols.values())),
            }
            # After each run: what ended isn't lost if this is stopped.
            args.report.write_text(json.dumps(report, indent=1) + "\n")
    kernels = len(report["kernels"])
    print(f"{report['passed']} runs clean, {report['failed']} not; {kernels} kernels")
    sys.exit(report["failed"] > 0)


if __name__ == "__main__":
    main()
