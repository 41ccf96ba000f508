"""Bytes counted from abstract states against bytes of real ones."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxplus as ox

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


def test_prints_an_aligned_table_and_gives_plain_data():
    report = ox.memory_report(ox.muon(0.1), PARAMS)
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{NUM_PARAMS:,} parameters")
    assert len({len(line) for line in lines}) == 1
    assert any(line.startswith("  state of muon") for line in lines)
    assert report.to_dict()["by_label"] == report.by_label
