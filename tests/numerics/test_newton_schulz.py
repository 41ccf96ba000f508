"""The polar factor by Newton-Schulz: bands, scale, batches, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxplus.numerics import COEFFICIENT_TABLES
from optaxplus.numerics.coefficients import resolve_coefficients
from tests.numerics.spectra import (
    BANDS,
    METHODS,
    NORMS,
    SHAPES,
    SMALL,
    STEPS,
    gaussian,
    in_float64,
    polar_factor,
    singular_values,
    with_two_singular_values,
)
from tests.references import matrix, muon_family
from tests.references.golden import (
    GOLDEN_POLAR_CASES,
    POLAR_DECIMALS,
    POLAR_MATRIX,
    GoldenPolarCase,
)
from tests.selection import mostly

# Agreement


@pytest.mark.parametrize("case", GOLDEN_POLAR_CASES, ids=lambda case: case.name)
def test_golden_numbers(case: GoldenPolarCase):
    # The numbers were made with ‖G‖ + 1e-7; ours adds a share of the norm.
    eps = 1e-7 / np.linalg.norm(POLAR_MATRIX)
    rows = case.ns_coeffs
    if rows is None:  # The exact factor: a table that converges, and then converges.
        rows = COEFFICIENT_TABLES["deepseek"].rows + ((1.875, -1.25, 0.375),) * 3
    result = in_float64(
        np.array(POLAR_MATRIX),
        ns_coeffs=rows,
        ns_steps=len(rows),
        normalization="frobenius",
        eps=eps,
    )
    # Half a unit of the last decimal printed, and a little for float64.
    atol = 0.505 * 10.0**-POLAR_DECIMALS
    np.testing.assert_allclose(result, case.expected, rtol=0, atol=atol)


# Rounding errors are amplified by the slope of the composed polynomial: 500 to 1000 at
# 0 for five steps, as much near 1 for "cans", 8e4 at 0 for ten steps of "deepseek".
AMPLIFICATION = {name: 1e3 for name in BANDS} | {"cubic": 10, "deepseek": 8e4}


@pytest.mark.parametrize(
    ("name", "shape", "normalization", "method"),
    [(name, (4, 6), "frobenius", "standard") for name in COEFFICIENT_TABLES]
    + [
        pytest.param(
            *("polar_express", shape, normalization, method),
            marks=[] if shape == (4, 6) else pytest.mark.slow,
        )
        for shape in SHAPES
        for normalization in NORMS
        for method in METHODS
    ]
    + [("you", (4, 6), "schatten", "gram"), ("deepseek", (4, 6), "schatten", "gram")],
)
def test_reference(name: str, shape: tuple[int, int], normalization: str, method: str):
    x = gaussian(1, shape)
    rows = resolve_coefficients("test", name, STEPS[name])
    expected = matrix.newton_schulz(x, rows, eps=0, normalization=normalization)
    arguments = {
        "ns_coeffs": name,
        "ns_steps": STEPS[name],
        "normalization": normalization,
        "method": method,
        "eps": 0.0,
    }
    result = in_float64(x, **arguments)
    # Some ten roundings of 1e-16, amplified.
    atol = 2e-15 * AMPLIFICATION[name]
    np.testing.assert_allclose(result, expected, rtol=0, atol=atol)
    result = polar_factor(jnp.float32(x), compute_dtype="float32", **arguments)
    assert result.dtype == jnp.float32
    # The same for roundings of 6e-8; "deepseek" converges, which damps them.
    atol = 1e-6 * min(AMPLIFICATION[name], 1e3)
    np.testing.assert_allclose(result, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["turbo", "aol", "polar_express"])
@pytest.mark.parametrize(
    "shape", mostly([(4, 6), (6, 4)], [(4, 6), (6, 4), (5, 5), (1, 7)])
)
def test_aol_reference(name: str, shape: tuple[int, int], method: str):
    x = gaussian(24, shape)
    rows = resolve_coefficients("test", name, STEPS[name])
    # Rows are scaled on the short side.
    wide = x if shape[0] <= shape[1] else x.T
    expected = muon_family.newton_schulz_steps(
        muon_family.aol_scaled(wide, eps=0.0), rows
    )
    result = in_float64(
        x,
        ns_coeffs=name,
        ns_steps=STEPS[name],
        normalization="aol",
        method=method,
        eps=0.0,
    )
    # Some ten roundings of 1e-16, amplified.
    np.testing.assert_allclose(
        result if wide is x else result.T, expected, rtol=0, atol=2e-12
    )


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_aol_with_a_zero_row_at_any_scale(scale: float):
    x = jnp.float32(gaussian(25, (3, 5))).at[1].set(0.0)
    arguments = {"normalization": "aol", "compute_dtype": "float32"}
    arguments |= {"ns_coeffs": "turbo", "ns_steps": 4}
    result = polar_factor(x * scale, **arguments)
    np.testing.assert_array_equal(result[1], np.zeros(5))
    # Two singular values of about 1 and the missing one; float32 roundings of a scale.
    np.testing.assert_allclose(result, polar_factor(x, **arguments), rtol=0, atol=2e-5)
    assert 0.8 < singular_values(result)[1] < 1.2


def test_defaults():
    x = jnp.float32(gaussian(2, (4, 8)))
    explicit = polar_factor(
        x,
        ns_steps=5,
        ns_coeffs="gram_newton_schulz",
        method="gram",
        normalization="schatten",
        compute_dtype="bfloat16",
        eps=1e-7,
    )
    np.testing.assert_array_equal(polar_factor(x), explicit)


# Bands


@pytest.mark.parametrize(
    ("name", "compute_dtype", "method"),
    [(name, "float64", "standard") for name in BANDS]
    + [(name, "float32", "gram") for name in ("polar_express", "jordan", "deepseek")],
)
def test_bands(name: str, compute_dtype: str, method: str):
    x = with_two_singular_values(SMALL)
    arguments = {
        "ns_coeffs": name,
        "ns_steps": STEPS[name],
        "normalization": "frobenius",
        "method": method,
    }
    if compute_dtype == "float64":
        values = singular_values(in_float64(x, **arguments))
    else:
        x = jnp.float32(x)
        values = singular_values(polar_factor(x, compute_dtype="float32", **arguments))
    low, high = BANDS[name]
    # Half a unit of the last decimal of the band; roundings of 1e-7, amplified by 500
    # or less where a singular value still grows.
    slack = (1e-4 if name == "deepseek" else 6e-4) + 1e-4
    assert values.min() >= low - slack
    assert values.max() <= high + slack
    # The band is used, so that a table that does something else cannot pass.
    if name != "deepseek":
        assert values.max() >= high - 2e-2


@pytest.mark.parametrize("name", COEFFICIENT_TABLES)
def test_singular_vectors_stay(name: str):
    x = gaussian(3, (4, 6))
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    s = s / NORMS["schatten"](s)
    for a, b, c in resolve_coefficients("test", name, STEPS[name]):
        s = a * s + b * s**3 + c * s**5
    result = in_float64(x, ns_coeffs=name, ns_steps=STEPS[name], eps=0.0)
    # Ten roundings of 1e-16, amplified.
    np.testing.assert_allclose(
        result, (u * s) @ vh, rtol=0, atol=2e-15 * AMPLIFICATION[name]
    )


# Scale


@pytest.mark.parametrize(
    "compute_dtype", mostly(["bfloat16"], ["bfloat16", "float16", "float32"])
)
@pytest.mark.parametrize("power", [-100, -14, 15, 100])
def test_powers_of_two_change_no_bit(compute_dtype: str, power: int):
    x = jnp.float32(gaussian(4, (3, 5)))
    expected = polar_factor(x, compute_dtype=compute_dtype)
    scaled = polar_factor(x * 2.0**power, compute_dtype=compute_dtype)
    np.testing.assert_array_equal(scaled, expected)


# Rounding 1e30·x differs from rounding x, by 2^-9, 2^-11 and 2^-24 of every entry. The
# slope of "you" is at most 8 for singular values above 0.1 (that of "polar_express" is
# 220, so that noise may move a value anywhere inside its band); a few of them add up.
SCALE_TOLERANCE = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 3e-6}


@pytest.mark.parametrize("compute_dtype", SCALE_TOLERANCE)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(compute_dtype: str, scale: float):
    x = jnp.float32(gaussian(5, (3, 6)))
    arguments = {"compute_dtype": compute_dtype, "ns_coeffs": "you"}
    expected = polar_factor(x, **arguments)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(
        polar_factor(x * scale, **arguments),
        expected,
        rtol=0,
        atol=SCALE_TOLERANCE[compute_dtype],
    )


@pytest.mark.parametrize("power", [-99, 119])
@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_norms_at_the_ends_of_the_range(power: int, compute_dtype: str):
    # Frobenius norms of 2e-30 and 7e35, of a matrix with many entries.
    x = gaussian(30, (64, 256))
    x = jnp.float32(x / np.linalg.norm(x))
    usual = polar_factor(x, compute_dtype=compute_dtype)
    extreme = polar_factor(x * 2.0**power, compute_dtype=compute_dtype)
    # The scale is a rounding away, and one to bfloat16 may follow from it.
    atol = {"bfloat16": 2e-2, "float32": 5e-6}[compute_dtype]
    np.testing.assert_allclose(extreme, usual, rtol=0, atol=atol)


def test_scale_does_not_matter_in_float64():
    x = gaussian(6, (3, 6))
    # Roundings of 1e-16, amplified by at most 1e3.
    for scale in (1e-300, 1e300):
        np.testing.assert_allclose(in_float64(x * scale), in_float64(x), atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "powers"), [("float16", (-6, 14)), ("bfloat16", (-100, 120))]
)
def test_scale_of_low_precision_gradients_does_not_matter(dtype: str, powers):
    # The largest and the smallest power of two at which all entries stay normal numbers
    # (float16), or nearly so.
    x = jnp.asarray(gaussian(7, (3, 5)), dtype)
    expected = polar_factor(x)
    assert expected.dtype == jnp.float32
    for power in powers:
        scaled = (x.astype(jnp.float32) * 2.0**power).astype(dtype)
        assert jnp.isfinite(scaled).all()
        np.testing.assert_array_equal(polar_factor(scaled), expected)


# Invariances


@pytest.mark.parametrize("shape", SHAPES)
def test_transpose(shape: tuple[int, int]):
    x = gaussian(8, shape)
    # Both sides of a square matrix are iterated on as they are; other shapes take the
    # same path, bit for bit. Roundings of 1e-16, amplified by 1e3.
    np.testing.assert_allclose(in_float64(x.T), in_float64(x).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_orthogonal_change_of_basis(shape: tuple[int, int]):
    x = gaussian(9, shape)
    left = np.linalg.qr(gaussian(10, (shape[0],) * 2))[0]
    right = np.linalg.qr(gaussian(11, (shape[1],) * 2))[0]
    # Roundings of 1e-16, amplified by 1e3.
    np.testing.assert_allclose(
        in_float64(left @ x @ right), left @ in_float64(x) @ right, rtol=0, atol=1e-12
    )


def test_permutations_and_signs():
    x = gaussian(12, (3, 5))
    rows, columns, signs = [2, 0, 1], [4, 1, 3, 0, 2], np.array([1, -1, 1, 1, -1])
    # Sums in another order: roundings of 1e-16, amplified by 1e3.
    np.testing.assert_allclose(
        in_float64(x[rows][:, columns] * signs),
        in_float64(x)[rows][:, columns] * signs,
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("shape", "compute_dtype"),
    [((2, 2, 4, 6), "float32"), ((3, 5, 5), "float32"), ((2, 2, 4, 6), "bfloat16")],
)
def test_batch_is_its_slices(shape: tuple[int, ...], compute_dtype: str):
    scales = np.logspace(-20, 20, int(np.prod(shape[:-2]))).reshape(*shape[:-2], 1, 1)
    x = jnp.float32(gaussian(13, shape) * scales)
    batched = polar_factor(x, compute_dtype=compute_dtype)
    slices = jax.lax.map(
        lambda one: polar_factor(one, compute_dtype=compute_dtype),
        x.reshape(-1, *shape[-2:]),
    ).reshape(shape)
    # Float32 sums in another order, amplified by up to 1000; where that moves a
    # rounding to bfloat16, 2^-9.
    atol = 2e-5 if compute_dtype == "float32" else 2e-2
    np.testing.assert_allclose(batched, slices, rtol=0, atol=atol)


def test_symmetric_positive_matrices_go_to_the_identity():
    root = gaussian(14, (4, 4))
    result = in_float64(root @ root.T + np.eye(4), ns_coeffs="deepseek", ns_steps=10)
    # "deepseek" leaves singular values within 5e-4 of 1.
    np.testing.assert_allclose(result, np.eye(4), rtol=0, atol=1e-3)


# Limits


@pytest.mark.parametrize("name", mostly(["polar_express", "jordan"], BANDS))
@pytest.mark.parametrize(
    "compute_dtype", mostly(["bfloat16"], ["bfloat16", "float16", "float32"])
)
def test_rank_one_is_no_edge(name: str, compute_dtype: str):
    # The one singular value is 1 after normalising and may be rounded to more.
    x = gaussian(20, (64, 3, 1)) @ gaussian(21, (64, 1, 4))
    result = polar_factor(
        jnp.float32(x),
        ns_coeffs=name,
        ns_steps=STEPS[name],
        compute_dtype=compute_dtype,
    )
    values = singular_values(result)[:, 0]
    low, high = BANDS[name]
    # As in low precision, see test_rounding.py.
    assert values.min() >= low - 0.04
    assert values.max() <= high + 0.04


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "dtype", mostly(["float32"], ["bfloat16", "float16", "float32"])
)
def test_zero_stays_zero(dtype: str, compute_dtype: str):
    x = jnp.zeros((2, 3, 4), dtype)
    result = polar_factor(x, compute_dtype=compute_dtype, eps=0.0)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, np.zeros((2, 3, 4)))


def test_zero_in_a_batch_does_not_touch_the_others():
    x = jnp.float32(gaussian(15, (2, 3, 4)))
    result = polar_factor(x.at[0].set(0.0), compute_dtype="float32")
    np.testing.assert_array_equal(result[0], np.zeros((3, 4)))
    np.testing.assert_array_equal(
        result[1], polar_factor(x, compute_dtype="float32")[1]
    )


@pytest.mark.parametrize("rank", [1, 2])
def test_missing_directions_stay_missing(rank: int):
    x = gaussian(16, (4, rank)) @ gaussian(17, (rank, 5))
    values = singular_values(in_float64(x))
    low, high = BANDS["gram_newton_schulz"]
    assert values[:rank].min() >= low - 1e-3
    assert values[:rank].max() <= high + 1e-3
    # Float64 zeros are 1e-16, amplified by 1e3.
    assert values[rank:].max() < 1e-12


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("shape", mostly([(6, 1)], [(1, 6), (6, 1), (1, 1)]))
def test_a_single_row_is_normalised(name: str, shape: tuple[int, int]):
    x = jnp.float32(gaussian(18, shape)) * 1e-3
    result = polar_factor(
        x, ns_coeffs=name, ns_steps=STEPS[name], compute_dtype="float32"
    )
    length = np.linalg.norm(result)
    low, high = BANDS[name]
    # The band is printed with three decimals.
    assert low - 1e-3 <= length <= high + 1e-3
    # Float32 roundings, some of them of 8·x, from which 7·x is then taken away.
    np.testing.assert_allclose(
        result / length, x / jnp.linalg.norm(x), rtol=0, atol=3e-6
    )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 3), (2, 0, 3), (0, 0)])
def test_empty_stays_empty(shape: tuple[int, ...]):
    result = polar_factor(jnp.zeros(shape, jnp.bfloat16))
    assert (result.shape, result.dtype) == (shape, jnp.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "compute_dtype", mostly(["bfloat16"], ["bfloat16", "float16", "float32"])
)
def test_one_bad_entry_makes_its_matrix_nan(value: float, compute_dtype: str):
    x = jnp.float32(gaussian(19, (2, 3, 4))).at[0, 1, 2].set(value)
    result = np.asarray(polar_factor(x, compute_dtype=compute_dtype))
    assert np.isnan(result[0]).all()
    assert np.isfinite(result[1]).all()


# Errors


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (jnp.ones((2, 3), jnp.int32), {}, "polar_factor: x of dtype int32 is not"),
        (jnp.ones((2, 3), jnp.complex64), {}, "x of dtype complex64 .* real floating"),
        (jnp.ones((2, 3)), {"compute_dtype": "int8"}, "compute_dtype='int8' is not"),
        (jnp.ones((2, 3)), {"compute_dtype": "half-ish"}, "compute_dtype='half-ish'"),
        (jnp.ones((2, 3)), {"compute_dtype": None}, "compute_dtype=None is not"),
        (jnp.ones((2, 3)), {"ns_steps": 2.5}, "polar_factor: ns_steps=2.5 is not"),
        (jnp.ones((2, 3)), {"eps": True}, "polar_factor: eps=True is not allowed"),
        (jnp.ones((2, 3)), {"eps": "small"}, "polar_factor: eps='small' is not"),
    ],
)
def test_wrong_types_are_refused(x, arguments, message: str):
    with pytest.raises(TypeError, match=message):
        polar_factor(x, **arguments)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (jnp.ones(3), {}, r"x of shape \(3,\) is not allowed; .* at least two axes"),
        (jnp.ones(()), {}, r"polar_factor: x of shape \(\) is not allowed"),
        (jnp.ones((2, 3)), {"ns_coeffs": "nope"}, "polar_factor: ns_coeffs='nope'"),
        (
            jnp.ones((2, 3)),
            {"ns_coeffs": "you", "ns_steps": 6},
            "polar_factor: ns_steps=6 is not allowed",
        ),
        (jnp.ones((2, 3)), {"method": "Gram"}, "method='Gram' .* 'auto', 'standard', "),
        (jnp.ones((2, 3)), {"normalization": "l2"}, "normalization='l2' .* 'schatten'"),
        (jnp.ones((2, 3)), {"eps": -1e-7}, "eps=-1e-07 is not allowed; .* >= 0"),
        (jnp.ones((2, 3)), {"eps": float("nan")}, "polar_factor: eps=nan is not"),
    ],
)
def test_wrong_values_are_refused(x, arguments, message: str):
    with pytest.raises(ValueError, match=message):
        polar_factor(x, **arguments)


def test_traced_steps_are_refused():
    with pytest.raises(TypeError, match="ns_steps shapes the compiled program"):
        jax.jit(lambda steps: polar_factor(jnp.ones((2, 3)), ns_steps=steps))(5)
