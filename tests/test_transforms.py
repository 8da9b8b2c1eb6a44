"""JAX's transformations: each gives what the same calls give one by one."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from jax_flashattn import attention


def inputs(B=2, T=5, S=7, N=4, K=2, H=8, Hv=6):
    return oracle.make_inputs(0, B, T, S, N, K, H, Hv, jnp.float32)[:3]


def assert_trees_close(got, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5), got, expected)


def with_lse(q, k, v, **options):
    return attention(q, k, v, return_lse=True, **options)


def gradients(q, k, v, **options):
    def loss(q, k, v):
        out, lse = with_lse(q, k, v, **options)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

    return jax.grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("function", [with_lse, gradients])
def test_jit(function):
    assert_trees_close(jax.jit(function)(*inputs()), function(*inputs()))


@pytest.mark.parametrize("function", [with_lse, gradients])
@pytest.mark.parametrize(
    "axes",
    [
        (0, 0, 0),
        (0, None, None),
        (None, 0, None),
        (None, None, 0),
        (1, 0, None),
        (4, 2, 3),
        (None, 1, -1),
    ],
    ids=str,
)
def test_vmap_any_axis(function, axes):
    rng = np.random.default_rng(1)
    args = []
    for x, axis in zip(inputs(), axes, strict=True):
        wide = jnp.asarray(rng.standard_normal((3, *x.shape), np.float32))
        args.append(x if axis is None else jnp.moveaxis(wide, 0, axis))
    got = jax.vmap(function, axes)(*args)
    take = lambda x, axis, i: x if axis is None else jnp.take(x, i, axis)
    one_by_one = [
        function(*(take(x, a, i) for x, a in zip(args, axes, strict=True))) for i in range(3)
    ]
    assert_trees_close(got, jax.tree.map(lambda *xs: jnp.stack(xs), *one_by_one))


@pytest.mark.parametrize("function", [with_lse, gradients])
def test_vmap_nested_and_of_lengths(function):
    q, k, v = inputs()
    lengths = jnp.array([[1, 7], [3, 2], [5, 6]])
    queries = jnp.stack([q, 2 * q])

    def call(lengths, q):
        return function(q, k, v, key_value_seq_lengths=lengths, is_causal=True, query_offset="end")

    got = jax.vmap(lambda n: jax.vmap(lambda q: call(n, q))(queries))(lengths)
    for i, n in enumerate(lengths):
        for j, x in enumerate(queries):
            assert_trees_close(jax.tree.map(lambda a, i=i, j=j: a[i, j], got), call(n, x))


def test_vmap_of_queries_alone_copies_no_keys():
    q, k, v = inputs()
    queries = jnp.stack([q] * 3)
    text = jax.jit(jax.vmap(lambda q: attention(q, k, v))).lower(queries).as_text()
    [call] = re.findall(r"custom_call @jfa_fwd_v4.*", text)
    assert "tensor<2x7x2x8xf32>" in call


def test_jacrev():
    q, k, v = inputs(B=1, T=2, S=3)
    f = lambda x, implementation: attention(x, k, v, implementation=implementation)
    assert_trees_close(jax.jacrev(f)(q, None), jax.jacrev(f)(q, "xla"))


def test_gradient_of_some_arguments_and_results():
    q, k, v = inputs()
    for argnums in (0, 1, 2, (0, 2)):
        for pick in (lambda r: r[0].sum(), lambda r: r[1].sum(), lambda r: r[0].sum() + r[1].sum()):
            f = lambda q, k, v, implementation, pick=pick: pick(
                with_lse(q, k, v, implementation=implementation)
            )
            assert_trees_close(
                jax.grad(f, argnums)(q, k, v, None), jax.grad(f, argnums)(q, k, v, "xla")
            )


@pytest.mark.parametrize("function", [with_lse, gradients])
def test_xla_implementation_agrees(function):
    options = dict(is_causal=True, query_offset=1, key_value_seq_lengths=jnp.array([4, 0]))
    assert_trees_close(
        function(*inputs(), **options), function(*inputs(), implementation="xla", **options)
    )


def layer(x, weight, implementation=None):
    return x + weight * attention(x, x, x, is_causal=True, implementation=implementation), None


def test_scan_over_layers():
    q, _, _ = inputs()

    def stack(x, implementation):
        body = partial(layer, implementation=implementation)
        return jax.lax.scan(body, x, jnp.array([0.1, 0.2, 0.3]))[0].sum()

    f = jax.value_and_grad(stack)
    assert_trees_close(jax.jit(f, static_argnums=1)(q, None), f(q, "xla"))


@pytest.mark.parametrize(
    ("policy", "num_forward"),
    [
        (None, 2),
        (("flash_attention_out",), 2),
        (("flash_attention_out", "flash_attention_lse"), 1),
    ],
    ids=str,
)
def test_checkpoint_policies(policy, num_forward):
    """A policy that saves both residuals saves the second forward."""
    q, _, _ = inputs()
    policy = policy and jax.checkpoint_policies.save_only_these_names(*policy)
    weights = jnp.array([0.1, 0.2, 0.3])

    def loss(layer, x):
        return jax.lax.scan(layer, x, weights)[0].sum()

    f = jax.jit(jax.value_and_grad(partial(loss, jax.checkpoint(layer, policy=policy))))
    text = f.lower(q).compile().as_text()
    assert len(re.findall(r'custom_call_target="jfa_fwd_v4"', text)) == num_forward
    assert len(re.findall(r'custom_call_target="jfa_bwd_v3"', text)) == 1
    assert_trees_close(f(q), jax.value_and_grad(partial(loss, layer))(q))


def test_other_platforms_lower_to_the_dense_definition():
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs()]
    for function in (with_lse, gradients):
        text = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
        assert "jfa_" not in text
        assert "dot_general" in text


def test_concurrent_calls():
    """Handlers share XLA's thread pool; many at once neither deadlock nor mix."""
    from concurrent.futures import ThreadPoolExecutor

    f = jax.jit(gradients)
    many = [tuple(x + i for x in inputs(T=70, S=130)) for i in range(8)]
    expected = [f(*x) for x in many]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for got, one in zip(pool.map(lambda x: f(*x), many), expected, strict=True):
                assert_trees_close(got, one)
