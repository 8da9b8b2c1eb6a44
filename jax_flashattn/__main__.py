"""`python -m jax_flashattn`: what is installed here, and how fast it is."""

import argparse
import pathlib

import jax

import jax_flashattn
from jax_flashattn import _bench, _native


def _info() -> None:
    print(f"jax_flashattn {jax_flashattn.__version__}, jax {jax.__version__}")
    print("XLA FFI {}.{} (built against)".format(*_native.ffi_api_version()))
    print(f"CPU kernels: {_native.cpu_isa()}")
    print("devices: " + ", ".join(str(device) for device in jax.devices()))


def main() -> None:
    """Parses the command line and runs the command."""
    parser = argparse.ArgumentParser(prog="python -m jax_flashattn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, kernels and devices")
    bench = commands.add_parser("bench", help="speed and memory beside jax.nn, on this CPU")
    bench.add_argument("--output", type=pathlib.Path, help="also write the results here, as JSON")
    args = parser.parse_args()
    if args.command == "info":
        _info()
    else:
        jax.config.update("jax_platforms", "cpu")
        _bench.run(args.output)


if __name__ == "__main__":
    main()
