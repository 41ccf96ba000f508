"""Polar factors of matrices that are spread over a mesh."""

from collections.abc import Sequence
from itertools import chain

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from optaxplus.custom_types import DTypeName
from optaxplus.numerics.matrix_axes import MatrixAxes, resolve_axes
from optaxplus.numerics.newton_schulz import (
    NewtonSchulz,
    Step,
    bytes_of_sums,
    multiplications,
    steps_of_panels,
)
from optaxplus.numerics.polar import polar_factors
from optaxplus.sharding.exchange import exchanged
from optaxplus.sharding.layouts import (
    Block,
    guessed_spec,
    lay_out,
    layout_counts,
)
from optaxplus.sharding.placement import Where
from optaxplus.sharding.plan import Panels, Plan, Work, make_plan

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

    def sums(rows: int, columns: int, panels: int) -> float:
        # In a ring of the team.
        return bytes_of_sums(iteration, rows, columns) * 2 * (panels - 1) / panels

    def function(matrices: list[jax.Array]) -> list[jax.Array]:
        return [y.astype(dtype) for y in polar_factors(matrices, iteration)]

    def steps(rows: int, columns: int) -> list[Step]:
        *others, last = steps_of_panels(iteration, rows, columns)
        return [*others, lambda x, total: (last(x, total)[0].astype(dtype), None)]

    return Work(flops, dtype, function, Panels(sums, steps))


def polar_factors_on_mesh(
    leaves: Sequence[jax.Array],
    axes: Sequence[MatrixAxes],
    iteration: NewtonSchulz,
    where: Where,
) -> list[jax.Array]:
    """The polar factor of every matrix of every leaf, each computed once.

    Args:
      leaves: Real floating-point arrays.
      axes: Their matrix axes.
      iteration: What `newton_schulz` returns.
      where: How the leaves lie on a mesh.

    Returns:
      Arrays of the shapes and shardings of `leaves`, in the accumulator's dtype.
    """
    axes = [resolve_axes(a, x.shape) for a, x in zip(axes, leaves, strict=True)]
    work = newton_schulz_work(iteration, where.comm_dtype)
    # Each behind a barrier of its own: what is sliced and moved is narrow already.
    narrow = [lax.optimization_barrier(x.astype(work.dtype)) for x in leaves]
    specs = where.specs
    if specs is None:
        # The compiler brings them to where they are guessed to be, and back.
        specs = tuple(
            guessed_spec(x.shape, a, where.axes)
            for x, a in zip(leaves, axes, strict=True)
        )
    plan, blocks = plan_for([x.shape for x in leaves], axes, specs, where.axes, work)
    results = jax.shard_map(
        lambda *parts: tuple(exchanged(work, parts, axes, blocks, plan)),
        mesh=where.mesh,
        in_specs=specs,
        out_specs=specs,
        axis_names=set(where.axes),
        check_vma=False,
    )(*narrow)
    return [lax.optimization_barrier(y).astype(iteration.accumulator) for y in results]


def plan_for(
    shapes: Sequence[tuple[int, ...]],
    axes: Sequence[MatrixAxes],
    specs: Sequence[PartitionSpec],
    mesh: dict[str, int],
    work: Work,
) -> tuple[Plan, list[list[Block]]]:
    """Who computes what, and how the matrices of each parameter lie."""
    blocks = [
        lay_out(shape, a, spec, mesh)
        for shape, a, spec in zip(shapes, axes, specs, strict=True)
    ]
    return make_plan(layout_counts(list(chain(*blocks))), mesh, work), blocks
