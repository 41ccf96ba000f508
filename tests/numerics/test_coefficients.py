"""The coefficient tables: what they do to singular values, and where they end."""

import jax.numpy as jnp
import numpy as np
import pytest

from optaxplus.numerics.coefficients import COEFFICIENT_TABLES, resolve_coefficients

# Smallest and largest image of [low, 1], as published or measured in exact arithmetic
# by others: table, number of steps, low, band.
BANDS = [
    ("jordan", 5, 1e-2, (0.682, 1.134)),
    ("jordan", 5, 1e-3, (0.471, 1.202)),
    ("you", 5, 1e-2, (0.978, 1.032)),
    ("you", 5, 1e-3, (0.475, 1.145)),
    ("polar_express", 5, 1e-3, (0.859, 1.141)),
    ("cans", 5, 1e-3, (0.839, 1.113)),
    ("cubic", 5, 1e-1, (0.659, 1.000)),
    ("cubic", 5, 1e-2, (0.076, 1.000)),
    ("deepseek", 10, 1e-3, (1.0000, 1.0005)),
]

STEPS = {name: max(5, len(table.rows)) for name, table in COEFFICIENT_TABLES.items()}


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


@pytest.mark.parametrize("name", COEFFICIENT_TABLES)
def test_no_singular_value_changes_its_sign(name: str):
    table = COEFFICIENT_TABLES[name]
    x = np.geomspace(1e-8, 1, 20001)
    for steps in range(1 if table.prefix else STEPS[name], STEPS[name] + 1):
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
    assert x.max() < 1.25


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


def best_quintic(low: float, high: float) -> np.ndarray:
    """(a, b, c) of the odd quintic closest to 1 on [low, high], by Remez exchange."""
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    error = np.inf
    for _ in range(100):
        nodes = np.array([low, *inner, high])
        system = np.stack([nodes, nodes**3, nodes**5, signs], axis=1)
        a, b, c, new_error = np.linalg.solve(system, np.ones(4))
        if abs(new_error - error) <= 1e-15:
            break
        error = new_error
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return np.array([a, b, c])


def test_polar_express_is_the_greedy_optimum():
    # Polar Express, arXiv 2505.16932: each row is the best quintic for the interval
    # that the rows before it leave of [1e-3, 1], widened below to `cushion` times its
    # upper end and recentred, with a safety factor on all rows but the last.
    safety, cushion = 1 + 2e-2, 2e-2
    low, high, rows = 1e-3, 1.0, []
    for step in range(5):
        row = best_quintic(max(low, cushion * high), high)
        if cushion * high > low:
            row *= 2 / (apply([row], low) + apply([row], high))
        if step < 4:
            row /= safety ** np.array([1, 3, 5])
        rows.append(row)
        low = apply([row], low)
        high = 2 - low
    # Solving for the second and third row loses eight digits to the conditioning of
    # the exchange.
    np.testing.assert_allclose(
        COEFFICIENT_TABLES["polar_express"].rows, rows, rtol=1e-7
    )


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
    assert resolve_coefficients("f", "polar_express", 2) == rows[:2]
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
        (
            "polar_express",
            6,
            "f: ns_steps=6 is not allowed; the table 'polar_express' defines 1 to 5",
        ),
        ("you", 6, "the table 'you' defines exactly 5 steps"),
        ("you", 4, "f: ns_steps=4 is not allowed; the table 'you' defines exactly 5"),
        ("cans", 3, "the table 'cans' defines exactly 5 steps"),
        ("deepseek", 5, "the table 'deepseek' defines exactly 10 steps"),
        (
            "keller",
            5,
            "f: ns_coeffs='keller' is not allowed; .* one of 'polar_express', 'jordan'",
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
