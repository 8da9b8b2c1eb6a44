"""Which kernels a call would get, without running it."""

import dataclasses
from typing import Any

import jax

from jax_flashattn import _fp8, _lowering_cuda, _lowering_serve, _native, _prepare
from jax_flashattn._spec import AttentionSpec, UnsupportedError


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns; printing it gives a readable account.

    Attributes:
      implementation: 'cuda', 'cpu' or 'xla'.
      spec: the call's static description.
      variants: for CUDA what is compiled for: operation, dtype, head dims, mask and features of
        forward and backward. Calls with equal variants share kernels.
      kernels: for CUDA one dict per kernel: symbol, file, config (tile sizes and features),
        threads, smem_bytes, schedule ('grid' or 'persistent'), arch and key (its name in the
        kernel cache; None without NVRTC).
    """

    implementation: str
    spec: AttentionSpec
    variants: list[dict[str, Any]]
    kernels: list[dict[str, Any]]

    def __str__(self) -> str:
        lines = [f"implementation: {self.implementation}", f"{self.spec}"]
        for kernel in self.kernels:
            lines.append(
                f"{kernel['symbol']} ({kernel['file']}, {kernel['arch']}): {kernel['threads']} "
                f"threads, {kernel['smem_bytes'] / 1024:.0f} KiB shared memory, "
                f"{kernel['schedule']}"
            )
            lines.append(f"  key {kernel['key']}")
            lines.append("  " + ", ".join(f"{k}={v}" for k, v in kernel["config"].items()))
        return "\n".join(lines)


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    platform: str | None = None,
    arch: int | None = None,
    **options: Any,
) -> Explanation:
    """Tells what a call of `attention` (or, with `cu_seqlens_q`, `attention_varlen`) would run.

    Args:
      q: array or `jax.ShapeDtypeStruct` as for `attention`; k and v likewise.
      k: keys.
      v: values.
      platform: 'cuda', 'cpu' or another; JAX's default backend if left out.
      arch: GPU architecture, such as 80 or 90; that of the first GPU if left out.
      **options: further arguments of the call.

    Raises:
      TypeError, ValueError, UnsupportedError: as the call would.
      RuntimeError: no GPU is there to tell the architecture.
    """
    options.pop("return_lse", None)
    prepare = _prepare.packed if "cu_seqlens_q" in options else _prepare.dense
    found: list[AttentionSpec] = []

    def trace(q: Any, k: Any, v: Any) -> None:
        found.append(prepare(q, k, v, **options).spec)

    jax.eval_shape(trace, q, k, v)
    spec = found[0]
    platform = platform or jax.default_backend()
    platform = {"gpu": "cuda"}.get(platform, platform)
    implementation = spec.implementation or (platform if platform in ("cuda", "cpu") else "xla")
    if implementation != "cuda":
        return Explanation(implementation, spec, [], [])
    _lowering_cuda.check_supported(q, v)
    ops = ("fwd",) if _fp8.is_fp8(k) else ("fwd", "bwd")
    variants = [_lowering_cuda.variant(spec, op, q, k, v) for op in ops]
    if _lowering_serve.decodes(q, v, k.shape[-2], spec):
        rows = q.shape[-3] * (q.shape[-2] // k.shape[-2])
        variants[0] = _lowering_cuda.variant(spec, "decode", q, k, v, rows=rows)
    if arch is None:
        arch = _lowering_cuda.device_archs()[0]
    kernels = []
    for variant in variants:
        plan = _native.cuda_explain(**variant, arch=arch)
        if plan["error"]:
            raise UnsupportedError(plan["error"])
        kernels += [{**kernel, "arch": plan["arch"]} for kernel in plan["kernels"]]
    return Explanation(implementation, spec, variants, kernels)
