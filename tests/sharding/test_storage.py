"""State in codes and rounded weights on eight devices: the same bits, moved nowhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from benchmarks.hlo_cost import hlo_cost
from optaxplus.numerics.quantization import quantize
from tests.assertions import assert_trees_equal
from tests.problems import cast, gradients, normal_tree

# Eight devices have 256, 96, 64 and 32 rows of these; blocks have 256 or 192.
SHAPES = {
    "up": {"kernel": (2048, 16)},
    "gate": {"kernel": (768, 16)},
    "down": {"kernel": (512, 16)},
    "layers": {"kernel": (2, 256, 16)},
    "query": {"kernel": (512, 2, 8)},
    "norm": {"scale": (4096,)},
}
ROWS = {
    "up": {"kernel": P("x", None)},
    "gate": {"kernel": P("x", None)},
    "down": {"kernel": P("x", None)},
    "layers": {"kernel": P(None, "x", None)},
    "query": {"kernel": P("x", None, None)},
    "norm": {"scale": P("x")},
}
COLUMNS = {
    "up": {"kernel": P(None, "x")},
    "gate": {"kernel": P(None, "x")},
    "down": {"kernel": P(None, "x")},
    "layers": {"kernel": P(None, None, "x")},
    "query": {"kernel": P(None, None, "x")},
    "norm": {"scale": P("x")},
}
RULES = (
    ox.Rule("layers", ox.MatrixAxes((-2,), (-1,)), "hidden"),
    *ox.DEFAULT_RULES,
)
PARAMS = normal_tree(SHAPES, seed=1)
GRADS = gradients(SHAPES, steps=2)


def place(tree, mesh, specs):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
    )


def run(tx, params, grads, init=None):
    state = (init or tx.init)(params)
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def quantized():
    return ox.adamw8bit(1e-2, weight_decay=0.1, min_size=1, rules=RULES)


@pytest.mark.parametrize(
    ("kind", "specs"),
    [
        pytest.param(
            AxisType.Explicit, ROWS, id="explicit-rows", marks=pytest.mark.slow
        ),
        pytest.param(AxisType.Auto, COLUMNS, id="auto-columns"),
        pytest.param(AxisType.Auto, ROWS, id="auto-rows", marks=pytest.mark.slow),
        pytest.param(
            AxisType.Explicit, COLUMNS, id="explicit-columns", marks=pytest.mark.slow
        ),
    ],
)
def test_codes_on_eight_devices_are_those_on_one(kind, specs):
    tx = quantized()
    _, expected = run(tx, PARAMS, GRADS)
    mesh = jax.make_mesh((8,), ("x",), (kind,))
    params = place(PARAMS, mesh, specs)
    grads = [place(g, mesh, specs) for g in GRADS]
    shardings = ox.state_sharding(tx, params)
    init = jax.jit(tx.init, out_shardings=shardings)
    with jax.set_mesh(mesh):
        _, state = run(tx, params, grads, init)
        abstract = jax.eval_shape(tx.init, params), grads[0], params
        wanted = jax.tree.map(lambda p: p.sharding, params), shardings
        update = jax.jit(lambda s, g, p: tx.update(g, s, p), out_shardings=wanted)
        typed = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=sharding
            ),
            abstract[0],
            shardings,
        )
        text = update.lower(typed, *abstract[1:]).compile().as_text()
    assert_trees_equal(state, expected)
    moments = optax.tree.get(state, "mu")
    for name, leaf in (("up", "kernel"), ("query", "kernel"), ("norm", "scale")):
        moment, param = moments[name][leaf], params[name][leaf]
        assert moment.codes.sharding.is_equivalent_to(param.sharding, param.ndim)
    # Whole blocks on every device have scales there; halves have them everywhere.
    spec = moments["up"]["kernel"].scales.sharding.spec
    assert spec == specs["up"]["kernel"] or spec == P(*specs["up"]["kernel"][:1])
    cost = hlo_cost(text)
    if specs is COLUMNS:
        assert cost.wire_bytes == 0
    else:
        # The largest entries of pieces of blocks: two a block in "gate", four in "down"
        # and "query", eight in "layers", of two moments. They may be gathered, and the
        # result too.
        pieces = 2 * 4 * 16 + 4 * 2 * 16 * 2 + 8 * 2 * 16
        assert 0 < cost.wire_bytes <= 2 * 2 * 4 * pieces


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        # 16 blocks of 256 rows: whole ones, shared by up to eight devices, by more.
        ((4096, 64), P("fsdp", None), P("fsdp", None)),
        ((4096, 64), P(("fsdp", "data"), None), P("fsdp", None)),
        ((4096, 64), P(("fsdp", "tensor"), None), P("fsdp", "tensor")),
        ((4096, 64), P("tensor", "fsdp"), P("tensor", "fsdp")),
        # Three columns cannot be shared out.
        ((4096, 3), P(("fsdp", "tensor"), None), P("fsdp", None)),
        ((2, 512, 32), P(None, "tensor", None), P(None, None, "tensor")),
        ((4096,), P(("fsdp", "data")), P("fsdp")),
    ],
    ids=str,
)
def test_devices_that_share_a_block(shape, spec, expected):
    sizes, names = (16, 8, 16), ("fsdp", "data", "tensor")
    mesh = jax.sharding.AbstractMesh(
        sizes, names, axis_types=(AxisType.Explicit,) * len(names)
    )
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    codes, scales = jax.eval_shape(lambda x: quantize(x, signed=True), x)
    assert codes.sharding.spec == spec
    assert scales.sharding.spec == expected


WEIGHTS = {
    "32": ox.master_weights(ox.adamw(1e-2)),
    "24": ox.master_weights(ox.adamw(1e-2), bits=24),
    "stochastic": ox.stochastic_rounding(ox.adamw(1e-2)),
    "compensated": ox.compensated(ox.adamw(1e-2)),
    "24 and codes": ox.master_weights(quantized(), bits=24),
    "scaled": ox.dynamic_loss_scale(ox.master_weights(ox.adamw(1e-2))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "kind",
    [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)],
    ids=str,
)
def test_weights_on_eight_devices_are_those_on_one(kind, name):
    tx = WEIGHTS[name]
    narrow = cast(PARAMS, "bfloat16")
    grads = [cast(g, "bfloat16") for g in GRADS]
    expected = run(tx, narrow, grads)
    mesh = jax.make_mesh((8,), ("x",), (kind,))
    params = place(narrow, mesh, ROWS)
    with jax.set_mesh(mesh):
        found = run(tx, params, [place(g, mesh, ROWS) for g in grads])
    if name == "24 and codes":
        # XLA contracts a·b + c here and not there: a rounding of a scale, which may
        # move a number to the next code.
        for ours, theirs in zip(
            jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
        ):
            near = 1 if jnp.issubdtype(ours.dtype, jnp.integer) else 0
            np.testing.assert_allclose(
                np.asarray(ours, np.float64),
                np.asarray(theirs, np.float64),
                rtol=1e-6,
                atol=near,
            )
    else:
        # The same noise, too.
        assert_trees_equal(found, expected)
    for p, start in zip(
        jax.tree.leaves(found[0]), jax.tree.leaves(params), strict=True
    ):
        assert p.sharding.is_equivalent_to(start.sharding, p.ndim)


def test_muon_in_codes_with_placement():
    shapes = {"block": {"up": {"kernel": (64, 128)}, "down": {"kernel": (128, 64)}}}
    specs = {
        "block": {"up": {"kernel": P("x", None)}, "down": {"kernel": P("x", None)}}
    }
    params, grads = normal_tree(shapes, seed=1), gradients(shapes, steps=2)
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    placed = place(params, mesh, specs)

    def make(placement):
        muon = ox.muon(1e-2, compute_dtype="float32", placement=placement)
        return ox.quantize_state(muon, min_size=1)

    expected, state = run(make("auto"), params, grads)
    with jax.set_mesh(mesh):
        found, sharded = run(
            make(ox.Placement.like(placed)),
            placed,
            [place(g, mesh, specs) for g in grads],
        )
    # The momentum and its codes are the same; products are summed in another order,
    # which Newton-Schulz amplifies.
    assert_trees_equal(sharded, state)
    for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.slow  # `test_checkpoints` restores codes onto a mesh, too
def test_codes_are_restored_onto_another_mesh(tmp_path):
    tx = quantized()
    meshes = [
        jax.make_mesh((n,), ("x",), (AxisType.Auto,), devices=jax.devices()[:n])
        for n in (8, 2)
    ]
    first, second = (place(PARAMS, mesh, ROWS) for mesh in meshes)
    _, state = run(tx, first, [place(g, meshes[0], ROWS) for g in GRADS])
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, second),
        ox.state_sharding(tx, second),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert_trees_equal(restored, state)
    codes = optax.tree.get(restored, "mu")["up"]["kernel"].codes
    assert codes.sharding == NamedSharding(meshes[1], P("x", None))
    assert jnp.any(codes != 0)
