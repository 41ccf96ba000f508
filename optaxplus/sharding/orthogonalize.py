"""Polar factors of matrices that are spread over a mesh."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from optaxplus import trees
from optaxplus.custom_types import DTypeName, PyTree
from optaxplus.numerics.matrix_axes import MatrixAxes, resolve_axes
from optaxplus.numerics.newton_schulz import (
    NewtonSchulz,
    Step,
    bytes_of_sums,
    multiplications,
    steps_of_panels,
)
from optaxplus.numerics.polar import polar_factors, turned
from optaxplus.sharding.alike import lying_as
from optaxplus.sharding.exchange import exchanged
from optaxplus.sharding.layouts import (
    Block,
    guessed_specs,
    lay_out,
    layout_counts,
)
from optaxplus.sharding.placement import Where, device_memory
from optaxplus.sharding.plan import Panels, Plan, Work, make_plan, panels_that_fit

__all__ = ["newton_schulz_work", "plan_for", "polar_factors_on_mesh"]


def newton_schulz_work(
    iteration: NewtonSchulz, comm_dtype: DTypeName | None = None
) -> Work:
    """The iteration as work on matrices that are moved in `comm_dtype`."""
    # Gradients are outside of the range of float16.
    narrow = jnp.float32 if iteration.dtype == jnp.float16 else iteration.dtype
    dtype = jnp.dtype(comm_dtype or narrow)

    def flops(rows: int, columns: int, panels: int) -> float:
        short, long = sorted((rows, columns))
        blocks = iteration.blocks(short, long)
        return 2.0 * multiplications(blocks, short, long // panels)

    def memory(rows: int, columns: int, panels: int) -> float:
        # The panel as it came and as it goes, its product and three Gram matrices.
        short, long = sorted((rows, columns))
        moved, wide = dtype.itemsize, iteration.accumulator.itemsize
        return short * long / panels * (2 * moved + wide) + 3 * short**2 * wide

    def sums(rows: int, columns: int, panels: int) -> float:
        # In a ring of the team.
        short, long = sorted((rows, columns))
        return bytes_of_sums(iteration, short, long) * 2 * (panels - 1) / panels

    def function(matrices: list[jax.Array]) -> list[jax.Array]:
        return [y.astype(dtype) for y in polar_factors(matrices, iteration)]

    def steps(rows: int, columns: int) -> list[Step]:
        short, long = sorted((rows, columns))
        first, *others, last = steps_of_panels(iteration, short, long)
        # Panels are wide for the iteration, whatever they are for the others.
        wide = turned if rows > columns else lambda x: x
        return [
            lambda x, total: first(wide(x), total),
            *others,
            lambda x, total: (wide(last(x, total)[0].astype(dtype)), None),
        ]

    return Work(flops, memory, dtype, function, Panels(sums, steps))


def polar_factors_on_mesh(
    function: str,
    tree: PyTree,
    axes: Sequence[MatrixAxes],
    iteration: NewtonSchulz,
    where: Where,
    params: PyTree | None,
) -> list[jax.Array]:
    """The polar factor of every matrix of every leaf, each computed once.

    Args:
      function: Name of the caller, for messages.
      tree: Real floating-point arrays.
      axes: The matrix axes of its leaves.
      iteration: What `newton_schulz` returns.
      where: How the leaves lie on a mesh.
      params: Parameters that lie as the leaves do, if there are any.

    Returns:
      Arrays of the shapes and shardings of the leaves, in the accumulator's dtype.

    Raises:
      ValueError: If a matrix needs more memory than a device has.
    """
    leaves = jax.tree.leaves(tree)
    axes = [resolve_axes(a, x.shape) for a, x in zip(axes, leaves, strict=True)]
    work = newton_schulz_work(iteration, where.comm_dtype)
    # Each behind a barrier of its own: what is sliced and moved is narrow already.
    narrow = [lax.optimization_barrier(x.astype(work.dtype)) for x in leaves]
    specs = where.specs
    given = jax.tree.leaves(params) if specs is None else []
    narrow = _as_given(narrow, given)
    if specs is None:
        # The compiler brings them to where they are guessed to be, and back.
        specs = tuple(guessed_specs([x.shape for x in leaves], axes, where.sizes))
    plan, blocks = plan_for(
        function, trees.leaves_with_paths(tree), axes, specs, where, work
    )
    if not plan.exchanges:
        return [x.astype(iteration.accumulator) for x in leaves]
    results = jax.shard_map(
        lambda *parts: tuple(exchanged(work, parts, axes, blocks, plan)),
        mesh=where.mesh,
        in_specs=specs,
        out_specs=specs,
        axis_names=set(where.axes),
        check_vma=False,
    )(*narrow)
    results = _as_given([lax.optimization_barrier(y) for y in results], given)
    return [y.astype(iteration.accumulator) for y in results]


def _as_given(arrays: list[jax.Array], given: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays, which the compiler is to shard as it shards those that are given.

    Left to itself it would compute also what comes before and after where the guess
    says, and move that, in float32, instead.
    """
    if not given:
        return arrays
    return [
        lax.optimization_barrier(lying_as(x, like))
        for x, like in zip(arrays, given, strict=True)
    ]


def plan_for(
    function: str,
    leaves: Sequence[tuple[str, Any]],
    axes: Sequence[MatrixAxes],
    specs: Sequence[PartitionSpec],
    where: Where,
    work: Work,
) -> tuple[Plan, list[list[Block]]]:
    """Who computes what, and how the matrices of each of the (path, array) lie."""
    capacity, mesh = device_memory(where.mesh), where.sizes
    blocks, fewest_panels = [], {}
    for (path, leaf), leaf_axes, spec in zip(leaves, axes, specs, strict=True):
        blocks.append(lay_out(leaf.shape, leaf_axes, spec, mesh))
        for block in blocks[-1]:
            panels = panels_that_fit(block.layout, mesh, work, capacity)
            if panels is not None:
                fewest_panels[block.layout] = panels
                continue
            rows, columns = block.layout.shape(mesh)
            needed = work.memory(rows, columns, 1)
            raise ValueError(
                f"{function}: parameter {path!r} of shape {leaf.shape} is not allowed; "
                f"to orthogonalize its matrices of shape ({rows}, {columns}) takes "
                f"{needed / 1e9:.1f} GB on one device, which has "
                f"{capacity / 1e9:.1f} GB, and they cannot be cut into panels that "
                "fit. Give it to another optimizer, or name smaller matrices by `axes`."
            )
    counts = layout_counts(list(chain(*blocks)))
    return make_plan(counts, mesh, work, fewest_panels), blocks
