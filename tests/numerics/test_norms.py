"""Squared magnitudes, norms and means, real and complex."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.numerics.norms import (
    abs_square,
    block_mean,
    block_norm,
    block_rms,
    mean_square,
    scaled_square,
)

AXES = {
    "matrix": (MatrixAxes((0,), (1,)), (3, 4), (0, 1)),
    "stack": (MatrixAxes((-2,), (-1,)), (2, 3, 4), (1, 2)),
    "heads": (MatrixAxes((1,), (2, 3)), (2, 3, 2, 2), (1, 2, 3)),
    "stacked_vectors": (MatrixAxes((), (1,)), (2, 5), (1,)),
    "scalar": (MatrixAxes((), ()), (), ()),
}


def gaussian(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if "complex" in dtype else x).astype(
        dtype
    )


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("name", AXES)
def test_norm_and_rms_of_every_block(name: str, dtype: str):
    axes, shape, over = AXES[name]
    x = gaussian(shape, dtype)
    squares = np.abs(x.astype(np.complex128)) ** 2
    norms, rms = block_norm(jnp.asarray(x), axes), block_rms(jnp.asarray(x), axes)
    assert (norms.dtype, rms.dtype) == (jnp.float32, jnp.float32)
    # Two roundings of 6e-8 an entry, and a root.
    np.testing.assert_allclose(
        norms, np.sqrt(squares.sum(axis=over, keepdims=True)), rtol=5e-7
    )
    np.testing.assert_allclose(
        rms, np.sqrt(squares.mean(axis=over, keepdims=True)), rtol=5e-7
    )


def test_splits_have_norms_of_their_own():
    x = jnp.asarray([[3.0, 0.0, 6.0], [4.0, 0.0, 8.0]])
    axes = MatrixAxes((0,), (1,), splits=(1, 2))
    np.testing.assert_allclose(block_norm(x, axes), [[5.0, 10.0, 10.0]], rtol=1e-6)
    # The second block has twice as many entries as the first.
    np.testing.assert_allclose(block_rms(x, axes), [[12.5**0.5, 5.0, 5.0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_squares_are_real(dtype: str):
    x = gaussian((5,), dtype)
    squares = np.abs(x.astype(np.complex128)) ** 2
    assert abs_square(jnp.asarray(x)).dtype == jnp.float32
    # Three roundings of 6e-8.
    np.testing.assert_allclose(abs_square(jnp.asarray(x)), squares, rtol=2e-7)
    scaled = scaled_square(0.001, jnp.asarray(x))
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, 0.001 * squares, rtol=3e-7)
    traced = scaled_square(jnp.float32(0.001), jnp.asarray(x))
    np.testing.assert_array_equal(traced, scaled)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("over", [(), (0,), (1, 2), (0, 1, 2), (-1,)])
def test_mean_square(over: tuple[int, ...], dtype: str):
    x = gaussian((2, 3, 4), dtype)
    squares = np.abs(x.astype(np.complex128)) ** 2
    means = mean_square(jnp.asarray(x), over)
    assert means.dtype == jnp.float32
    # Two roundings of 6e-8 an entry, and a quotient.
    np.testing.assert_allclose(means, squares.mean(axis=over, keepdims=True), rtol=5e-7)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("name", AXES)
def test_mean_of_every_block(name: str, dtype: str):
    axes, shape, over = AXES[name]
    x = gaussian(shape, dtype)
    means = block_mean(jnp.asarray(x), axes)
    assert means.dtype == dtype
    # A dozen roundings of 6e-8 of numbers of about 1, averaged.
    np.testing.assert_allclose(
        means, x.mean(axis=over, keepdims=True), rtol=0, atol=3e-7
    )


def test_splits_have_means_of_their_own():
    x = jnp.asarray([[3.0, 0.0, 2.0], [5.0, 2.0, 8.0]])
    means = block_mean(x, MatrixAxes((0,), (1,), splits=(1, 2)))
    np.testing.assert_array_equal(means, [[4.0, 3.0, 3.0]])


def test_mean_square_of_nothing_is_zero():
    np.testing.assert_array_equal(
        mean_square(jnp.zeros((0, 3)), (0,)), np.zeros((1, 3))
    )
    assert mean_square(jnp.zeros((3, 0)), (0,)).shape == (1, 0)
    # A scalar is its own mean.
    np.testing.assert_array_equal(mean_square(jnp.float32(-3), ()), np.float32(9))


def test_mean_square_keeps_what_float64_has():
    with jax.enable_x64(True):
        means = mean_square(jnp.asarray([1.0, 1 + 2.0**-40]), (0,))
        assert means.dtype == jnp.float64
        # Exact up to a float64 rounding.
        np.testing.assert_allclose(means, [1 + 2.0**-40], rtol=3e-16)


def test_scale_is_applied_before_the_square_overflows():
    # (s·x)·x, not s·x²: 1e-4·(1e20)² is a float32 number, (1e20)² is not.
    result = scaled_square(1e-4, jnp.float32(1e20))
    np.testing.assert_allclose(result, 1e36, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_empty_blocks_have_norm_zero(shape: tuple[int, ...]):
    axes = MatrixAxes((-2,), (-1,))
    for function in (block_mean, block_norm, block_rms):
        result = function(jnp.zeros(shape), axes)
        np.testing.assert_array_equal(result, np.zeros((*shape[:-2], 1, 1)))


def test_bad_entries_stay_in_their_block():
    x = jnp.asarray([[1.0, jnp.nan], [3.0, 4.0], [jnp.inf, 0.0]])
    result = block_norm(x, MatrixAxes((), (1,)))
    np.testing.assert_allclose(result, [[np.nan], [5.0], [np.inf]])
