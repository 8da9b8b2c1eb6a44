"""Who may include or import whom: data flows one way, and a file has one job."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent

BENCH = {"_bench_harness", "_bench_report", "_timing"}  # what every section is built of
# Each Python module and the modules of the package that it may import.
PYTHON = {
    "__init__": {"_api", "_explain", "_kv_cache", "_page_allocator", "_serving", "_spec"},
    "__main__": {"_bench", "_bench_cuda", "_lowering_cuda", "_native"},
    "_bench": {"_api", "_bench_features", "_bench_harness", "_bench_report", "_native"},
    "_bench_cuda": {
        "_bench_features",
        "_bench_fp8",
        "_bench_harness",
        "_bench_overhead",
        "_bench_plain",
        "_bench_report",
        "_bench_serve",
    },
    "_bench_plain": {*BENCH, "_api", "_bench_features", "_bench_peers"},
    "_bench_serve": {*BENCH, "_api", "_bench_peers", "_kv_cache", "_serving"},
    "_bench_fp8": {*BENCH, "_api", "_bench_peers", "_bench_plain", "_bench_serve", "_fp8"},
    "_bench_features": {*BENCH, "_api"},
    "_bench_overhead": {*BENCH, "_api"},
    "_bench_peers": {"_bench_harness", "_timing"},
    "_bench_harness": {"_bench_report", "_timing"},
    "_bench_report": {"_native"},
    "_timing": set(),
    "_api": {"_prepare", "_reference", "_spec", "_vjp"},
    "_explain": {"_fp8", "_lowering_cuda", "_lowering_serve", "_native", "_prepare", "_spec"},
    "_serving": {"_api", "_kv_cache", "_paged", "_prepare", "_reference", "_spec"},
    "_kv_cache": {"_fp8", "_prepare", "_reference", "_spec"},
    "_page_allocator": set(),
    "_paged": {"_calls", "_lowering", "_sharding", "_spec"},
    "_prepare": {"_fp8", "_spec"},
    "_vjp": {"_explicit", "_fp8", "_primitives", "_sharding", "_spec"},
    "_primitives": {"_calls", "_explicit", "_lowering", "_sharding", "_spec"},
    "_lowering": {
        "_explicit",
        "_lowering_cpu",
        "_lowering_cuda",
        "_lowering_serve",
        "_reference",
        "_spec",
    },
    "_lowering_cpu": {"_calls", "_fp8", "_native", "_sharding", "_spec", "_targets"},
    "_lowering_cuda": {"_calls", "_fp8", "_native", "_sharding", "_spec", "_targets"},
    "_lowering_serve": {
        "_calls",
        "_fp8",
        "_lowering_cuda",
        "_native",
        "_sharding",
        "_spec",
        "_targets",
    },
    "_explicit": {"_sharding", "_spec"},
    "_calls": {"_sharding", "_spec"},
    "_targets": {"_native"},
    "_reference": {"_fp8", "_spec"},
    "_fp8": {"_spec"},
    "_sharding": set(),
    "_spec": set(),
}


# What builds upon the package from outside of that order, as users do.
FLAX = {"_api", "_spec", "flax"}


def imports(source: str) -> set[str]:
    found = set(re.findall(r"from jax_flashattn\.(\w+) import", source))
    for names in re.findall(r"from jax_flashattn import (\([^)]+\)|.+)", source):
        found |= set(re.findall(r"\w+", names))
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jax_flashattn").glob("*.py")), ids=lambda p: p.stem
)
def test_python(path):
    assert imports(path.read_text()) <= PYTHON[path.stem] | {path.stem}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jax_flashattn" / "flax").glob("*.py")), ids=lambda p: p.stem
)
def test_flax(path):
    found = re.findall(r"from jax_flashattn(?:\.([\w.]+))? import (.+)", path.read_text())
    modules = {module.split(".")[0] or name for module, name in found}
    assert modules <= FLAX


def sources(*suffixes: str) -> list[pathlib.Path]:
    return sorted(p for p in (ROOT / "cc").rglob("*") if p.suffix in suffixes)


def test_only_handlers_know_xla_and_only_the_module_knows_python():
    for path in sources(".cc", ".h"):
        name = str(path.relative_to(ROOT / "cc"))
        text = path.read_text()
        if '"xla/' in text:
            assert re.fullmatch(r"module\.cc|(cpu/)?handlers\.(h|cc)", name), name
        if "nanobind/" in text:
            assert name == "module.cc", name


def test_files_are_short():
    files = [*sources(".cc", ".h", ".cuh"), *(ROOT / "jax_flashattn").rglob("*.py")]
    files += [*(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    for path in files:
        assert len(path.read_text().splitlines()) <= 600, path
