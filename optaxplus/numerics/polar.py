"""Polar factors of many matrices: one compiled iteration for each canonical shape.

A network has dozens of weight matrices and a handful of shapes. All matrices of one
shape, transposes included, whatever parameter and whatever place in a stack they come
from, go through the same code, so a deeper network has no more products to compile.

How they go through it depends on the machine. GPUs and TPUs take them as one batch.
CPUs reach their bfloat16 matrix units only with plain two-dimensional products, keep
in their caches what a single matrix needs, and waste a part of every product on
handing it to all cores; there a loop takes two matrices at a time, each by products of
its own that can run beside those of the other.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from optaxplus.numerics.newton_schulz import (
    NewtonSchulz,
    iterate,
    newton_schulz,
    power_of_two,
)

__all__ = ["polar_factor", "polar_factors"]

# Matrices that the loop on CPUs works on at a time. Measured on two cores, bfloat16:
# one takes up to 1.8 times as long, four are no faster.
_LANES = 2


def polar_factor(
    x: jax.Array,
    *,
    ns_steps: int = 5,
    ns_coeffs: str | Sequence[Sequence[float]] = "polar_express",
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
        rounding errors ("gram_newton_schulz", or a safety of 0.05 on all rows) and is
        refused, or not chosen, for others. Static.
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
      whose entries are normal float32 numbers (largest entry 1e-34 to 1e37), up to
      rounding. A zero matrix gives zeros; one with a NaN or an infinity gives NaN
      throughout; singular values of 0 (rank deficiency) stay 0. A single row or
      column is normalised to a length inside the table's band.

    Raises:
      TypeError: If `x` is not real floating point, or an argument has a wrong type.
      ValueError: If `x` has fewer than two axes, an argument is out of range, or the
        Gram form is asked for where rounding would break it.

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
    (result,) = polar_factors([x], iteration)
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
    """
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
    operands = [_operand(x, iteration) for x in matrices]
    in_turn = not any(_is_sharded(x) for x in operands)
    return lax.platform_dependent(
        *operands,
        cpu=partial(_in_turn if in_turn else _at_once, iteration),
        default=partial(_at_once, iteration),
    )


def _operand(x: jax.Array, iteration: NewtonSchulz) -> jax.Array:
    """X in the dtype of the products."""
    if iteration.dtype == jnp.float16:
        # Its range is that of no gradient; bfloat16 has the range of float32.
        x = x.astype(iteration.accumulator) * power_of_two(x)
    return x.astype(iteration.dtype)


def _is_sharded(x: jax.Array) -> bool:
    """Whether the type of `x` says so, as it does under an explicit mesh."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def _is_tall(x: jax.Array) -> bool:
    return x.shape[-2] > x.shape[-1]


def _at_once(iteration: NewtonSchulz, *matrices: jax.Array) -> list[jax.Array]:
    """All matrices as one batch."""
    wide = [x.mT if _is_tall(x) else x for x in matrices]
    if len(wide) == 1:
        factors = [iterate(wide[0], iteration)]
    else:
        flat = [x.reshape(-1, *x.shape[-2:]) for x in wide]
        ends = np.cumsum([len(x) for x in flat])[:-1]
        factors = jnp.split(iterate(jnp.concatenate(flat), iteration), ends.tolist())
        factors = [y.reshape(x.shape) for x, y in zip(wide, factors, strict=True)]
    return [y.mT if _is_tall(x) else y for x, y in zip(matrices, factors, strict=True)]


def _in_turn(iteration: NewtonSchulz, *matrices: jax.Array) -> list[jax.Array]:
    """A few matrices at a time, in a loop over a stack that it overwrites."""
    short, long = sorted(matrices[0].shape[-2:])
    rows = [x.reshape(-1, short * long) for x in matrices]
    ends = np.cumsum([len(x) for x in rows])
    tall = np.repeat([_is_tall(x) for x in matrices], [len(x) for x in rows])
    stack = jnp.zeros((ends[-1], short * long), _bits_dtype(iteration.dtype))
    for end, row in zip(ends, rows, strict=True):
        start = (int(end) - len(row), 0)
        stack = lax.dynamic_update_slice(stack, _to_bits(row), start)

    def factor(row: jax.Array, is_tall: jax.Array) -> jax.Array:
        x = _from_bits(turned(row, is_tall, (long, short)), iteration.dtype)
        y = iterate(x.reshape(short, long), iteration)
        return turned(_to_bits(y.reshape(-1)), is_tall, (short, long))

    def turned(row: jax.Array, is_tall: jax.Array, shape: tuple[int, int]) -> jax.Array:
        if not tall.any():
            return row
        return lax.cond(is_tall, partial(_transposed, shape), lambda row: row, row)

    def take(start: Any, count: int, stack: jax.Array) -> jax.Array:
        indices = [start + lane for lane in range(count)]
        factors = [
            factor(
                lax.dynamic_index_in_dim(stack, index, keepdims=False),
                jnp.asarray(tall)[index],
            )
            for index in indices
        ]
        for index, row in zip(indices, factors, strict=True):
            stack = lax.dynamic_update_index_in_dim(stack, row, index, 0)
        return stack

    rounds, left = divmod(len(stack), _LANES)
    if rounds:
        stack = lax.fori_loop(
            0, rounds, lambda turn, stack: take(turn * _LANES, _LANES, stack), stack
        )
    if left:
        stack = take(len(stack) - left, left, stack)
    return [
        _from_bits(y, iteration.dtype).reshape(x.shape)
        for x, y in zip(matrices, jnp.split(stack, ends[:-1].tolist()), strict=True)
    ]


def _transposed(shape: tuple[int, int], row: jax.Array) -> jax.Array:
    """A flat matrix of this shape, transposed, flat again."""
    # A layout makes it a copy, by XLA's blocked transposition. Left to itself, XLA
    # folds the transposition into the product, which is then five times slower.
    turned = with_layout_constraint(row.reshape(shape).T, Layout((0, 1)))
    return turned.reshape(-1)


# XLA moves bfloat16 numbers on CPUs one by one, by way of float32, and 16-bit integers
# in vectors: the stack holds their bits.


def _bits_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype


def _to_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, _bits_dtype(x.dtype))


def _from_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(bits, dtype)
