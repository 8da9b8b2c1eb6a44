"""`python -m jax_flashattn`: what is installed here, how fast it is, and the kernel cache."""

import argparse
import concurrent.futures
import itertools
import pathlib
import shutil
import sys

import jax

import jax_flashattn
from jax_flashattn import _lowering_cuda, _native
from jax_flashattn._bench import cpu as bench_cpu
from jax_flashattn._bench import cuda as bench_cuda

BACKWARD_FEATURES = ("deterministic", "dslopes")
FORWARD_FEATURES = ("paged",)
FEATURES = ("softcap", "alibi", "segments", "packed", *FORWARD_FEATURES, *BACKWARD_FEATURES)
# Of decoding, whose kernel takes dense and paged keys, but neither segments nor packed queries.
DECODE_FEATURES = ("softcap", "alibi")
DECODE_ROWS = (16, 32, 64, 128)  # of a tile: queries of one key head, rounded up
FORWARD_KEYS = (512, 4096, 16384)  # one length of each kind that tiles are chosen by


def _info(args: argparse.Namespace) -> None:
    print(f"jax_flashattn {jax_flashattn.__version__}, jax {jax.__version__}")
    print("XLA FFI {}.{} (built against)".format(*_native.ffi_api_version()))
    print(f"CPU kernels: {_native.cpu_isa()}")
    try:
        cuda = _native.cuda_devices()
        print(
            f"CUDA driver: {cuda['driver_version'] // 1000}.{cuda['driver_version'] % 1000 // 10}"
        )
        for device in cuda["devices"]:
            print(f"GPU {device['ordinal']}: {device['name']}, {device['arch']}")
    except RuntimeError as error:
        print(f"CUDA driver: none ({error})")
    try:
        print(f"NVRTC: {_native.nvrtc_version()}")
    except RuntimeError as error:
        print(f"NVRTC: none ({error})")
    print(f"kernel sources: source_sha256 {_native.kernel_sources_sha256()}")
    _print_cache()


def _entries() -> list[pathlib.Path]:
    directory = pathlib.Path(_native.jit_cache_dir() or "/nonexistent")
    return sorted(directory.glob("*.jfa")) if directory.is_dir() else []


def _print_cache() -> None:
    entries = _entries()
    size = sum(path.stat().st_size for path in entries) / 2**20
    print(f"kernel cache: {_native.jit_cache_dir()}, {len(entries)} kernels, {size:.1f} MiB")


def _cache(args: argparse.Namespace) -> None:
    if args.action == "list":
        for path in _entries():
            print(f"{path.stat().st_size:>9} {path.name}")
    elif args.action == "clear":
        for path in _entries():
            path.unlink(missing_ok=True)
    _print_cache()


def _warmup(args: argparse.Namespace) -> None:
    try:
        archs = args.arch or _lowering_cuda.device_archs()
    except RuntimeError as error:
        sys.exit(f"no GPU to compile for ({error}); name one with --arch, as 80 or 90")
    jobs = list(
        itertools.product(args.op, args.dtype, args.head_dim, args.mask, args.features, archs)
    )

    def compile_one(job: tuple[str, str, tuple[int, int], str, list[str], int]) -> int:
        op, dtype, (head_dim, head_dim_v), mask, features, arch = job
        if op == "decode":
            features = [x for x in features if x in DECODE_FEATURES]
        else:
            others = BACKWARD_FEATURES if op == "fwd" else FORWARD_FEATURES
            features = [x for x in features if x not in others]
        all_rows = DECODE_ROWS if op == "decode" else (0,)
        kv_lens = FORWARD_KEYS if op == "fwd" else (0,)
        common = (op, dtype, head_dim, head_dim_v, mask, features, arch)
        return sum(
            len(_native.cuda_warm(*common, rows, kv_len)) for rows in all_rows for kv_len in kv_lens
        )

    width = max(10, shutil.get_terminal_size().columns - 40)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for done, _ in enumerate(pool.map(compile_one, jobs), 1):
            bar = "#" * (width * done // len(jobs))
            print(f"\r[{bar:<{width}}] {done}/{len(jobs)} variants", end="", flush=True)
    stats = _native.jit_stats()
    print(f"\n{stats['compiles']} compiled, {stats['disk_hits']} were there")
    _print_cache()


def _bench_command(args: argparse.Namespace) -> None:
    if args.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        bench_cpu.run(args.output)
    else:
        if jax.default_backend() != "gpu":
            sys.exit(f"--platform cuda: JAX finds no GPU, its backend is {jax.default_backend()}")
        bench_cuda.run(
            args.output, only=args.only, family=args.family, peers=args.peers, limit=args.limit
        )


def _features(text: str) -> list[str]:
    features = [] if text == "none" else text.split("+")
    for feature in features:
        if feature not in FEATURES:
            raise argparse.ArgumentTypeError(f"{feature!r} is none of {', '.join(FEATURES)}")
    return features


def _head_dims(text: str) -> tuple[int, int]:
    head_dim, _, head_dim_v = text.partition(":")
    return int(head_dim), int(head_dim_v or head_dim)


def main() -> None:
    """Parses the command line and runs the command."""
    parser = argparse.ArgumentParser(prog="python -m jax_flashattn", description=__doc__)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("info", help="versions, devices, kernels, cache").set_defaults(run=_info)

    cache = commands.add_parser("cache", help="the compiled CUDA kernels on disk")
    cache.add_argument("action", choices=["list", "size", "clear"])
    cache.set_defaults(run=_cache)

    warmup = commands.add_parser("warmup", help="compile CUDA kernels ahead of their first call")
    warmup.add_argument("--op", nargs="+", choices=["fwd", "bwd", "decode"], default=["fwd", "bwd"])
    dtypes = ["bfloat16", "float16"]
    warmup.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes[:1])
    warmup.add_argument(
        "--head-dim", nargs="+", type=_head_dims, default=[(64, 64), (128, 128)], metavar="H[:Hv]"
    )
    masks = ["full", "causal", "local"]
    warmup.add_argument("--mask", nargs="+", choices=masks, default=masks[:2])
    warmup.add_argument(
        "--features",
        nargs="+",
        type=_features,
        default=[[]],
        metavar="none|" + "|".join(FEATURES),
        help="joined by +, such as none softcap+packed; 'local' is the mask of any window",
    )
    warmup.add_argument("--arch", nargs="+", type=int, help="such as 80 90; default: the GPUs here")
    warmup.add_argument("--jobs", type=int, default=None, help="how many at once")
    warmup.set_defaults(run=_warmup)

    bench = commands.add_parser("bench", help="speed beside jax.nn and what else is installed")
    bench.add_argument("--platform", choices=["cpu", "cuda"], default="cpu")
    bench.add_argument("--output", type=pathlib.Path, help="also write the results here, as JSON")
    bench.add_argument(
        "--only",
        type=lambda text: text.split(","),
        metavar="SECTION,...",
        help=f"on a GPU: which of {', '.join(bench_cuda.SECTIONS)}; all by default",
    )
    bench.add_argument(
        "--family", choices=bench_cuda.FAMILIES, help="on a GPU: force these kernels (plain only)"
    )
    bench.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="on a GPU: compare with these only, such as dew_fa3,torch_cudnn",
    )
    bench.add_argument("--limit", type=int, help="on a GPU: at most so many cells of a section")
    bench.set_defaults(run=_bench_command)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
