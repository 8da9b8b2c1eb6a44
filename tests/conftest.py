"""Settings that hold for every test; JAX must see them before its first use."""

import datetime
import json
import os
import pathlib
import subprocess
import sys
import textwrap

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# The reference's matrix products are small, and each test process would start a thread per core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", help="with -m gpu: write what ran, and on what, to this file")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Compiling takes up to a minute a test: a worker without work takes another one's."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


def pytest_configure(config: pytest.Config) -> None:
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        jax.config.update("jax_platforms", "cpu")
        # A CUDA plugin may be there to compile with; without a GPU its versions don't matter.
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # What passes under these passes for users who set them.
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    path = config.getoption("--gpu-report")
    if not path or hasattr(config, "workerinput"):
        return
    from jax_flashattn import _native

    outcomes = {
        outcome: len(terminalreporter.stats.get(outcome, []))
        for outcome in ("passed", "failed", "error", "skipped")
    }
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **_native.cuda_devices(),
        "nvrtc": _native.nvrtc_version(),
        "jax": jax.__version__,
        "source_sha256": _native.kernel_sources_sha256(),
        "outcomes": outcomes,
        "tests": sorted(x.nodeid for x in terminalreporter.stats.get("passed", [])),
        "failed": sorted(x.nodeid for x in terminalreporter.stats.get("failed", [])),
    }
    pathlib.Path(path).write_text(json.dumps(report, indent=1) + "\n")


@pytest.fixture
def run_python():
    """Runs a script in a fresh interpreter that can import from tests/; returns its output."""

    def run(script: str, **environment: str) -> str:
        here = pathlib.Path(__file__).parent
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            # Not the repository's root, where the package lies without its compiled module.
            cwd=here,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")
