"""Calls that reach every CUDA kernel, for `compute-sanitizer --tool memcheck python ...`."""

from functools import partial

import jax
import jax.numpy as jnp

from jax_flashattn import attention, attention_varlen

T, S = 150, 170
IDS = jnp.arange(S, dtype=jnp.int32) // 40
FEATURES = {
    "plain": {},
    "window": dict(local_window_size=(30, 5), sink_tokens=3),
    "biases": dict(logits_soft_cap=5.0, alibi_slopes=jnp.ones(4), sinks=jnp.ones(4)),
    "segments": dict(segment_ids=(IDS[:T], IDS)),
    "packed": dict(
        cu_seqlens_q=jnp.array([0, 60, 61, 140]), cu_seqlens_kv=jnp.array([0, 0, 90, 169])
    ),
}


def _loss(q, k, v, deterministic, features):
    options = dict(is_causal=True, query_offset="end", deterministic=deterministic)
    if "cu_seqlens_q" in features:
        out = attention_varlen(q[0], k[0], v[0], **options, **features)
    else:
        lengths = jnp.array([S, 70])
        out = attention(q, k, v, key_value_seq_lengths=lengths, **options, **features)
    return out.astype(jnp.float32).sum()


for head_dim, head_dim_v in ((64, 64), (100, 100), (128, 128), (192, 128), (256, 256)):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, T, 4, head_dim), (2, S, 2, head_dim), (2, S, 2, head_dim_v))
    inputs = [jax.random.normal(*x, jnp.bfloat16) for x in zip(keys, shapes, strict=True)]
    for name, features in FEATURES.items():
        for deterministic in (False, True):
            loss = partial(_loss, deterministic=deterministic, features=features)
            grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)
            assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in grads)
            print("ran", head_dim, head_dim_v, name, deterministic, flush=True)
