"""Steepest directions: the farthest point of a norm's unit ball along a gradient.

    U(B) = argmax ⟨B, U⟩ over ‖U‖ <= 1,  ⟨B, U(B)⟩ = ‖B‖*, the dual norm

of matrices with fan_in = m inputs and fan_out = n outputs; b_i is what reads input i, a
row of (fan_in, fan_out), and b^j what makes output j, a column:

    norm         the ball                            U(B)
    spectral     largest singular value <= √(n/m)    √(n/m) · polar factor
    sign         entries <= 1/m                      sign(B) / m
    per_input    RMS of each b_i <= 1/m              b_i / (m · RMS(b_i))
    per_output   length of each b^j <= 1/√m          b^j / (√m · ‖b^j‖)
    rms          RMS of all entries <= 1             B / RMS(B)

In the balls of the first four an input of RMS 1 gives outputs of size at most 1: their
RMS ("spectral", "per_input") or each of them ("sign", "per_output"). An input that is
one-hot, as that of an embedding, has length 1 and not √m: m counts as 1, and each
token's vector has RMS at most 1 ("spectral", "per_input") or entries at most 1.

The authors' matrices are (fan_out, fan_in). In their code "per_input" is `ColNorm`,
"per_output" is `RowNorm`, "rms" is `BiasRMS`, and `one_hot` is `normalized=False`, the
default of `ColNorm` alone; `transpose=True` says that a table is (tokens, features), as
it always is here. Their oracle is an argmin, -U.

Source: Pethick et al., Training deep learning models with norm-constrained LMOs, arXiv
2502.07529, and the authors' code (LIONS-EPFL/scion). Differs from the latter: nothing
is added to denominators, so the direction does not depend on the gradient's scale; a
convolution counts its window in fan_in, which divides by √(window size), where their
`SpectralConv` divides by the window size.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, PyTree, Scalar
from optaxplus.numerics.matrix_axes import MatrixAxes, reduce_blocks, scale_matrices
from optaxplus.numerics.newton_schulz import newton_schulz
from optaxplus.numerics.norms import mean_square, or_one
from optaxplus.partition.inference import axes_of
from optaxplus.sharding.placement import Placement, check_placement, check_specs
from optaxplus.transforms.orthogonalized import orthogonalize

__all__ = ["NORMS", "scale_by_norm_lmo"]

NORMS = ("spectral", "sign", "per_input", "per_output", "rms")
_NORMS_OF_MATRICES = ("spectral", "per_input", "per_output")


def _with_unit_rms(x: jax.Array, axes: MatrixAxes) -> jax.Array:
    """Each matrix or vector over its root mean square."""

    def rms(block: jax.Array, over: tuple[int, ...]) -> jax.Array:
        # Squares of 1e-30 and 1e30 are no numbers; those of the ratios are.
        largest = jnp.max(jnp.abs(block), axis=over, keepdims=True, initial=0.0)
        largest = or_one(largest)
        return largest * jnp.sqrt(mean_square(block / largest, over))

    return x / or_one(reduce_blocks(rms, x, axes))


def _direction(
    b: jax.Array, axes: MatrixAxes, *, norm: str, radius: Scalar, one_hot: bool
) -> jax.Array:
    """U(B) of one leaf times the radius; for "spectral" b is the polar factor."""
    rows = max(1, math.prod(b.shape[axis] for axis in axes.fan_in))
    fan_in = 1 if one_hot else rows
    if norm == "spectral":
        return scale_matrices(
            b, axes, lambda _, columns: radius * math.sqrt(columns / fan_in)
        )
    if norm == "sign":
        return jnp.sign(b) * (radius / fan_in)
    if norm == "per_input":
        vectors = MatrixAxes((), axes.fan_out, axes.splits)
        return _with_unit_rms(b, vectors) * (radius / fan_in)
    if norm == "per_output":
        # The length of a vector is its RMS times the root of its size.
        vectors = MatrixAxes((), axes.fan_in)
        return _with_unit_rms(b, vectors) * (radius / math.sqrt(rows * fan_in))
    return _with_unit_rms(b, axes) * radius


def scale_by_norm_lmo(
    norm: str = "spectral",
    *,
    radius: Scalar = 1.0,
    one_hot: bool = False,
    ns_steps: int = 5,
    ns_coeffs: str | Sequence[Sequence[float]] = "gram_newton_schulz",
    method: str = "auto",
    normalization: str = "schatten",
    compute_dtype: str = "bfloat16",
    eps: float = 1e-7,
    axes: Axes = None,
    placement: Placement | str | None = "auto",
) -> optax.GradientTransformation:
    """Replaces every matrix by the point of a norm ball that lies farthest along it.

    The linear minimization oracle (LMO) of the ball, with the sign of a direction to
    descend along: `optax.chain(ox.scale_by_ema(0.9), ox.scale_by_norm_lmo("sign"),
    ox.descend(1e-3, 1.0))` moves the parameters a part of the way to the point of the
    ball that lies farthest against the average gradient, and so never out of the ball.
    `optaxplus.scion` chooses a norm by the role of a parameter.

    Args:
      norm: "spectral", "sign", "per_input", "per_output" or "rms"; the module docstring
        has the formulas and the authors' names. Static.
      radius: Factor on the direction, the radius of the ball. > 0.
      one_hot: Whether the inputs of the matrices are one-hot, as those of an embedding
        (tokens, features) are, so that fan_in counts as 1 in the formulas; "rms" does
        not look at it. Static.
      ns_steps: Newton-Schulz steps of "spectral", >= 1. Static.
      ns_coeffs: Name of a table in `optaxplus.numerics.COEFFICIENT_TABLES` or
        `ns_steps` rows (a, b, c), as in `orthogonalize_via_newton_schulz`. Static.
      method: "standard", "gram" or "auto", whichever multiplies less. Static.
      normalization: "schatten", "frobenius" or "aol". Static.
      compute_dtype: Dtype of the operands of the matrix products. Static.
      eps: Relative margin added to the norm that normalises a matrix before the
        Newton-Schulz iteration. >= 0. Static.
      axes: Matrix axes, see `optaxplus.custom_types`. A vector has one input, which
        is always 1, so "sign" divides it by 1; "rms" takes a whole matrix as one
        block. Each split counts as a matrix.
      placement: Which device does the work of "spectral", see
        `optaxplus.custom_types`. Static.

    Returns:
      A transformation without state; emits float32. The scale of the gradient does not
      matter, for Frobenius norms from 1e-30 to 1e36. What the norm divides, a matrix,
      a row, a column or an entry, stays zero where it is zero, and becomes NaN where it
      has a NaN or an infinity; "sign" gives an infinity its sign.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point,
        or complex under "spectral".
      ValueError: If an argument is out of range, axes do not fit, or a parameter is a
        vector under "spectral", "per_input" or "per_output".

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> gradient = {"head": jnp.array([[4.0, -2.0], [0.0, 1.0]])}
      >>> tx = ox.scale_by_norm_lmo("sign", radius=10.0)
      >>> updates, _ = tx.update(gradient, tx.init(gradient))
      >>> print(updates["head"])
      [[ 5. -5.]
       [ 0.  5.]]

    References:
      Pethick et al., arXiv 2502.07529; LIONS-EPFL/scion.
    """
    name = "scale_by_norm_lmo"
    validation.check_choice(name, "norm", norm, NORMS)
    validation.check_positive(name, radius=radius)
    validation.check_flag(name, one_hot=one_hot)
    iteration = newton_schulz(
        name,
        ns_steps=ns_steps,
        ns_coeffs=ns_coeffs,
        method=method,
        normalization=normalization,
        compute_dtype=compute_dtype,
        eps=eps,
    )
    check_placement(name, placement)

    def resolved_axes(tree: PyTree) -> PyTree:
        resolved = axes_of(name, axes, tree)
        if norm in _NORMS_OF_MATRICES:
            _refuse_vectors(name, norm, tree, resolved)
        return resolved

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating(name, params, real=norm == "spectral")
        resolved_axes(params)
        if norm == "spectral":
            check_specs(name, placement, params)
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        leaf_axes = resolved_axes(updates)
        wide = jax.tree.map(trees.widen, updates)
        if norm == "spectral":
            wide = orthogonalize(name, wide, leaf_axes, iteration, placement, params)

        def leaf(b: jax.Array, b_axes: MatrixAxes) -> jax.Array:
            factor = trees.scalar_for(radius, b)
            return _direction(b, b_axes, norm=norm, radius=factor, one_hot=one_hot)

        return jax.tree.map(leaf, wide, leaf_axes), state

    return optax.GradientTransformation(init_fn, update_fn)


def _refuse_vectors(function: str, norm: str, tree: PyTree, axes: PyTree) -> None:
    for (path, leaf), leaf_axes in zip(
        trees.leaves_with_paths(tree), jax.tree.leaves(axes), strict=True
    ):
        if not leaf_axes.is_matrix:
            raise ValueError(
                f"{function}: parameter {path!r} of shape {leaf.shape} is not allowed; "
                f"it is a vector, and {norm!r} is a norm of matrices. Take 'rms' or "
                "'sign' for it, mask it away, or pass axes that make it a matrix."
            )
