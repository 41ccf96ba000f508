"""The coefficient tables: what they do to singular values, and where they end."""

import jax.numpy as jnp
import numpy as np
import pytest

from optaxplus.numerics import coefficients, polar_express_coefficients
from optaxplus.numerics.coefficients import COEFFICIENT_TABLES, resolve_coefficients

# Smallest and largest image of [low, 1], as published or measured in exact arithmetic
# by others: table, number of steps, low, band.
BANDS = [
    ("polar_express", 4, 1e-2, (0.853, 1.147)),
    ("polar_express", 4, 1e-3, (0.243, 1.147)),
    ("polar_express", 5, 1e-2, (0.859, 1.141)),
    ("polar_express", 5, 1e-3, (0.859, 1.141)),
    ("polar_express", 6, 1e-3, (0.864, 1.136)),
    ("polar_express_paper", 5, 1e-2, (0.876, 1.124)),
    ("polar_express_paper", 5, 1e-3, (0.852, 1.124)),
    ("polar_express_paper", 8, 1e-3, (1.000, 1.000)),
    ("gram_newton_schulz", 4, 1e-2, (0.837, 1.132)),
    ("gram_newton_schulz", 4, 1e-3, (0.206, 1.132)),
    ("gram_newton_schulz", 5, 1e-2, (0.846, 1.124)),
    ("gram_newton_schulz", 5, 1e-3, (0.729, 1.124)),
    ("gram_newton_schulz", 6, 1e-3, (0.855, 1.115)),
    ("jordan", 5, 1e-2, (0.682, 1.134)),
    ("jordan", 5, 1e-3, (0.471, 1.202)),
    ("you", 5, 1e-2, (0.978, 1.032)),
    ("you", 5, 1e-3, (0.475, 1.145)),
    ("cans", 5, 1e-2, (0.849, 1.113)),
    ("cans", 5, 1e-3, (0.839, 1.113)),
    ("turbo", 4, 1e-2, (0.973, 1.145)),
    ("turbo", 4, 1e-3, (0.120, 1.145)),
    ("aol", 4, 1e-2, (0.941, 1.050)),
    ("aol", 4, 1e-3, (0.147, 1.050)),
    ("cubic5", 5, 1e-2, (0.774, 1.300)),
    ("cubic5", 5, 1e-3, (0.110, 1.300)),
    ("cubic", 5, 1e-2, (0.076, 1.000)),
    ("cubic", 5, 1e-3, (0.008, 1.000)),
    ("deepseek", 10, 1e-3, (1.000, 1.0005)),
]

STEPS = {name: len(table.rows) for name, table in COEFFICIENT_TABLES.items()}


def apply(rows, x: np.ndarray) -> np.ndarray:
    """The composed polynomial, in float64."""
    for a, b, c in rows:
        x = x * (a + x**2 * (b + x**2 * c))
    return x


@pytest.mark.parametrize(("name", "steps", "low", "band"), BANDS)
def test_bands(name: str, steps: int, low: float, band: tuple[float, float]):
    image = apply(resolve_coefficients("f", name, steps), np.geomspace(low, 1, 20001))
    # The bands are printed with so many decimals; the grid adds 1e-5.
    atol = 0.6e-4 if name == "deepseek" else 0.6e-3
    np.testing.assert_allclose([image.min(), image.max()], band, rtol=0, atol=atol)


def test_the_documented_bands_are_these():
    lines = coefficients.__doc__.splitlines()
    rows = [line.split() for line in lines if line.split()[:1] and " to " in line]
    documented = {
        (row[0], int(row[1]), low, (float(row[at]), float(row[at + 2])))
        for row in rows
        for low, at in ((1e-2, 2), (1e-3, 5))
        if row[0] in COEFFICIENT_TABLES
    }
    assert {name for name, *_ in documented} == set(COEFFICIENT_TABLES)
    for name, steps, low, band in documented:
        image = apply(
            resolve_coefficients("f", name, steps), np.geomspace(low, 1, 20001)
        )
        # Printed with three decimals; the grid adds 1e-5.
        np.testing.assert_allclose([image.min(), image.max()], band, rtol=0, atol=6e-4)


def test_the_documented_slopes_are_these():
    for line in coefficients.__doc__.splitlines():
        if " to " in line and line.split()[0] in COEFFICIENT_TABLES:
            name, steps, *_, slope = line.split()
            rows = resolve_coefficients("f", name, int(steps))
            # Printed with one decimal.
            np.testing.assert_allclose(
                np.prod([a for a, _, _ in rows]), float(slope), rtol=0, atol=0.06
            )


@pytest.mark.parametrize("name", COEFFICIENT_TABLES)
def test_no_singular_value_changes_its_sign(name: str):
    x = np.geomspace(1e-8, 1, 20001)
    extends = COEFFICIENT_TABLES[name].extend is not None
    for steps in range(1, 13) if extends else [STEPS[name]]:
        assert apply(resolve_coefficients("f", name, steps), x).min() > 0


@pytest.mark.parametrize("name", COEFFICIENT_TABLES)
def test_rounding_does_not_leave_the_band(name: str):
    # Every step is given values that are up to 2^-7 off, as bfloat16 products are; a
    # table without a margin above 1 diverges from there.
    rng = np.random.default_rng(0)
    x = np.geomspace(1e-3, 1, 20001)
    for row in resolve_coefficients("f", name, STEPS[name]):
        x = apply([row], x * (1 + 2**-7 * rng.choice([-1, 1], size=x.shape)))
    assert x.min() > 0
    assert x.max() < 1.3


def test_cubic5_as_published():
    rows = np.array(COEFFICIENT_TABLES["cubic5"].rows)
    rows[:-1] *= 1.02 ** np.array([1, 3, 5])
    image = apply(rows, np.geomspace(1e-3, 1, 20001))
    np.testing.assert_allclose([image.min(), image.max()], [0.119, 1.300], atol=6e-4)
    assert apply(rows, 1.004) < 0


def test_cans_as_published():
    # Without the safety factor of 1.02 on all rows but the last.
    rows = np.array(COEFFICIENT_TABLES["cans"].rows)
    rows[:-1] *= 1.02 ** np.array([1, 3, 5])
    published = [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ]
    # Printed with four decimals; a float64 rounding beside them.
    np.testing.assert_allclose(rows, published, rtol=1e-14)
    image = apply(rows, np.geomspace(1e-3, 1, 20001))
    np.testing.assert_allclose([image.min(), image.max()], [0.884, 1.120], atol=6e-4)


PUBLISHED_LISTING = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def test_polar_express_generates_the_table_of_the_speedrun():
    # Lower bound, safety and cushion are the defaults.
    np.testing.assert_allclose(
        polar_express_coefficients(5),
        COEFFICIENT_TABLES["polar_express"].rows,
        rtol=0,
        # Both are float64; solving the exchange loses a digit or two.
        atol=1e-12,
    )


def test_polar_express_generates_the_listing_of_the_paper():
    rows = polar_express_coefficients(
        8, lower_bound=1e-3, safety=0.0, cushion=0.02407327424182761
    )
    np.testing.assert_allclose(rows[:6], PUBLISHED_LISTING[:6], rtol=0, atol=1e-13)
    # An interval of width 1e-6, then 1e-9, leaves so many digits to the exchange.
    np.testing.assert_allclose(rows[6:], PUBLISHED_LISTING[6:], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("lower_bound", "safety", "cushion"),
    [(1e-3, 0.02, 0.02), (1e-2, 0.0, 0.0), (1e-6, 0.01, 0.02), (0.02, 0.05, 0.1)],
)
def test_polar_express_is_the_greedy_optimum(lower_bound, safety, cushion):
    """No quintic does better on the interval that the rows before leave."""
    low, high = lower_bound, 1.0
    for index, row in enumerate(
        polar_express_coefficients(
            4, lower_bound=lower_bound, safety=safety, cushion=cushion
        )
    ):
        if index < 3:
            row = np.array(row) * (1 + safety) ** np.array([1, 3, 5])
        x = np.linspace(max(low, cushion * high), high, 4001)
        error = apply([row], x) - 1
        if low >= cushion * high:
            # Chebyshev: four alternating extrema of one size make an odd quintic the
            # best. The grid misses an extremum by 1e-6.
            extrema = [error[0], error.min(), error.max(), error[-1]]
            np.testing.assert_allclose(np.abs(extrema), np.abs(error[0]), rtol=1e-5)
            assert error[0] < 0 < error[-1] or abs(error[0]) < 1e-9
        else:
            # Recentred: as far below 1 at the true lower end as above at the upper.
            np.testing.assert_allclose(apply([row], low) + apply([row], high), 2)
        if index < 3:
            row = np.array(row) / (1 + safety) ** np.array([1, 3, 5])
        low = apply([row], low)
        high = 2 - low


@pytest.mark.parametrize("ns_steps", range(3, 11))
def test_the_band_of_polar_express_does_not_depend_on_the_number_of_steps(ns_steps):
    # Every step more reaches four times further down.
    rows = resolve_coefficients("f", "polar_express", ns_steps)
    image = apply(rows, np.geomspace(1e-3 * 4.0 ** (5 - ns_steps), 1, 20001))
    assert 0.84 < image.min() < image.max() < 1.16


def test_polar_express_converges():
    rows = polar_express_coefficients(12, lower_bound=1e-2)
    image = apply(rows, np.geomspace(1e-2, 1, 2001))
    # Some forty roundings.
    np.testing.assert_allclose(image, 1, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"ns_steps": 0}, "ns_steps=0 is not allowed"),
        (TypeError, {"ns_steps": 2.0}, "ns_steps=2.0 is not allowed"),
        (ValueError, {"lower_bound": 0.0}, r"lower_bound=0.0 is not .* \(0, 1\)"),
        (ValueError, {"lower_bound": 1.0}, r"lower_bound=1.0 is not .* \(0, 1\)"),
        (ValueError, {"safety": -0.1}, "safety=-0.1 is not allowed; .* >= 0"),
        (ValueError, {"cushion": 1.0}, r"cushion=1.0 is not allowed; .* \[0, 1\)"),
        (TypeError, {"cushion": "0"}, "cushion='0' is not allowed"),
    ],
)
def test_polar_express_refuses(error, arguments, message: str):
    with pytest.raises(error, match=f"polar_express_coefficients: {message}"):
        polar_express_coefficients(**{"ns_steps": 5, **arguments})


def test_the_published_tables_with_safety_factors():
    listing = np.array(PUBLISHED_LISTING)
    powers = np.array([1, 3, 5])
    # microsoft and Dao-AILab print ten decimals of the latter.
    gram = [
        (7.8925828744, -20.3830139459, 13.5553061494),
        (3.9114848681, -2.5464635929, 0.4268988320),
        (3.7606579557, -2.5128190182, 0.4323647349),
        (3.1603996737, -2.1496495189, 0.3996366908),
        (2.1910971619, -1.4416620102, 0.3281464876),
    ]
    np.testing.assert_allclose(
        COEFFICIENT_TABLES["gram_newton_schulz"].rows, gram, rtol=0, atol=6e-11
    )
    for steps in (4, 6):
        *found, last = resolve_coefficients("f", "gram_newton_schulz", steps)
        expected = np.array(
            polar_express_coefficients(
                steps,
                lower_bound=1e-3 * 4.0 ** (5 - steps),
                safety=0.0,
                cushion=0.02407327424182761,
            )
        )
        np.testing.assert_allclose([*found, last], expected / 1.05**powers, rtol=1e-14)
    for steps in (1, 5, 8, 10):
        rows = np.array(resolve_coefficients("f", "polar_express_paper", steps))
        expected = listing[np.minimum(np.arange(steps), 7)]
        np.testing.assert_allclose(rows[-1], expected[-1], rtol=1e-15)
        np.testing.assert_allclose(rows[:-1], expected[:-1] / 1.01**powers, rtol=1e-14)


def test_safety_of_the_fifth_row_is_not_applied():
    # With the factor on the last row too, the image of 1 would be 1.02 times smaller
    # than that of its upper end.
    rows = COEFFICIENT_TABLES["polar_express"].rows
    image = apply(rows, np.geomspace(1e-3, 1, 20001))
    # A band centred at 1, as the best approximation leaves it.
    np.testing.assert_allclose(image.min() + image.max(), 2, atol=2e-3)


@pytest.mark.parametrize("name", COEFFICIENT_TABLES)
def test_every_table_names_its_source(name: str):
    table = COEFFICIENT_TABLES[name]
    assert np.shape(table.rows) == (len(table.rows), 3)
    assert np.isfinite(table.rows).all()
    assert len(table.source) > 10


def test_steps_of_a_table():
    rows = COEFFICIENT_TABLES["polar_express"].rows
    assert resolve_coefficients("f", "polar_express", 5) == rows
    assert resolve_coefficients("f", "polar_express", 4) == polar_express_coefficients(
        4, lower_bound=4e-3
    )
    assert resolve_coefficients("f", "jordan", 7) == ((3.4445, -4.775, 2.0315),) * 7
    assert resolve_coefficients("f", "cubic", 1) == ((1.5, -0.5, 0.0),)


def test_rows_of_ones_own():
    expected = ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert resolve_coefficients("f", [[1, 2, 3], [4, 5, 6]], 2) == expected
    assert resolve_coefficients("f", np.array(expected), 2) == expected
    assert resolve_coefficients("f", expected, np.int64(2)) == expected


@pytest.mark.parametrize(
    ("ns_coeffs", "ns_steps", "message"),
    [
        ("you", 6, "the table 'you' defines exactly 5 steps"),
        ("you", 4, "f: ns_steps=4 is not allowed; the table 'you' defines exactly 5"),
        ("cans", 3, "the table 'cans' defines exactly 5 steps"),
        ("deepseek", 5, "the table 'deepseek' defines exactly 10 steps"),
        (
            "keller",
            5,
            "f: ns_coeffs='keller' is not allowed; .* one of 'gram_newton_schulz'",
        ),
        ([[1.0, 2.0]], 1, r"ns_coeffs=\[\[1.0, 2.0\]\] .* sequence of finite rows"),
        ([1.0, 2.0, 3.0], 3, "ns_coeffs=.* sequence of finite rows"),
        ([[1.0, 2.0, 3.0], [1.0]], 2, "ns_coeffs=.* sequence of finite rows"),
        ([[1.0, float("nan"), 3.0]], 1, "ns_coeffs=.* sequence of finite rows"),
        ([["a", "b", "c"]], 1, "ns_coeffs=.* sequence of finite rows"),
        (None, 5, "ns_coeffs=None is not allowed"),
        (
            [[1.0, 2.0, 3.0]],
            5,
            "ns_steps=5 is not allowed; ns_coeffs has 1 rows, so pass ns_steps=1",
        ),
        ("jordan", 0, "f: ns_steps=0 is not allowed; it must be an integer >= 1"),
    ],
)
def test_values_that_are_refused(ns_coeffs, ns_steps, message: str):
    with pytest.raises(ValueError, match=message):
        resolve_coefficients("f", ns_coeffs, ns_steps)


@pytest.mark.parametrize(
    ("ns_steps", "message"),
    [
        (5.0, "f: ns_steps=5.0 is not allowed; it must be an integer >= 1"),
        (True, "f: ns_steps=True is not allowed"),
        ("5", "f: ns_steps='5' is not allowed"),
        (jnp.asarray(5), r"ns_steps shapes the compiled program .*static_args=\('ns_s"),
    ],
)
def test_types_that_are_refused(ns_steps, message: str):
    with pytest.raises(TypeError, match=message):
        resolve_coefficients("f", "jordan", ns_steps)
