"""Work on whole matrices, of which eight devices have pieces: the same, moved once."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus.numerics.tiles import tile
from optaxplus.sharding.owners import Lies, lies, on_owners
from tests.assertions import assert_trees_equal
from tests.selection import mostly
from tests.sharding.meshes import is_placed, make_mesh, place

M = ox.MatrixAxes
LAST_TWO = M((-2,), (-1,))


class Leaf(NamedTuple):
    """Arrays (*batch, tiles, rows, columns)."""

    update: jax.Array
    mu: jax.Array
    factor_in: jax.Array | None  # (*batch, tiles, rows, rows)
    factor_out: jax.Array | None  # (*batch, tiles, columns, columns)
    diagonal: jax.Array | None  # (*batch, tiles, columns, 1)
    basis: jax.Array | None  # like factor_out: what is slow


SIDES = {"factor_in": 0, "factor_out": 1, "diagonal": 1, "basis": 1}
SLOW = frozenset({"basis"})


def work(
    leaves: Sequence[Leaf], *, is_due: jax.Array, copies: Any, scale: Any
) -> list[Leaf]:
    """Products of each matrix, elementwise operations, and some that are rare."""

    def one(leaf: Leaf) -> Leaf:
        update, mu, factor_in, factor_out, diagonal, basis = leaf
        mu = mu + scale * update
        if factor_in is not None:
            factor_in = factor_in + update @ update.mT
            update = factor_in @ update
        if factor_out is not None:
            factor_out = factor_out + mu.mT @ mu
        if diagonal is not None:
            diagonal = diagonal + jnp.sum(mu, axis=-2)[..., None]
            update = update * diagonal.mT
        if basis is not None:
            new = jnp.flip(factor_out, axis=-1) - basis
            basis = jnp.where(is_due, new, basis)
            update = update + mu @ basis
        return Leaf(update + mu, mu, factor_in, factor_out, diagonal, basis)

    del copies
    return [one(leaf) for leaf in leaves]


@dataclass(frozen=True)
class Layout:
    """Parameters, and how they lie on which mesh."""

    mesh: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    specs: dict[str, P]
    max_dim: int | None = None
    axes: dict[str, ox.MatrixAxes] = field(default_factory=dict)

    def places(self) -> dict[str, Lies]:
        sizes = {name: size for name, size in self.mesh.items() if size > 1}
        return {
            name: lies(
                tile(self.axes.get(name, LAST_TWO), shape, self.max_dim),
                self.specs[name],
                sizes,
            )
            for name, shape in self.shapes.items()
        }

    def lying(self) -> dict[str, Leaf]:
        """The spec of every array."""
        sizes = {name: size for name, size in self.mesh.items() if size > 1}

        def of(own: Lies) -> Leaf:
            n = own.tiling.size[1]
            widths = {"factor_in": own.tiling.size[0], "diagonal": 1}
            factors = {
                name: own.factor(side, widths.get(name, n), sizes)
                for name, side in SIDES.items()
            }
            return Leaf(own.matrices, own.matrices, **factors)

        return {name: of(own) for name, own in self.places().items()}

    def leaves(self, seed: int = 0) -> dict[str, Leaf]:
        """Small whole numbers, whose sums are exact in any order."""
        rng = np.random.default_rng(seed)

        def of(own: Lies) -> Leaf:
            m, n = own.tiling.size
            shapes = ((m, n), (m, n), (m, m), (n, n), (n, 1), (n, n))
            arrays = [
                rng.integers(-2, 3, (*own.tiling.batch, *shape)).astype("float32")
                for shape in shapes
            ]
            return Leaf(*map(jnp.asarray, arrays))

        return {name: of(own) for name, own in self.places().items()}


def run_on(layout: Layout, mesh: Any, axes: tuple[str, ...], work: Any = work) -> Any:
    """A function of (leaves, is_due, scale) on the mesh."""
    places, lying = layout.places(), layout.lying()
    names = list(layout.shapes)

    def function(leaves: dict[str, Leaf], is_due: Any, scale: Any) -> dict[str, Leaf]:
        results = on_owners(
            work,
            [leaves[name] for name in names],
            [
                Leaf(*(None if x is None else s for x, s in zip(*pair, strict=True)))
                for pair in ((leaves[name], lying[name]) for name in names)
            ],
            [places[name] for name in names],
            mesh,
            axes=axes,
            slow=SLOW,
            is_due=is_due,
            scale=scale,
        )
        return dict(zip(names, results, strict=True))

    return function


def fast(function: Any) -> Any:
    """Compiled in a hurry: it runs a few times."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options)


SHAPES = {"stack": (3, 16, 8), "up": (8, 16), "square": (8, 8), "other": (8, 8)}
FSDP = {
    "stack": P(None, "fsdp"),
    "up": P(None, "fsdp"),
    "square": P("fsdp"),
    "other": P(None, "fsdp"),
}
BOTH = {"fsdp": 4, "tensor": 2}
LAYOUTS = {
    "fsdp": Layout({"fsdp": 8}, SHAPES, FSDP),
    "many": Layout(
        {"fsdp": 8},
        {f"w{i}": (8, 8) for i in range(11)},
        {f"w{i}": P("fsdp") for i in range(11)},
    ),
    "fsdp x tensor": Layout(
        BOTH,
        {**SHAPES, "row": (16, 8), "column": (8, 16), "turned": (8, 8)},
        {
            "stack": P(None, "fsdp", "tensor"),
            "up": P("fsdp", "tensor"),
            "square": P("tensor", "fsdp"),
            "other": P("fsdp"),
            "row": P(("fsdp", "tensor")),
            "column": P(None, ("tensor", "fsdp")),
            "turned": P(("tensor", "fsdp")),
        },
    ),
    "tensor x fsdp": Layout(
        {"tensor": 2, "fsdp": 4},
        SHAPES,
        {
            "stack": P(None, "fsdp", "tensor"),
            "up": P("fsdp", "tensor"),
            "square": P("tensor", "fsdp"),
            "other": P(("fsdp", "tensor")),
        },
    ),
    "fsdp x data": Layout({"fsdp": 4, "data": 2}, SHAPES, FSDP),
    "data x fsdp": Layout({"data": 2, "fsdp": 4}, SHAPES, FSDP),
    "replicated": Layout({"data": 8}, SHAPES, dict.fromkeys(SHAPES, P())),
    "some replicated": Layout(
        BOTH,
        SHAPES,
        {"stack": P(None, "fsdp"), "up": P(), "square": P("tensor"), "other": P()},
    ),
    "resident": Layout(
        {"fsdp": 8},
        {"stack": (16, 8, 8), "one": (8, 8), "deep": (8, 2, 8, 16)},
        {"stack": P(None, "fsdp"), "one": P("fsdp"), "deep": P(None, None, "fsdp")},
    ),
    "resident on both": Layout(
        BOTH,
        {"stack": (8, 8, 8), "few": (4, 8, 8), "rows": (4, 8, 8)},
        {
            "stack": P(None, "fsdp", "tensor"),
            "few": P(None, "fsdp", "tensor"),
            "rows": P(None, "fsdp"),
        },
    ),
    "experts": Layout(
        {"expert": 2, "fsdp": 4},
        {"experts": (4, 8, 16), "resident": (8, 8, 16), "dense": (8, 16)},
        {"experts": P("expert", "fsdp"), "resident": P("expert", "fsdp"), "dense": P()},
    ),
    "whole matrices": Layout(
        {"layer": 4, "fsdp": 2},
        {"w": (4, 8, 8), "z": (3, 4, 8, 8)},
        {"w": P("layer"), "z": P(None, "layer")},
    ),
    "tiles": Layout(
        BOTH,
        {"a": (16, 8), "b": (8, 24), "c": (2, 8, 8)},
        {"a": P("fsdp", "tensor"), "b": P("tensor", "fsdp"), "c": P(None, "fsdp")},
        max_dim=8,
    ),
    "odd sides": Layout(
        BOTH,
        {"a": (12, 6), "b": (4, 2), "c": (3, 5, 4)},
        {
            "a": P("fsdp", "tensor"),
            "b": P("tensor", "fsdp"),
            "c": P(None, None, "fsdp"),
        },
    ),
    "heads": Layout(
        BOTH,
        {"query": (16, 2, 4), "out": (2, 4, 16), "vector": (16,)},
        {"query": P("fsdp", "tensor"), "out": P("tensor", None, "fsdp"), "vector": P()},
        axes={
            "query": M((0,), (1, 2)),
            "out": M((0, 1), (2,)),
            "vector": M((), (0,)),
        },
    ),
}
DEFAULT = ("tensor x fsdp", "replicated", "resident on both")


@pytest.mark.parametrize("kind", mostly(["explicit"], ["explicit", "auto"]))
@pytest.mark.parametrize("name", mostly(DEFAULT, LAYOUTS))
def test_eight_devices_agree_with_one(name: str, kind: str) -> None:
    layout = LAYOUTS[name]
    types = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
    mesh = make_mesh(types[kind], **layout.mesh)
    lying, inputs = layout.lying(), layout.leaves()

    def on_one(leaves: dict[str, Leaf], is_due: Any, scale: Any) -> dict[str, Leaf]:
        results = work(leaves.values(), is_due=is_due, copies=(), scale=scale)
        return dict(zip(leaves, results, strict=True))

    one = fast(on_one)
    scalars = [(jnp.asarray(is_due), jnp.float32(2.0)) for is_due in (True, False)]
    expected = [one(inputs, *pair) for pair in scalars]
    with jax.set_mesh(mesh):
        placed = place(inputs, mesh, lying)
        function = fast(run_on(layout, mesh, mesh.axis_names))
        results = [function(placed, *pair) for pair in scalars]
    for result, wanted in zip(results, expected, strict=True):
        for key in inputs:
            for x, y, spec, part in zip(
                result[key], wanted[key], lying[key], Leaf._fields, strict=True
            ):
                np.testing.assert_array_equal(x, y, err_msg=f"{key}.{part}")
                assert is_placed(x, mesh, spec), f"{key}.{part}"


def test_leaves_without_some_factors() -> None:
    layout = Layout(
        {"fsdp": 8},
        {"up": (8, 16), "other": (8, 8)},
        {"up": P(None, "fsdp"), "other": P("fsdp")},
    )
    mesh = make_mesh(AxisType.Auto, **layout.mesh)
    inputs = layout.leaves()
    inputs["up"] = inputs["up"]._replace(factor_in=None, diagonal=None)
    inputs["other"] = inputs["other"]._replace(factor_out=None, basis=None)
    scalars = jnp.asarray(True), jnp.float32(2.0)
    one = fast(lambda leaves: work(leaves, is_due=True, copies=(), scale=2.0))
    expected = one(list(inputs.values()))
    lying = {
        key: Leaf(
            *(
                None if x is None else spec
                for x, spec in zip(inputs[key], specs, strict=True)
            )
        )
        for key, specs in layout.lying().items()
    }
    with jax.set_mesh(mesh):
        function = fast(run_on(layout, mesh, mesh.axis_names))
        results = function(place(inputs, mesh, lying), *scalars)
    for key, wanted in zip(inputs, expected, strict=True):
        assert_trees_equal(results[key], wanted)


# What is moved


def collectives(text: str) -> dict[str, list[int]]:
    """Sizes of the results of each kind, in a compiled program."""
    kinds = "all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter"
    found: dict[str, list[int]] = {}
    for shapes, kind in re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", text):
        sizes = re.findall(r"\[([\d,]*)\]", shapes)
        numbers = (map(int, filter(None, size.split(","))) for size in sizes)
        found.setdefault(kind, []).append(sum(map(math.prod, numbers)))
    return found


def program(layout: Layout, kind: AxisType = AxisType.Auto) -> str:
    mesh = make_mesh(kind, **layout.mesh)
    arrays = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        ),
        layout.leaves(),
        layout.lying(),
    )
    with jax.set_mesh(mesh):
        function = fast(run_on(layout, mesh, mesh.axis_names))
        lowered = function.lower(arrays, jnp.asarray(True), jnp.float32(2.0))
    return lowered.compile().as_text()


def test_one_all_to_all_there_and_one_back() -> None:
    layout = LAYOUTS["many"]
    found = collectives(program(layout))
    # Eleven matrices are as many as sixteen. A device has an eighth of everything:
    # update, mu, three factors and the diagonal of 8. A cond has two ways back, one
    # without the basis.
    matrix = 8 * 8
    everything = 16 * (5 * matrix + 8) // 8
    # Diagonals are in no need of being traded: their side is whole, theirs is not cut.
    assert set(found) <= {"all-to-all", "all-gather"}
    assert sorted(found["all-to-all"]) == sorted(
        [
            everything - 16,
            everything - 16,
            everything - 16 - 16 * matrix // 8,
        ]
    )


def test_a_resident_stack_never_moves_its_factors() -> None:
    layout = Layout({"fsdp": 8}, {"w": (16, 8, 24)}, {"w": P(None, "fsdp")})
    found = collectives(program(layout))
    # update and mu, there and back in one of two ways
    assert found == {"all-to-all": [2 * 16 * 8 * 24 // 8] * 3}


@pytest.mark.slow
def test_collectives_are_as_many_for_any_number_of_leaves() -> None:
    counts = []
    for count in (2, 9):
        layout = Layout(
            {"fsdp": 4, "tensor": 2},
            {f"w{i}": (8, 8) for i in range(count)},
            {f"w{i}": P("fsdp", "tensor") for i in range(count)},
        )
        found = collectives(program(layout))
        counts.append({kind: len(sizes) for kind, sizes in found.items()})
    assert counts[0] == counts[1]
    # One for each mesh axis there, and in each of two ways back.
    assert counts[0]["all-to-all"] == 6


# Where things lie


def place_of(
    shape: tuple[int, ...],
    spec: P,
    mesh: dict[str, int],
    axes: ox.MatrixAxes = LAST_TWO,
) -> Lies:
    return lies(tile(axes, shape, None), spec, mesh)


def test_owners_are_the_mesh_axes_of_both_sides() -> None:
    own = place_of((8, 16), P("tensor", "fsdp"), BOTH)
    assert (own.rows, own.columns) == (("tensor",), ("fsdp",))
    assert own.owners == ("tensor", "fsdp")
    assert own.matrices == P(None, "tensor", "fsdp")
    assert own.factor(0, 8, BOTH) == P(None, "tensor", "fsdp")
    assert own.factor(1, 16, BOTH) == P(None, "fsdp", "tensor")
    assert own.factor(1, 1, BOTH) == P(None, "fsdp", None)
    assert not own.is_resident


def test_pieces_lie_in_the_order_of_the_mesh() -> None:
    own = place_of((16, 8), P(("tensor", "fsdp")), BOTH)
    assert own.rows == ("fsdp", "tensor")


def test_a_stack_is_resident_if_every_device_can_have_as_many() -> None:
    for count, expected in ((4, False), (8, True), (12, False), (16, True)):
        own = place_of((count, 8, 8), P(None, "fsdp", "tensor"), BOTH)
        assert own.is_resident == expected
    own = place_of((8, 8, 8), P(None, "fsdp", "tensor"), BOTH)
    assert own.factor(0, 8, BOTH) == P(("tensor", "fsdp"), None, None, None)
    # Half as many devices share the matrices of an expert.
    for count, expected in ((4, False), (8, True)):
        own = place_of((count, 8, 8), P("tensor", "fsdp"), BOTH)
        assert own.is_resident == expected
        if expected:
            assert own.factor(1, 8, BOTH) == P(("tensor", "fsdp"), None, None, None)
    # Where no mesh axis cuts a matrix there is nothing to own.
    assert not place_of((8, 8, 8), P("fsdp"), BOTH).is_resident
    assert not place_of((8, 8, 8), P(), BOTH).is_resident


def test_sides_that_do_not_divide_are_whole() -> None:
    own = place_of((6, 10), P("tensor", "fsdp"), {"fsdp": 4, "tensor": 2})
    assert (own.rows, own.columns) == (("tensor",), ())
    # A tile of 4 has no eight rows.
    own = lies(tile(LAST_TWO, (16, 8), 4), P(("fsdp", "tensor")), BOTH)
    assert (own.rows, own.columns) == (("fsdp",), ())
