"""Bytes counted from abstract states against bytes of real ones."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus.report.tables import format_bytes

PARAMS = {
    "wte": jnp.ones((16, 8)),
    "dense": {"kernel": jnp.ones((8, 32), jnp.bfloat16), "bias": jnp.ones(32)},
}
NUM_PARAMS = 16 * 8 + 8 * 32 + 32


def real_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "tx", [ox.sgd(0.1), ox.adamw(0.1), ox.adafactor(0.1), ox.muon(0.1), optax.adam(0.1)]
)
def test_counts_what_init_allocates(tx):
    report = ox.memory_report(tx, PARAMS)
    assert report.state == real_bytes(tx.init(PARAMS))
    assert report.params == report.grads == real_bytes(PARAMS)
    assert report.total == report.params + report.grads + report.state
    assert report.num_params == NUM_PARAMS
    assert report.bytes_per_param == report.total / NUM_PARAMS
    assert sum(report.by_label.values()) == report.state
    assert sum(report.by_dtype.values()) == report.total


def test_partitioned_state_is_counted_by_label():
    report = ox.memory_report(ox.muon(0.1), PARAMS)
    scalars = 4  # one int32 counter in either group
    assert report.by_label == {
        "adamw": 8 * (16 * 8 + 32) + scalars,
        "frozen": 0,
        "muon": 4 * 8 * 32 + scalars,
    }


def test_state_outside_a_partition_is_shared():
    tx = optax.inject_hyperparams(ox.adam)(learning_rate=0.1)
    assert list(ox.memory_report(tx, PARAMS).by_label) == ["all"]
    tx = optax.chain(optax.trace(0.9), ox.muon(0.1))
    by_label = ox.memory_report(tx, PARAMS).by_label
    assert by_label["shared"] == real_bytes(optax.trace(0.9).init(PARAMS))


def test_a_70b_model_is_counted_without_allocating():
    params = {"w": jax.ShapeDtypeStruct((70, 10**5, 10**4), jnp.float32)}
    tx = optax.scale_by_adam()
    report = ox.memory_report(tx, params)
    # The textbook figure: 16 bytes for each of 7e10 parameters, and one counter.
    assert report.total == 16 * 70 * 10**9 + 4


def test_gradients_in_another_dtype():
    report = ox.memory_report(ox.sgd(0.1), PARAMS, grads_dtype="bfloat16")
    assert report.grads == 2 * NUM_PARAMS


def test_refuses_a_gradient_dtype_that_is_not_floating():
    with pytest.raises(TypeError, match="memory_report: grads_dtype='int8' is not"):
        ox.memory_report(ox.sgd(0.1), PARAMS, grads_dtype="int8")


def test_empty_tree():
    report = ox.memory_report(ox.sgd(0.1), {})
    assert (report.total, report.num_params, report.bytes_per_param) == (0, 0, 0.0)
    assert "total" in str(report)
    # A count of steps is 4 bytes, of no parameter.
    _, rows = ox.memory_report(ox.adamw(0.1), {}).table()
    assert {row[2] for row in rows} == {"0.000"}


def test_prints_an_aligned_table_and_gives_plain_data():
    report = ox.memory_report(ox.muon(0.1), PARAMS)
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{NUM_PARAMS:,} parameters")
    assert len({len(line) for line in lines}) == 1
    assert any(line.startswith("  state of muon") for line in lines)
    assert report.to_dict()["by_label"] == report.by_label


def test_a_name_stands_for_the_model():
    tx = ox.adamw(0.1)
    report = ox.memory_report(tx, "gpt2-small", grads_dtype="bfloat16")
    params = ox.abstract_params("gpt2-small")
    assert report == ox.memory_report(tx, params, grads_dtype="bfloat16")
    assert report.params == 4 * 124_439_808


def test_a_name_stands_for_what_is_frozen_too():
    report = ox.memory_report(ox.adamw(0.1), PARAMS, frozen="gpt2-small")
    assert report.num_params == NUM_PARAMS + 124_439_808
    with pytest.raises(ValueError, match=r"memory_report: frozen='gpt' .* 'llama-70b'"):
        ox.memory_report(ox.adamw(0.1), PARAMS, frozen="gpt")


def test_refuses_a_name_of_nothing():
    with pytest.raises(ValueError, match=r"memory_report: params='gpt' .* 'llama-70b'"):
        ox.memory_report(ox.sgd(0.1), "gpt")


def test_what_is_frozen_has_no_gradient():
    tx = ox.adamw(0.1)
    alone = ox.memory_report(tx, {"w": PARAMS["wte"]}, grads_dtype="float32")
    report = ox.memory_report(
        tx, {"w": PARAMS["wte"]}, grads_dtype="float32", frozen=PARAMS["dense"]
    )
    assert report.num_params == NUM_PARAMS
    assert report.params == real_bytes(PARAMS)
    assert (report.grads, report.state) == (alone.grads, alone.state)
    assert sum(report.by_dtype.values()) == report.total


# Where each parameter of PARAMS lies on a mesh of four by two.
SPECS = {"wte": P("tensor", "fsdp"), "dense": {"kernel": P("fsdp"), "bias": P()}}


def on_mesh(kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (kind,) * 2)
    return jax.device_put(
        PARAMS, jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    )


def bytes_on(device, tree):
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "tx",
    [ox.adamw(0.1), ox.adafactor(0.1, min_dim_size_to_factor=2), ox.muon(0.1)],
    ids=["adamw", "adafactor", "muon"],
)
def test_bytes_of_real_arrays_on_each_device(kind, tx):
    params = on_mesh(kind)
    report = ox.memory_report(tx, params, grads_dtype="float32")
    state = jax.jit(tx.init, out_shardings=ox.state_sharding(tx, params))(params)
    for device in jax.devices()[:8]:
        assert report.per_device["params"] == bytes_on(device, params)
        assert report.per_device["state"] == bytes_on(device, state)
    grads = 4 * (16 * 8 // 8 + 8 * 32 // 4 + 32)
    assert report.per_device["grads"] == grads
    assert report.per_device["total"] == sum(
        report.per_device[part] for part in ("params", "grads", "state")
    )
    # The sums over all devices are those of no device, as without shardings.
    assert report.total == ox.memory_report(tx, PARAMS, grads_dtype="float32").total


def test_shapes_on_a_mesh_without_devices():
    mesh = AbstractMesh((512,), ("fsdp",))
    kernel = jax.ShapeDtypeStruct(
        (1024, 64), "bfloat16", sharding=NamedSharding(mesh, P("fsdp"))
    )
    params = {"kernel": kernel, "bias": jax.ShapeDtypeStruct((64,), "bfloat16")}
    report = ox.memory_report(ox.scale_by_ema(), params)
    share = 1024 * 64 // 512 + 64
    assert report.per_device == {
        "params": 2 * share,
        "grads": 2 * share,
        "state": 4 * share + 4,
        "total": 8 * share + 4,
    }


def test_what_is_frozen_may_lie_on_the_mesh_alone():
    frozen = on_mesh(AxisType.Auto)
    report = ox.memory_report(ox.sgd(0.1), {"w": jnp.ones(3)}, frozen=frozen)
    assert report.per_device["params"] == bytes_on(jax.devices()[0], frozen) + 12
    assert report.per_device["grads"] == 12


def test_unknown_shares_are_none():
    assert ox.memory_report(ox.sgd(0.1), PARAMS).per_device is None
    meshes = (AbstractMesh((2,), ("a",)), AbstractMesh((4,), ("a",)))
    params = [
        jax.ShapeDtypeStruct((8,), "float32", sharding=NamedSharding(mesh, P("a")))
        for mesh in meshes
    ]
    assert ox.memory_report(ox.sgd(0.1), params[:1]).per_device["params"] == 16
    assert ox.memory_report(ox.sgd(0.1), params).per_device is None


def test_shares_are_printed_beside_the_whole():
    report = ox.memory_report(ox.muon(0.1), on_mesh(AxisType.Auto))
    header, _, *lines = str(report).splitlines()
    assert header.endswith("per device")
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[-1] for line in lines if line.startswith("  ")] == ["-", "-"]
    assert lines[-1].endswith(format_bytes(report.per_device["total"]))


def test_state_outside_of_labels_is_printed_as_shared():
    text = str(ox.memory_report(ox.master_weights(ox.muon(0.1)), PARAMS))
    assert "\n  shared state " in text


def test_refuses_what_is_no_transformation():
    with pytest.raises(TypeError, match=r"memory_report: tx=0\.1 is not allowed"):
        ox.memory_report(0.1, {"w": jnp.ones(3)})
