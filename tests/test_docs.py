"""The programs of docs/sharding.md run and give what one device gives."""

import pathlib
import re

import jax.numpy as jnp

from jax_flashattn import attention
from shards import assert_same, inputs

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "sharding.md"


def test_programs_of_the_sharding_page():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"jnp": jnp}
    with_result = 0
    for block, K in zip(blocks, (2, 1, 1, 1, 2), strict=True):
        q, k, v, _ = inputs(0, 8, 16, 8, K)
        names.update(q=q, k=k, v=v, K=K)
        exec(block, names)
        if "out" in names:
            assert_same(names.pop("out"), attention(q, k, v))
            with_result += 1
    assert with_result == 3
