"""Polar factors of many matrices: one compiled iteration for each canonical shape.

A network has dozens of weight matrices and a handful of shapes. All matrices of one
shape, transposes included, whatever parameter and whatever place in a stack they come
from, go through the same code, so a deeper network has no more products to compile.

How they go through it depends on the machine. GPUs and TPUs take them as one batch.
CPUs reach their bfloat16 matrix units only with plain two-dimensional products, keep
in their caches what a single matrix needs, and waste a part of every product on
handing it to all cores; there a loop takes two matrices at a time, each by products of
its own that can run beside those of the other. A program for CPUs therefore has the
products of an iteration twice, and once more for an odd matrix at the end.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from optaxplus.numerics.explicit_axes import left_to_compiler
from optaxplus.numerics.newton_schulz import (
    NewtonSchulz,
    iterate,
    largest_entry,
    newton_schulz,
    power_of_two,
)

__all__ = ["concatenated", "in_rows", "polar_factor", "polar_factors", "turned"]

# Rows from which panels pay. Measured on two cores, bfloat16, four panels, all of
# Muon's update: 1.16 times as slow for 256 rows, as fast for 512, 1.05 times as fast
# for 768, 1.1 for 1024.
_SMALL = 512

# Entries of one batch on accelerators; the products of a turn take 12 bytes an entry.
_BATCH = 2**26

# Operands of one concatenation on accelerators.
_CONCATENATED = 8


def polar_factor(
    x: jax.Array,
    *,
    ns_steps: int = 5,
    ns_coeffs: str | Sequence[Sequence[float]] = "gram_newton_schulz",
    method: str = "auto",
    normalization: str = "schatten",
    compute_dtype: str = "bfloat16",
    eps: float = 1e-7,
) -> jax.Array:
    """Approximates U·Vᵀ of the singular value decomposition x = U·S·Vᵀ.

    Args:
      x: Shape (..., m, n), real floating point. Leading axes are a batch.
      ns_steps: Number of iterations, >= 1. Static.
      ns_coeffs: Name of a table in `optaxplus.numerics.COEFFICIENT_TABLES` or
        `ns_steps` rows (a, b, c), such as `polar_express_coefficients` computes. The
        tables say what band of singular values they leave. Static.
      method: "standard"; "gram", which iterates on the Gram matrix of the short side,
        two steps at a time after the first; "auto", whichever multiplies less, "gram"
        for matrices more than one and a half times as long as wide. Both are the same
        in exact arithmetic. In bfloat16 "gram" needs coefficients with room for its
        rounding errors and is refused, or not chosen, for others: "gram_newton_schulz",
        "jordan", "cubic", "deepseek" and rows with a safety of 0.05 have it. Static.
      normalization: What x is divided by, so that no singular value exceeds 1:
        "frobenius", the root of the sum of their squares; "schatten", the fourth root
        of the sum of their fourth powers, which is smaller and no work; "aol" divides
        each row of the wide matrix by the root of the absolute sum of its row of the
        Gram matrix, and so approximates the polar factor of a rescaled matrix. Static.
      compute_dtype: Dtype of the operands of the products, "bfloat16", "float16",
        "float32" or "float64". The matrix is rounded to it first, and after every
        block; products accumulate in float32, and so do the norm and the coefficients
        (in float64 for "float64"). Static.
      eps: Relative margin added to the norm. >= 0. Static.

    Returns:
      Shape of `x`, float32 (float64 for compute dtype "float64"), rounded to
      `compute_dtype`. The result is the same for x and for any positive multiple of it
      whose Frobenius norm is between 1e-30 and 1e36, up to rounding. A zero matrix
      gives zeros; one with a NaN or an infinity gives NaN throughout; singular values
      of 0 (rank deficiency) stay 0. A single row or column is normalised to a length
      inside the table's band.

    Raises:
      TypeError: If `x` is not real floating point, or an argument has a wrong type.
      ValueError: If `x` has fewer than two axes, an argument is out of range, the Gram
        form is asked for where rounding would break it, or float64 without x64.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxplus.numerics import polar_factor
      >>> polar = polar_factor(
      ...     jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]]),
      ...     ns_coeffs="deepseek", ns_steps=10, compute_dtype="float32",
      ... )
      >>> print(polar.round(2))
      [[1. 0. 0.]
       [0. 1. 0.]]

    References:
      Keller Jordan et al., Muon (2024); Dao-AILab/gram-newton-schulz (2026) for "gram";
      Boissin et al., arXiv 2512.04632, for "aol". `optaxplus.numerics.newton_schulz`
      has the formulas.
    """
    iteration = newton_schulz(
        "polar_factor",
        ns_steps=ns_steps,
        ns_coeffs=ns_coeffs,
        method=method,
        normalization=normalization,
        compute_dtype=compute_dtype,
        eps=eps,
    )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"polar_factor: x of dtype {x.dtype} is not allowed; it must be real "
            "floating point."
        )
    if x.ndim < 2:
        raise ValueError(
            f"polar_factor: x of shape {x.shape} is not allowed; it must have at "
            "least two axes, the last two forming the matrix."
        )
    (result,) = left_to_compiler(lambda x: tuple(polar_factors([x], iteration)), x)
    return result


def polar_factors(
    matrices: Sequence[jax.Array], iteration: NewtonSchulz
) -> list[jax.Array]:
    """`polar_factor` of each array, each shape compiled once.

    Args:
      matrices: Arrays of shape (..., m, n), real floating point.
      iteration: What `newton_schulz` returns.

    Returns:
      As many arrays of the same shapes, in the dtype of the accumulator.

    Raises:
      ValueError: If the products are to be in float64 and JAX has none.
    """
    if iteration.dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "Newton-Schulz: compute_dtype='float64' is not allowed while JAX has no "
            "float64; call jax.config.update('jax_enable_x64', True) first."
        )
    results = [x.astype(iteration.accumulator) for x in matrices]
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, x in enumerate(matrices):
        if x.size:
            groups.setdefault(tuple(sorted(x.shape[-2:])), []).append(index)
    for members in groups.values():
        factors = _factors_of_one_shape(iteration, *(matrices[i] for i in members))
        for index, factor in zip(members, factors, strict=True):
            results[index] = factor.astype(iteration.accumulator)
    return results


# Compiled by itself so that a call outside of `jax.jit` compiles only once.
@partial(jax.jit, static_argnums=0, inline=True)
def _factors_of_one_shape(
    iteration: NewtonSchulz, *matrices: jax.Array
) -> list[jax.Array]:
    return _factors_of_operands(iteration, *(_operand(x, iteration) for x in matrices))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _factors_of_operands(
    iteration: NewtonSchulz, *operands: jax.Array
) -> list[jax.Array]:
    in_turn = not any(_is_sharded(x) for x in operands)
    return lax.platform_dependent(
        *operands,
        cpu=partial(_in_turn if in_turn else _at_once, iteration),
        default=partial(_at_once, iteration),
    )


@_factors_of_operands.defjvp
def _(iteration: NewtonSchulz, operands: Any, tangents: Any) -> Any:
    # Moving bits has no derivative, and a loop over stacks a costly one.
    return jax.jvp(partial(_at_once, iteration), operands, tangents)


def _operand(x: jax.Array, iteration: NewtonSchulz) -> jax.Array:
    """X in the dtype of the products."""
    if iteration.dtype == jnp.float16:
        # Its range is that of no gradient; bfloat16 has the range of float32.
        x = x.astype(iteration.accumulator) * power_of_two(largest_entry(x))
    return x.astype(iteration.dtype)


def _is_sharded(x: jax.Array) -> bool:
    """Whether the type of `x` says so, as it does under an explicit mesh."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def _is_tall(x: jax.Array) -> bool:
    return x.shape[-2] > x.shape[-1]


def _at_once(iteration: NewtonSchulz, *matrices: jax.Array) -> list[jax.Array]:
    """All matrices as one batch, or a few large ones."""
    wide = [x.mT if _is_tall(x) else x for x in matrices]
    if len(wide) == 1 and wide[0].size <= _BATCH:
        factors = iterate(wide, iteration, rolled=True)
    else:
        stacks = [x.reshape(-1, *x.shape[-2:]) for x in wide]
        ends = np.cumsum([len(x) for x in stacks])[:-1]
        stack = _in_batches(concatenated(stacks), iteration)
        factors = jnp.split(stack, ends.tolist())
        factors = [y.reshape(x.shape) for x, y in zip(wide, factors, strict=True)]
    return [y.mT if _is_tall(x) else y for x, y in zip(matrices, factors, strict=True)]


def _in_batches(stack: jax.Array, iteration: NewtonSchulz) -> jax.Array:
    """The factors of a stack, in a loop if it is large, for the memory of one turn."""

    def factors(some: jax.Array) -> jax.Array:
        return iterate([some], iteration, rolled=True)[0]

    turns = min(len(stack), -(-stack.size // _BATCH))
    if turns == 1:
        return factors(stack)
    count = -(-len(stack) // turns)
    missing = turns * count - len(stack)
    padded = jnp.pad(stack, [(0, missing), (0, 0), (0, 0)])
    batches = padded.reshape(turns, count, *stack.shape[1:])

    def turn(index: Any, batches: jax.Array) -> jax.Array:
        batch = lax.dynamic_index_in_dim(batches, index, keepdims=False)
        return lax.dynamic_update_index_in_dim(batches, factors(batch), index, 0)

    results = lax.fori_loop(0, turns, turn, batches)
    return results.reshape(padded.shape)[: len(stack)]


def concatenated(stacks: list[jax.Array]) -> jax.Array:
    """One stack of all, put together a few at a time.

    The TPU compiler takes twice as long for one concatenation of 48 arrays into which
    it fuses what they are computed from.
    """
    while len(stacks) > 1:
        stacks = lax.optimization_barrier(stacks)
        starts = range(0, len(stacks), _CONCATENATED)
        stacks = [jnp.concatenate(stacks[i : i + _CONCATENATED]) for i in starts]
    return stacks[0]


def _in_turn(iteration: NewtonSchulz, *matrices: jax.Array) -> list[jax.Array]:
    """Two matrices at a time, in a loop over two stacks that it overwrites."""
    short, long = sorted(matrices[0].shape[-2:])
    rows = [_to_bits(x).reshape(-1, short * long) for x in matrices]
    counts = [len(x) for x in rows]
    tall = np.repeat([_is_tall(x) for x in matrices], counts)
    turns, left = divmod(len(tall), 2)
    # Each lane has a stack of its own. If they shared one, XLA would copy it in every
    # turn: it cannot tell that one lane does not read what the other writes.
    starts = (0, turns + left)
    lanes = tuple(_regrouped(rows, (turns + left, turns)))

    def advanced(lane: jax.Array, turn: Any, start: int) -> jax.Array:
        row = lax.dynamic_index_in_dim(lane, turn, keepdims=False)
        is_tall = jnp.asarray(tall)[start + turn]
        factor = _factor_of_row(row, is_tall, (short, long), iteration)
        return lax.dynamic_update_index_in_dim(lane, factor, turn, 0)

    def both(turn: jax.Array, lanes: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(map(advanced, lanes, (turn, turn), starts))

    if turns:
        lanes = lax.fori_loop(0, turns, both, lanes)
    if left:
        lanes = (advanced(lanes[0], turns, 0), lanes[1])
    return [
        _from_bits(y, iteration.dtype).reshape(x.shape)
        for x, y in zip(matrices, _regrouped(lanes, counts), strict=True)
    ]


def _regrouped(arrays: Sequence[jax.Array], lengths: Sequence[int]) -> list[jax.Array]:
    """The rows of all arrays, in their order, in arrays of other lengths."""
    firsts = np.cumsum([0, *map(len, arrays)]).tolist()
    stops = np.cumsum(lengths).tolist()
    return [
        jnp.concatenate(
            [
                x[max(stop - length - first, 0) : max(stop - first, 0)]
                for first, x in zip(firsts, arrays, strict=False)
            ]
        )
        for length, stop in zip(lengths, stops, strict=True)
    ]


def _factor_of_row(
    row: jax.Array, is_tall: jax.Array, shape: tuple[int, int], iteration: NewtonSchulz
) -> jax.Array:
    """The polar factor of a flat matrix, of shape (short, long) unless it is tall.

    It goes through the iteration in panels, blocks of columns about as wide as they are
    high, whose Gram matrices are faster to form than that of the whole.
    """
    short, long = shape
    width = _panel_width(short, long)
    panels = lax.cond(
        is_tall,
        lambda: in_rows(row.reshape(-1, width, short).transpose(0, 2, 1)),
        lambda: in_rows(row.reshape(short, -1, width).transpose(1, 0, 2)),
    )
    panels = _from_bits(panels, iteration.dtype)
    panels = _to_bits(jnp.stack(iterate(list(panels), iteration, rolled=False)))
    return lax.cond(
        is_tall,
        lambda: in_rows(panels.transpose(0, 2, 1)).reshape(-1),
        lambda: in_rows(panels.transpose(1, 0, 2)).reshape(-1),
    )


def _panel_width(short: int, long: int) -> int:
    """That of the whole for small matrices, else a divisor for at most four panels."""
    if short < _SMALL:
        return long
    least = max(short, -(-long // 4))
    return next(width for width in range(least, long + 1) if long % width == 0)


def in_rows(x: jax.Array) -> jax.Array:
    """x, row after row in memory."""
    # A layout makes a transposition a copy, by XLA's blocked transposition. Left to
    # itself, XLA folds it into the product, which is then five times slower.
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def turned(x: jax.Array) -> jax.Array:
    """Transposes (..., m, n), here and now."""
    # XLA would rather compute everything that it is made of and made into in the other
    # layout, in float32.
    return in_rows(in_rows(x).mT)


# XLA moves bfloat16 numbers on CPUs one by one, by way of float32, and 16-bit integers
# in vectors: the stack holds their bits.


def _bits_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype


def _to_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, _bits_dtype(x.dtype))


def _from_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(bits, dtype)
