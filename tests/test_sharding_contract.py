"""Contracts on many devices: same numbers, the state where its parameters are.

Eight simulated CPU devices. Under an Explicit mesh shardings are part of the types, so
abstract evaluation decides; under an Auto mesh the compiler places the results.
"""

from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus import trees
from tests import problems
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.cases import CASES, Case, one_of_each_family, variants_are_slow

each_factory = pytest.mark.parametrize("case", variants_are_slow(CASES))
each_family = pytest.mark.parametrize("case", one_of_each_family(CASES))

SHAPES = {
    "dense": {"kernel": (8, 4)},
    "attention": {"query": {"kernel": (8, 2, 2)}, "out": {"kernel": (2, 2, 8)}},
}
VECTOR_SHAPES = {"norm": {"scale": (8,)}, "temperature": ()}
# A mesh of one axis, on rows, columns and a vector in turn.
SPECS = {
    "dense": {"kernel": P("data", None)},
    "attention": {
        "query": {"kernel": P("data", None, None)},
        "out": {"kernel": P(None, None, "data")},
    },
    "norm": {"scale": P("data")},
    "temperature": P(),
}


def make_mesh(axis_type: AxisType, devices: int = 8) -> Mesh:
    return jax.make_mesh(
        (devices,), ("data",), (axis_type,), devices=jax.devices()[:devices]
    )


def specs_of(case: Case) -> dict[str, Any]:
    if not case.matrix_only:
        return SPECS
    return {key: SPECS[key] for key in SHAPES}


def shapes_of(case: Case) -> dict[str, Any]:
    return SHAPES if case.matrix_only else SHAPES | VECTOR_SHAPES


def place(tree: Any, mesh: Mesh, specs: Any) -> Any:
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
    )


def problem(case: Case, mesh: Mesh | None = None):
    params = problems.normal_tree(shapes_of(case), seed=1)
    grads = problems.gradients(shapes_of(case), steps=2)
    if mesh is None:
        return params, grads
    return (
        place(params, mesh, specs_of(case)),
        [place(g, mesh, specs_of(case)) for g in grads],
    )


def remaining_spec(spec: P, shape: tuple[int, ...]) -> P:
    """The sharding of a leaf whose reduced axes have size 1."""
    entries = (*spec, *[None] * (len(shape) - len(spec)))
    return P(
        *(None if size == 1 else e for e, size in zip(entries, shape, strict=True))
    )


def expected_specs(case: Case, tx: optax.GradientTransformation, state: Any) -> Any:
    """How every array of a state should be sharded: as its parameter, or not at all."""

    def along(leaf, spec, shape):
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        is_reduced = leaf.ndim == len(shape) and all(
            size in (1, whole) for size, whole in zip(leaf.shape, shape, strict=True)
        )
        if is_reduced:
            return remaining_spec(spec, leaf.shape)
        # What lies along a side is sharded as it is: here all that is has length 8, and
        # of two such axes the first one is that side's.
        lengths = list(leaf.shape)
        rows = lengths.index(8) if 8 in lengths else len(lengths)
        return P(*(None,) * rows, *("data",) * (rows < len(lengths)))

    return optax.tree_map_params(
        tx,
        along,
        state,
        specs_of(case),
        shapes_of(case),
        transform_non_params=lambda leaf: P(),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


def with_shardings(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """The types of `tree`, to be placed on `mesh`."""
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        ),
        tree,
        specs,
    )


def run(tx, update, params, grads):
    """Updates of every step, the parameters unchanged, and the last state."""
    state = tx.init(params)
    updates = []
    for g in grads:
        u, state = update(g, state, params)
        updates.append(u)
    return updates, state


def assert_placed(tree: Any, specs: Any, mesh: Mesh) -> None:
    is_spec = lambda node: isinstance(node, P)  # noqa: E731
    for (path, leaf), spec in zip(
        trees.leaves_with_paths(tree),
        jax.tree.leaves(specs, is_leaf=is_spec),
        strict=True,
    ):
        # A counter made by `init` lies on one device: nothing tells it of the mesh.
        wanted = NamedSharding(mesh, spec)
        assert leaf.ndim == 0 or leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (
            f"{path}: {leaf.sharding}, not {wanted}"
        )


@each_family
def test_many_devices_agree_with_one(case: Case) -> None:
    tx = case.make()
    plain, plain_state = run(tx, tx.update, *problem(case))
    mesh = make_mesh(AxisType.Auto)
    params, grads = problem(case, mesh)
    initial = tx.init(params)
    update = jax.jit(tx.update)
    sharded, state = run(tx, update, params, grads)
    # Sums go over the devices in another order, and compiled code contracts.
    for ours, theirs in zip(sharded, plain, strict=True):
        assert_trees_close(ours, theirs, rtol=case.rtol)
    # Averages of what was multiplied have its rounding errors.
    assert_trees_close(state, plain_state, rtol=max(4e-6, case.rtol))
    specs = expected_specs(case, tx, state)
    assert_placed(initial, specs, mesh)
    assert_placed(state, specs, mesh)


@each_factory
def test_shardings_in_types(case: Case) -> None:
    tx = case.make()
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, (grads, _) = problem(case, mesh)
        state = tx.init(params)
        specs = expected_specs(case, tx, state)
        assert_placed(state, specs, mesh)
        assert_same_shardings(jax.eval_shape(tx.init, params), state)
        updates, after = jax.eval_shape(tx.update, grads, state, params)
        assert_same_shardings(after, state)
        assert_same_shardings(updates, params)


def assert_same_shardings(actual: Any, expected: Any) -> None:
    for (path, ours), theirs in zip(
        trees.leaves_with_paths(actual), jax.tree.leaves(expected), strict=True
    ):
        got, wanted = jax.typeof(ours).sharding, jax.typeof(theirs).sharding
        assert got.spec == wanted.spec, f"{path}: {got}, not {wanted}"


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("adamw", "lamb", "adafactor")],
    ids=str,
)
def test_explicit_mesh_agrees_with_one_device(case: Case) -> None:
    tx = case.make()
    plain, _ = run(tx, tx.update, *problem(case))
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        sharded, _ = run(tx, jax.jit(tx.update), *problem(case, mesh))
    # As under an Auto mesh.
    for ours, theirs in zip(sharded, plain, strict=True):
        assert_trees_close(ours, theirs, rtol=case.rtol)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_accumulation_keeps_shardings(axis_type: AxisType) -> None:
    (case,) = (case for case in CASES if case.name == "adamw")
    tx = ox.accumulate(case.make(), every_k=2)
    plain, _ = run(tx, tx.update, *problem(case))
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        params, grads = problem(case, mesh)
        sharded, state = run(tx, jax.jit(tx.update), params, grads)
    assert_placed(state, expected_specs(case, tx, state), mesh)
    for ours, theirs in zip(sharded, plain, strict=True):
        assert_trees_close(ours, theirs, rtol=case.rtol)


# Checkpoints


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.name in ("sgd-momentum", "adamw", "adafactor-b1", "muon")
    ],
    ids=str,
)
def test_orbax_continues_bit_by_bit_and_on_another_mesh(
    case: Case, tmp_path: Path
) -> None:
    import orbax.checkpoint as ocp

    tx = case.make()

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(params, state, mesh):
        for g in problems.gradients(shapes_of(case), steps=2, seed=40):
            params, state = step(params, state, place(g, mesh, specs_of(case)))
        return params, state

    mesh, other_mesh = make_mesh(AxisType.Auto), make_mesh(AxisType.Auto, devices=4)
    params, (grads, _) = problem(case, mesh)
    saved = step(params, tx.init(params), grads)
    specs = specs_of(case), expected_specs(case, tx, saved[1])
    uninterrupted = train(*saved, mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        again, elsewhere = (
            checkpointer.restore(
                tmp_path / "checkpoint", with_shardings(saved, specs, target)
            )
            for target in (mesh, other_mesh)
        )
    assert jax.tree.structure(again) == jax.tree.structure(saved)
    assert_trees_equal(again, saved)
    assert_trees_equal(train(*again, mesh), uninterrupted)
    assert_trees_equal(elsewhere, saved)
    assert_placed(elsewhere, specs, other_mesh)
    # Half as many devices sum in another order.
    assert_trees_close(train(*elsewhere, other_mesh), uninterrupted, rtol=case.rtol)
