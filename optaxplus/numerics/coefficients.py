"""Named coefficient tables of the Newton-Schulz iteration, a source beside each.

A row (a, b, c) is one step x <- a·x + b·x³ + c·x⁵ on every singular value. What the
rows make of singular values in [l, 1], in exact arithmetic:

===================  =====  ==============  ==============  ========
table                steps  band, l = 1e-2  band, l = 1e-3     slope
===================  =====  ==============  ==============  ========
gram_newton_schulz       4  0.837 to 1.132  0.206 to 1.132     207.1
gram_newton_schulz       5  0.846 to 1.124  0.729 to 1.124     803.9
gram_newton_schulz       6  0.855 to 1.115  0.855 to 1.115    3120.3
polar_express            4  0.853 to 1.147  0.243 to 1.147     244.6
polar_express            5  0.859 to 1.141  0.859 to 1.141     989.5
polar_express            6  0.864 to 1.136  0.864 to 1.136    4002.5
polar_express_paper      5  0.876 to 1.124  0.852 to 1.124     986.0
polar_express_paper      8  1.000 to 1.000  1.000 to 1.000    6363.4
jordan                   5  0.682 to 1.134  0.471 to 1.202     484.9
you                      5  0.978 to 1.032  0.475 to 1.145     492.7
cans                     5  0.849 to 1.113  0.839 to 1.113     969.1
turbo                    4  0.973 to 1.145  0.120 to 1.145     120.6
aol                      4  0.941 to 1.050  0.147 to 1.050     147.2
cubic5                   5  0.774 to 1.300  0.110 to 1.300     110.2
cubic                    5  0.076 to 1.000  0.008 to 1.000       7.6
deepseek                10  1.000 to 1.001  1.000 to 1.001   79262.8
===================  =====  ==============  ==============  ========

A singular value s below l ends at about slope·s, so nothing above 1e-3 falls below
the third column. Products with bfloat16 operands add up to 0.04 to a band, in the Gram
form up to 0.1, and leave single values of "cans" at 0.2
(tests/numerics/test_rounding.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from optaxplus import validation
from optaxplus.numerics.polar_express import Row, polar_express_coefficients

__all__ = ["COEFFICIENT_TABLES", "CoefficientTable", "resolve_coefficients"]


class CoefficientTable(NamedTuple):
    """One table of the coefficients of the Newton-Schulz iteration.

    Attributes:
      rows: The steps in order, (a, b, c) each.
      source: Where the numbers come from.
      extend: Number of steps -> rows, for other numbers of steps than `rows` has; None
        if the source knows no other.
    """

    rows: tuple[Row, ...]
    source: str
    extend: Callable[[int], tuple[Row, ...]] | None = None


def _with_safety(rows: tuple[Row, ...], safety: float) -> tuple[Row, ...]:
    """All rows but the last see x / safety, so that rounding leaves x in range."""
    return (*_divided(rows[:-1], safety), rows[-1])


def _divided(rows: tuple[Row, ...], safety: float) -> tuple[Row, ...]:
    """All rows see x / safety."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows)


def _lower_bound(ns_steps: int) -> float:
    # Below 1e-30 the rows stay the same, up to where float64 ends.
    return max(1e-30, 1e-3 * 4.0 ** (5 - ns_steps))


def _repeat_last(rows: tuple[Row, ...], ns_steps: int) -> tuple[Row, ...]:
    return (rows + rows[-1:] * max(0, ns_steps - len(rows)))[:ns_steps]


_JORDAN: Row = (3.4445, -4.7750, 2.0315)
_CUBIC: Row = (1.5, -0.5, 0.0)
_YOU: tuple[Row, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_POLAR_EXPRESS_LISTING: tuple[Row, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_CUSHION_OF_THE_LISTING = 0.02407327424182761

COEFFICIENT_TABLES: dict[str, CoefficientTable] = {
    # The default: as good as "polar_express" with the room for rounding errors that the
    # Gram form needs in bfloat16.
    "gram_newton_schulz": CoefficientTable(
        rows=_divided(_POLAR_EXPRESS_LISTING[:5], 1.05),
        source="Dao-AILab/gram-newton-schulz: five rows of the listing of Polar "
        "Express, safety factor 1.05 on all of them; other numbers of steps computed "
        "alike, with the lower bound 1e-3·4^(5 - steps)",
        extend=lambda ns_steps: _divided(
            polar_express_coefficients(
                ns_steps,
                lower_bound=_lower_bound(ns_steps),
                safety=0.0,
                cushion=_CUSHION_OF_THE_LISTING,
            ),
            1.05,
        ),
    ),
    # Every step fewer or more raises or lowers by 4, the slope of the inner steps, the
    # smallest singular value that the (unchanged) band holds for.
    "polar_express": CoefficientTable(
        rows=(
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        source="Polar Express, arXiv 2505.16932, as computed for KellerJordan/"
        "modded-nanogpt (lower bound 1e-3, safety 2e-2, cushion 2e-2); other numbers "
        "of steps computed alike, with the lower bound 1e-3·4^(5 - steps)",
        extend=lambda ns_steps: polar_express_coefficients(
            ns_steps, lower_bound=_lower_bound(ns_steps)
        ),
    ),
    # The rows of `_POLAR_EXPRESS_LISTING`; converges from the sixth step on.
    "polar_express_paper": CoefficientTable(
        rows=_with_safety(_POLAR_EXPRESS_LISTING[:5], 1.01),
        source="Polar Express, arXiv 2505.16932, the listing of the paper, safety "
        "factor 1.01 on all rows but the last that is used",
        extend=lambda ns_steps: _with_safety(
            _repeat_last(_POLAR_EXPRESS_LISTING, ns_steps), 1.01
        ),
    ),
    # Steep at 0 and never convergent (a + b + c = 0.701).
    "jordan": CoefficientTable(
        rows=(_JORDAN,) * 5,
        source="Keller Jordan et al., Muon (2024), KellerJordan/Muon",
        extend=lambda ns_steps: (_JORDAN,) * ns_steps,
    ),
    "you": CoefficientTable(
        rows=_YOU,
        source="You Jiacheng (2024); called 'dion' in optax and 'quintic' in NVIDIA's "
        "Emerging-Optimizers",
    ),
    # As published (band 0.884 to 1.120) it sends a singular value of 1.0001, which
    # rounding makes of the 1 of a matrix of rank one, to infinity. Noisier than the
    # others: bfloat16 products leave single values at 0.3.
    "cans": CoefficientTable(
        rows=_with_safety(
            (
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            safety=1.02,
        ),
        source="CANS, arXiv 2506.10935, with the safety factor of Polar Express (arXiv "
        "2505.16932) on all rows but the last",
    ),
    # For normalization="aol", which leaves larger singular values than a norm does.
    "turbo": CoefficientTable(
        rows=_YOU[1:],
        source="Turbo-Muon, arXiv 2512.04632, thib-s/flash-newton-schulz: You's table "
        "without its first row",
    ),
    "aol": CoefficientTable(
        rows=(
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        source="microsoft/dion, for its AOL pre-scaling",
    ),
    # As published (band 0.774 to 1.300) its first step makes 0.024 of 1 and changes
    # the sign of 1.004, which rounding makes of it.
    "cubic5": CoefficientTable(
        rows=_with_safety(
            (
                (3.3656576, -3.3420992, 0.0),
                (2.5744352, -1.4957376, 0.0),
                (2.5368962, -1.4312570, 0.0),
                (2.4418906, -1.2764040, 0.0),
                (2.2230472, -0.9630650, 0.0),
            ),
            safety=1.02,
        ),
        source="arXiv 2606.00371, with a safety factor of 1.02 on all rows but the "
        "last",
    ),
    # Convergent but slow.
    "cubic": CoefficientTable(
        rows=(_CUBIC,) * 5,
        source="The classical Newton-Schulz iteration (Kovarik 1970; Björck and "
        "Bowie 1971)",
        extend=lambda ns_steps: (_CUBIC,) * ns_steps,
    ),
    # Eight fast steps, then two that converge.
    "deepseek": CoefficientTable(
        rows=(_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
        source="DeepSeek-V4's schedule as listed in NVIDIA's Emerging-Optimizers",
    ),
}
"""Name -> table, for the argument `ns_coeffs`."""


def resolve_coefficients(
    function: str, ns_coeffs: str | Sequence[Sequence[float]], ns_steps: int
) -> tuple[Row, ...]:
    """Returns the `ns_steps` rows that `ns_coeffs` stands for.

    Args:
      function: Name of the caller, for messages.
      ns_coeffs: A name in `COEFFICIENT_TABLES`, or rows (a, b, c), as many as steps.
      ns_steps: Number of steps, >= 1.

    Raises:
      TypeError: If `ns_steps` is not an integer, or `ns_coeffs` a JAX array.
      ValueError: If the name is unknown, the rows are not an (n, 3) table of finite
        numbers, or the number of steps does not fit the table.
    """
    validation.check_int(function, minimum=1, ns_steps=ns_steps)
    if isinstance(ns_coeffs, str):
        validation.check_choice(function, "ns_coeffs", ns_coeffs, COEFFICIENT_TABLES)
        table = COEFFICIENT_TABLES[ns_coeffs]
        if ns_steps == len(table.rows):
            return table.rows
        if table.extend is None:
            raise ValueError(
                f"{function}: ns_steps={ns_steps} is not allowed; the table "
                f"{ns_coeffs!r} defines exactly {len(table.rows)} steps."
            )
        return table.extend(ns_steps)
    if isinstance(ns_coeffs, jax.Array):
        raise TypeError(
            f"{function}: ns_coeffs shapes the compiled program and must be a name or "
            "Python numbers, but it is an array. Under optax.inject_hyperparams pass "
            "static_args=('ns_coeffs',)."
        )
    try:
        array = np.asarray(ns_coeffs, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)  # Refused just below, with the same message.
    if array.ndim != 2 or array.shape[-1] != 3 or not np.isfinite(array).all():
        raise ValueError(
            f"{function}: ns_coeffs={ns_coeffs!r} is not allowed; it must be one of "
            f"{', '.join(map(repr, COEFFICIENT_TABLES))}, or a sequence of finite "
            "rows (a, b, c)."
        )
    if len(array) != ns_steps:
        raise ValueError(
            f"{function}: ns_steps={ns_steps} is not allowed; ns_coeffs has "
            f"{len(array)} rows, so pass ns_steps={len(array)}."
        )
    return tuple(zip(*array.T.tolist(), strict=True))
