"""Rounding to the grid of a narrower floating-point format.

Every function returns numbers in the dtype that it was given, so that what rounding
took away can be computed. Compilers may leave out a conversion to a narrow dtype and
back (XLA does), and so may not be asked for one.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = [
    "NARROW",
    "even_shifts",
    "join_weight",
    "noise_key",
    "round_stochastically",
    "round_to",
    "split_weight",
    "uniform_bits",
]

NARROW = ("bfloat16", "float16")
"""The dtypes to which these functions round."""

# `lax.reduce_precision` knows no denormal numbers: those of float16, below 2^-14, are
# the multiples of 2^-24, which is the spacing of float32 at 0.75.
_FLOAT16_NORMAL = 2.0**-14
_FLOAT16_ROUNDER = np.float32(0.75)


def round_to(x: jax.Array, dtype: str) -> jax.Array:
    """The nearest number of `dtype`, ties to even, as float32.

    Args:
      x: float32.
      dtype: Name in `NARROW`. Numbers beyond its largest become infinite.
    """
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if dtype == "float16":
        small = jnp.copysign(_nearest_multiple(jnp.abs(x)) * 2.0**-24, x)
        rounded = jnp.where(jnp.abs(x) < _FLOAT16_NORMAL, small, rounded)
    return rounded


def round_stochastically(x: jax.Array, dtype: str, bits: jax.Array) -> jax.Array:
    """One of the two numbers of `dtype` beside `x`, the nearer one more often.

    The expectation is `x`: it becomes the number above with the probability that its
    distance from the number below is of the distance between both. Numbers of `dtype`
    stay, and so does what is not finite; numbers beyond the largest are rounded to the
    nearest, which is it or infinity.

    Args:
      x: float32.
      dtype: Name in `NARROW`.
      bits: Random uint32 of the shape of `x`, see `uniform_bits`.

    Returns:
      float32.
    """
    info = jnp.finfo(dtype)
    kept = _float(_without_low_bits(_bits(x), 23 - info.nmant, bits))
    if dtype == "float16":
        small = _stochastic_multiple(x * 2.0**24, bits) * 2.0**-24
        kept = jnp.where(jnp.abs(x) < _FLOAT16_NORMAL, small, kept)
    return jnp.where(jnp.abs(x) <= float(info.max), kept, round_to(x, dtype))


def split_weight(
    x: jax.Array, dtype: str, bits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A weight of 24 bits as a number of 16 and a correction of 8.

    The correction counts in 1/256 of the distance between numbers of `dtype` there.
    `x` is rounded to a multiple of that, stochastically, and split into the nearest
    number of `dtype` and the rest.

    Args:
      x: float32.
      dtype: Name in `NARROW`.
      bits: Random uint32 of the shape of `x`.

    Returns:
      The number of `dtype`, as float32, and the int8 correction. What is not finite in
      `dtype` has a correction of 0.
    """
    dropped = 23 - jnp.finfo(dtype).nmant
    pattern = _without_low_bits(_bits(x), dropped - 8, bits)
    # Half of the distance goes up.
    half, mask = np.uint32(1 << dropped - 1), np.uint32(2**32 - 2**dropped)
    high = (pattern + half) & mask
    low = lax.bitcast_convert_type(pattern - high, jnp.int32) >> (dropped - 8)
    nearest = _float(high)
    if dtype == "float16":
        units = _stochastic_multiple(jnp.abs(x) * 2.0**32, bits)
        whole = jnp.floor(units * 2.0**-8 + 0.5)
        small = (units - whole * 2.0**8).astype(jnp.int32)
        # 0 has no sign that would last: there the correction has it.
        small = jnp.where((whole == 0) & (x < 0), -small, small)
        is_small = jnp.abs(x) < _FLOAT16_NORMAL
        nearest = jnp.where(is_small, jnp.copysign(whole * 2.0**-24, x), nearest)
        low = jnp.where(is_small, small, low)
    is_finite = jnp.abs(nearest) <= float(jnp.finfo(dtype).max)
    is_finite &= jnp.abs(x) < jnp.inf
    nearest = jnp.where(is_finite, nearest, round_to(x, dtype))
    return nearest, jnp.where(is_finite, low, 0).astype(jnp.int8)


def join_weight(nearest: jax.Array, correction: jax.Array, dtype: str) -> jax.Array:
    """The float32 number of which `split_weight` made these."""
    rest = correction.astype(jnp.int32)
    pattern = _bits(nearest)
    shifted = rest << (15 - jnp.finfo(dtype).nmant)
    x = _float(pattern + lax.bitcast_convert_type(shifted, jnp.uint32))
    if dtype == "float16":
        multiple = rest.astype(jnp.float32) * 2.0**-32
        size = jnp.abs(nearest) + multiple
        small = jnp.where(nearest == 0, multiple, jnp.copysign(size, nearest))
        return jnp.where(jnp.abs(small) < _FLOAT16_NORMAL, small, x)
    # From the pattern of 0, which somebody may have put in the place of a weight,
    # nothing can be taken.
    is_zero = (pattern & np.uint32(0x7FFFFFFF)) == 0
    return jnp.where(is_zero & (rest < 0), 0.0, x)


def noise_key(seed: int | jax.Array, step: jax.Array, index: int) -> jax.Array:
    """A uint32 key for the noise of one array in one step; seeds are below 2^32."""
    key = _mixed(jnp.asarray(seed, jnp.uint32) + np.uint32(_GOLDEN))
    key = _mixed(key + step.astype(jnp.uint32))
    return _mixed(key + np.uint32(index * _GOLDEN & 0xFFFFFFFF))


def uniform_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32: the positions of the entries, hashed with a key.

    Good enough to round with and a fiftieth of the work of `jax.random` (of which
    compilers keep arrays). The same on any number of devices.
    """
    position = jnp.full(shape, key)
    stride = 1
    for axis in reversed(range(len(shape))):
        step = np.uint32(stride & 0xFFFFFFFF)
        position += lax.broadcasted_iota(jnp.uint32, shape, axis) * step
        stride *= shape[axis]
    return _mixed(position)


def even_shifts(
    step: jax.Array, shape: tuple[int, ...], axes: Collection[int]
) -> jax.Array:
    """Numbers from -1/2 to 1/2 that every entry meets evenly over the steps, float32.

    (i + j + step)·φ modulo 1 with the indices i, j along `axes` and the golden ratio φ:
    of any number of steps in a row, or of entries along one of the axes, the share
    below p is p but for a few (Weyl 1916). The same along other axes, and on any number
    of devices.
    """
    # Bare indices first: what is done to one of them alone would be a loop of its own
    # on a TPU.
    indices = (lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in sorted(axes))
    turns = (sum(indices) + step.astype(jnp.uint32)) * np.uint32(_GOLDEN)
    return lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32) * 2.0**-32


# 2^32 over the golden ratio, odd: multiples of it are far apart.
_GOLDEN = 0x9E3779B9


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of uint32 in which every bit depends on every bit.

    Shifts and multipliers: Wellons, "lowbias32" of Hash Function Prospector (2018),
    with an average of 0.17 % more or less than half of the bits flipped by one.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _without_low_bits(pattern: jax.Array, count: int, bits: jax.Array) -> jax.Array:
    """The pattern of a float32 number rounded stochastically to `count` bits less.

    A random number of as many bits as are dropped, added to them, carries into those
    that are kept as often as it should. The exponent takes a carry as well.
    """
    mask = np.uint32(0xFFFFFFFF << count & 0xFFFFFFFF)
    return (pattern + (bits >> (32 - count))) & mask


def _nearest_multiple(x: jax.Array) -> jax.Array:
    """`x` / 2^-24 rounded to the nearest integer, ties to even; 0 <= x <= 2^-14."""
    # Compilers simplify (x + 0.75) - 0.75.
    pattern = _bits(x + _FLOAT16_ROUNDER) - _FLOAT16_ROUNDER.view(np.uint32)
    return pattern.astype(jnp.float32)


def _stochastic_multiple(x: jax.Array, bits: jax.Array) -> jax.Array:
    """One of the two integers beside `x`, `x` on average."""
    lower = jnp.floor(x)
    # The quotient may round to 1, which no fraction exceeds.
    threshold = bits.astype(jnp.float32) * 2.0**-32
    return jnp.where(x - lower > threshold, lower + 1.0, lower)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _float(pattern: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(pattern, jnp.float32)
