"""What the README says of checkpoints: saved and restored by Orbax.

Bit by bit in the whole product of optimizers, wrappers and meshes elsewhere
(`test_sharding_contract`, `sharding/test_storage`); here what users change meanwhile.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from tests.assertions import assert_same_types, assert_trees_equal
from tests.problems import cast, normal_tree

Tx = optax.GradientTransformation

SHAPES = {"embedding": (8, 64), "hidden": (64, 128), "norm": (64,)}
PARAMS = normal_tree(SHAPES, seed=1)
GRADS = normal_tree(SHAPES, seed=2)


def schedule(step: Any) -> jax.Array:
    return 0.1 / (1 + step)


def filled(tx: Tx, params: Any = PARAMS) -> Any:
    """A state with something in it, nothing of which is computed."""
    return jax.tree.map(
        lambda x: (jnp.arange(1, 1 + x.size) % 100).reshape(x.shape).astype(x.dtype),
        jax.eval_shape(tx.init, params),
    )


def after_a_step(tx: Tx, params: Any = PARAMS) -> Any:
    return jax.jit(tx.update)(GRADS, tx.init(params), params)[1]


def restored(path: Path, state: Any, target: Any) -> Any:
    """`state`, saved and read again into the structure of `target`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", target)


def in_few_bits(learning_rate: Any, **arguments: Any) -> Tx:
    return ox.master_weights(ox.quantize_state(ox.muon(learning_rate, **arguments)))


def test_a_state_in_few_bits_is_restored_with_other_numbers(tmp_path):
    params = cast(PARAMS, "bfloat16")
    state = filled(in_few_bits(0.1), params)
    assert optax.tree.get(state, "kept")["master"]["hidden"].dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} >= {"int8", "float32"}
    other = in_few_bits(0.03, b1=0.9, weight_decay=0.0, adamw_b2=0.99, clip_norm=1.0)
    again = restored(tmp_path, state, jax.eval_shape(other.init, params))
    assert_same_types(again, state)
    assert_trees_equal(again, state)


def test_a_state_in_few_bits_is_restored_onto_a_mesh(tmp_path):
    params = cast(PARAMS, "bfloat16")
    tx = in_few_bits(0.1)
    state = filled(tx, params)
    mesh = jax.make_mesh((4,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:4])
    params = jax.device_put(params, NamedSharding(mesh, P("fsdp")))
    shardings = ox.state_sharding(tx, params)
    target = jax.tree.map(
        lambda x, sharding: x.update(sharding=sharding),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    again = restored(tmp_path, state, target)
    assert_trees_equal(again, state)
    assert jax.tree.map(lambda x: x.sharding, again) == shardings
    master = optax.tree.get(again, "kept")["master"]["hidden"]
    assert master.sharding.spec == P("fsdp", None)


# Another optimizer

# What the message of Orbax names in each case.
CHANGES: dict[str, tuple[Tx, Tx, str]] = {
    "another rule": (ox.adamw(0.1), ox.muon(0.1), "inner_states"),
    "a field more": (ox.lion(0.1), ox.adamw(0.1), "count"),
    "fields less": (ox.adamw(0.1), ox.lion(0.1), r"\.nu\b"),
    "a schedule": (ox.adamw(0.1), ox.adamw(schedule), "'1', 'count'"),
    "no schedule": (ox.adamw(schedule), ox.adamw(0.1), r"\[1\]"),
    "a link in front": (
        optax.chain(ox.scale_by_adam(), ox.descend(0.1)),
        optax.chain(ox.clip_by_global_norm(1.0), ox.scale_by_adam(), ox.descend(0.1)),
        "'1', 'count'",
    ),
    "a wrapper": (ox.adamw(0.1), ox.quantize_state(ox.adamw(0.1)), "'count'"),
    "another code": (
        ox.lion8bit(0.1),
        ox.lion8bit(0.1, code="dynamic"),
        "'signed_dynamic'",
    ),
    "another sign": (
        ox.lion8bit(0.1),
        ox.quantize_state(ox.lion(0.1), fields={"mu": "unsigned"}),
        "'unsigned_root'",
    ),
    "optax's": (optax.adamw(0.1), ox.adamw(0.1), "structures do not match"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_structure_is_refused(name, tmp_path):
    before, after, message = CHANGES[name]
    target = jax.eval_shape(after.init, PARAMS)
    with pytest.raises(ValueError, match=message):
        restored(tmp_path, filled(before), target)


def test_another_shape_is_refused(tmp_path):
    # One array: of several Orbax leaves some to the garbage collector, which complains.
    tx = ox.scale_by_lion()
    old, new = ({"w": jnp.ones(shape)} for shape in ((8, 4), (9, 4)))
    with pytest.raises(ValueError, match=r"\(9, 4\) .*\(8, 4\)"):
        restored(tmp_path, filled(tx, old), jax.eval_shape(tx.init, new))


def by_path(old: Any, fresh: Any) -> Any:
    """What has the same place in both is taken from `old`."""
    found = dict(jax.tree.leaves_with_path(old))
    return jax.tree.map_with_path(lambda path, x: found.get(path, x), fresh)


def by_name(*names: str) -> Callable[[Any, Any], Any]:
    def carry_over(old: Any, fresh: Any) -> Any:
        return optax.tree.set(fresh, **{k: optax.tree.get(old, k) for k in names})

    return carry_over


def update_of(tx: Tx, state: Any) -> Any:
    return jax.jit(tx.update)(GRADS, state, PARAMS)[0]


def test_moments_are_carried_over_by_their_paths():
    old, fresh = filled(ox.muon(0.1)), ox.muon(schedule).init(PARAMS)
    state = by_path(old, fresh)
    assert_same_types(state, fresh)
    kept, found = (dict(jax.tree.leaves_with_path(tree)) for tree in (old, state))
    assert_trees_equal([found[path] for path in kept], list(kept.values()))
    # The schedules of both groups begin.
    assert [int(found[path]) for path in found if path not in kept] == [0, 0]


def test_moments_and_steps_are_carried_over_by_their_names():
    scheduled = ox.adamw(schedule)
    carry_over = by_name("count", "mu", "nu")
    state = carry_over(after_a_step(ox.adamw(0.1)), scheduled.init(PARAMS))
    # A schedule continues, too: all counters have the name.
    assert_trees_equal(state, after_a_step(scheduled))


def test_moments_of_optax_are_carried_over():
    theirs, ours = optax.adamw(0.1, weight_decay=0.1), ox.adamw(0.1, weight_decay=0.1)
    old = after_a_step(theirs)
    state = by_name("count", "mu", "nu")(old, ours.init(PARAMS))
    for ours_now, theirs_now in zip(
        jax.tree.leaves(update_of(ours, state)),
        jax.tree.leaves(update_of(theirs, old)),
        strict=True,
    ):
        # Both correct the bias by 1 - b2² = 2e-3, known to 6e-8: to 3e-5.
        assert jnp.allclose(ours_now, theirs_now, rtol=3e-5, atol=0)


# What is not refused


def test_another_dtype_is_cast(tmp_path):
    state = after_a_step(ox.adamw(0.1))
    target = jax.eval_shape(ox.adamw(0.1, mu_dtype="bfloat16").init, PARAMS)
    again = restored(tmp_path, state, target)
    assert_trees_equal(again[0].mu, cast(state[0].mu, "bfloat16"))
    assert_trees_equal(again[0].nu, state[0].nu)


def test_injected_hyperparameters_come_back(tmp_path):
    inject = optax.inject_hyperparams(ox.adamw, hyperparam_dtype=jnp.float32)
    target = jax.eval_shape(inject(learning_rate=0.3).init, PARAMS)
    again = restored(tmp_path, inject(learning_rate=0.1).init(PARAMS), target)
    assert again.hyperparams["learning_rate"] == jnp.float32(0.1)
    changed = optax.tree.set(again, learning_rate=jnp.float32(0.3))
    expected = inject(learning_rate=0.3)
    assert_trees_equal(
        update_of(expected, changed), update_of(expected, expected.init(PARAMS))
    )
