"""Moving averages and the bias of those that start from zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxplus.numerics.moving_averages import bias_correction, mix


def test_mix():
    average, x = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, -2.0])
    # A few float32 roundings.
    np.testing.assert_allclose(mix(0.75, average, x), [1.5, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(mix(0.0, average, x), x)
    np.testing.assert_array_equal(mix(1.0, average, x), average)
    assert mix(0.75, average.astype(jnp.complex64), x).dtype == jnp.complex64


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 0.99999, 1 - 2**-24])
@pytest.mark.parametrize("count", [1, 2, 10, 1000, 2**24])
def test_bias_correction(decay: float, count: int):
    expected = -np.expm1(count * np.log(np.float64(decay))) if decay else 1.0
    static = bias_correction(decay, jnp.asarray(count, jnp.int32))
    assert static.dtype == jnp.float32
    # expm1 of a float32 product: three roundings. 1 - decay**count in float32 would be
    # off by 6e-8 / (1 - decay), that is 6e-5 for 0.999 at the first step.
    np.testing.assert_allclose(static, expected, rtol=3e-7)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_bias_correction_of_a_traced_decay(decay: float):
    traced = jax.jit(bias_correction)(jnp.float32(decay), jnp.int32(3))
    rounded = np.float64(np.float32(decay))
    # The logarithm of a number near 1 is as good as float32 gives the number: 6e-8 over
    # 1 - decay, compared with the rounded decay to a few roundings.
    np.testing.assert_allclose(traced, 1 - rounded**3, rtol=1e-6)


def test_bias_correction_in_float64():
    with jax.enable_x64(True):
        result = bias_correction(0.999, jnp.asarray(7))
        assert result.dtype == jnp.float64
        # The subtraction on the right loses three digits.
        np.testing.assert_allclose(result, 1 - 0.999**7, rtol=1e-13)


def test_corrected_average_of_a_constant_is_the_constant():
    average = jnp.zeros(())
    for count in range(1, 20):
        average = mix(0.9, average, 3.0)
        # Twenty roundings of 6e-8.
        np.testing.assert_allclose(
            average / bias_correction(0.9, jnp.asarray(count)), 3.0, rtol=2e-6
        )
