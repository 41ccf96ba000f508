"""Orthogonalized updates: every matrix replaced by its polar factor.

    O_t = U·Vᵀ of the singular value decomposition of the momentum     (Newton-Schulz)
    u_t = s(fan_in, fan_out) · O_t

Scales s by name (`shape_scale`):

    match_adamw   0.2·sqrt(max(fan_in, fan_out))     update RMS 0.2, about AdamW's
    keller        sqrt(max(1, fan_out / fan_in))     Keller Jordan's Muon
    spectral      sqrt(fan_out / fan_in)             unit spectral norm in the sense of
                                                     Bernstein; Dion's Muon, Scion

Sources: Keller Jordan et al., Muon (2024); Liu et al., Muon is scalable for LLM
training (Moonlight), arXiv 2502.16982, section 2.2; Bernstein and Newhouse, arXiv
2409.20325.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, PyTree
from optaxplus.numerics.matrix_axes import (
    MatrixAxes,
    map_all_matrices,
    scale_matrices,
)
from optaxplus.numerics.newton_schulz import NewtonSchulz, newton_schulz
from optaxplus.numerics.polar import polar_factors
from optaxplus.partition.inference import axes_of
from optaxplus.sharding.orthogonalize import polar_factors_on_mesh
from optaxplus.sharding.placement import (
    Placement,
    check_placement,
    check_specs,
    where,
)

__all__ = [
    "SHAPE_SCALES",
    "matrix_axes_of",
    "orthogonalize",
    "orthogonalize_via_newton_schulz",
    "scale_by_matrix_shape",
]

# (fan_in, fan_out) -> factor
SHAPE_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_adamw": lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),
    "keller": lambda fan_in, fan_out: math.sqrt(max(1.0, fan_out / fan_in)),
    "spectral": lambda fan_in, fan_out: math.sqrt(fan_out / fan_in),
}


def matrix_axes_of(function: str, axes: Axes, tree: PyTree) -> PyTree:
    """`axes_of`, where a vector is an error: it has no polar factor to speak of."""
    resolved = axes_of(function, axes, tree)
    for (path, leaf), leaf_axes in zip(
        trees.leaves_with_paths(tree),
        jax.tree.leaves(resolved, is_leaf=lambda node: isinstance(node, MatrixAxes)),
        strict=True,
    ):
        if not leaf_axes.is_matrix:
            raise ValueError(
                f"{function}: parameter {path!r} of shape {leaf.shape} is not allowed; "
                "it is a vector. Give it the role 'vector' in muon's rules, mask "
                "it away, or pass axes that make it a matrix."
            )
    return resolved


def orthogonalize_via_newton_schulz(
    *,
    ns_steps: int = 5,
    ns_coeffs: str | Sequence[Sequence[float]] = "gram_newton_schulz",
    method: str = "auto",
    normalization: str = "schatten",
    compute_dtype: str = "bfloat16",
    eps: float = 1e-7,
    axes: Axes = None,
    placement: Placement | str | None = "auto",
) -> optax.GradientTransformation:
    """Replaces every matrix by an approximation of its polar factor U·Vᵀ.

    All singular values become about 1, so the update moves every direction in which
    the gradient has any component by the same amount. In a stack every layer (expert,
    head) is orthogonalized on its own. Matrices of one shape, wherever they are in the
    tree, share one compiled iteration; on a mesh every device takes whole matrices.

    Args:
      ns_steps: Number of Newton-Schulz steps, >= 1. Static.
      ns_coeffs: Name of a table in `optaxplus.numerics.COEFFICIENT_TABLES`
        ("gram_newton_schulz", "polar_express", "polar_express_paper", "jordan", "you",
        "cans", "turbo", "aol", "cubic5", "cubic", "deepseek"), or `ns_steps` rows
        (a, b, c). Static.
      method: "standard", "gram" or "auto", whichever multiplies less. Static.
      normalization: "schatten", "frobenius" (what most implementations do) or "aol".
        Static.
      compute_dtype: Dtype of the operands of the matrix products: "bfloat16",
        "float16", "float32" or "float64". Sums, the norm and the coefficients are
        float32 (float64 for "float64"). Static.
      eps: Relative margin added to the norm that normalises a matrix. >= 0. Static.
      axes: Matrix axes, see `optaxplus.custom_types`.
      placement: Which device does the work, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation without state; emits float32. The scale of the gradient does
      not matter; zeros stay zeros; a matrix with a NaN or infinity becomes NaN.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If the table is unknown or has not `ns_steps` steps, another argument
        is out of range, axes or specs do not fit, or a parameter is a vector.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(ox.scale_by_ema(0.95), ox.orthogonalize_via_newton_schulz())
      >>> state = tx.init({"w": jnp.ones((4, 8))})

    References:
      Keller Jordan et al., Muon (2024); see `optaxplus.numerics.polar_factor`.
    """
    name = "orthogonalize_via_newton_schulz"
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

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating(name, params, real=True)
        matrix_axes_of(name, axes, params)
        check_specs(name, placement, params)
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        wide = jax.tree.map(trees.widen, updates)
        resolved = matrix_axes_of(name, axes, updates)
        result = orthogonalize(name, wide, resolved, iteration, placement, params)
        return result, state

    return optax.GradientTransformation(init_fn, update_fn)


def orthogonalize(
    function: str,
    tree: PyTree,
    axes: PyTree,
    iteration: NewtonSchulz,
    placement: Placement | str | None,
    params: PyTree | None,
) -> PyTree:
    """The polar factors of all matrices of a tree, in the dtypes of its leaves.

    `params` may tell the compiler how the tree lies, where nothing else does.
    """
    leaves, structure = jax.tree.flatten(tree)
    resolved = jax.tree.leaves(axes)
    mesh = where(function, placement, tree)
    if mesh is None:
        factors = map_all_matrices(
            lambda blocks: polar_factors(blocks, iteration), leaves, resolved
        )
    else:
        factors = polar_factors_on_mesh(
            function, tree, resolved, iteration, mesh, params
        )
    cast = [y.astype(x.dtype) for x, y in zip(leaves, factors, strict=True)]
    return jax.tree.unflatten(structure, cast)


def scale_by_matrix_shape(
    shape_scale: str = "match_adamw", *, axes: Axes = None
) -> optax.GradientTransformation:
    """Multiplies every matrix by a factor that depends on its shape alone.

    Args:
      shape_scale: "match_adamw": 0.2·sqrt(max(fan_in, fan_out)); "keller": sqrt(max(1,
        fan_out / fan_in)); "spectral": sqrt(fan_out / fan_in). Static.
      axes: Matrix axes, see `optaxplus.custom_types`. Each split counts as a matrix.

    Returns:
      A transformation without state; emits float32.

    Raises:
      TypeError: If a parameter is not floating point.
      ValueError: If the scale is unknown, axes do not fit, or a parameter is a vector.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> tx = ox.scale_by_matrix_shape("keller")
      >>> grads = {"kernel": jnp.ones((4, 16))}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["kernel"][0, 0])
      2.0

    References:
      Keller Jordan et al., Muon (2024); Liu et al., arXiv 2502.16982, section 2.2;
      Bernstein and Newhouse, arXiv 2409.20325.
    """
    name = "scale_by_matrix_shape"
    validation.check_choice(name, "shape_scale", shape_scale, SHAPE_SCALES)
    factor = SHAPE_SCALES[shape_scale]

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating(name, params)
        matrix_axes_of(name, axes, params)
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        del params

        def leaf(u: jax.Array, leaf_axes: MatrixAxes) -> jax.Array:
            return scale_matrices(trees.widen(u), leaf_axes, factor)

        return jax.tree.map(leaf, updates, matrix_axes_of(name, axes, updates)), state

    return optax.GradientTransformation(init_fn, update_fn)
