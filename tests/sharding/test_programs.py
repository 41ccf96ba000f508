"""What the compiled programs of eight devices move, and where."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from benchmarks.hlo_cost import hlo_cost
from tests.sharding.meshes import make_mesh

LAYERS = 8
SHAPES = {"query": (64, 64), "out": (64, 64), "up": (64, 256), "down": (256, 64)}
MODEL_AXIS = {"query": 0, "out": 1, "up": 0, "down": 1}
# Rounded to bfloat16 before they move, everything there and back.
PARAMETERS = LAYERS * (2 * 64 * 64 + 2 * 64 * 256)


def spec_of(name: str, fsdp: str | None, tensor: str | None) -> P:
    names = (fsdp, tensor) if MODEL_AXIS[name] == 0 else (tensor, fsdp)
    return P(*names)


def compiled(mesh, fsdp, tensor, *, stacked: bool, mode: str, **arguments):
    shapes, specs = {}, {}
    for name, shape in SHAPES.items():
        spec = spec_of(name, fsdp, tensor)
        if stacked:
            shapes[name], specs[name] = (LAYERS, *shape), P(None, *spec)
            continue
        for layer in range(LAYERS):
            shapes[f"{name}_{layer}"] = shape
            specs[f"{name}_{layer}"] = spec
    grads = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, specs[name])
        )
        for name, shape in shapes.items()
    }
    tx = ox.orthogonalize_via_newton_schulz(
        axes=ox.MatrixAxes((-2,), (-1,)),
        placement=ox.Placement(mesh, specs) if mode == "placement" else "auto",
        **arguments,
    )
    shardings = jax.tree.map(lambda x: x.sharding, grads)
    update = jax.jit(lambda g: tx.update(g, ())[0], out_shardings=shardings)
    return update.lower(grads).compile().as_text()


def kinds_of(cost) -> dict[str, int]:
    return {kind: found.count for kind, found in cost.collectives.items()}


def mesh_of(mode: str, **axes: int):
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    return make_mesh(kind, **axes)


each_layout = pytest.mark.parametrize("stacked", [True, False], ids=["stack", "leaves"])


@each_layout
@pytest.mark.parametrize("mode", ["explicit", "placement"])
def test_fsdp_is_one_all_to_all_there_and_one_back(mode: str, stacked: bool) -> None:
    text = compiled(mesh_of(mode, fsdp=8), "fsdp", None, stacked=stacked, mode=mode)
    cost = hlo_cost(text)
    assert kinds_of(cost) == {"all-to-all": 2}
    assert cost.collectives_in_products == 0
    bound = 2 * PARAMETERS / 8 * 2 * 7 / 8
    # XLA on CPUs has no bfloat16 collectives of its own, and may move float32.
    assert cost.wire_bytes <= 2.04 * bound


@each_layout
@pytest.mark.parametrize("mode", ["explicit", "placement"])
def test_so_is_fsdp_with_tensor_parallelism(mode: str, stacked: bool) -> None:
    mesh = mesh_of(mode, fsdp=4, tensor=2)
    cost = hlo_cost(compiled(mesh, "fsdp", "tensor", stacked=stacked, mode=mode))
    assert kinds_of(cost) == {"all-to-all": 2}
    assert cost.collectives_in_products == 0


@each_layout
@pytest.mark.parametrize("mode", ["explicit", "placement"])
def test_replicas_only_gather(mode: str, stacked: bool) -> None:
    mesh = mesh_of(mode, data=8)
    cost = hlo_cost(compiled(mesh, None, None, stacked=stacked, mode=mode))
    # One for the square matrices, one for the long ones.
    assert kinds_of(cost) == {"all-gather": 2}
    assert cost.wire_bytes <= 2.04 * 2 * PARAMETERS * 7 / 8


@pytest.mark.parametrize(("count", "sent"), [(1, 2), (7, 8), (9, 10), (12, 16)])
def test_replicas_send_little_for_what_does_not_divide(count: int, sent: int) -> None:
    """An eighth of eight is gathered; one is summed with zeros, at twice its bytes."""
    mesh = mesh_of("placement", data=8)
    sharding = NamedSharding(mesh, P())
    shape = (count, 64, 128)
    grads = {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
    placement = ox.Placement.like(grads)
    tx = ox.orthogonalize_via_newton_schulz(
        axes=ox.MatrixAxes((-2,), (-1,)), placement=placement
    )
    program = jax.jit(lambda g: tx.update(g, ())[0]).lower(grads)
    cost = hlo_cost(program.compile().as_text())
    params = {"up": {"kernel": grads["w"]}}
    rules = [ox.Rule("kernel", ox.MatrixAxes((-2,), (-1,)), "hidden")]
    planned = ox.plan_placement(params, rules=rules).comm_bytes
    assert planned == sent * 64 * 128 * 2 * 7 / 8
    # The compiler of CPUs sums in float32.
    assert planned <= cost.wire_bytes <= 2 * planned


@pytest.mark.parametrize("mode", ["explicit", "placement"])
def test_replicas_of_shards_do_both(mode: str) -> None:
    mesh = mesh_of(mode, data=2, fsdp=4)
    cost = hlo_cost(compiled(mesh, "fsdp", None, stacked=True, mode=mode))
    assert kinds_of(cost) == {"all-to-all": 2, "all-gather": 2}


def test_a_guess_that_is_right_moves_nothing_more() -> None:
    mesh = mesh_of("auto", fsdp=4, tensor=2)
    shapes = {"up": (16, 32, 64), "down": (16, 64, 32)}
    specs = {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")}
    grads = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, specs[name])
        )
        for name, shape in shapes.items()
    }
    tx = ox.orthogonalize_via_newton_schulz(axes=ox.MatrixAxes((-2,), (-1,)))
    shardings = jax.tree.map(lambda x: x.sharding, grads)
    update = jax.jit(lambda g: tx.update(g, ())[0], out_shardings=shardings)
    cost = hlo_cost(update.lower(grads).compile().as_text())
    assert kinds_of(cost) == {"all-to-all": 2}


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp")])
def test_panels_sum_their_gram_matrices_once_a_block(spec: P, monkeypatch) -> None:
    from optaxplus.sharding import plan

    monkeypatch.setattr(plan, "_FLOPS_PER_SECOND", 1e6)
    mesh = mesh_of("placement", fsdp=8)
    grads = {
        "w": jax.ShapeDtypeStruct(
            (64, 512), jnp.float32, sharding=NamedSharding(mesh, spec)
        )
    }
    tx = ox.orthogonalize_via_newton_schulz(
        axes=ox.MatrixAxes((-2,), (-1,)), placement=ox.Placement.like(grads)
    )
    text = jax.jit(lambda g: tx.update(g, ())[0]).lower(grads).compile().as_text()
    cost = hlo_cost(text)
    # The largest entry, and three blocks of the Gram form.
    assert kinds_of(cost) == {"all-to-all": 2, "all-reduce": 4}
    assert cost.collectives_in_products == 0
