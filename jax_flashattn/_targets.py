"""The compiled module: its version check and its FFI targets.

Importing this touches no device: XLA takes the registered targets when a backend starts.
"""

import importlib.metadata
import importlib.util
import pathlib
import re

import jax

from jax_flashattn import _native

# The version in the name is that of the operands and attributes: exported programs and XLA's
# persistent cache refer to it, so a changed meaning needs a new name beside the old one.
FWD_TARGET = "jfa_fwd_v3"
BWD_TARGET = "jfa_bwd_v3"
SERVE_TARGET = "jfa_serve_v2"
PAGED_TARGET = "jfa_paged_v1"


def _check_ffi_version() -> None:
    """Raises ImportError where this jaxlib would refuse our handlers.

    Without it the refusal surfaces at the first JAX operation, as a backend that can't start.
    """
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    runtime = tuple(
        int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header).group(1))  # type: ignore
        for part in ("MAJOR", "MINOR")
    )
    built = tuple(_native.ffi_api_version())
    if built > runtime:
        raise ImportError(
            f"jax_flashattn was built against XLA FFI {built[0]}.{built[1]}, but the installed "
            f"jaxlib {importlib.metadata.version('jaxlib')} has {runtime[0]}.{runtime[1]}; "
            "upgrade jax and jaxlib, or rebuild jax_flashattn against this jaxlib"
        )


def _nvrtc_directories() -> list[str]:
    """Where pip puts libnvrtc, next to which its builtins lie; the loader doesn't look there."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec is not None else None
    return [
        str(directory)
        for root in roots or ()
        for subdirectory in ("cu13/lib", "cuda_nvrtc/lib")
        if (directory := pathlib.Path(root, subdirectory)).is_dir()
    ]


def _register() -> None:
    for name, handler in _native.cpu_handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    jax.ffi.register_ffi_type("jfa_cuda_state_v2", _native.cuda_state_type(), platform="CUDA")
    for name, stages in _native.cuda_handlers().items():
        jax.ffi.register_ffi_target(name, stages, platform="CUDA")
    # Not PAGED_TARGET: pages belong to no batch element, and no other axis leads on the CPU.
    for name in (FWD_TARGET, BWD_TARGET, SERVE_TARGET):
        jax.ffi.register_ffi_target_as_batch_partitionable(name)
    _native.set_nvrtc_search_paths(_nvrtc_directories())


_check_ffi_version()
_register()
