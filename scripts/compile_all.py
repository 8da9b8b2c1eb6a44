"""Compiles CUDA kernels for every architecture, without a GPU, and writes docs/kernels.md.

Usage: python scripts/compile_all.py [--product] [--archs ARCH...]. Without `--product`: bfloat16,
each head dim, mask and operation without further features. With it: the full product of all that
kernels are compiled for, some 17000 variants, which takes hours. With `--archs` the rows of other
architectures stay as they are.
"""

import argparse
import itertools
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

from jax_flashattn import _native

ROOT = pathlib.Path(__file__).parent.parent
TABLE = ROOT / "docs" / "kernels.md"
ARCHS = (80, 86, 89, 90, 100, 120)
HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
ARCH = 6  # where a variant, the arguments of cuda_warm, has its architecture
OPS = (("fwd", ()), ("bwd", ()), ("bwd", ("deterministic",)))
KEYS = (512, 4096, 16384)
LAYOUTS = ((), ("segments",), ("packed",))


def _serving_variants(product: bool) -> list[tuple]:
    """Decoding with 16, 32 and 64 rows a tile, and the forward over pages; of 8-bit keys too."""
    dtypes = ("bfloat16", "float16") if product else ("bfloat16",)
    logits = [x for n in range(3) for x in itertools.combinations(("softcap", "alibi"), n)]
    masks = ("full", "causal", "local")
    decode = [
        ("decode", dtype, *dims, mask, [*more], arch, rows)
        for arch, dims, dtype, mask, more, rows in itertools.product(
            ARCHS, HEAD_DIMS, dtypes, masks, logits if product else [()], (16, 32, 64)
        )
    ]
    paged = [
        ("fwd", dtype, *dims, mask, [*more, *layout, "paged"], arch, 0)
        for arch, dims, dtype, mask, more, layout in itertools.product(
            ARCHS, HEAD_DIMS, dtypes, masks, logits if product else [()], ((), ("packed",))
        )
    ]
    fp8 = [(*x[:5], [*x[5], "fp8_kv"], *x[6:]) for x in decode + paged]
    return decode + paged + fp8


def _fp8_variants(product: bool) -> list[tuple]:
    """The forward in 8-bit floats, which only Hopper has."""
    mixes = [
        [f"e5m2_{name}" for name, e5m2 in zip("qkv", given, strict=True) if e5m2]
        for given in (itertools.product((False, True), repeat=3) if product else [(False,) * 3])
    ]
    logits = [x for n in range(3) for x in itertools.combinations(("softcap", "alibi"), n)]
    features = [x + y for x in logits for y in LAYOUTS] if product else [()]
    return [
        ("fwd", dtype, *dims, mask, ["fp8", *mix, *sums, *more], 90)
        for dims, dtype, mask, mix, sums, more in itertools.product(
            HEAD_DIMS[1:],
            ("bfloat16", "float16") if product else ("bfloat16",),
            ("full", "causal", "local"),
            mixes,
            ((), ("two_level",)),
            features,
        )
    ]


def _variants(product: bool) -> list[tuple]:
    dtypes = ("bfloat16", "float16") if product else ("bfloat16",)
    logits = [x for n in range(3) for x in itertools.combinations(("softcap", "alibi"), n)]
    features = [x + y for x in logits for y in LAYOUTS] if product else [()]
    masks = ("full", "causal", "local")
    plain = [
        (op, dtype, *dims, mask, [*more, *extra], arch)
        for arch, (op, extra), dims, dtype, mask, more in itertools.product(
            ARCHS, OPS, HEAD_DIMS, dtypes, masks, features
        )
    ]
    # Hopper's forward has tiles of its own for short and for long keys.
    lengths = [(*x, 0, kv_len) for x in plain if x[0] == "fwd" and x[-1] == 90 for kv_len in KEYS]
    return plain + lengths + _serving_variants(product) + _fp8_variants(product)


def _rows(variant: tuple) -> list[tuple]:
    specs = {x["symbol"]: x for x in _native.cuda_explain(*variant)["kernels"]}
    return [
        (
            kernel["arch"],
            kernel["symbol"],
            specs[kernel["symbol"]]["threads"],
            kernel["registers"],
            kernel["local_bytes"],
            specs[kernel["symbol"]]["smem_bytes"],
        )
        for kernel in _native.cuda_warm(*variant)
    ]


def _rows_of_others(archs: list[int]) -> list[str]:
    """The table's lines of architectures that aren't compiled now."""
    own = tuple(f"| sm_{arch}" for arch in archs)
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    return [line for line in lines if line.startswith("| sm_") and not line.startswith(own)]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--product", action="store_true", help="every variant there is")
    parser.add_argument("--archs", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    args = parser.parse_args()
    variants = [x for x in _variants(args.product) if x[ARCH] in args.archs]
    rows: set[tuple] = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, found in enumerate(pool.map(_rows, variants), 1):
            rows.update(found)
            print(f"\r{done}/{len(variants)} variants", end="", flush=True)
    print(f"\n{len(rows)} kernels, {sum(row[4] > 0 for row in rows)} with a stack")
    version = _native.nvrtc_version()
    lines = [
        "# Resources of the CUDA kernels",
        "",
        f"By `scripts/compile_all.py` with NVRTC {version}. Shared memory is what a launch asks",
        "for; stack holds spilled registers.",
        "",
        "| arch | kernel | threads | registers | stack, bytes | shared memory, bytes |",
        "|---|---|---|---|---|---|",
    ]
    own = [f"| {' | '.join(map(str, row))} |" for row in rows]
    lines += sorted(_rows_of_others(args.archs) + own)
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    _main()
