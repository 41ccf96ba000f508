"""Who computes what: matrices shared out over the devices of a mesh, evenly by cost.

No arrays here: the plan is made from shapes and shardings when a program is traced.

A matrix lies in pieces on the devices along the mesh axes that shard its rows and
columns, is repeated along the mesh axes that shard nothing of it, and other matrices of
the same parameter lie along the mesh axes that shard its batch. An `Exchange` takes
everything that is sharded over the same mesh axes: one all-to-all over those of the
pieces brings whole matrices to their owners, one brings the results back, and one
all-gather repeats them.

Owners are chosen as in longest-processing-time-first scheduling: the costliest matrix
first, each to the device that has least to do. Where there are fewer matrices than
devices, a matrix can be cut along its long side into panels for a team of neighbours,
which add up their Gram matrices; it is worth its bytes for large matrices alone. The
team is of devices that have pieces of it: what every device has whole is not cut.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from optaxplus.sharding.copies import sent_for_all_shares
from optaxplus.sharding.layouts import Layout, mesh_size

__all__ = ["Exchange", "Panels", "Plan", "Work", "make_plan", "panels_that_fit"]

# What a second is worth when flops are weighed against bytes: about a TPU v5e, at 60 %
# of its bfloat16 peak, the links of one ring, and what a collective takes at least.
_FLOPS_PER_SECOND = 1.2e14
_BYTES_PER_SECOND = 9e10
_SECONDS_OF_COLLECTIVE = 1e-5

# Columns that a TPU moves together.
_LANES = 128

# Matrices are cut into more panels only if the step gains this share of its time.
_WORTH_CUTTING = 0.1


@dataclass(frozen=True)
class Panels:
    """How the work is done where a matrix is cut into panels along its long side.

    Attributes:
      sums: (rows, columns, number of panels) -> bytes that each member of the team
        sends to add up what the panels need from each other.
      steps: (rows, columns) of the whole matrix -> functions that do the work on
        panels, one after the other: each maps panels and the sum over the team of what
        the one before wanted summed (None for the first) to panels and what is to be
        summed (None from the last). The first gets, and the last gives, panels (count,
        rows, part of the columns), of matrices with more rows than columns (count, part
        of the rows, columns).
    """

    sums: Callable[[int, int, int], float]
    steps: Callable[[int, int], list[Callable[[Any, Any], tuple[Any, Any]]]]


@dataclass(frozen=True)
class Work:
    """What is done to the matrices.

    Attributes:
      flops: (rows, columns, number of panels) -> floating-point operations of each
        member of the team for one matrix.
      memory: (rows, columns, number of panels) -> bytes that each member of the team
        needs for one matrix.
      dtype: What matrices are moved in.
      function: Maps arrays (count, rows, columns) to as many of the same shapes and
        dtypes.
      panels: How it is done on panels; None if matrices cannot be cut.
    """

    flops: Callable[[int, int, int], float]
    memory: Callable[[int, int, int], float]
    dtype: np.dtype
    function: Callable[[list[Any]], list[Any]]
    panels: Panels | None = None


@dataclass(frozen=True, eq=False)
class Exchange:
    """Matrices whose pieces lie along the same mesh axes, and who owns them.

    Attributes:
      mesh: Sizes of the mesh axes, in their order.
      axes: The mesh axes of the all-to-all, in that order.
      copies: The mesh axes along which the pieces are repeated.
      batch: The mesh axes along which other matrices lie.
      layouts: The layouts.
      counts: How many matrices of each layout a device has a piece of.
      panels: Into how many panels a matrix of each layout is cut.
      owned: Shape (copies, devices of the all-to-all, layouts): how many matrices, or
        panels, of each layout each of them computes.
    """

    mesh: dict[str, int]
    axes: tuple[str, ...]
    copies: tuple[str, ...]
    batch: tuple[str, ...]
    layouts: tuple[Layout, ...]
    counts: tuple[int, ...]
    panels: tuple[int, ...]
    owned: np.ndarray

    def cut_side(self, position: int) -> int:
        """0 if matrices of a layout are cut into panels of rows, 1 if of columns."""
        return self.layouts[position].long_side(self.mesh)

    def panel_shape(self, position: int) -> tuple[int, int]:
        """Shape of a panel of a matrix of a layout; of the matrix if it is not cut."""
        return self._panel(position, self.layouts[position].shape(self.mesh))

    @cached_property
    def pieces(self) -> list[tuple[int, int]]:
        """Shape of one device's piece of a panel of each layout."""
        return [
            self._panel(position, layout.piece)
            for position, layout in enumerate(self.layouts)
        ]

    def _panel(self, position: int, shape: tuple[int, int]) -> tuple[int, int]:
        rows, columns = shape
        panels = self.panels[position]
        if self.cut_side(position) == 0:
            return rows // panels, columns
        return rows, columns // panels

    @cached_property
    def width(self) -> int:
        """Columns of what is sent; wider pieces are cut, narrower ones padded."""
        # TPUs keep columns in lanes of 128: narrower arrays take as much memory, and
        # what is not cut between lanes has to be moved entry by entry.
        candidates = {
            width
            for _, columns in self.pieces
            for width in _divisors(columns)
            if width >= _LANES or width == columns
        }
        return min(candidates, key=lambda width: (self._chunk(width) * width, -width))

    def rows(self, width: int) -> list[int]:
        """Rows that a piece of a panel of each layout takes, if they are so wide."""
        return [rows * -(-columns // width) for rows, columns in self.pieces]

    @cached_property
    def chunk(self) -> int:
        """Rows that every device sends to every owner, padding included."""
        return self._chunk(self.width)

    def _chunk(self, width: int) -> int:
        return int((self.owned @ np.asarray(self.rows(width))).max())

    @property
    def shares(self) -> np.ndarray:
        """Shape (copies, layouts): matrices that each copy takes care of."""
        return self.owned.sum(axis=1) // np.asarray(self.panels)


@dataclass(frozen=True)
class Plan:
    """Exchanges, and what is left to do on each device.

    Attributes:
      mesh: Sizes of the mesh axes, in their order.
      exchanges: What moves together.
      kinds: For each kind of device, how many matrices or panels of each layout of each
        exchange it computes.
      kind_of: The kind of each device, in the order of the mesh.
      flops: Floating-point operations of the busiest device.
      mean_flops: The same if the work could be shared out to the last bit, uncut.
      bytes: Bytes that a device sends in rings.
      least_bytes: The same without padding and sums over panels.
      sums: How often panels are summed.
    """

    mesh: dict[str, int]
    exchanges: tuple[Exchange, ...]
    kinds: tuple[tuple[tuple[int, ...], ...], ...]
    kind_of: np.ndarray
    flops: float
    mean_flops: float
    bytes: float
    least_bytes: float
    sums: int

    @property
    def cut(self) -> list[tuple[int, int]]:
        """(exchange, layout) of everything that is cut into panels, by position."""
        return [
            (e, position)
            for e, exchange in enumerate(self.exchanges)
            for position, panels in enumerate(exchange.panels)
            if panels > 1
        ]

    def most(self, e: int, position: int) -> int:
        """The most panels of one layout that a device has."""
        return max(kind[e][position] for kind in self.kinds)

    def teams(self, e: int, position: int) -> list[list[int]]:
        """The devices that may have panels of one matrix, for all of the mesh."""
        exchange = self.exchanges[e]
        order = _Roles(exchange.batch, exchange.copies, exchange.axes).order(self.mesh)
        devices = np.arange(len(self.kind_of)).reshape(tuple(self.mesh.values()))
        return devices.transpose(order).reshape(-1, exchange.panels[position]).tolist()

    @property
    def seconds(self) -> float:
        """A guess at the time of a step, for comparing plans."""
        return (
            self.flops / _FLOPS_PER_SECOND
            + self.bytes / _BYTES_PER_SECOND
            + self.sums * _SECONDS_OF_COLLECTIVE
        )


def make_plan(
    counts: Mapping[Layout, int],
    mesh: Mapping[str, int],
    work: Work,
    fewest_panels: Mapping[Layout, int] = MappingProxyType({}),
) -> Plan:
    """Shares out matrices over a mesh.

    Args:
      counts: How many matrices of each layout a device has a piece of.
      mesh: Sizes of the mesh axes, in their order.
      work: What is done to them.
      fewest_panels: Into how many panels matrices have to be cut, see
        `panels_that_fit`; those that are not named need not be.

    Returns:
      The plan that takes the least time by the model of this module.
    """
    cuts = {layout: fewest_panels.get(layout, 1) for layout in counts}
    best = _plan(counts, mesh, work, cuts)
    while work.panels is not None:
        trials = [
            (_plan(counts, mesh, work, trial), trial)
            for trial in _finer(cuts, counts, mesh)
        ]
        if not trials:
            break
        plan, trial = min(trials, key=lambda t: t[0].seconds)
        if plan.seconds > (1 - _WORTH_CUTTING) * best.seconds:
            break
        best, cuts = plan, trial
    return best


def panels_that_fit(
    layout: Layout, mesh: Mapping[str, int], work: Work, capacity: float
) -> int | None:
    """The fewest panels that fit into the memory of a device; None if none do."""
    shape = layout.shape(mesh)
    numbers = [1] if work.panels is None else _panel_numbers(layout, mesh)
    return next((n for n in numbers if work.memory(*shape, n) <= capacity), None)


def _panel_numbers(layout: Layout, mesh: Mapping[str, int]) -> list[int]:
    """All that divide the long side, and the devices that have pieces."""
    if layout.splits:
        return [1]
    side = layout.piece[layout.long_side(mesh)]
    return [n for n in _divisors(mesh_size(mesh, layout.axes)) if side % n == 0]


def _finer(
    cuts: dict[Layout, int], counts: Mapping[Layout, int], mesh: Mapping[str, int]
) -> Iterator[dict[Layout, int]]:
    """Cuts with more panels of one layout, or of all with matrices of one shape.

    Those of one shape alone make a step no shorter than the others of that shape do.
    """
    numbers = {
        layout: {
            panels
            for panels in _panel_numbers(layout, mesh)
            if counts[layout] * panels <= mesh_size(mesh, set(mesh) - {*layout.batch})
        }
        for layout in counts
    }
    by_shape: dict[tuple[int, ...], list[Layout]] = {}
    for layout in counts:
        shape = layout.shape(mesh)
        by_shape.setdefault((min(shape), max(shape)), []).append(layout)
    groups = [[layout] for layout in counts]
    groups += [layouts for layouts in by_shape.values() if len(layouts) > 1]
    for layouts in groups:
        for panels in sorted(set.intersection(*(numbers[x] for x in layouts))):
            if all(panels > cuts[layout] for layout in layouts):
                yield cuts | {layout: panels for layout in layouts}


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _plan(
    counts: Mapping[Layout, int],
    mesh: Mapping[str, int],
    work: Work,
    cuts: Mapping[Layout, int],
) -> Plan:
    """The plan with these numbers of panels."""
    sizes = dict(mesh)
    costs = {
        layout: work.flops(*layout.shape(sizes), cuts[layout]) for layout in counts
    }
    loads = np.zeros(tuple(sizes.values()))
    # Panels first: a team has to be free as a whole.
    order = sorted(counts, key=lambda x: (cuts[x], costs[x]), reverse=True)
    owned = {
        layout: _shared_out(
            layout, counts[layout], cuts[layout], costs[layout], loads, sizes
        )
        for layout in order
    }
    exchanges = _exchanges(counts, cuts, owned, sizes)
    per_device = [_per_device(exchange) for exchange in exchanges]
    devices = list(zip(*map(_as_tuples, per_device), strict=True))
    kinds = tuple(dict.fromkeys(devices))
    uncut = sum(
        count * work.flops(*layout.shape(sizes), 1) * mesh_size(sizes, layout.batch)
        for layout, count in counts.items()
    )
    return Plan(
        mesh=sizes,
        exchanges=tuple(exchanges),
        kinds=kinds,
        kind_of=np.array([kinds.index(row) for row in devices], np.int32),
        flops=float(loads.max(initial=0.0)),
        mean_flops=uncut / loads.size,
        bytes=sum(_bytes(exchange, work) for exchange in exchanges),
        least_bytes=sum(_least_bytes(exchange, work) for exchange in exchanges),
        sums=sum(
            len(work.panels.steps(*layout.shape(sizes))) - 1
            for layout, panels in cuts.items()
            if panels > 1 and work.panels is not None
        ),
    )


class _Roles(NamedTuple):
    """What the mesh axes are to a layout, each in the order of the mesh."""

    batch: tuple[str, ...]
    copies: tuple[str, ...]
    axes: tuple[str, ...]

    def order(self, mesh: Mapping[str, int]) -> list[int]:
        """The axes of an array of all devices, as batch, copies and pieces."""
        names = list(mesh)
        return [names.index(axis) for axis in (*self.batch, *self.copies, *self.axes)]


def _roles(layout: Layout, mesh: Mapping[str, int]) -> _Roles:
    pieces, batch = layout.axes, set(layout.batch)
    return _Roles(
        batch=tuple(axis for axis in mesh if axis in batch),
        copies=tuple(axis for axis in mesh if axis not in pieces | batch),
        axes=tuple(axis for axis in mesh if axis in pieces),
    )


def _shared_out(
    layout: Layout,
    count: int,
    panels: int,
    cost: float,
    loads: np.ndarray,
    mesh: Mapping[str, int],
) -> np.ndarray:
    """Gives every matrix of one layout to those who have least to do.

    Args:
      layout: Of the matrices.
      count: How many of them a device has a piece of.
      panels: Into how many panels each is cut.
      cost: What a panel costs.
      loads: Shape of the mesh: what each device has to do; it is added to.
      mesh: Sizes of the mesh axes.

    Returns:
      Shape (copies, devices of the all-to-all): how many each of them has.
    """
    roles = _roles(layout, mesh)
    order = roles.order(mesh)
    shape = mesh_size(mesh, roles.copies), mesh_size(mesh, roles.axes)
    by_owner = loads.transpose(order).reshape(-1, *shape)
    teams = by_owner.max(axis=0).reshape(-1, panels).max(axis=1)
    owned = np.zeros(len(teams), int)
    for _ in range(count):
        team = int(teams.argmin())
        teams[team] += cost
        owned[team] += 1
    members = np.repeat(owned, panels).reshape(shape)
    moved = by_owner + cost * members
    sizes = [loads.shape[axis] for axis in order]
    loads[...] = moved.reshape(sizes).transpose(np.argsort(order))
    return members


def _exchanges(
    counts: Mapping[Layout, int],
    cuts: Mapping[Layout, int],
    owned: Mapping[Layout, np.ndarray],
    mesh: dict[str, int],
) -> list[Exchange]:
    """One for all layouts to which the mesh axes are the same."""
    together: dict[_Roles, list[Layout]] = {}
    for layout in counts:
        together.setdefault(_roles(layout, mesh), []).append(layout)
    return [
        Exchange(
            mesh=mesh,
            axes=roles.axes,
            copies=roles.copies,
            batch=roles.batch,
            layouts=tuple(layouts),
            counts=tuple(counts[layout] for layout in layouts),
            panels=tuple(cuts[layout] for layout in layouts),
            owned=np.stack([owned[layout] for layout in layouts], axis=2),
        )
        for roles, layouts in together.items()
    ]


def _per_device(exchange: Exchange) -> np.ndarray:
    """Shape (devices, layouts): what each device of the mesh owns."""
    mesh = exchange.mesh
    order = _Roles(exchange.batch, exchange.copies, exchange.axes).order(mesh)
    copies, owners, layouts = exchange.owned.shape
    everywhere = np.broadcast_to(
        exchange.owned, (mesh_size(mesh, exchange.batch), copies, owners, layouts)
    )
    sizes = np.asarray(tuple(mesh.values()))[order]
    back = [*np.argsort(order), len(order)]
    return everywhere.reshape(*sizes, layouts).transpose(back).reshape(-1, layouts)


def _as_tuples(rows: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in rows.tolist()]


def _bytes(exchange: Exchange, work: Work) -> float:
    """What a device sends: there, back, to its copies, and sums over panels."""
    owners = exchange.owned.shape[1]
    pieces = [math.prod(layout.piece) for layout in exchange.layouts]
    there = exchange.chunk * exchange.width * (owners - 1)
    gathered = [sent_for_all_shares(sizes) for sizes in exchange.shares.T]
    moved = (2 * there + np.asarray(gathered) @ pieces) * work.dtype.itemsize
    busiest = exchange.owned.reshape(-1, len(pieces)).max(axis=0)
    for layout, panels, count in zip(
        exchange.layouts, exchange.panels, busiest, strict=True
    ):
        if panels > 1 and work.panels is not None:
            moved += count * work.panels.sums(*layout.shape(exchange.mesh), panels)
    return float(moved)


def _least_bytes(exchange: Exchange, work: Work) -> float:
    copies, owners, _ = exchange.owned.shape
    pieces = [math.prod(layout.piece) for layout in exchange.layouts]
    held = np.asarray(exchange.counts) @ np.asarray(pieces)
    moved = 2 * held / (copies * owners) * (owners - 1)
    return float((moved + held / copies * (copies - 1)) * work.dtype.itemsize)
