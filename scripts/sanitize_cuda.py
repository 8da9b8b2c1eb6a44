"""Runs compute-sanitizer over calls that reach every CUDA kernel, and writes what it found.

    python scripts/sanitize_cuda.py REPORT.json

Needs a GPU, `jax[cuda]` and compute-sanitizer on the PATH. Takes some minutes. The exit status says
whether all runs were clean.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import sanitizer_cases

from jax_flashattn import _native

CASES = pathlib.Path(sanitizer_cases.__file__)
TOOLS = ("memcheck", "racecheck", "synccheck")
LONGEST_SECONDS = 300


def _runs(archs: set[int]) -> list[tuple[str, str, str]]:
    """Tool, case and kernel family of each run; the other family than the plan's is forced."""
    families = ("sm80", "sm90") if 90 in archs else ("sm80",)
    return [
        (tool, case, family)
        for tool in TOOLS
        for case in sanitizer_cases.CASES
        for family in families
        if not case.startswith("fp8") or family == "sm90"
    ]


def _run(tool: str, case: str, family: str, cache: str) -> dict:
    start = time.monotonic()
    env = {
        **os.environ,
        "JFA_FORCE_FAMILY": family,
        "JFA_CACHE_DIR": cache,
        "JAX_PLATFORMS": "cuda",
        # A buffer for each array, or memcheck doesn't see where one ends.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    }
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=jfa_"]
    command += ["--error-exitcode", "9", sys.executable, str(CASES), case]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False
        )
        output, passed = done.stdout + done.stderr, done.returncode == 0
    except subprocess.TimeoutExpired as error:
        output, passed = f"{error}", False
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    result = {"tool": tool, "case": case, "family": family}
    result |= {"passed": passed and len(summary) == 1, "summary": summary}
    result |= {"calls": output.count("\nran "), "seconds": round(time.monotonic() - start)}
    if not result["passed"]:
        result["output"] = output[-2000:]
        print(output[:3000], output[-1000:], flush=True)
    print(*result.values(), flush=True)
    return result


def _compiled(cache: str) -> list[str]:
    """Names of the kernels that the runs used."""
    files = pathlib.Path(cache).glob("*.jfa")
    return sorted({re.search(rb"jfa_\w+", x.read_bytes()).group().decode() for x in files})  # type: ignore


def main() -> None:
    """Runs everything, several processes at a time, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    args = parser.parse_args()
    devices = _native.cuda_devices()
    runs = _runs({90 if "90" in x["arch"] else 80 for x in devices["devices"]})
    with (
        tempfile.TemporaryDirectory() as cache,
        concurrent.futures.ThreadPoolExecutor(args.jobs) as pool,
    ):
        results = list(pool.map(lambda run: _run(*run, cache), runs))
        kernels = _compiled(cache)
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **devices,
        "nvrtc": _native.nvrtc_version(),
        "source_sha256": _native.kernel_sources_sha256(),
        "passed": sum(x["passed"] for x in results),
        "failed": sum(not x["passed"] for x in results),
        "runs": results,
        "kernels": kernels,
    }
    args.report.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['passed']} runs clean, {report['failed']} not; {len(kernels)} kernels")
    sys.exit(report["failed"] > 0)


if __name__ == "__main__":
    main()
