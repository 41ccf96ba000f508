"""Plans: everything is owned once, evenly, and comes back as it went."""

import math
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus.sharding import exchange, layouts, plan
from tests.selection import mostly
from tests.sharding.meshes import make_mesh, place

M = ox.MatrixAxes


def cubic(rows: int, columns: int, panels: int) -> float:
    return float(rows * columns * min(rows, columns)) / panels


def work(function=lambda matrices: matrices, panels: plan.Panels | None = None):
    memory = lambda rows, columns, panels: float(rows * columns) / panels  # noqa: E731
    return plan.Work(cubic, memory, jnp.dtype("float32"), function, panels)


# Two steps that need nothing of each other, and change nothing.
IDENTITY = plan.Panels(
    sums=lambda rows, columns, panels: 0.0,
    steps=lambda rows, columns: [
        lambda x, total: (x, x[:, :1]),
        lambda x, total: (x, None),
    ],
)


def random_problem(seed: int):
    """A mesh, and parameters that lie on it in any way."""
    rng = np.random.default_rng(seed)
    mesh = [{"a": 8}, {"a": 4, "b": 2}, {"a": 2, "b": 2, "c": 2}][seed % 3]
    shapes, axes, specs = [], [], []
    for _ in range(rng.integers(1, 6)):
        shape = (int(rng.integers(1, 4)) * 8, *(8 * rng.integers(1, 4, 2)).tolist())
        shape = shape[rng.integers(0, 2) :]
        names = [name for name in mesh if rng.random() < 0.7]
        entries: list[tuple[str, ...]] = [() for _ in shape]
        for name in names:
            entries[rng.integers(0, len(shape))] += (name,)
        splits = ()
        if rng.random() < 0.3:
            splits = (shape[-1] - 4, 4)
        shapes.append(tuple(shape))
        axes.append(M((len(shape) - 2,), (len(shape) - 1,), splits))
        specs.append(P(*(entry or None for entry in entries)))
    return mesh, shapes, axes, specs


def plan_of(mesh, shapes, axes, specs, work):
    blocks = [
        layouts.lay_out(shape, a, spec, mesh)
        for shape, a, spec in zip(shapes, axes, specs, strict=True)
    ]
    counts = layouts.layout_counts(list(chain(*blocks)))
    return plan.make_plan(counts, mesh, work), blocks


@pytest.mark.parametrize("seed", range(40))
def test_every_matrix_has_one_owner_and_the_load_is_even(seed: int) -> None:
    mesh, *problem = random_problem(seed)
    made, _ = plan_of(mesh, *problem, work())
    costliest = 0.0
    for e in made.exchanges:
        owned = e.owned.reshape(-1, len(e.layouts)).sum(axis=0)
        assert owned.tolist() == list(e.counts)
        costliest = max(costliest, *(cubic(*x.shape(mesh), 1) for x in e.layouts))
    # Graham's bound for giving each job to whoever is free first. Exchanges whose
    # matrices lie along other axes cannot be evened out against each other.
    if len(made.exchanges) == 1:
        assert made.flops <= made.mean_flops + costliest
    assert made.flops >= made.mean_flops * (1 - 1e-9)
    assert made.bytes >= made.least_bytes * (1 - 1e-9)
    assert len(made.kind_of) == math.prod(mesh.values())


def unchanged(made, blocks, panels, mesh, shapes, axes, specs) -> None:
    """Sends arrays to the owners of a plan and back."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(s), "float32") for s in shapes]
    device_mesh = make_mesh(AxisType.Auto, **mesh)
    run = jax.shard_map(
        lambda *parts: tuple(
            exchange.exchanged(work(panels=panels), parts, axes, blocks, made)
        ),
        mesh=device_mesh,
        in_specs=tuple(specs),
        out_specs=tuple(specs),
        check_vma=False,
    )
    results = jax.jit(run)(*place(arrays, device_mesh, specs))
    for result, array in zip(results, arrays, strict=True):
        np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize("seed", mostly(range(3), range(6)))
def test_what_nobody_changes_comes_back_to_the_last_bit(seed: int) -> None:
    problem = random_problem(seed)
    unchanged(*plan_of(*problem, work()), None, *problem)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("seed", mostly(range(2), range(6)))
def test_so_do_panels(seed: int, side: int, monkeypatch) -> None:
    """Random panels, of the side that is sharded or of the other one."""
    monkeypatch.setattr(plan, "_FLOPS_PER_SECOND", 1e-3)
    rng = np.random.default_rng(seed)
    mesh = [{"a": 8}, {"a": 4, "b": 2}, {"a": 2, "b": 4}][seed % 3]
    shapes, specs = [], []
    for axis in rng.permutation(["a", "b"])[: len(mesh)]:
        short, long = 8, 16 * int(rng.integers(3, 6))
        shapes.append((short, long) if side else (long, short))
        if seed % 2:
            # The others are copies.
            specs.append(P(axis if axis in mesh else "a"))
        else:
            specs.append(P(tuple(mesh)) if rng.random() < 0.5 else P("a", *[*mesh][1:]))
    axes = [M((0,), (1,))] * len(shapes)
    made, blocks = plan_of(mesh, shapes, axes, specs, work(panels=IDENTITY))
    assert made.cut
    assert {made.exchanges[e].cut_side(position) for e, position in made.cut} == {side}
    unchanged(made, blocks, IDENTITY, mesh, shapes, axes, specs)


def llama(layers: int):
    shapes = {"q": (2048, 2048), "k": (2048, 512), "up": (2048, 8192)}
    shapes |= {"gate": (2048, 8192), "down": (8192, 2048), "o": (2048, 2048)}
    params = {
        f"layer_{i}": {
            name: {"kernel": jax.ShapeDtypeStruct(shape, "float32")}
            for name, shape in shapes.items()
        }
        for i in range(layers)
    }
    spec = lambda path, x: (  # noqa: E731
        P(None, "fsdp") if path[1].key in ("down", "o") else P("fsdp")
    )
    return params, jax.tree_util.tree_map_with_path(spec, params)


def test_matrices_go_where_least_is_to_do() -> None:
    params, specs = llama(16)
    made = ox.plan_placement(
        params, ox.Placement(AbstractMesh((64,), ("fsdp",)), specs)
    )
    # A long matrix costs more than two square ones: 48 devices have one, 16 the rest.
    assert made.kinds == 2
    by_shape = {group.shape: group for group in made.groups}
    assert by_shape[2048, 8192].per_device == ((48, 1), (16, 0))
    assert by_shape[2048, 2048].per_device == ((16, 2), (48, 0))
    assert made.comm_bytes / made.least_comm_bytes < 1.15
    assert made.flops / made.even_flops < 1.05
    assert "64 devices (fsdp=64), of 2 kinds" in str(made)
    assert made.to_dict()["kinds"] == 2


def test_scarce_matrices_are_cut() -> None:
    params, specs = llama(16)
    made = ox.plan_placement(
        params, ox.Placement(AbstractMesh((256,), ("fsdp",)), specs)
    )
    panels = {group.shape: group.panels for group in made.groups}
    assert panels[2048, 8192] == 4
    assert made.flops / made.even_flops < 2.1


def test_matrices_of_one_shape_are_cut_together() -> None:
    params, _ = llama(16)
    # Some are sharded along their short side, some along the long one: two layouts.
    placement = ox.Placement(AbstractMesh((256,), ("fsdp",)), P("fsdp"))
    made = ox.plan_placement(params, placement)
    panels = [group.panels for group in made.groups if group.shape == (2048, 8192)]
    assert panels == [4, 4]
    assert made.flops / made.even_flops < 2.1


def test_panels_need_not_be_a_power_of_two(monkeypatch) -> None:
    from optaxplus.sharding import orthogonalize

    monkeypatch.setattr(orthogonalize, "device_memory", lambda mesh: 200e3)
    params = {"up": {"kernel": jax.ShapeDtypeStruct((63, 768), "float32")}}
    placement = ox.Placement(AbstractMesh((3,), ("fsdp",)), P("fsdp"))
    assert ox.plan_placement(params, placement).groups[0].panels == 3


def test_an_even_number_needs_one_kind_and_nothing_more_than_it_must() -> None:
    params, specs = llama(16)
    made = ox.plan_placement(params, ox.Placement(AbstractMesh((8,), ("fsdp",)), specs))
    assert made.kinds == 1
    assert made.comm_bytes == made.least_comm_bytes
    assert made.flops == pytest.approx(made.even_flops)


def test_nothing_to_place() -> None:
    params = {"norm": {"scale": jax.ShapeDtypeStruct((8,), "float32")}}
    made = ox.plan_placement(params, ox.Placement(AbstractMesh((8,), ("a",)), P()))
    assert str(made) == "8 devices: nothing to move."
    kernel = {"up": {"kernel": jax.ShapeDtypeStruct((8, 8), "float32")}}
    made = ox.plan_placement(kernel, ox.Placement(AbstractMesh((1,), ("a",)), P("a")))
    assert str(made) == "1 device: nothing to move."


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp")])
def test_what_fits_no_device_is_cut_or_refused(spec: P, monkeypatch) -> None:
    from optaxplus.sharding import orthogonalize

    params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 512), "float32")}}
    placement = ox.Placement(AbstractMesh((8,), ("fsdp",)), spec)
    assert ox.plan_placement(params, placement).groups[0].panels == 1
    # 64 x 512 entries at 8 bytes, and three Gram matrices in float32: 311 kB.
    monkeypatch.setattr(orthogonalize, "device_memory", lambda mesh: 200e3)
    assert ox.plan_placement(params, placement).groups[0].panels == 2
    monkeypatch.setattr(orthogonalize, "device_memory", lambda mesh: 20e3)
    with pytest.raises(ValueError, match=r"'up/kernel'.*512.*GB on one device"):
        ox.plan_placement(params, placement)
