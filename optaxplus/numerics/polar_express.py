"""Coefficients of the Polar Express: the best odd quintic for what is left, repeated.

The singular values of a normalised matrix lie in [l, u] = [lower_bound, 1]. Each step
takes the polynomial p(x) = a·x + b·x³ + c·x⁵ whose largest distance from 1 on [l, u]
is smallest. It maps [l, u] onto [p(l), 2 - p(l)], the interval of the next step, and
greedy is optimal: no other composition of as many quintics comes closer to 1.

Two changes make the numbers fit for low precision. A lower end below `cushion` times
the upper one is taken to be there, which bounds the slopes, and the polynomial is
recentred on the true interval. Every row but the last sees x / (1 + safety), which
leaves room for values that rounding lifts above the upper end.

Source: Amsel, Persson, Musco and Gower, The Polar Express, arXiv 2505.16932, algorithm
1 and section 4; the order of cushion and safety as in NoahAmsel/PolarExpress.
"""

import math

import numpy as np

from optaxplus import validation

__all__ = ["polar_express_coefficients"]

Row = tuple[float, float, float]

# Ends closer than this make the four equations of the exchange singular; the limit of
# the best quintic is then known in closed form.
_TOUCHING = 5e-6


def polar_express_coefficients(
    ns_steps: int,
    *,
    lower_bound: float = 1e-3,
    safety: float = 0.02,
    cushion: float = 0.02,
) -> tuple[Row, ...]:
    """Computes rows (a, b, c) for the Newton-Schulz iteration.

    `polar_express_coefficients(5)` are those of KellerJordan/modded-nanogpt and of
    microsoft/dion; with cushion=0.02407327424182761 and safety=0 they are the listing
    of the paper, which divides by its safety factor afterwards.

    Args:
      ns_steps: Number of rows, >= 1.
      lower_bound: Smallest singular value that is to reach the band, relative to the
        norm that the matrix is divided by, in (0, 1). Smaller ones are multiplied by
        the product of the first column.
      safety: Share by which values may exceed 1 because of rounding. >= 0.
      cushion: Smallest ratio of the ends of an interval that a step is made for, in
        [0, 1).

    Returns:
      `ns_steps` rows for `ns_coeffs`.

    Raises:
      TypeError: If an argument is not a number, or `ns_steps` not an integer.
      ValueError: If an argument is out of range.

    Example:
      >>> from optaxplus.numerics import polar_express_coefficients
      >>> for row in polar_express_coefficients(2, lower_bound=0.1):
      ...     print(" ".join(f"{value:.4f}" for value in row))
      5.4938 -13.0829 8.8159
      2.1442 -1.5246 0.4034

    References:
      Amsel, Persson, Musco and Gower, arXiv 2505.16932, algorithm 1 and section 4.
    """
    name = "polar_express_coefficients"
    validation.check_int(name, minimum=1, ns_steps=ns_steps)
    validation.check_between_zero_and_one(name, lower_bound=lower_bound)
    validation.check_non_negative(name, safety=safety)
    validation.check_below_one(name, cushion=cushion)
    low, high, rows = float(lower_bound), 1.0, []
    for step in range(ns_steps):
        a, b, c = _best_quintic(max(low, cushion * high), high)
        if cushion * high > low:
            centre = (_image(low, a, b, c) + _image(high, a, b, c)) / 2
            a, b, c = a / centre, b / centre, c / centre
        if step < ns_steps - 1:
            margin = 1.0 + safety
            a, b, c = a / margin, b / margin**3, c / margin**5
        rows.append((a, b, c))
        # Near convergence rounding may put the two ends in the wrong order.
        low = _image(low, a, b, c)
        low, high = min(low, 2.0 - low), 2.0 - low
    return tuple(rows)


def _image(x: float, a: float, b: float, c: float) -> float:
    return x * (a + x**2 * (b + x**2 * c))


def _best_quintic(low: float, high: float) -> Row:
    """The odd quintic that is closest to 1 on [low, high], by Remez exchange."""
    if low / high >= 1.0 - _TOUCHING:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    # The error is the same, with alternating signs, at the ends and at the two extrema
    # between them; solving for the polynomial and finding its extrema take turns.
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    previous = math.inf
    row = (0.0, 0.0, 0.0)
    for _ in range(100):  # Converges in about ten; rounding may keep the last bit open.
        nodes = np.array([low, *inner, high])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        system = np.stack([nodes, nodes**3, nodes**5, signs], axis=1)
        *solution, error = np.linalg.solve(system, np.ones(4)).tolist()
        a, b, c = row = tuple(solution)
        if abs(error - previous) <= 1e-15:
            break
        previous = error
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
    return row
