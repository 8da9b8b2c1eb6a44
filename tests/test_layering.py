"""Who may include or import whom: data flows one way, and a file has one job."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Each Python module and the modules of the package that it may import.
PYTHON = {
    "__init__": {"_api", "_explain", "_kv_cache", "_page_allocator", "_serving", "_spec"},
    "__main__": {"_bench", "_lowering_cuda", "_native"},
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


# The benchmarks: what they are built of, then their sections, then what runs those.
SECTION = {"harness", "report", "timing"}
BENCH = {
    "timing": set(),
    "report": set(),
    "harness": {"report", "timing"},
    "peers": {"harness", "timing"},
    "features": SECTION,
    "overhead": SECTION,
    "plain": {*SECTION, "features", "peers"},
    "serve": {*SECTION, "peers"},
    "fp8": {*SECTION, "peers", "plain", "serve"},
    "cpu": {"features", "harness", "report"},
    "cuda": {"features", "fp8", "harness", "overhead", "plain", "report", "serve"},
}
# What they time, as users call it, and what tells which kernels were timed.
TIMED = {"_api", "_bench", "_fp8", "_kv_cache", "_native", "_serving"}

# What builds upon the package from outside of that order, as users do.
FLAX = {"_api", "_spec", "flax"}


def imports(source: str, package: str = "") -> set[str]:
    inside = re.escape(f"jax_flashattn{package}")
    found = set(re.findall(rf"from {inside}\.(\w+)[\w.]* import", source))
    for names in re.findall(rf"from {inside} import (\([^)]+\)|.+)", source):
        found |= set(re.findall(r"\w+", names))
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jax_flashattn").glob("*.py")), ids=lambda p: p.stem
)
def test_python(path):
    assert imports(path.read_text()) <= PYTHON[path.stem] | {path.stem}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jax_flashattn" / "_bench").glob("[!_]*.py")), ids=lambda p: p.stem
)
def test_bench(path):
    source = path.read_text()
    assert imports(source) <= TIMED
    assert imports(source, "._bench") <= BENCH[path.stem] | {path.stem}


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
