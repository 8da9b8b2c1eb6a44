"""A few calls that reach every CUDA kernel, for `compute-sanitizer --tool memcheck python ...`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import jax.numpy as jnp
import numpy as np

import oracle

for H, Hv in ((64, 64), (128, 128), (256, 256), (40, 72), (17, 33)):
    for deterministic in (False, True):
        oracle.check(
            *oracle.make_inputs(0, 2, 150, 267, 4, 2, H, Hv, jnp.bfloat16),
            is_causal=True,
            query_offset="end",
            key_value_seq_lengths=np.array([267, 100], np.int32),
            deterministic=deterministic,
        )
        print("checked", H, Hv, deterministic, flush=True)
