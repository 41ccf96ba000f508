"""Named coefficient tables of the Newton-Schulz iteration, a source beside each.

A row (a, b, c) is one step x <- a·x + b·x³ + c·x⁵ on every singular value. The bands
quoted are those of the singular values after all rows of a table, in exact
arithmetic, for inputs in [1e-3, 1]; bfloat16 products add about 1e-2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from optaxplus import validation

__all__ = ["COEFFICIENT_TABLES", "CoefficientTable", "resolve_coefficients"]

Row = tuple[float, float, float]


class CoefficientTable(NamedTuple):
    """One table.

    Attributes:
      rows: The steps in order.
      source: Where the numbers come from.
      repeats: Whether the last row may be applied again for steps beyond the table.
      prefix: Whether the first rows alone are a sensible schedule, so that fewer
        steps than the table has may be asked for.
    """

    rows: tuple[Row, ...]
    source: str
    repeats: bool
    prefix: bool


def _with_safety(rows: tuple[Row, ...], safety: float) -> tuple[Row, ...]:
    """All rows but the last see x / safety, so that rounding leaves x in range."""
    scaled = tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows[:-1])
    return (*scaled, rows[-1])


_JORDAN: Row = (3.4445, -4.7750, 2.0315)

COEFFICIENT_TABLES: dict[str, CoefficientTable] = {
    # Band 0.859 to 1.141. Optimal step by step for singular values from 1e-3, with a
    # safety factor of 1.02 that absorbs bfloat16 noise.
    "polar_express": CoefficientTable(
        rows=(
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        source="Polar Express, arXiv 2505.16932, as computed for KellerJordan/"
        "modded-nanogpt (l = 1e-3, 5 steps, safety 2e-2, cushion 2e-2)",
        repeats=False,
        prefix=True,
    ),
    # Band 0.471 to 1.202; steep at 0 and never convergent (a + b + c = 0.701).
    "jordan": CoefficientTable(
        rows=(_JORDAN,),
        source="Keller Jordan et al., Muon (2024), KellerJordan/Muon",
        repeats=True,
        prefix=True,
    ),
    # Band 0.475 to 1.145; within 0.978 to 1.032 for inputs above 1e-2.
    "you": CoefficientTable(
        rows=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        source="You Jiacheng (2024); called 'dion' in optax and 'quintic' in NVIDIA's "
        "Emerging-Optimizers",
        repeats=False,
        prefix=False,
    ),
    # Band 0.839 to 1.113. As published (0.884 to 1.120) it sends a singular value of
    # 1.0001, which rounding makes of the 1 of a matrix of rank one, to infinity.
    # Noisier than the others: bfloat16 products leave single values at 0.3.
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
        repeats=False,
        prefix=False,
    ),
    # Convergent but slow: five steps leave a singular value of 0.01 at 0.076.
    "cubic": CoefficientTable(
        rows=((1.5, -0.5, 0.0),),
        source="The classical Newton-Schulz iteration (Kovarik 1970; Björck and "
        "Bowie 1971)",
        repeats=True,
        prefix=True,
    ),
    # Band 1.0000 to 1.0005: eight fast steps, then two that converge.
    "deepseek": CoefficientTable(
        rows=(_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
        source="DeepSeek-V4's schedule as listed in NVIDIA's Emerging-Optimizers",
        repeats=False,
        prefix=False,
    ),
}


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
        rows, size = table.rows, len(table.rows)
        if (ns_steps > size and not table.repeats) or (
            ns_steps < size and not table.prefix
        ):
            allowed = f"1 to {size}" if table.prefix else f"exactly {size}"
            raise ValueError(
                f"{function}: ns_steps={ns_steps} is not allowed; the table "
                f"{ns_coeffs!r} defines {allowed} steps and does not say how to "
                "continue."
            )
        return (rows + rows[-1:] * max(0, ns_steps - size))[:ns_steps]
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
