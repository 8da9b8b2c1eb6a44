"""The compile cache's promises, with NVRTC and no GPU. Each test is a process or two of its own."""

import json
import os
import stat
import subprocess
import sys

import pytest

PRELUDE = """
import json, os, threading
import jax_flashattn
from jax_flashattn import _native

def source(name="kernel", text=""):
    return f'extern "C" __global__ void {name}(float* x) {{ x[threadIdx.x] = 1.f; {text} }}'

def compile(name="kernel", arch="sm_90a", text=""):
    return _native.jit_compile_source(name, source(name, text), arch)
"""


@pytest.fixture
def run(run_python, tmp_path):
    def run(script: str, **environment: str) -> str:
        directory = str(tmp_path / "cache")
        return run_python(PRELUDE + script, **{"JFA_CACHE_DIR": directory, **environment})

    return run


def entries(tmp_path):
    return sorted((tmp_path / "cache").iterdir())


def test_same_key_compiles_once_and_serves_from_disk(run, tmp_path):
    run(
        """
assert compile()["origin"] == "compiled"
assert compile()["origin"] == "memory"
assert _native.jit_stats()["compiles"] == 1
"""
    )
    [entry] = entries(tmp_path)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    run(
        f"""
kernel = compile()
assert kernel["origin"] == "disk" and kernel["key"] in {entry.name!r}
assert kernel["cubin"][:4] == b"\\x7fELF"
stats = _native.jit_stats()
assert stats["compiles"] == 0 and stats["disk_hits"] == 1
"""
    )


def test_what_changes_the_key(run):
    run(
        """
keys = [compile()["key"], compile(arch="sm_80")["key"], compile(text="x[0] = 2.f;")["key"]]
assert len(set(keys)) == 3, keys
"""
    )


def test_threads_share_one_compile(run):
    run(
        """
results = []
threads = [threading.Thread(target=lambda: results.append(compile())) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len({r["key"] for r in results}) == 1 and len(results) == 8
assert _native.jit_stats()["compiles"] == 1, _native.jit_stats()
"""
    )


def test_processes_at_once(tmp_path):
    script = PRELUDE + "for i in range(4): assert compile(text=f'x[{i}] = 3.f;')['cubin']"
    environment = {**os.environ, "JFA_CACHE_DIR": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen([sys.executable, "-P", "-c", script], env=environment) for _ in range(3)
    ]
    assert [p.wait() for p in processes] == [0, 0, 0]
    assert len(entries(tmp_path)) == 4  # and no temporary file is left


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_damaged_entries_are_compiled_again(run, tmp_path, damage):
    run("compile()")
    [entry] = entries(tmp_path)
    whole = entry.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    entry.write_bytes(
        {"truncated": whole[:middle], "flipped": flipped, "foreign": b"#!/bin/sh\n", "empty": b""}[
            damage
        ]
    )
    run("assert compile()['origin'] == 'compiled'")
    run("assert compile()['origin'] == 'disk'")


def test_a_killed_writer_leaves_nothing_that_is_read(run, tmp_path):
    run("compile()")
    [entry] = entries(tmp_path)
    whole = entry.read_bytes()
    entry.unlink()
    (tmp_path / "cache" / f"{entry.name}.tmp.1.deadbeef").write_bytes(whole[:100])
    run("assert compile()['origin'] == 'compiled'")


def test_a_directory_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    run(
        """
assert compile()["origin"] == "compiled" and compile()["origin"] == "memory"
assert _native.jit_stats()["store_failures"] == 1
""",
        JFA_CACHE_DIR=str(tmp_path / "file" / "cache"),
    )


def test_compile_errors_name_the_line_and_can_be_retried(run):
    run(
        """
for _ in range(2):
    try:
        compile("bad", text="oops();")
    except RuntimeError as error:
        assert "oops" in str(error), error
    else:
        raise AssertionError("compiled")
assert _native.jit_stats()["compile_failures"] == 2
assert compile()["origin"] == "compiled"
"""
    )


def test_jit_can_be_disabled(run):
    run(
        """
try:
    compile()
except RuntimeError as error:
    assert str(error).startswith("KernelNotCachedError") and "warmup" in str(error), error
else:
    raise AssertionError("compiled")
""",
        JFA_DISABLE_JIT="1",
    )
    run("compile()")
    run("assert compile()['origin'] == 'disk'", JFA_DISABLE_JIT="1")


def test_without_nvrtc_the_error_says_what_to_install(run, tmp_path):
    run(
        """
try:
    compile()
except RuntimeError as error:
    assert "nvrtc" in str(error).lower() and "JFA_NVRTC_PATH" in str(error), error
else:
    raise AssertionError("compiled")
""",
        JFA_NVRTC_PATH=str(tmp_path / "nowhere"),
    )


def test_a_kernel_directory_replaces_the_embedded_sources(run, run_python, tmp_path):
    script = "print(json.dumps(_native.kernel_sources_sha256()))"
    embedded = json.loads(run(script))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "params.h").write_text("// other\n")
    assert json.loads(run(script, JFA_KERNEL_DIR=str(tmp_path / "kernels"))) != embedded
