"""The one tolerance rule.

A kernel may be off from the float64 reference by at most twice what the same maths costs with every
operation in the inputs' dtype (float32 where a matrix product accumulates), plus, of the largest
value, one rounding in the inputs' dtype and eight in float32, which every backend sums in an order
of its own. Errors are the largest over the array. NaN and infinite positions are equal. For a sum
over a whole head, whose terms may cancel, the largest value is the root of the sum of the terms'
squares, as independent roundings add up.
"""

import jax.numpy as jnp
import numpy as np


def assert_close(got, reference, low_precision, *, dtype, what: str, terms=None) -> None:
    """Fails unless `got` is as near to `reference` (float64) as the rule asks.

    Args:
      got: the kernel's result.
      reference: the same in float64.
      low_precision: the same by the low-precision twin.
      dtype: the inputs' dtype, which sets the rounding.
      what: name of the result, for the message.
      terms: what the result sums over the last axis, if it is a sum.
    """
    got, reference, low_precision = (
        np.asarray(x).astype(np.float64) for x in (got, reference, low_precision)
    )
    assert got.shape == reference.shape, f"{what}: shape {got.shape}, expected {reference.shape}"
    finite = np.isfinite(reference)
    np.testing.assert_array_equal(got[~finite], reference[~finite], err_msg=what)
    assert np.isfinite(got[finite]).all(), f"{what}: not finite where the reference is"
    if not finite.any():
        return
    error = np.abs(got[finite] - reference[finite]).max()
    allowed = 2 * np.abs(low_precision[finite] - reference[finite]).max()
    rounding = float(jnp.finfo(dtype).eps) + 8 * float(jnp.finfo(jnp.float32).eps)
    largest = np.abs(reference[finite]).max()
    if terms is not None:
        largest = max(largest, np.sqrt((terms**2).sum(axis=-1)).max())
    allowed += rounding * largest
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
