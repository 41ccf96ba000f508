"""What the tests assert of trees, beyond what NumPy asserts of arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxplus import trees

__all__ = [
    "assert_finite",
    "assert_same_types",
    "assert_trees_close",
    "assert_trees_equal",
]


def _pairs(actual: Any, expected: Any):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    return zip(trees.leaves_with_paths(actual), jax.tree.leaves(expected), strict=True)


def _widened(x: Any) -> np.ndarray:
    """NumPy array in float64 or complex128."""
    x = np.asarray(x)
    return x.astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)


def assert_same_types(actual: Any, expected: Any) -> None:
    """Same structure, and leaf by leaf the same shape, dtype and weak type."""
    for (path, ours), theirs in _pairs(actual, expected):
        for attribute in ("shape", "dtype", "weak_type"):
            got, wanted = getattr(ours, attribute), getattr(theirs, attribute)
            assert got == wanted, f"{path}: {attribute} is {got}, not {wanted}"


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Same structure, dtypes and numbers; NaN equals NaN."""
    for (path, ours), theirs in _pairs(actual, expected):
        assert ours.dtype == theirs.dtype, f"{path}: {ours.dtype}, not {theirs.dtype}"
        np.testing.assert_array_equal(_widened(ours), _widened(theirs), err_msg=path)


def assert_trees_close(actual: Any, expected: Any, *, rtol: float) -> None:
    """Same structure, and numbers that agree relative to the largest of each leaf."""
    for (path, ours), theirs in _pairs(actual, expected):
        ours, theirs = _widened(ours), _widened(theirs)
        largest = np.abs(theirs).max(initial=0.0)
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=rtol * largest, err_msg=path
        )


def assert_finite(tree: Any) -> None:
    """No NaN and no infinity in any leaf."""
    for path, leaf in trees.leaves_with_paths(tree):
        assert np.isfinite(_widened(leaf)).all(), f"{path}: {leaf}"
