from collections.abc import Sequence
from typing import Any

def ffi_api_version() -> tuple[int, int]: ...
def cpu_handlers() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def cpu_bwd_scratch_floats(
    q_len: int, num_heads: int, num_kv_heads: int, head_dim: int, num_sequences: int
) -> int: ...
def cuda_handlers() -> dict[str, dict[str, Any]]: ...
def cuda_state_type() -> Any: ...
def cuda_devices() -> dict[str, Any]: ...
def cuda_bwd_scratch_floats(
    head_dim: int,
    head_dim_v: int,
    deterministic: bool,
    group: int,
    q_len: int,
    num_sequences: int,
) -> int: ...
def cuda_decode_scratch_floats(
    batch: int, num_kv_heads: int, group: int, q_len: int, kv_len: int, head_dim_v: int
) -> int: ...
def cuda_decode_share(
    head_dim: int,
    batch: int,
    num_kv_heads: int,
    group: int,
    q_len: int,
    kv_len: int,
    page_size: int,
    alike: bool,
    arch: int,
    multiprocessors: int,
) -> tuple[int, int]: ...
def cuda_slope_partials(kv_len: int, num_sequences: int) -> int: ...
def cuda_explain(
    op: str,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    mask: str,
    features: Sequence[str],
    arch: int,
    rows: int = 0,
    kv_len: int = 0,
) -> dict[str, Any]: ...
def cuda_forward_ctas(
    head_dim: int,
    mask: str,
    features: Sequence[str],
    arch: int,
    num_heads: int,
    q_len: int,
    kv_len: int,
    multiprocessors: int,
) -> int: ...
def cuda_warm(
    op: str,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    mask: str,
    features: Sequence[str],
    arch: int,
    rows: int = 0,
    kv_len: int = 0,
) -> list[dict[str, Any]]: ...
def jit_compile_source(symbol: str, source: str, arch_name: str) -> dict[str, Any]: ...
def jit_stats() -> dict[str, Any]: ...
def jit_clear_memory() -> None: ...
def jit_cache_dir() -> str: ...
def nvrtc_version() -> str: ...
def set_nvrtc_search_paths(directories: list[str]) -> None: ...
def kernel_sources_sha256() -> str: ...
