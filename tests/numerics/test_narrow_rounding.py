"""Rounding to narrower formats, and the noise for it, against NumPy's casts."""

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by its name
import numpy as np
import pytest

from optaxplus.numerics.rounding import (
    NARROW,
    even_shifts,
    join_weight,
    noise_key,
    round_stochastically,
    round_to,
    split_weight,
    uniform_bits,
)

narrow = pytest.mark.parametrize("dtype", NARROW)

_round_to = jax.jit(round_to, static_argnames="dtype")
_round_stochastically = jax.jit(round_stochastically, static_argnames="dtype")
_uniform_bits = jax.jit(uniform_bits, static_argnames="shape")
_split = jax.jit(split_weight, static_argnames="dtype")
_join = jax.jit(join_weight, static_argnames="dtype")

# Shares of coin flips. The standard deviation is sqrt(p(1-p) / N) <= 1/1024. Beyond 5.6
# of these one share in 5e7 is found without a reason, and a share that is off by 0.01,
# which is 10.2 of them, is missed once in 4e5. What is random here has a fixed seed.
FLIPS = 2**18
OFF = 5.6 / 1024


def floats(patterns) -> np.ndarray:
    return np.asarray(patterns, np.uint32).view(np.float32)


def patterns(x) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def random_patterns(count: int, seed: int) -> np.ndarray:
    """float32 numbers of all exponents and signs; one in 128 no normal number."""
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as it is after a conversion to `dtype` and back."""
    with np.errstate(all="ignore"):
        return x.astype(dtype).astype(np.float32)


def numbers_of(dtype: str) -> np.ndarray:
    """The finite numbers of `dtype` that are not negative, ascending, as float32."""
    numbers = np.arange(2**15, dtype=np.uint16).view(dtype).astype(np.float32)
    return numbers[np.isfinite(numbers)]


def beyond(dtype: str) -> np.ndarray:
    """The largest number of `dtype` and those float32 numbers that follow."""
    return floats(patterns(numbers_of(dtype)[-1]) + np.arange(2**16))


NOT_FINITE = floats([0x7F800000, 0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF])


def both_signs(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, -x])


def neighbours(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of `dtype` below and above those that it has room for.

    Twice the same where it is one of `dtype`. Neighbours in size have patterns that
    follow each other.
    """
    nearest = x.astype(dtype)
    step = np.sign(np.abs(x) - np.abs(nearest.astype(np.float32)))
    other = (nearest.view(np.uint16) + step).astype(np.uint16).view(dtype)
    pair = np.stack([nearest, other]).astype(np.float64)
    return pair.min(axis=0), pair.max(axis=0)


# To the nearest


@narrow
def test_nearest_is_that_of_numpy(dtype: str):
    numbers = numbers_of(dtype)
    # Exact: float32 has the halves of all of them, and their sums.
    middles = numbers[1:] / 2 + numbers[:-1] / 2
    x = [numbers, np.nextafter(middles, -1), middles, np.nextafter(middles, np.inf)]
    x = both_signs(np.concatenate([*x, beyond(dtype), NOT_FINITE]))
    x = np.concatenate([x, floats(random_patterns(2**17, seed=0))])
    result = _round_to(x, dtype=dtype)
    assert result.dtype == jnp.float32
    # NaN equals NaN, and 0 equals -0; of its sign below.
    np.testing.assert_array_equal(result, cast(x, dtype))


@narrow
def test_sign_of_zero(dtype: str):
    assert np.signbit(_round_to(np.float32(-0.0), dtype=dtype))


@narrow
def test_what_rounding_took_away(dtype: str):
    x = np.random.default_rng(0).standard_normal(2**12).astype(np.float32)
    # Down to the denormal numbers of float16.
    x *= np.tile(2.0 ** np.arange(-15, 1, dtype=np.float32), 2**8)
    rest = np.asarray(jax.jit(lambda x: x - round_to(x, dtype))(x))
    np.testing.assert_array_equal(rest, x - cast(x, dtype))
    # One number in 2^16 or 2^13 is exact.
    assert (rest != 0).mean() > 0.99


@narrow
def test_no_conversions_for_compilers_to_leave_out(dtype: str):
    # Those for CPUs keep them today, so that no number here would tell.
    x, bits = np.ones(3, np.float32), np.ones(3, np.uint32)
    correction = np.ones(3, np.int8)
    traced = [
        jax.make_jaxpr(lambda x: round_to(x, dtype))(x),
        jax.make_jaxpr(lambda x, bits: round_stochastically(x, dtype, bits))(x, bits),
        jax.make_jaxpr(lambda x, bits: split_weight(x, dtype, bits))(x, bits),
        jax.make_jaxpr(lambda x, y: join_weight(x, y, dtype))(x, correction),
    ]
    for text in map(str, traced):
        assert "f32[3]" in text
        assert "f16[" not in text


# To one of both neighbours

BETWEEN = [
    1.0 + 0.3 * 2.0**-10,
    1.0 + 0.9 * 2.0**-7,
    2.0 - 2.0**-12,  # The upper neighbour has another exponent.
    3.0 - 2.0**-20,
    0.1,
    1e-3,
    60000.3,
    2.0**-14 - 2.0**-26,  # Between the denormal and the normal numbers of float16.
    1.3e-6,  # Between denormal ones.
    1.501 * 2.0**-24,
    0.3 * 2.0**-24,  # Between 0 and the smallest.
    0.001 * 2.0**-24,
]
# Likewise for bfloat16: denormal numbers, and below the largest.
BETWEEN_BFLOAT16 = floats([0x00001234, 0x0001C000, 0x007FFF00, 0x7F7E1234])


def between(dtype: str) -> np.ndarray:
    x = np.float32(BETWEEN)
    return both_signs(np.append(x, BETWEEN_BFLOAT16) if dtype == "bfloat16" else x)


def shares(x: np.ndarray, dtype: str, bits: np.ndarray) -> tuple[np.ndarray, ...]:
    """How often numbers are rounded up with these bits, and how often they should."""
    result = np.asarray(_round_stochastically(x[:, None], dtype=dtype, bits=bits))
    assert result.dtype == np.float32
    below, above = neighbours(x, dtype)
    is_above = result == above[:, None]
    assert (is_above | (result == below[:, None])).all()
    assert (below < above).all()
    return is_above.mean(axis=1), (x - below) / (above - below)


@narrow
def test_shares_of_both_neighbours(dtype: str):
    x = between(dtype)
    # 2^12 bits at equal distances: whatever a number takes for its threshold, all of
    # them but one are on the right side of it.
    bits = (np.arange(2**12, dtype=np.uint32) << 20) + np.uint32(2**19)
    up, expected = shares(x, dtype, np.broadcast_to(bits, (len(x), len(bits))))
    np.testing.assert_allclose(up, expected, rtol=0, atol=2.0**-12)


@narrow
def test_unbiased_with_our_noise(dtype: str):
    x = between(dtype)
    # 2^18 flips of each number: one of all 56 shares is off without a reason with a
    # probability of 1e-6.
    bits = _uniform_bits(noise_key(3, jnp.int32(14), 15), shape=(len(x), FLIPS))
    up, expected = shares(x, dtype, bits)
    np.testing.assert_allclose(up, expected, rtol=0, atol=OFF)


def spread_numbers(dtype: str, count: int) -> np.ndarray:
    """Of all exponents that `dtype` has, with some on both ends that it has not."""
    x = floats(random_patterns(count, seed=0))
    if dtype == "float16":
        exponents = np.random.default_rng(2).integers(-30, 16, count)
        sizes = 1 + (patterns(x) & 0x7FFFFF) / 2.0**23
        signs = np.where(patterns(x) >> 31, -1.0, 1.0)
        return (signs * sizes * 2.0**exponents).astype(np.float32)
    return x


@narrow
def test_random_numbers_become_a_neighbour(dtype: str):
    x, bits = spread_numbers(dtype, FLIPS), random_patterns(FLIPS, seed=1)
    x, bits = (part[np.abs(x) <= numbers_of(dtype)[-1]] for part in (x, bits))
    result = np.asarray(_round_stochastically(x, dtype=dtype, bits=bits))
    below, above = neighbours(x, dtype)
    is_above = result == above
    assert (is_above | (result == below)).all()
    # As many go down: distances from below and above are alike.
    np.testing.assert_allclose(is_above[below < above].mean(), 0.5, rtol=0, atol=OFF)


@narrow
@pytest.mark.parametrize("bits", [0, 0x80000000, 0xFFFFFFFF])
def test_noise_leaves_alone(dtype: str, bits: int):
    def rounded(x: np.ndarray) -> np.ndarray:
        noise = np.full(x.shape, bits, np.uint32)
        return np.asarray(_round_stochastically(x, dtype=dtype, bits=noise))

    stays = both_signs(np.concatenate([numbers_of(dtype), NOT_FINITE]))
    np.testing.assert_array_equal(rounded(stays), stays)
    # There is no number above the largest: nearest.
    large = both_signs(beyond(dtype))
    np.testing.assert_array_equal(rounded(large), cast(large, dtype))


# Weights in two parts


def units(x: np.ndarray, dtype: str) -> np.ndarray:
    """1/256 of the distance between numbers of `dtype`, where x is."""
    info = jnp.finfo(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(x).astype(np.float64), float(info.tiny)))
    return np.ldexp(1.0, exponent - 1 - info.nmant - 8)


def part_of(dtype: str) -> int:
    """`units` as a difference of patterns of float32, not of denormal float16."""
    return 2 ** (23 - jnp.finfo(dtype).nmant - 8)


def weights_and_noise(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of all sizes that are nearer to a finite one than to infinity."""
    info, numbers = jnp.finfo(dtype), numbers_of(dtype)
    # About powers of two, the smallest numbers and the largest.
    borders = np.array([1.0, 2.0, info.tiny, numbers[1], numbers[-1]], np.float32)
    offsets = part_of(dtype) * np.array([0.0, 0.5, 1, 1.5, 127, 128, 129, 256])
    offsets = np.concatenate([offsets, offsets + 1]).astype(np.int64)
    special = patterns(borders)[:, None] + np.concatenate([-offsets, offsets])
    special = floats(special[special < 2**31].ravel())
    x = np.concatenate([spread_numbers(dtype, 2**17), both_signs(special)])
    # Denormal float32 numbers are 0 to many compilers.
    x = np.append(x[np.abs(x) >= 2.0**-126], np.float32([0.0, -0.0]))
    x = x[np.abs(x) <= floats(patterns(numbers[-1]) + 127 * part_of(dtype))]
    # With random carries, none and all.
    random, none = random_patterns(len(x), seed=1), np.zeros(len(x), np.uint32)
    return np.tile(x, 3), np.concatenate([random, none, ~none])


@pytest.mark.parametrize(
    ("dtype", "sign"),
    [
        ("bfloat16", 1),
        ("bfloat16", -1),
        ("float16", 1),
        ("float16", -1),
    ],
)
def test_both_parts_are_the_weight_on_a_finer_grid(dtype: str, sign: int):
    x, noise = weights_and_noise(dtype)
    x = np.copysign(x, sign)
    nearest, correction = _split(x, dtype=dtype, bits=noise)
    assert (nearest.dtype, correction.dtype) == (jnp.float32, jnp.int8)
    joined = np.asarray(_join(nearest, correction, dtype=dtype), np.float64)
    # float64 has all these multiples.
    unit = units(x, dtype)
    below, above = np.floor(x / unit) * unit, np.ceil(x / unit) * unit
    is_above = joined == above
    assert (is_above | (joined == below)).all()
    # As many go down, of 10^5 with random noise: half the flips twice as far off.
    moved = is_above[(below < above) & (np.arange(len(x)) < len(x) // 3)]
    np.testing.assert_allclose(moved.mean(), 0.5, rtol=0, atol=2 * OFF)
    assert len(moved) > FLIPS / 4


@narrow
def test_the_first_part_is_the_nearest(dtype: str):
    x, noise = weights_and_noise(dtype)
    nearest, correction = _split(x, dtype=dtype, bits=noise)
    joined = np.asarray(_join(nearest, correction, dtype=dtype))
    # Ties, with a correction of -128, may be even or odd.
    tied = np.asarray(correction) == -128
    nearest = np.asarray(nearest, np.float64)
    np.testing.assert_array_equal(nearest[~tied], cast(joined[~tied], dtype))
    below, above = neighbours(joined[tied], dtype)
    np.testing.assert_array_equal(below + above, 2 * joined[tied].astype(np.float64))
    assert ((nearest[tied] == below) | (nearest[tied] == above)).all()
    assert tied.sum() > 1000
    assert len(np.unique(correction)) == 256


@narrow
def test_weights_are_unbiased(dtype: str):
    info, numbers = jnp.finfo(dtype), numbers_of(dtype)
    # Near numbers of all kinds, by multiples of the unit and shares of it: about the
    # middle of two numbers, about powers of two, below the largest.
    places = [1.0, 1.0, 1.0, 2.0, 2.0, info.tiny, 100 * numbers[1], numbers[-1], 0.1]
    whole = np.array([0, 127, 126, -1, -2, -1, -1, 126, 0])
    # A unit of float16 is 32 numbers of float32.
    share = np.array([1, 10, 16, 24, 31, 8, 16, 4, 29]) / 32
    places = np.array(places, np.float64)
    unit = units(places * np.where(whole < 0, 1 - 2.0**-20, 1.0), dtype)
    x = both_signs(np.float32(places + (whole + share) * unit))
    noise = _uniform_bits(noise_key(3, jnp.int32(14), 15), shape=(len(x), FLIPS))
    spread = np.broadcast_to(x[:, None], noise.shape)
    joined = _join(*_split(spread, dtype=dtype, bits=noise), dtype=dtype)
    unit = units(x, dtype)
    below = np.floor(x / unit) * unit
    is_above = np.asarray(joined) > below[:, None]
    expected = (x - below) / unit
    assert ((expected > 0.03) & (expected < 0.97)).all()
    np.testing.assert_allclose(is_above.mean(axis=1), expected, rtol=0, atol=OFF)


@narrow
@pytest.mark.parametrize("bits", [0, 0x80000000, 0xFFFFFFFF])
def test_parts_of_what_is_too_large(dtype: str, bits: int):
    # What noise may carry over the middle of the largest number and infinity is not
    # infinite for it, and what is beyond the middle is.
    x = both_signs(beyond(dtype)[127 * part_of(dtype) + 1 :])
    noise = np.full(x.shape, bits, np.uint32)
    nearest, correction = (np.asarray(a) for a in _split(x, dtype=dtype, bits=noise))
    np.testing.assert_array_equal(nearest, cast(x, dtype))
    joined = np.asarray(_join(nearest, correction, dtype=dtype))
    is_finite = np.isfinite(nearest)
    assert (correction[~is_finite] == 0).all()
    np.testing.assert_array_equal(joined[~is_finite], nearest[~is_finite])
    # Nothing else is further from it than half of the distance to the number below.
    rest = joined[is_finite].astype(np.float64) - nearest[is_finite]
    assert (np.abs(rest) <= 128 * units(nearest[is_finite], dtype)).all()
    assert is_finite.any()
    assert not is_finite.all()


@narrow
@pytest.mark.parametrize("bits", [0, 0xFFFFFFFF])
@pytest.mark.parametrize(
    "pattern",
    [
        0x7F800000,
        0x7F800001,
        0x7F80FFFF,
        0x7FC00000,
        0x7FFFFFFF,  # What GPUs of NVIDIA make of 0/0.
    ],
    ids=hex,
)
def test_parts_of_what_is_not_finite(dtype: str, bits: int, pattern: int):
    x = both_signs(floats([pattern]))
    noise = np.full(x.shape, bits, np.uint32)
    nearest, correction = _split(x, dtype=dtype, bits=noise)
    np.testing.assert_array_equal(nearest, x)
    np.testing.assert_array_equal(correction, 0)
    np.testing.assert_array_equal(_join(nearest, correction, dtype=dtype), x)


@narrow
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_corrections_of_zero(dtype: str, zero: float):
    # Somebody may set weights to 0, and know nothing of corrections.
    corrections = np.arange(-128, 128, dtype=np.int8)
    joined = _join(np.full(256, zero, np.float32), corrections, dtype=dtype)
    if dtype == "bfloat16":
        np.testing.assert_array_equal(joined[:129], 0.0)
    # No more than half of the smallest number.
    assert (np.abs(np.asarray(joined)) <= numbers_of(dtype)[1] / 2).all()


# Noise


def lowbias32(x: np.ndarray) -> np.ndarray:
    """The hash of Wellons, in Python's order of operations: uint64, cut off."""
    x = x.astype(np.uint64)
    x ^= x >> np.uint64(16)
    x = x * np.uint64(0x7FEB352D) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(15)
    x = x * np.uint64(0x846CA68B) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    return x.astype(np.uint32)


def key(seed: int = 0, step: int = 0, index: int = 0) -> jax.Array:
    return noise_key(seed, jnp.int32(step), index)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0, 2), (7, 5, 3)])
def test_bits_are_hashed_positions(shape: tuple[int, ...]):
    # Whatever the shape and the compiler.
    start = key(seed=1, step=2, index=3)
    positions = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)
    expected = lowbias32(positions + np.uint64(start) & np.uint64(0xFFFFFFFF))
    for function in (uniform_bits, _uniform_bits):
        bits = function(start, shape=shape)
        assert (bits.dtype, bits.shape) == (jnp.uint32, shape)
        np.testing.assert_array_equal(bits, expected)


def test_keys_differ():
    seeds, steps = jnp.arange(16)[:, None], jnp.arange(16)
    keys = np.stack([noise_key(seeds, steps, index) for index in range(16)])
    # 4096 of 2^32: two are equal by chance with a probability of 0.002.
    assert len(np.unique(keys)) == 16**3
    traced = jax.jit(noise_key, static_argnums=2)(seeds, steps, 3)
    np.testing.assert_array_equal(traced, keys[3])


def signs_of_bits(bits) -> np.ndarray:
    """1 for a bit that is set, else -1; shape (N, 32)."""
    shifts = np.arange(32, dtype=np.uint32)
    is_set = np.asarray(bits).ravel()[:, None] >> shifts & np.uint32(1)
    return 2 * is_set.astype(np.float32) - 1


# Less than all the others: 32 numbers are made of each.
SHAPE = (2**10, 64)
NOISE = {
    "itself": {},
    "next step": {"step": 1},
    "later step": {"step": 1000},
    "next leaf": {"index": 1},
    "next seed": {"seed": 1},
}


@pytest.mark.parametrize("name", NOISE)
def test_bits_are_independent_of_each_other(name: str):
    first = np.asarray(_uniform_bits(key(), shape=SHAPE))
    other = np.asarray(_uniform_bits(key(**NOISE[name]), shape=SHAPE))
    ours, theirs = signs_of_bits(first), signs_of_bits(other)
    # Means and correlations have a standard deviation of 1/256. One of 26000 is beyond
    # 6.6 of these by chance with a probability of 1e-6.
    np.testing.assert_allclose(theirs.mean(axis=0), 0.0, rtol=0, atol=6.6 / 256)
    # Every bit with every bit in the same place, in the ones beside it, and in those of
    # the rows beside it.
    for lag in (-64, -1, 0, 1, 64):
        pairs = ours.T @ np.roll(theirs, lag, axis=0) / len(ours)
        if name == "itself" and lag == 0:
            np.testing.assert_array_equal(np.diag(pairs), 1.0)
            pairs -= np.eye(32)
        np.testing.assert_allclose(pairs, 0.0, rtol=0, atol=6.6 / 256)


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_are_uniform(shift: int):
    bits = np.asarray(_uniform_bits(key(), shape=(FLIPS,)))
    counts = np.bincount((bits >> shift) & 0xFF, minlength=256)
    expected = FLIPS / 256
    chi_square = np.sum((counts - expected) ** 2) / expected
    # Of 255 degrees of freedom: both ends have a probability of 1e-7. Too even would
    # be as bad as too uneven.
    assert 151 < chi_square < 392


# Shifts


@pytest.mark.parametrize("start", [0, 2**31 - 500])
def test_shifts_fill_the_interval_evenly(start: int):
    shape, steps = (5, 2, 7), start + jnp.arange(500)
    shifts = jax.jit(jax.vmap(lambda step: even_shifts(step, shape, {0, 2})))
    drawn = np.asarray(shifts(steps), np.float64)
    assert drawn.min() >= -0.5 and drawn.max() <= 0.5
    # The same along the other axis only.
    np.testing.assert_array_equal(drawn[:, :, 0], drawn[:, :, 1])
    assert len(np.unique(drawn[0, :, 0])) == 5 + 7 - 1
    # The share below p differs from p by 1.9 log(n) / n at most; random numbers would
    # by 0.04.
    shares = np.arange(1, len(drawn) + 1) / len(drawn) - 0.5
    error = np.abs(np.sort(drawn, axis=0) - shares[:, None, None, None])
    assert error.max() < 0.012
    alone = even_shifts(jnp.int32(start), (3,), {0})
    np.testing.assert_allclose(alone, drawn[0, 0, 0, :3])
