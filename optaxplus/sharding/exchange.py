"""Whole matrices on each device: pieces there, the work, results back.

    pieces of all matrices ── all-to-all ──> whole matrices of their owner
    whole matrices ── the work, each kind of device by a branch of its own ──> results
    results ── all-to-all ──> pieces of all results (── all-gather ──> on all copies)

Rows and columns arrive in whatever order the mesh gives them: the work must not mind,
and what is taken apart goes back the same way. Everything here runs on each device, on
its own part of the arrays.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxplus.numerics.matrix_axes import (
    MatrixAxes,
    from_matrices,
    split_columns,
    to_matrices,
)
from optaxplus.numerics.polar import concatenated, turned
from optaxplus.sharding.chunks import (
    chunk_of_matrices,
    from_chunks,
    matrices_of_chunk,
    to_chunks,
)
from optaxplus.sharding.copies import all_shares, share_of_copy
from optaxplus.sharding.layouts import Block, Layout
from optaxplus.sharding.plan import Exchange, Plan, Work

__all__ = ["exchanged"]

Matrices = list[jax.Array]


def exchanged(
    work: Work,
    arrays: Sequence[jax.Array],
    axes: Sequence[MatrixAxes],
    blocks: Sequence[Sequence[Block]],
    plan: Plan,
) -> list[jax.Array]:
    """Does the work on whole matrices, each on its owner.

    Args:
      work: What is done.
      arrays: A device's parts of the parameters.
      axes: Their matrix axes, non-negative.
      blocks: For each of them, what `lay_out` says.
      plan: Who owns what.

    Returns:
      A device's parts of the results, in the dtype of `arrays`.
    """
    pieces = [
        _pieces(x, a, own) for x, a, own in zip(arrays, axes, blocks, strict=True)
    ]
    results = _on_owners(work, _by_layout(pieces, blocks, plan), plan)
    parts = _unstacked(results, pieces, blocks)
    return [
        _from_pieces(own, a, x, part)
        for own, a, x, part in zip(blocks, axes, arrays, parts, strict=True)
    ]


def _pieces(x: jax.Array, axes: MatrixAxes, blocks: Sequence[Block]) -> Matrices:
    """(count, *piece) for each block of a parameter."""
    matrices = to_matrices(x, axes)
    splits = axes.splits if len(blocks) > 1 else ()
    *batch, rows, columns = matrices.shape
    parts = split_columns(matrices.reshape(math.prod(batch), rows, columns), splits)
    return [
        turned(part) if block.is_turned else part
        for block, part in zip(blocks, parts, strict=True)
    ]


def _from_pieces(
    blocks: Sequence[Block], axes: MatrixAxes, like: jax.Array, pieces: Matrices
) -> jax.Array:
    parts = [
        turned(piece) if block.is_turned else piece
        for block, piece in zip(blocks, pieces, strict=True)
    ]
    return from_matrices(jnp.concatenate(parts, axis=-1), axes, like.shape)


def _by_layout(
    pieces: Sequence[Matrices], blocks: Sequence[Sequence[Block]], plan: Plan
) -> dict[Layout, Matrices]:
    """The pieces (count, *piece) of each layout, in the order of the blocks."""
    members: dict[Layout, Matrices] = {
        layout: [] for exchange in plan.exchanges for layout in exchange.layouts
    }
    for parts, own in zip(pieces, blocks, strict=True):
        for part, block in zip(parts, own, strict=True):
            if part.size:
                members[block.layout].append(part)
    return members


def _unstacked(
    stacks: dict[Layout, jax.Array],
    pieces: Sequence[Matrices],
    blocks: Sequence[Sequence[Block]],
) -> list[Matrices]:
    starts = dict.fromkeys(stacks, 0)
    results = []
    for parts, own in zip(pieces, blocks, strict=True):
        results.append([])
        for part, block in zip(parts, own, strict=True):
            if part.size:
                start = starts[block.layout]
                starts[block.layout] = start + block.count
                part = stacks[block.layout][start : start + block.count]
            results[-1].append(part)
    return results


def _on_owners(
    work: Work, pieces: dict[Layout, Matrices], plan: Plan
) -> dict[Layout, jax.Array]:
    """One stack of results for each layout."""
    received = [
        _all_to_all(
            _sent([pieces[layout] for layout in exchange.layouts], exchange),
            exchange.axes,
        )
        for exchange in plan.exchanges
    ]
    panels = _on_teams(work, received, plan)
    computed = _switch(
        tuple(plan.mesh),
        plan.kind_of,
        [partial(_compute, work, kind, plan) for kind in range(len(plan.kinds))],
        received,
        panels,
    )
    results = {}
    for x, exchange in zip(computed, plan.exchanges, strict=True):
        stacks = _received(_all_to_all(x, exchange.axes), exchange)
        results.update(zip(exchange.layouts, stacks, strict=True))
    return results


def _switch(
    axes: tuple[str, ...],
    table: np.ndarray,
    branches: Sequence[Callable],
    *operands: Any,
) -> Any:
    """Calls the branch that `table` has for the device's place on `axes`."""
    if len(branches) == 1:
        return branches[0](*operands)
    index = jnp.asarray(table)[lax.axis_index(axes)]
    return lax.switch(index, branches, *operands)


def _all_to_all(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Row i goes to the i-th device; row i of the result came from it."""
    if not axes:
        return x
    # Without the barrier XLA moves what precedes it, in float32, to the other side.
    x = lax.optimization_barrier(x)
    return lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)


def _sent(pieces: Sequence[Matrices], exchange: Exchange) -> jax.Array:
    """Shape (owners, rows, width): for each owner the pieces of what it owns.

    Copies share the work out among themselves first: each sends its share alone.
    """
    if exchange.copies:
        stacks = [
            share_of_copy(parts, sizes, exchange.copies)
            for parts, sizes in zip(pieces, exchange.shares.T, strict=True)
        ]
    else:
        stacks = [concatenated(parts) for parts in pieces]

    def sent(owned: np.ndarray, stacks: Matrices) -> jax.Array:
        return to_chunks(stacks, exchange, owned)

    return _by_copy(sent, exchange, stacks)


def _received(x: jax.Array, exchange: Exchange) -> Matrices:
    """A stack of all matrices of each layout; the way back."""
    largest = exchange.shares.max(axis=0).tolist()

    def received(owned: np.ndarray, x: jax.Array) -> Matrices:
        return [
            jnp.pad(stack, [(0, size - len(stack)), (0, 0), (0, 0)])
            for stack, size in zip(
                from_chunks(x, exchange, owned), largest, strict=True
            )
        ]

    stacks = _by_copy(received, exchange, x)
    if not exchange.copies:
        return stacks
    return [
        all_shares(stack, sizes, exchange.copies)
        for stack, sizes in zip(stacks, exchange.shares.T, strict=True)
    ]


def _by_copy(function: Callable, exchange: Exchange, operand: Any) -> Any:
    """function(what the owners of this copy own, operand)."""
    copies, *shape = exchange.owned.shape
    rows, of_copy = np.unique(
        exchange.owned.reshape(copies, -1), axis=0, return_inverse=True
    )
    branches = [partial(function, row.reshape(shape)) for row in rows]
    return _switch(exchange.copies, of_copy.reshape(-1), branches, operand)


# What an owner does.


def _compute(
    work: Work, kind: int, plan: Plan, received: Matrices, panels: Matrices
) -> Matrices:
    """The results of one kind of device, as they are sent back."""
    have = [
        matrices_of_chunk(x, exchange, counts)
        for x, exchange, counts in zip(
            received, plan.exchanges, plan.kinds[kind], strict=True
        )
    ]
    finished = dict(zip(plan.cut, panels, strict=True))
    whole = [
        x
        for e, exchange in enumerate(have)
        for position, arrays in enumerate(exchange)
        if (e, position) not in finished
        for x in arrays
    ]
    computed = iter(work.function(whole))
    results = [
        [
            [finished[e, position][: len(x)] for x in arrays]
            if (e, position) in finished
            else [next(computed) for _ in arrays]
            for position, arrays in enumerate(exchange)
        ]
        for e, exchange in enumerate(have)
    ]
    return [
        chunk_of_matrices(matrices, exchange, x.dtype)
        for matrices, exchange, x in zip(results, plan.exchanges, received, strict=True)
    ]


def _on_teams(work: Work, received: Matrices, plan: Plan) -> Matrices:
    """The results of everything that is cut into panels, on whoever has some.

    What the members of a team add up is added up by all devices at the same place of
    the program; those without a panel wait with zeros.
    """
    if work.panels is None or not plan.cut:
        return []
    steps = [
        work.panels.steps(*plan.exchanges[e].layouts[position].shape(plan.mesh))
        for e, position in plan.cut
    ]
    state = _switched(_panels, plan, received)
    totals: list[jax.Array | None] = [None] * len(plan.cut)
    for number in range(max(map(len, steps))):
        due = [
            functions[number] if number < len(functions) else None
            for functions in steps
        ]
        state, partials = _switched(partial(_step, due), plan, state, totals)
        totals = [
            None
            if x is None
            else lax.psum(
                x, tuple(plan.mesh), axis_index_groups=plan.teams(e, position)
            )
            for x, (e, position) in zip(partials, plan.cut, strict=True)
        ]
    return state


def _switched(function: Callable, plan: Plan, *operands: Any) -> Any:
    """function(kind, plan, ...) of each device's kind."""
    branches = [partial(function, kind, plan) for kind in range(len(plan.kinds))]
    return _switch(tuple(plan.mesh), plan.kind_of, branches, *operands)


def _panels(kind: int, plan: Plan, received: Matrices) -> Matrices:
    """The panels of one kind of device, padded to the most that any has."""
    panels = []
    for e, position in plan.cut:
        exchange = plan.exchanges[e]
        counts = plan.kinds[kind][e]
        x = received[e]
        have = matrices_of_chunk(x, exchange, counts)[position]
        none = jnp.zeros((0, *exchange.panel_shape(position)), x.dtype)
        stack = have[0] if have else none
        missing = plan.most(e, position) - len(stack)
        panels.append(jnp.pad(stack, [(0, missing), (0, 0), (0, 0)]))
    return panels


def _step(
    due: Sequence[Callable | None],
    kind: int,
    plan: Plan,
    state: Matrices,
    totals: Sequence[jax.Array | None],
) -> tuple[Matrices, list[jax.Array | None]]:
    """The next step of everything that one kind of device has panels of."""
    panels, partials = [], []
    for function, (e, position), x, total in zip(
        due, plan.cut, state, totals, strict=True
    ):
        if function is None:
            panels.append(x)
            partials.append(None)
        elif plan.kinds[kind][e][position]:
            x, to_add = function(x, total)
            panels.append(x)
            partials.append(to_add)
        else:
            # It has none: zeros, of what the others make of theirs.
            like, to_add = jax.eval_shape(function, x, total)
            panels.append(jnp.zeros(like.shape, like.dtype))
            partials.append(
                None if to_add is None else jnp.zeros(to_add.shape, to_add.dtype)
            )
    return panels, partials
