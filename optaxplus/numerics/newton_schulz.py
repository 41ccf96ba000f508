"""The polar factor of a matrix by the Newton-Schulz iteration.

The polar factor of G = U·S·Vᵀ is U·Vᵀ, the nearest semi-orthogonal matrix. An odd
polynomial p acts on a matrix through its singular values alone,
p(X) = U·p(S)·Vᵀ, so polynomials that push every value in (0, 1] towards 1, applied
one after the other, turn G / ‖G‖ into U·Vᵀ with nothing but matrix products. For each
row (a, b, c) of coefficients, with X wide (the Gram matrix R is on the short side):

    R <- X·Xᵀ
    X <- (a·I + b·R + c·R²)·X                                    standard form

All polynomials of R commute, so several steps can be taken on the small matrix alone,
and X is touched once at their end (Gram form):

    R <- X·Xᵀ,  Q <- I
    for each row of a block:
        Z <- b·R + c·R²
        Q <- (a·I + Z)·Q
        R <- (a·I + Z)·R·(a·I + Z)
    X <- Q·X

The standard form is a Gram form with blocks of one step. Rounding errors of R grow
with the square of the slopes of a block, so the first step stands alone, further
blocks have two steps, and in bfloat16 the coefficients must leave room for them.

The norm that G is divided by comes from the first R too: the root of its trace
(Frobenius), or the root of its own Frobenius norm (Schatten-4). The latter is closer
to the largest singular value; unless that one dominates, this saves up to one step.

Sources: Keller Jordan et al., Muon (2024); Bernstein and Newhouse, arXiv 2409.20325;
Dao-AILab/gram-newton-schulz (2026) for the Gram form; Boissin et al., Turbo-Muon,
arXiv 2512.04632 for AOL. Differs from KellerJordan/Muon: the norm is taken in float32
and does not overflow or vanish, so the direction does not depend on the gradient's
scale.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxplus import validation
from optaxplus.numerics.coefficients import Row, resolve_coefficients
from optaxplus.numerics.norms import or_one

__all__ = [
    "NewtonSchulz",
    "Step",
    "bytes_of_sums",
    "check_compute_dtype",
    "iterate",
    "largest_entry",
    "multiplications",
    "newton_schulz",
    "power_of_two",
    "steps_of_panels",
]

METHODS = ("auto", "standard", "gram")
NORMALIZATIONS = ("schatten", "frobenius", "aol")

# The share by which rounding may lift singular values above the range that the next
# step of a pair is made for, by the dtype of the products. Rows that bear it kept all
# matrices that were tried within 0.1 of their band; with half of it, sparse and small
# ones grow without bound (tests/numerics/test_rounding.py).
_ROUNDING = {"bfloat16": 0.04, "float16": 0.005, "float32": 1e-5, "float64": 1e-14}

# Squares of numbers outside of these overflow or vanish in float32.
_SAFE_SQUARES = (1e-25, 1e25)


def check_compute_dtype(function: str, compute_dtype: str) -> None:
    """Refuses dtypes that the iteration is not made for."""
    validation.check_floating_dtype(function, compute_dtype=compute_dtype)
    name = jnp.dtype(compute_dtype).name
    validation.check_choice(function, "compute_dtype", name, tuple(_ROUNDING))


@dataclass(frozen=True)
class NewtonSchulz:
    """A checked choice of the iteration; see `polar_factor` for the arguments."""

    rows: tuple[Row, ...]
    method: str
    normalization: str
    compute_dtype: str
    eps: float

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the operands of the products."""
        return jnp.dtype(self.compute_dtype)

    @property
    def accumulator(self) -> jnp.dtype:
        """The dtype of sums, norms, coefficients and results."""
        return jnp.dtype(jnp.float64 if self.dtype == jnp.float64 else jnp.float32)

    def blocks(self, short: int, long: int) -> list[tuple[Row, ...]]:
        """The rows in blocks of the Gram form, single ones for the standard form."""
        standard, gram = [(row,) for row in self.rows], in_pairs(self.rows)
        if self.method == "auto" and bear_pairs(self.rows, self.dtype.name):
            return min((standard, gram), key=lambda b: multiplications(b, short, long))
        return gram if self.method == "gram" else standard


def newton_schulz(
    function: str,
    *,
    ns_steps: int,
    ns_coeffs: str | Sequence[Sequence[float]],
    method: str,
    normalization: str,
    compute_dtype: str,
    eps: float,
) -> NewtonSchulz:
    """Checks the arguments of `polar_factor` on behalf of `function`."""
    rows = resolve_coefficients(function, ns_coeffs, ns_steps)
    validation.check_choice(function, "method", method, METHODS)
    validation.check_choice(function, "normalization", normalization, NORMALIZATIONS)
    check_compute_dtype(function, compute_dtype)
    validation.check_static_margin(function, eps=eps)
    if method == "gram" and not bear_pairs(rows, jnp.dtype(compute_dtype).name):
        raise ValueError(
            f"{function}: method='gram' is not allowed with compute_dtype="
            f"{jnp.dtype(compute_dtype).name!r} and these ns_coeffs; rounding would "
            "take singular values out of their range. Pass method='auto', or "
            "ns_coeffs='gram_newton_schulz', which leaves room for it."
        )
    return NewtonSchulz(rows, method, normalization, compute_dtype, float(eps))


def in_pairs(rows: Sequence[Row]) -> list[tuple[Row, ...]]:
    """The blocks of the Gram form: the first step, the steepest one, then pairs."""
    pairs = [tuple(rows[start : start + 2]) for start in range(1, len(rows), 2)]
    return [tuple(rows[:1]), *pairs]


def bear_pairs(rows: Sequence[Row], dtype: str) -> bool:
    """Whether the rows stay in range when every step is given a little too much."""
    x = np.linspace(0.0, 1.0, 2001)
    for a, b, c in rows:
        x = x * (1.0 + _ROUNDING[dtype])
        x = x * (a + x**2 * (b + x**2 * c))
        if x.min() < 0.0 or x.max() > 10.0:
            return False
    return bool(x.max() < 1.5)


def multiplications(blocks: Sequence[Sequence[Row]], short: int, long: int) -> int:
    """How many scalar multiplications the matrix products of an iteration take."""
    total = 0
    for block in blocks:
        steps = len(block)
        total += 2 * short * short * long  # X·Xᵀ and Q·X.
        # R², and for all steps but one Q·Z, R·Z and Z·R·Z.
        total += (steps + 3 * (steps - 1)) * short**3
    return total


def iterate(
    panels: Sequence[jax.Array], iteration: NewtonSchulz, *, rolled: bool
) -> Sequence[jax.Array]:
    """Runs the iteration on wide matrices of its dtype.

    Args:
      panels: The columns of the matrices: arrays (..., n, w) that form (..., n, m),
        n <= m, side by side. Each is multiplied by itself.
      iteration: What `newton_schulz` returns.
      rolled: Whether blocks of as many steps are a loop of the program, which makes it
        shorter, or follow each other, which saves copies of what the loop carries.

    Returns:
      The panels of the result.
    """
    short, long = panels[0].shape[-2], sum(x.shape[-1] for x in panels)
    first, *others = iteration.blocks(short, long)
    gram, unit = _in_range(_gram(panels, iteration), panels, iteration)
    gram, start, scale = _normalise(gram, panels, unit, iteration)
    result = _block(start, gram, scale, first, iteration)

    def advanced(panels: Sequence[jax.Array], rows: Any) -> list[jax.Array]:
        return _block(panels, _gram(panels, iteration), None, rows, iteration)

    for _, group in itertools.groupby(others, key=len):
        blocks = list(group)
        if rolled and len(blocks) > 1:
            table = jnp.asarray(blocks, iteration.accumulator)
            result, _ = lax.scan(
                lambda x, rows: (advanced(x, rows), None), result, table
            )
        else:
            for rows in blocks:
                result = advanced(result, rows)
    return result


def _block(
    panels: Sequence[jax.Array],
    gram: jax.Array,
    scale: jax.Array | None,
    rows: Any,
    iteration: NewtonSchulz,
) -> list[jax.Array]:
    """Applies the steps of one block to scale·X, whose Gram matrix is given.

    A polynomial of the Gram matrix is kept as (identity, rest), the multiple of the
    identity apart: beside it the rest would lose its digits in low precision. `rows`
    may be an array.
    """

    def combine(*terms: tuple[float | jax.Array, jax.Array]) -> jax.Array:
        # One fused pass in float32; what the next product reads is rounded once.
        first, *others = (factor * term.astype(accumulator) for factor, term in terms)
        return sum(others, start=first).astype(iteration.dtype)

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return _product(left, right, iteration)

    accumulator = iteration.accumulator
    gram = combine((1.0, gram))
    (identity, b, c), *others = rows
    step = rest = combine((b, gram), (c, product(gram, gram)))
    step_identity = identity
    for a, b, c in others:
        half = combine((step_identity, gram), (1.0, product(gram, step)))
        gram = combine((step_identity, half), (1.0, product(half, step)))
        step = combine((b, gram), (c, product(gram, gram)))
        rest = combine((1.0, product(rest, step)), (a, rest), (identity, step))
        step_identity, identity = a, identity * a
    if scale is None:
        return [combine((identity, x), (1.0, product(rest, x))) for x in panels]
    return [combine((identity * scale, x), (scale, product(rest, x))) for x in panels]


def _normalise(
    gram: jax.Array,
    panels: Sequence[jax.Array],
    unit: jax.Array,
    iteration: NewtonSchulz,
) -> tuple[jax.Array, Sequence[jax.Array], jax.Array | None]:
    """(Gram matrix of s·X, X, s) for a scale s that leaves no singular value above 1.

    X itself is not rounded once more: its scale is multiplied in at the block's end.
    `gram` is the Gram matrix of unit·X.
    """
    margin = 1.0 + iteration.eps
    if iteration.normalization == "aol":
        rows = jnp.sum(jnp.abs(gram), axis=-1, keepdims=True)
        scale = lax.rsqrt(or_one(rows)) / margin
        return gram * scale * scale.mT, _scaled(panels, unit * scale, iteration), None
    trace = or_one(_trace(gram))
    gram = gram / trace
    if iteration.normalization == "schatten":
        squares = jnp.sum(jnp.square(gram), axis=(-2, -1), keepdims=True)
        norm = jnp.sqrt(or_one(squares))
        trace, gram = trace * norm, gram / norm
    return gram / margin**2, panels, unit * lax.rsqrt(trace) / margin


def _in_range(
    gram: jax.Array, panels: Sequence[jax.Array], iteration: NewtonSchulz
) -> tuple[jax.Array, jax.Array]:
    """The Gram matrix of unit·X and unit, a power of two, 1 but for extreme scales.

    Entries of 1e-30 and 1e30 are numbers, their squares are not. To look for them
    beforehand would be another pass over X; the trace of the Gram matrix tells.
    """
    low, high = _SAFE_SQUARES
    trace = _trace(gram)
    safe = jnp.all((trace > low) & (trace < high))

    def rescaled() -> tuple[jax.Array, jax.Array]:
        unit = power_of_two(largest_entry(jnp.concatenate(panels, axis=-1)))
        return _gram(_scaled(panels, unit, iteration), iteration), unit

    return lax.cond(safe, lambda: (gram, jnp.ones_like(trace)), rescaled)


def _scaled(
    panels: Sequence[jax.Array], scale: jax.Array, iteration: NewtonSchulz
) -> Sequence[jax.Array]:
    return [
        (x.astype(iteration.accumulator) * scale).astype(iteration.dtype)
        for x in panels
    ]


def largest_entry(x: jax.Array) -> jax.Array:
    """The largest absolute entry of each matrix, shape (..., 1, 1)."""
    return jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0.0)


def power_of_two(largest: jax.Array) -> jax.Array:
    """The power of two that brings the largest entry of a matrix to [1, 2).

    In the dtype in which matrices are summed; 1 for what is zero or not finite.
    Multiplying by it rounds nothing.
    """
    dtype = jnp.dtype(jnp.float64 if largest.dtype == jnp.float64 else jnp.float32)
    _, exponent = jnp.frexp(largest.astype(dtype))
    # The smallest powers have no normal reciprocal.
    exponent = jnp.clip(exponent, jnp.finfo(dtype).minexp + 3, None)
    unit = jnp.ldexp(jnp.ones_like(largest, dtype), 1 - exponent)
    return jnp.where(jnp.isfinite(largest) & (largest > 0), unit, 1.0)


# Panels of one matrix on several devices, which add up what each of them has.

Step = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def steps_of_panels(iteration: NewtonSchulz, short: int, long: int) -> list[Step]:
    """The iteration on one panel, cut where panels need each other.

    Args:
      iteration: What `newton_schulz` returns.
      short: Rows of the whole matrices.
      long: Columns of the whole matrices.

    Returns:
      Functions (panels, total) -> (panels, part): panels are (count, short, width), of
      the dtype of the products from the second on; `total` is the sum, over all panels
      of a matrix, of the `part` that the function before returned. The first gets None,
      the last gives it.
    """
    first, *others = iteration.blocks(short, long)

    def begin(x: jax.Array, total: None) -> tuple[jax.Array, jax.Array]:
        del total
        return x, largest_entry(x).astype(iteration.accumulator)

    def rescale(x: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The sum of the largest is not far above the largest of all.
        (x,) = _scaled([x], power_of_two(total), iteration)
        return x, _quarters(_gram([x], iteration))

    def advance(rows: Any, is_last: bool, x: jax.Array, total: jax.Array) -> Any:
        panels, scale, gram = [x], None, _from_quarters(total)
        if rows is first:
            unit = jnp.ones_like(_trace(gram))
            gram, panels, scale = _normalise(gram, panels, unit, iteration)
        (x,) = _block(panels, gram, scale, rows, iteration)
        return x, None if is_last else _quarters(_gram([x], iteration))

    blocks = [first, *others]
    return [
        begin,
        rescale,
        *(partial(advance, rows, rows is blocks[-1]) for rows in blocks),
    ]


def bytes_of_sums(iteration: NewtonSchulz, short: int, long: int) -> int:
    """Bytes of everything that the panels of a matrix have to sum."""
    entries = 3 * (short // 2) ** 2 if short % 2 == 0 else short**2
    blocks = len(iteration.blocks(short, long))
    return blocks * entries * iteration.accumulator.itemsize


def _quarters(gram: jax.Array) -> jax.Array:
    """What determines a symmetric matrix: three quarters of it, (..., 3, n/2, n/2)."""
    half = gram.shape[-1] // 2
    if gram.shape[-1] % 2:
        return gram[..., None, :, :]
    corners = (
        gram[..., :half, :half],
        gram[..., half:, :half],
        gram[..., half:, half:],
    )
    return jnp.stack(corners, axis=-3)


def _from_quarters(quarters: jax.Array) -> jax.Array:
    if quarters.shape[-3] == 1:
        return quarters[..., 0, :, :]
    top, below, bottom = jnp.moveaxis(quarters, -3, 0)
    rows = ((top, below.mT), (below, bottom))
    return jnp.concatenate([jnp.concatenate(row, axis=-1) for row in rows], axis=-2)


def _trace(gram: jax.Array) -> jax.Array:
    return jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]


def _gram(panels: Sequence[jax.Array], iteration: NewtonSchulz) -> jax.Array:
    # Both operands summed over their last axis: a transposed operand would be moved
    # first on CPUs.
    first, *others = (_dot(x, x, x.ndim - 1, iteration) for x in panels)
    return sum(others, start=first)


def _product(left: jax.Array, right: jax.Array, iteration: NewtonSchulz) -> jax.Array:
    return _dot(left, right, right.ndim - 2, iteration)


def _dot(
    left: jax.Array, right: jax.Array, right_axis: int, iteration: NewtonSchulz
) -> jax.Array:
    # lax.dot_general, not jnp.matmul: matmul widens the operands to the type of the
    # result, which keeps the products off the bfloat16 matrix units.
    batch = tuple(range(left.ndim - 2))
    return lax.dot_general(
        left,
        right,
        (((left.ndim - 1,), (right_axis,)), (batch, batch)),
        preferred_element_type=iteration.accumulator,
        # "highest" keeps float32 operands from being rounded on accelerators.
        precision=lax.Precision.HIGHEST if iteration.dtype.itemsize >= 4 else None,
    )
