"""Which device orthogonalizes what, and what that costs, before anything runs."""

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from optaxplus.custom_types import PyTree
from optaxplus.numerics.newton_schulz import newton_schulz
from optaxplus.optimizers.muon import muon
from optaxplus.partition.inference import decide
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.report.tables import format_bytes, format_table
from optaxplus.sharding.layouts import mesh_size
from optaxplus.sharding.orthogonalize import newton_schulz_work, plan_for
from optaxplus.sharding.placement import Placement, Where, placement_like, specs_of
from optaxplus.sharding.plan import Plan
from optaxplus.transforms.orthogonalized import orthogonalize_via_newton_schulz

__all__ = ["PlacementGroup", "PlacementPlan", "plan_placement"]


@dataclass(frozen=True)
class PlacementGroup:
    """Matrices of one shape that lie on the mesh in one way.

    Attributes:
      shape: (short side, long side) of a matrix; (rows, columns) of a fused one.
      count: How many there are.
      pieces: Mesh axes along which the pieces of one of them lie.
      copies: Mesh axes along which the same pieces are repeated.
      batch: Mesh axes along which other matrices of the same parameters lie.
      panels: Into how many panels each is cut, one for each device of a team.
      per_device: (number of devices, matrices or panels that each of them computes),
        the busiest first.
    """

    shape: tuple[int, int]
    count: int
    pieces: tuple[str, ...]
    copies: tuple[str, ...]
    batch: tuple[str, ...]
    panels: int
    per_device: tuple[tuple[int, int], ...]


@dataclass(frozen=True, repr=False)
class PlacementPlan:
    """What `plan_placement` found; `str()` is the table.

    Attributes:
      mesh: Sizes of the mesh axes.
      groups: What moves and is computed together.
      kinds: How many kinds of devices there are, each a branch of the program.
      flops: Floating-point operations of the busiest device in a step.
      even_flops: The same if the work could be shared out evenly.
      comm_bytes: Bytes that a device sends in a step, in rings.
      least_comm_bytes: The same without padding and without sums over panels.
    """

    mesh: dict[str, int]
    groups: tuple[PlacementGroup, ...]
    kinds: int
    flops: float
    even_flops: float
    comm_bytes: float
    least_comm_bytes: float

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        devices = int(np.prod(list(self.mesh.values())))
        axes = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        if not self.groups:
            return f"{_plural(devices, 'device')}: nothing to move."
        header = ("matrices", "pieces", "copies", "others", "panels", "on a device")
        rows = [
            (
                f"{group.count:,} x ({group.shape[0]}, {group.shape[1]})",
                *(
                    ", ".join(names) or "-"
                    for names in (group.pieces, group.copies, group.batch)
                ),
                str(group.panels),
                ", ".join(f"{each} on {count}" for count, each in group.per_device),
            )
            for group in self.groups
        ]
        return "\n".join(
            [
                format_table(header, rows),
                f"{devices} devices ({axes}), of {_plural(self.kinds, 'kind')}",
                f"arithmetic: {self.flops:.4g} flops on the busiest device, "
                f"{_ratio(self.flops, self.even_flops)} of an even share",
                f"moved: {format_bytes(self.comm_bytes)} from every device, "
                f"{_ratio(self.comm_bytes, self.least_comm_bytes)} of the least",
            ]
        )

    def __repr__(self) -> str:
        return str(self)


def plan_placement(
    params: PyTree,
    placement: Placement | None = None,
    *,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> PlacementPlan:
    """Says which devices orthogonalize which matrices, and what a step moves.

    The plan that `optaxplus.muon` and its relatives follow with their defaults, under
    an Explicit mesh or with `Placement.like(params)`; under an Auto mesh without one
    they guess how parameters lie, and the compiler moves what lies otherwise. Nothing
    is compiled.

    Args:
      params: Arrays, or `jax.ShapeDtypeStruct`s, of all parameters.
      placement: How they lie on a mesh; None reads it from their shardings.
      rules: What each parameter is, as in `optaxplus.muon`. Shown are the "hidden"
        matrices; `optaxplus.scion` places those of the role "other" too.

    Returns:
      A `PlacementPlan`: `str()` is the table, `groups` and `to_dict()` are the data.

    Raises:
      ValueError: If neither `params` nor `placement` says how the parameters lie, a
        spec does not fit its parameter, no rule decides a parameter, or a matrix needs
        more memory than a device has.

    Example:
      >>> import jax, optaxplus as ox
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.sharding.AbstractMesh((64,), ("fsdp",))
      >>> kernel = jax.ShapeDtypeStruct((2048, 8192), "float32")
      >>> params = {f"up_{i}": {"kernel": kernel} for i in range(96)}
      >>> plan = ox.plan_placement(params, ox.Placement(mesh, P("fsdp")))
      >>> print(plan)  # doctest: +NORMALIZE_WHITESPACE
      matrices           pieces  copies  others  panels  on a device
      -----------------  ------  ------  ------  ------  ----------------
      96 x (2048, 8192)  fsdp    -       -       1       2 on 32, 1 on 32
      64 devices (fsdp=64), of 2 kinds
      arithmetic: 1.203e+12 flops on the busiest device, 1.33 of an even share
      moved: 132.1 MB from every device, 1.33 of the least
    """
    name = "plan_placement"
    if placement is None:
        placement = placement_like(name, params)
    decisions = decide(name, params, rules)
    specs = specs_of(name, placement, params)
    hidden = [
        (decision, spec)
        for decision, spec in zip(decisions, specs, strict=True)
        if decision.role == "hidden"
    ]
    located = Where(placement.mesh, placement.mesh.axis_names, None)
    mesh = located.sizes
    if not mesh or not hidden:
        return PlacementPlan(mesh, (), 1, 0.0, 0.0, 0.0, 0.0)
    defaults = {
        key: parameter.default
        for function in (orthogonalize_via_newton_schulz, muon)
        for key, parameter in inspect.signature(function).parameters.items()
    }
    _, *arguments = inspect.signature(newton_schulz).parameters
    iteration = newton_schulz(name, **{key: defaults[key] for key in arguments})
    plan, _ = plan_for(
        name,
        [(decision.path, decision) for decision, _ in hidden],
        [decision.axes for decision, _ in hidden],
        [spec for _, spec in hidden],
        located,
        newton_schulz_work(iteration, placement.comm_dtype),
    )
    return PlacementPlan(
        mesh=mesh,
        groups=tuple(
            _group(plan, e, position)
            for e, exchange in enumerate(plan.exchanges)
            for position in range(len(exchange.layouts))
        ),
        kinds=len(plan.kinds),
        flops=plan.flops,
        even_flops=plan.mean_flops,
        comm_bytes=plan.bytes,
        least_comm_bytes=plan.least_bytes,
    )


def _group(plan: Plan, e: int, position: int) -> PlacementGroup:
    exchange = plan.exchanges[e]
    layout = exchange.layouts[position]
    shape = layout.shape(plan.mesh)
    computed = Counter(plan.kinds[kind][e][position] for kind in plan.kind_of.tolist())
    return PlacementGroup(
        shape=shape if layout.splits else (min(shape), max(shape)),
        count=exchange.counts[position] * mesh_size(plan.mesh, exchange.batch),
        pieces=exchange.axes,
        copies=exchange.copies,
        batch=exchange.batch,
        panels=exchange.panels[position],
        per_device=tuple(
            (computed[each], each) for each in sorted(computed, reverse=True)
        ),
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _ratio(value: float, least: float) -> str:
    return f"{value / least:.2f}" if least else "1.00"
