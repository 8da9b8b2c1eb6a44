"""Runs compute-sanitizer over calls that reach every CUDA kernel, and writes what it found.

    python scripts/sanitize_cuda.py REPORT.json

Needs a GPU, `jax[cuda]` and compute-sanitizer on the PATH. Takes some minutes. The exit status says
whether all runs were clean.

The kernels run without `setmaxnreg`: instrumented code has more registers than they are written
for, and a warp that claims some then waits for ever.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import sanitizer_cases

from jax_flashattn import _native

CASES = pathlib.Path(sanitizer_cases.__file__)
KERNELS = CASES.parent.parent / "cc" / "kernels"
TOOLS = ("memcheck", "racecheck", "synccheck")


def _runs(
    tools: list[str], cases: list[str], families: tuple[str, ...]
) -> list[tuple[str, str, str]]:
    """Tool, case and kernel family of each run; families are forced."""
    return [
        (tool, case, family)
        for tool in tools
        for case in cases
        for family in families
        if not case.startswith("fp8") or family == "sm90"
    ]


def _copy_kernels(directory: pathlib.Path) -> None:
    """The kernels' sources without `setmaxnreg`."""
    directory.mkdir()
    for path in KERNELS.iterdir():
        text = re.sub(r'asm volatile\("setmaxnreg.*\);', "", path.read_text())
        (directory / path.name).write_text(text)


def _without_places(text: str) -> str:
    """The output without the folders of the machine that it ran on."""
    text = text.replace(f"{CASES.parent.parent}/", "")
    return re.sub(r'"/[^"]*/site-packages/', '"', text)


def _run(tool: str, case: str, family: str, work: pathlib.Path, longest_seconds: int) -> dict:
    start = time.monotonic()
    env = {
        **os.environ,
        "JFA_FORCE_FAMILY": family,
        "JFA_CACHE_DIR": str(work / "cache"),
        "JFA_KERNEL_DIR": str(work / "kernels"),
        "JAX_PLATFORMS": "cuda",
        # A buffer for each array, or memcheck doesn't see where one ends.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    }
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=jfa_"]
    command += ["--error-exitcode", "9", sys.executable, str(CASES), case]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(longest_seconds)
        except subprocess.TimeoutExpired:
            # With what it started, or a kernel that hangs goes on beside the other runs.
            os.killpg(process.pid, signal.SIGKILL)
            code = "timed out"
        log.seek(0)
        output = log.read()
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    result = {"tool": tool, "case": case, "family": family}
    result |= {"passed": code == 0 and len(summary) == 1, "code": code, "summary": summary}
    result |= {"calls": output.count("\nran "), "seconds": round(time.monotonic() - start)}
    if not result["passed"]:
        result["output"] = _without_places(output)[-2000:]
        print(output[:3000], output[-1000:], flush=True)
    print(*result.values(), flush=True)
    return result


def _compiled(work: pathlib.Path) -> list[str]:
    """Names of the kernels that the runs used."""
    files = (work / "cache").glob("*.jfa")
    return sorted({re.findall(rb"jfa_\w+", x.read_bytes())[0].decode() for x in files})


def main() -> None:
    """Runs everything, several processes at a time, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--cases", nargs="+", default=list(sanitizer_cases.CASES))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--seconds", type=int, default=300, help="at most, of one run")
    args = parser.parse_args()
    devices = _native.cuda_devices()
    is_hopper = any("90" in x["arch"] for x in devices["devices"])
    runs = _runs(args.tools, args.cases, ("sm80", "sm90") if is_hopper else ("sm80",))
    with (
        tempfile.TemporaryDirectory() as directory,
        concurrent.futures.ThreadPoolExecutor(args.jobs) as pool,
    ):
        work = pathlib.Path(directory)
        _copy_kernels(work / "kernels")
        results = list(pool.map(lambda run: _run(*run, work, args.seconds), runs))
        kernels = _compiled(work)
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
