"""Codes of 8 bits against float64 arithmetic over all of them, and their blocks."""

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by its name
import numpy as np
import pytest

from optaxplus.numerics.quantization import (
    blocks_of,
    dequantize,
    dynamic_map,
    quantize,
    root_code,
)
from tests.numerics.codes import (
    KINDS,
    by_columns,
    codes_and_values,
    decoded,
    encoded,
    every_kind,
    measured,
    round_trip,
    samples,
    signs,
)

# The smallest normal float32, the smallest scale.
TINY = np.float32(2.0**-126)
SMALLEST_SCALE = np.float32(2.0**-124)

# Every entry gets the nearest code


def check_nearest(x, code: str, signed: bool) -> None:
    """Compares with all codes; `x` is a matrix with blocks of 256 rows."""
    x = np.asarray(x)
    codes, scales = encoded(x, code, signed)
    assert codes.shape == x.shape
    assert codes.dtype == (np.int8 if (code, signed) == KINDS[0] else np.uint8)
    assert scales.dtype == (np.float64 if x.dtype == np.float64 else np.float32)
    wide = x.astype(np.float64)
    largest = np.abs(wide).reshape(-1, 256, x.shape[1]).max(axis=1)
    np.testing.assert_array_equal(scales, largest)

    spread = by_columns(scales, len(x))
    ratio = wide / spread
    allowed, values = codes_and_values(code, signed)
    assert np.isin(codes, allowed).all()
    mine = values[codes.astype(int) - allowed[0]]
    place, places = measured(ratio, code, signed), measured(values, code, signed)
    distance = np.abs(place - measured(mine, code, signed))
    best = np.abs(place[..., None] - places).min(axis=-1)
    # Ratio, two square roots and their multiple are off by five roundings of 6e-8, or
    # ratio and middle by six; so are both of the distances that are compared.
    slack = 1e-6 if code == "root" else 1e-6 * np.abs(ratio)
    assert (distance <= best + slack).all()

    y = decoded(codes, scales, code, signed)
    assert y.dtype == scales.dtype
    # A root with two roundings, taken to a power, with four more.
    np.testing.assert_allclose(y, mine * spread, rtol=1e-6)


@signs
def test_ties_of_dynamic_go_up(signed: bool):
    table = dynamic_map(signed)
    x = np.ones((512, 8), np.float32)
    # A block of the largest, 1, and of what is in the middle of two entries.
    x[1:256] = ((table[1:] + table[:-1]) / 2)[:, None]
    codes, _ = encoded(x, "dynamic", signed)
    np.testing.assert_array_equal(codes[1:256, 0], np.arange(1, 256))


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_entry_gets_the_nearest_code(code: str, signed: bool, dtype: str):
    # Below the smallest code of each, so that there are zeros too; in float16 these
    # begin with its denormals.
    x = samples((512, 8), signed, decades=11.0)
    check_nearest((x * np.float32([1, 10, 1e2, 1e3] * 2)).astype(dtype), code, signed)


@every_kind
def test_float64(code: str, signed: bool):
    x = samples((512, 4), signed, decades=11.0).astype(np.float64)
    with jax.enable_x64(True):
        # The scales are float64, the ratios float32.
        check_nearest(x * [1e-20, 1 + 1e-9, 1e100, 1e300], code, signed)


def test_scales_of_float64_are_float32_numbers_or_larger():
    with jax.enable_x64(True):
        _, scales = encoded(np.full((3, 1), 1e-300), "root", False)
        assert scales.dtype == np.float64
        np.testing.assert_array_equal(scales, SMALLEST_SCALE)


def test_sign_of_float64_entries_that_are_denormal_in_float32():
    with jax.enable_x64(True):
        # Not compiled: fusion mends it.
        codes, _ = quantize(jnp.array([-1e-38, 1e-38]), code="dynamic", signed=True)
        # There is no -1: codes beside each other are 254 apart with these signs.
        np.testing.assert_array_equal(codes, [254 - codes[1], codes[1]])


@every_kind
def test_the_code_is_that_of_the_decoded_numbers(code: str, signed: bool):
    # Where the largest decodes exactly, so that the scale is the same: not for -1 of
    # "dynamic", see below.
    x = samples((512, 8), signed, decades=11.0)
    x[::256] = 1.25
    codes, scales = encoded(x, code, signed)
    again = encoded(decoded(codes, scales, code, signed), code, signed)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(again[1], scales)


@every_kind
def test_the_largest_entry_of_a_block_stays(code: str, signed: bool):
    x = samples((512, 8), signed)
    largest = np.abs(x) == by_columns(encoded(x, code, signed)[1], 512)
    y = round_trip(x, code, signed)
    if (code, signed) == ("dynamic", True):
        # The map has no -1. Two roundings.
        negative = largest & (x < 0)
        assert negative.any()
        np.testing.assert_allclose(y[negative], 0.99296874 * x[negative], rtol=3e-7)
        largest &= x > 0
    assert largest.any()
    np.testing.assert_array_equal(y[largest], x[largest])


@pytest.mark.parametrize(
    ("code", "signed", "smallest", "error"),
    [
        # Roots are off by half of 1/127, or of 1/255: at 1 and 1/16 this is
        # (1 + 0.5 / 127)^2 - 1 and so on with 31.75; second moments have
        # (1 + 0.5 / 127.5)^4 - 1 at 1/16 and so on.
        ("root", True, 0.98, 0.0080),
        ("root", True, 1 / 16, 0.0318),
        # From the middle of 7 and 8 on.
        ("root", True, (7.5 / 127) ** 2, 0.1378),
        ("root", False, 1 / 16, 0.0158),
        ("root", False, 1 / 256, 0.0318),
        # Half of 0.9 / 64 in the middle of the first two entries above 0.1, which are
        # 0.1070 and 0.1211; half of 0.9 / 128 in that of 0.1035 and 0.1105.
        ("dynamic", True, 0.1, 0.0616),
        ("dynamic", False, 0.1, 0.0328),
    ],
)
def test_relative_error(code: str, signed: bool, smallest: float, error: float):
    x = np.geomspace(smallest, 1.0, 8 * 512).reshape(8, 512).T.astype(np.float32)
    x[::256] = 1.0
    measured_error = np.abs(round_trip(x, code, signed) / x.astype(np.float64) - 1)
    # There are dozens of entries between two codes, and so some close to the middle.
    assert 0.95 * error < measured_error.max() <= 1.01 * error


# Scales


@every_kind
def test_powers_of_two_change_the_scales_alone(code: str, signed: bool):
    # Entries above 2^-20 of the largest: in the smallest block they decode to normal
    # float32 numbers.
    x = np.tile(samples((256, 1), signed, decades=6.0), (2, 1))
    powers = 2.0 ** np.array([0, -100, -75, -50, -1, 1, 50, 100], np.float32)
    codes, scales = encoded(x * powers, code, signed)
    np.testing.assert_array_equal(codes, np.broadcast_to(codes[:, :1], codes.shape))
    np.testing.assert_array_equal(scales, scales[:, :1] * powers)
    y = decoded(codes, scales, code, signed)
    np.testing.assert_array_equal(y, y[:, :1] * powers)


@every_kind
def test_zeros(code: str, signed: bool):
    codes, scales = encoded(np.zeros((512, 8), np.float32), code, signed)
    zero = {"root": 0, "dynamic": 127}[code] if signed else 1
    np.testing.assert_array_equal(codes, zero)
    np.testing.assert_array_equal(scales, SMALLEST_SCALE)
    y = decoded(codes, scales, code, signed)
    np.testing.assert_array_equal(y, 0.0 if signed else TINY)


@every_kind
def test_denormal_numbers(code: str, signed: bool):
    x = samples((512, 8), signed)
    alone = encoded(x, code, signed)
    x[:, 1] *= np.float32(1e-39)
    codes, scales = encoded(x, code, signed)
    # Blocks beside them know nothing of them.
    np.testing.assert_array_equal(codes[:, 2:], alone[0][:, 2:])
    np.testing.assert_array_equal(scales[:, 2:], alone[1][:, 2:])
    np.testing.assert_array_equal(scales[:, 1], SMALLEST_SCALE)
    y = decoded(codes, scales, code, signed)[:, 1]
    if signed:
        # Zeros, for compilers that know no denormal numbers.
        assert (np.abs(y) <= 1e-38).all()
    else:
        np.testing.assert_array_equal(y, TINY)


@every_kind
def test_largest_numbers(code: str, signed: bool):
    x = np.full((512, 8), np.finfo(np.float32).max)
    x[1:] *= np.linspace(0.2, 1, 511, dtype=np.float32)[:, None]
    # More than half of the distance of any two codes above 0.2.
    np.testing.assert_allclose(round_trip(x, code, signed), x, rtol=0.04)


@every_kind
def test_an_outlier_stays_in_its_block(code: str, signed: bool):
    x = samples((512, 8), signed)
    codes, scales = encoded(x, code, signed)
    x[300, 1] = 1e6
    changed_codes, changed_scales = encoded(x, code, signed)
    assert changed_scales[1, 1] == 1e6
    assert (changed_codes[256:, 1] != codes[256:, 1]).any()
    changed_codes[256:, 1], changed_scales[1, 1] = codes[256:, 1], scales[1, 1]
    np.testing.assert_array_equal(changed_codes, codes)
    np.testing.assert_array_equal(changed_scales, scales)


def float_of(pattern: int) -> np.float32:
    return np.uint32(pattern).view(np.float32)


PAYLOADS = [
    # What GPUs of NVIDIA make of 0/0, and another with the code of 1 in its low byte.
    pytest.param(
        float_of(pattern),
        id=f"{pattern:#x}",
    )
    for pattern in (0x7FFFFFFF, 0x7FC0007F)
]


def check_bad_entry(bad: np.float32, code: str, signed: bool, expected: float) -> None:
    x = samples((512, 8), signed)
    x[::256] = 1.25
    x[300, 1] = 0.0
    codes, scales = encoded(x, code, signed)
    x[300, 1] = bad
    bad_codes, bad_scales = encoded(x, code, signed)
    np.testing.assert_array_equal(bad_scales, scales)
    y = decoded(bad_codes, bad_scales, code, signed)[300, 1]
    bad_codes[300, 1] = codes[300, 1]
    np.testing.assert_array_equal(bad_codes, codes)
    # One rounding of the entry of the map.
    np.testing.assert_allclose(y, expected, rtol=3e-7)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize(
    "bad",
    [np.nan, np.inf, -np.inf, float_of(0xFFC00000), *PAYLOADS],
)
def test_bad_entries_of_root(bad: float, signed: bool):
    check_bad_entry(np.float32(bad), "root", signed, 0.0 if signed else np.inf)


@pytest.mark.parametrize(
    ("bad", "signed", "end"),
    [
        (np.nan, True, 1.0),
        (np.inf, True, 1.0),
        (-np.inf, True, -0.99296874),
        (np.nan, False, 1.0),
        (np.inf, False, 1.0),
    ],
)
def test_bad_entries_of_dynamic(bad: float, signed: bool, end: float):
    # They become as large as the largest.
    check_bad_entry(np.float32(bad), "dynamic", signed, 1.25 * end)


@pytest.mark.parametrize("code", ["root", "dynamic"])
def test_a_block_of_bad_entries_alone(code: str):
    x = np.ones((512, 8), np.float32)
    x[:256, 0] = np.nan
    codes, scales = encoded(x, code, signed=False)
    assert scales[0, 0] == SMALLEST_SCALE
    y = decoded(codes, scales, code, signed=False)
    expected = np.ones_like(x)
    expected[:256, 0] = np.inf if code == "root" else SMALLEST_SCALE
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("code", ["root", "dynamic"])
def test_positive_entries_stay_positive(code: str):
    # Down to the smallest denormal number, in blocks of all sizes.
    x = samples((512, 8), False, decades=8.0)
    x[::256] = [1.0, 1e-37, 2e-38, 1e-38, 1e-44, 1e10, 1e30, 8e37]
    x[1:256] *= x[0]
    x[257:] *= np.geomspace(1e-37, 1, 255, dtype=np.float32)[:, None]
    x = np.maximum(x, np.float32(1e-45))
    y = round_trip(x, code, False)
    assert (y > 0).all()
    assert np.isfinite(y).all()
    # Whatever the code, the scale and the compiler.
    codes = np.arange(1, 256, dtype=np.uint8)[:, None]
    scales = np.geomspace(SMALLEST_SCALE, 3.4e38, 64, dtype=np.float32)[None]
    y = decoded(np.broadcast_to(codes, (255, 64)), scales, code, False)
    assert (y > 0).all()
    assert np.isfinite(y).all()


def test_fewer_sizes():
    few = root_code(sizes=7, unsigned_sizes=15)
    ratio = jnp.linspace(0, 1, 9999)
    signed = few.decode(few.encode(ratio, -jnp.ones_like(ratio), 0.0), True)
    # Four roundings.
    sizes = -((np.arange(7, -1, -1) / 7) ** 2)
    np.testing.assert_allclose(np.unique(signed), sizes, rtol=5e-7)
    unsigned = few.decode(few.encode(ratio, None, 0.0), False)
    sizes = (np.arange(1, 16) / 15) ** 4
    np.testing.assert_allclose(np.unique(unsigned), sizes, rtol=5e-7)


# Blocks


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((1000, 3), 256),  # Groups of eight, and a shorter block at the end.
        ((509, 4), 256),  # Single rows, and a shorter block.
        ((384, 5), 256),  # Two equal blocks.
        ((300, 2, 3), 64),
        ((3, 3, 4, 300), 256),
        ((4, 90, 3), 100),
        ((7,), 256),
        ((600,), 2048),
        ((17, 2), 8),  # Slices are halved; 17 is reduced at once.
    ],
    ids=str,
)
def test_scale_is_the_largest_size_of_the_block(
    shape: tuple[int, ...], block_size: int
):
    blocks = blocks_of(shape, block_size)
    along = np.moveaxis(samples(shape, True), blocks.axis, 0)
    # Blocks beside each other have scales that are far apart.
    index = np.arange(len(along)) // (blocks.groups * blocks.group)
    along = (along.T * np.float32([1, 1e4, 1e-4])[index % 3]).T
    x = np.moveaxis(along, 0, blocks.axis)
    codes, scales = encoded(x, "root", True, block_size=block_size)
    along, starts = np.abs(along), np.flatnonzero(np.diff(index, prepend=-1))
    expected = np.moveaxis(np.maximum.reduceat(along, starts), 0, blocks.axis)
    assert codes.shape == shape
    assert scales.shape[blocks.axis] == blocks.count
    np.testing.assert_array_equal(scales, expected)
    # And every entry is decoded with it: "root" keeps what is 1/16 of it to 4 %.
    spread = np.repeat(scales, blocks.groups * blocks.group, blocks.axis)
    spread = np.take(spread, range(shape[blocks.axis]), blocks.axis)
    large = np.abs(x) > spread / 16
    y = decoded(codes, scales, "root", True, block_size=block_size)
    assert large.any()
    np.testing.assert_allclose(y[large], x[large], rtol=0.04)


@pytest.mark.parametrize(
    "shape",
    [(0,), (0, 3), (5, 0)],
    ids=str,
)
def test_arrays_without_entries(shape: tuple[int, ...]):
    x = jnp.zeros(shape)
    codes, scales = quantize(x, signed=True)
    assert codes.shape == shape
    assert dequantize(codes, scales, signed=True).shape == shape


# Transformations of JAX


@every_kind
def test_stacks_are_stacks_of_codes(code: str, signed: bool):
    # Rows are at least half a block, and so blocks lie along them whatever the stack.
    x = samples((150, 130, 2), signed)
    codes, scales = encoded(x, code, signed)
    mapped = jax.vmap(lambda x: quantize(x, code=code, signed=signed))
    for i in (0, 149):
        slice_codes, slice_scales = encoded(x[i], code, signed)
        np.testing.assert_array_equal(codes[i], slice_codes)
        np.testing.assert_array_equal(scales[i], slice_scales)
    mapped_codes, mapped_scales = jax.jit(mapped)(x)
    np.testing.assert_array_equal(mapped_codes, codes)
    np.testing.assert_array_equal(mapped_scales, scales)


@every_kind
def test_compiled_codes_are_those_op_by_op(code: str, signed: bool):
    x = samples((512, 8), signed)
    codes, scales = encoded(x, code, signed)
    plain = quantize(jnp.asarray(x), code=code, signed=signed)
    np.testing.assert_array_equal(plain[1], scales)
    # Fusion may round otherwise, by 3e-7 or less of a root: 1e-4 of the distance of
    # two codes. One of these 4096 entries at most is so close to the middle of two.
    apart = np.abs(np.asarray(plain[0], int) - codes)
    assert apart.sum() <= 1
    y = dequantize(jnp.asarray(codes), jnp.asarray(scales), code=code, signed=signed)
    # Five roundings.
    np.testing.assert_allclose(y, decoded(codes, scales, code, signed), rtol=5e-7)
