"""Hyper-parameters that were rounded on their way are made safe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon


@pytest.mark.parametrize("function", [as_decay_rate, as_epsilon])
@pytest.mark.parametrize("number", [0, 0.0, 0.9, 1])
def test_python_numbers_are_left_alone(function, number):
    assert function(number) is number


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_decay_rate_stays_below_one(dtype: str):
    # 0.9999 is 1 in bfloat16 and in float16.
    decay = as_decay_rate(jnp.asarray(0.9999, dtype))
    assert decay.dtype == jnp.float32
    assert decay < 1
    # Half a unit in the last place below 1 is all that rounding may change.
    np.testing.assert_allclose(decay, 0.9999, atol=float(jnp.finfo(dtype).eps))
    np.testing.assert_array_equal(as_decay_rate(jnp.float32(0.5)), np.float32(0.5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_epsilon_stays_above_zero(dtype: str):
    # 1e-8 is 0 in float16.
    eps = as_epsilon(jnp.asarray(1e-8, dtype))
    assert eps.dtype == jnp.float32
    assert 0 < eps < 1.01e-8
    np.testing.assert_array_equal(as_epsilon(jnp.float32(0.5)), np.float32(0.5))


def test_float64_stays():
    with jax.enable_x64(True):
        assert as_decay_rate(jnp.asarray(0.9)).dtype == jnp.float64
        assert as_epsilon(jnp.asarray(1e-8)).dtype == jnp.float64


def test_traced_values_pass():
    clipped = jax.jit(as_decay_rate)(jnp.bfloat16(1.0))
    np.testing.assert_array_equal(clipped, np.float32(1 - 2**-24))
    raised = jax.jit(as_epsilon)(jnp.float16(0.0))
    np.testing.assert_array_equal(raised, np.float32(1e-30))
