"""`Placement`, what it refuses, and where states lie."""

import contextlib

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus import trees
from tests.assertions import assert_trees_close
from tests.sharding.meshes import is_placed, make_mesh, normal, place

PARAMS = {"up": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}}
SPECS = {"up": {"kernel": P("fsdp"), "bias": P()}}


@pytest.fixture
def mesh():
    return make_mesh(AxisType.Auto, fsdp=8)


def test_like_reads_the_shardings(mesh) -> None:
    placed = place(PARAMS, mesh, SPECS)
    placement = ox.Placement.like(placed)
    assert placement.mesh == mesh
    assert placement.specs == SPECS
    # What is on one device alone counts as repeated.
    placed["up"]["bias"] = jnp.ones(16)
    assert ox.Placement.like(placed).specs == SPECS
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        place(PARAMS, mesh, SPECS),
    )
    assert ox.Placement.like(abstract).specs == SPECS


def test_like_wants_one_mesh(mesh) -> None:
    with pytest.raises(ValueError, match=r"Placement\.like: no parameter has a Named"):
        ox.Placement.like(PARAMS)
    other = jax.make_mesh((4,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:4])
    kernels = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    kernels = {
        "a": jax.device_put(kernels["a"], NamedSharding(mesh, P("fsdp"))),
        "b": jax.device_put(kernels["b"], NamedSharding(other, P("fsdp"))),
    }
    with pytest.raises(ValueError, match=r"Placement\.like: parameter 'b' lies on"):
        ox.Placement.like(kernels)


def test_bad_placements(mesh) -> None:
    with pytest.raises(TypeError, match="Placement: mesh='fsdp' is not allowed"):
        ox.Placement("fsdp", P())
    with pytest.raises(TypeError, match=r"Placement: specs=None is not allowed"):
        ox.Placement(mesh, None)
    with pytest.raises(TypeError, match=r"Placement: specs='fsdp' is not allowed"):
        ox.Placement(mesh, "fsdp")
    with pytest.raises(TypeError, match=r"Placement: specs\['up'\]='fsdp'.*Partition"):
        ox.Placement(mesh, {"up": "fsdp"})
    with pytest.raises(ValueError, match=r"no axis 'tensor'. Its axes are 'fsdp'"):
        ox.Placement(mesh, {"up": P("tensor")})
    with pytest.raises(TypeError, match=r"specs\['up'\].*UNCONSTRAINED"):
        ox.Placement(mesh, {"up": P(P.UNCONSTRAINED)})
    with pytest.raises(ValueError, match="names an axis of the mesh twice"):
        ox.Placement(mesh, P("fsdp", "fsdp"))
    with pytest.raises(TypeError, match="comm_dtype"):
        ox.Placement(mesh, P(), comm_dtype="int8")
    with pytest.raises(ValueError, match="comm_dtype='float16' is not allowed"):
        ox.Placement(mesh, P(), comm_dtype="float16")


FACTORIES = {
    "muon": lambda placement: ox.muon(0.1, placement=placement),
    "normuon": lambda placement: ox.normuon(0.1, placement=placement),
    "adamuon": lambda placement: ox.adamuon(0.1, placement=placement),
    "scion": lambda placement: ox.scion(0.1, placement=placement),
    "orthogonalize_via_newton_schulz": lambda placement: (
        ox.orthogonalize_via_newton_schulz(placement=placement)
    ),
    "scale_by_norm_lmo": lambda placement: ox.scale_by_norm_lmo(placement=placement),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_bad_arguments_are_refused_at_construction(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: placement='fsdp' is not allowed"):
        FACTORIES[name]("fsdp")


@pytest.mark.parametrize("name", FACTORIES)
def test_specs_that_do_not_fit_are_refused_at_init(name: str, mesh) -> None:
    params = {"up": {"kernel": jnp.ones((12, 16))}}

    def init(specs):
        FACTORIES[name](ox.Placement(mesh, specs)).init(params)

    with pytest.raises(ValueError, match=f"{name}.*'up/kernel'.*has no spec"):
        init({"down": P()})
    with pytest.raises(ValueError, match=r"None is no spec, and PartitionSpec\(\)"):
        init({"up": {"kernel": None}})
    with pytest.raises(ValueError, match=f"{name}.*12 does not divide by the 8"):
        init({"up": {"kernel": P("fsdp")}})
    with pytest.raises(ValueError, match=f"{name}.*which has 2 axes"):
        init({"up": {"kernel": P(None, None, "fsdp")}})


@pytest.mark.parametrize("name", ["muon", "normuon", "adamuon", "scion"])
def test_a_spec_without_a_parameter_is_refused(name: str, mesh) -> None:
    placement = ox.Placement(mesh, {**SPECS, "gone": P("fsdp")})
    with pytest.raises(ValueError, match=r"specs\['gone'\] belongs to no parameter"):
        FACTORIES[name](placement).init(PARAMS)


def test_one_spec_may_stand_for_many(mesh) -> None:
    params = {"a": {"kernel": jnp.ones((8, 16))}, "b": {"kernel": jnp.ones((8, 8))}}
    ox.muon(0.1, placement=ox.Placement(mesh, P("fsdp"))).init(params)
    ox.muon(0.1, placement=ox.Placement(mesh, {"a": P("fsdp"), "b": P()})).init(params)


def test_specs_may_not_contradict_types() -> None:
    mesh = make_mesh(AxisType.Explicit, fsdp=8)
    grads = place(normal({"w": (8, 16)}), mesh, {"w": P("fsdp")})
    tx = ox.orthogonalize_via_newton_schulz(
        placement=ox.Placement(mesh, P(None, "fsdp"))
    )
    with pytest.raises(ValueError, match="the parameter lies as"):
        tx.update(grads, tx.init(grads))


@pytest.mark.parametrize("around", [False, True])
def test_the_mesh_of_a_placement_may_be_abstract(around: bool, mesh) -> None:
    kernel = jax.device_put(jnp.ones((16, 16)), NamedSharding(mesh, P("fsdp")))
    params = {"up": {"kernel": kernel}}
    abstract = AbstractMesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    tx = ox.muon(0.1, placement=ox.Placement(abstract, P("fsdp")))
    state = tx.init(params)
    with jax.set_mesh(mesh) if around else contextlib.nullcontext():
        updates, _ = jax.jit(tx.update)(params, state, params)
    assert is_placed(updates["up"]["kernel"], mesh, P("fsdp"))


@pytest.mark.parametrize("around", [False, True])
def test_a_placement_on_another_mesh_is_refused(around: bool, mesh) -> None:
    params = {"up": {"kernel": jnp.ones((16, 16))}}
    other = make_mesh(AxisType.Auto, fsdp=4, tensor=2)
    tx = ox.muon(0.1, placement=ox.Placement(mesh, P("fsdp")))
    if around:
        with (
            jax.set_mesh(other),
            pytest.raises(ValueError, match=r"of jax\.set_mesh is"),
        ):
            tx.update(params, tx.init(params), params)
        return
    placed = jax.device_put(params, NamedSharding(other, P("fsdp")))
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"placement\.mesh=.*parameter 'up/kernel' is"):
        jax.jit(tx.update)(placed, state, placed)


def test_nothing_says_how_parameters_lie() -> None:
    params = jax.eval_shape(lambda: {"up": {"kernel": jnp.ones((8, 8))}})
    for function in ("plan_placement", "state_sharding"):
        given = (params,) if function == "plan_placement" else (ox.muon(0.1), params)
        with pytest.raises(ValueError, match=f"{function}: no parameter has a NamedSh"):
            getattr(ox, function)(*given)


def test_none_leaves_it_to_the_compiler(mesh) -> None:
    grads = place(normal({"w": (8, 16)}), mesh, {"w": P("fsdp")})
    tx = ox.orthogonalize_via_newton_schulz(placement=None)
    text = jax.jit(tx.update).lower(grads, ()).as_text()
    assert "manual_computation" not in text
    text = (
        jax.jit(ox.orthogonalize_via_newton_schulz().update).lower(grads, ()).as_text()
    )
    assert "manual_computation" in text


def test_one_device_is_left_alone() -> None:
    grads = normal({"w": (8, 16)})
    tx = ox.orthogonalize_via_newton_schulz()
    plain = jax.jit(tx.update).lower(grads, ()).as_text()
    none = ox.orthogonalize_via_newton_schulz(placement=None)
    assert plain == jax.jit(none.update).lower(grads, ()).as_text()
    mesh = jax.make_mesh((1,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:1])
    placed = place(grads, mesh, {"w": P("fsdp")})
    assert "manual_computation" not in jax.jit(tx.update).lower(placed, ()).as_text()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("sizes", [(1, 8), (1, 1)])
def test_axes_of_one_device(kind: AxisType, sizes: tuple[int, int]) -> None:
    devices = jax.devices()[: sizes[0] * sizes[1]]
    mesh = jax.make_mesh(sizes, ("fsdp", "tensor"), (kind,) * 2, devices=devices)
    grads = normal({"up": (8, 16), "down": (16, 8), "out": (8, 8)})
    specs = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp"), "out": P("fsdp")}
    tx = ox.orthogonalize_via_newton_schulz(
        compute_dtype="float32", axes=ox.MatrixAxes((0,), (1,))
    )
    expected, _ = tx.update(grads, ())
    placed = place(grads, mesh, specs)
    updates, _ = jax.jit(tx.update)(placed, ())
    # Sums in another order, of numbers of at most 1.
    assert_trees_close(updates, expected, rtol=2e-5)
    count = len(devices)
    plan = str(ox.plan_placement({"up": {"kernel": placed["up"]}}))
    assert f"{count} device" in plan


def test_inside_a_shard_map_arrays_are_what_the_device_has(mesh) -> None:
    grads = place(normal({"w": (16, 8, 16)}), mesh, {"w": P("fsdp")})
    tx = ox.orthogonalize_via_newton_schulz(
        compute_dtype="float32", axes=ox.MatrixAxes((-2,), (-1,))
    )
    update = lambda g: tx.update(g, ())[0]  # noqa: E731
    inside = jax.shard_map(update, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
    text = jax.jit(inside).lower(grads).compile().as_text()
    assert "all-to-all" not in text


# Where states lie


def test_state_sharding_tells_a_compiled_init(mesh) -> None:
    placed = place(PARAMS, mesh, SPECS)
    tx = ox.muon(0.1)
    shardings = ox.state_sharding(tx, placed)
    state = jax.jit(tx.init, out_shardings=shardings)(placed)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    for (path, leaf), sharding in zip(
        trees.leaves_with_paths(state), jax.tree.leaves(shardings), strict=True
    ):
        assert leaf.sharding == sharding, path
    spec = {s.spec for s in jax.tree.leaves(shardings)}
    assert spec == {P("fsdp"), P()} or spec == {P("fsdp", None), P(None), P()}


def test_state_sharding_of_other_libraries_and_of_nnx(mesh) -> None:
    placed = place(PARAMS, mesh, SPECS)
    shardings = ox.state_sharding(optax.adamw(0.1), placed)
    assert shardings[0].mu["up"]["kernel"].spec[0] == "fsdp"
    assert shardings[0].count.spec == P()
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    placement = ox.Placement(mesh, P("fsdp"))
    shardings = ox.state_sharding(ox.adamw(0.1), state, placement)
    specs = {s.spec[0] for s in jax.tree.leaves(shardings) if s.spec}
    assert specs == {"fsdp"}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_state_sharding_under_a_mesh_that_is_set(kind: AxisType) -> None:
    mesh = make_mesh(kind, fsdp=8)
    tx = ox.muon(0.1)
    with jax.set_mesh(mesh):
        placed = place(PARAMS, mesh, SPECS)
        shardings = ox.state_sharding(tx, placed)
        state = jax.jit(tx.init, out_shardings=shardings)(placed)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings


def test_a_placement_inside_a_shard_map_is_refused(mesh) -> None:
    grads = place(normal({"w": (16, 8)}), mesh, {"w": P("fsdp")})
    tx = ox.orthogonalize_via_newton_schulz(placement=ox.Placement.like(grads))
    inside = jax.shard_map(
        lambda g: tx.update(g, ())[0],
        mesh=mesh,
        in_specs=P("fsdp"),
        out_specs=P("fsdp"),
    )
    with pytest.raises(ValueError, match="not allowed inside jax"):
        jax.jit(inside)(grads)


def test_state_sharding_refuses(mesh) -> None:
    with pytest.raises(TypeError, match="state_sharding: tx=3 is not allowed"):
        ox.state_sharding(3, PARAMS)
    with pytest.raises(ValueError, match="no parameter has a NamedSharding"):
        ox.state_sharding(ox.adamw(0.1), PARAMS)
    with pytest.raises(ValueError, match="state_sharding: parameter 'up/bias'"):
        ox.state_sharding(
            ox.adamw(0.1), PARAMS, ox.Placement(mesh, {"up": {"kernel": P()}})
        )
