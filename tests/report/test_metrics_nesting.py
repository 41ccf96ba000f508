"""Metrics inside of and around other wrappers, on many devices, and in Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from tests.assertions import assert_same_types
from tests.problems import normal_tree
from tests.report.norms import RTOL, ZEROS, assert_metrics, expected

# Nesting


SMALL = {"dense": {"kernel": (5, 4), "bias": (4,)}}
P0 = normal_tree(SMALL, seed=1)
G0 = normal_tree(SMALL, seed=2)


def sgd():
    return ox.sgd(0.1, momentum=0.9)


def with_sgd():
    return ox.with_metrics(sgd())


def injected(tx):
    make = optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))
    return make(scale=1.0)


AROUND = {
    "chain": lambda tx: optax.chain(optax.identity(), optax.chain(tx)),
    "chain_in_float32": ox.chain_in_float32,
    "partition": lambda tx: optax.partition({"x": tx}, jax.tree.map(lambda _: "x", P0)),
    "masked": lambda tx: optax.masked(tx, True),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": injected,
    "route": lambda tx: ox.route(lambda roles, axes: tx),
    "accumulate": lambda tx: ox.accumulate(tx, 1),
    "lookahead": ox.lookahead,
    "quantize_state": lambda tx: ox.quantize_state(tx, min_size=1, block_size=8),
    "master_weights": ox.master_weights,
    "dynamic_loss_scale": lambda tx: ox.dynamic_loss_scale(tx, init_scale=1.0),
}


@pytest.mark.parametrize("around", AROUND)
def test_found_inside_of_every_wrapper(around: str):
    tx = AROUND[around](with_sgd())
    state = tx.init(P0)
    assert ox.metrics(state) == {"all": ZEROS}
    _, after = jax.jit(tx.update)(G0, state, P0)
    assert_same_types(after, state)
    wanted = expected(G0, optax.tree.scale(-0.1, G0), P0)
    assert_metrics(ox.metrics(after)["all"], wanted)


@pytest.mark.parametrize("inside", AROUND)
def test_found_around_every_wrapper(inside: str):
    tx = ox.with_metrics(AROUND[inside](sgd()))
    state = tx.init(P0)
    updates, after = jax.jit(tx.update)(G0, state, P0)
    assert_same_types(after, state)
    wanted = expected(G0, updates, P0)
    assert_metrics(ox.metrics(after)["all"], wanted)


@pytest.mark.parametrize(
    "split",
    [
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: ox.accumulate(tx, 2),
    ],
    ids=["MultiSteps", "accumulate"],
)
def test_micro_steps(split):
    inside, around = split(with_sgd()), ox.with_metrics(split(sgd()))
    mean = jax.tree.map(lambda g: 2 * g, G0)
    grads = [G0, jax.tree.map(lambda g: 3 * g, G0), mean]
    state, state_around = inside.init(P0), around.init(P0)
    kept, updates = [], []
    update, update_around = jax.jit(inside.update), jax.jit(around.update)
    for g in grads:
        _, state = update(g, state, P0)
        _, state_around = update_around(g, state_around, P0)
        kept.append(ox.metrics(state)["all"])
        updates.append(ox.metrics(state_around)["all"]["update_norm"])
    # Nothing before the first update, then the mean gradient, until the next update.
    assert kept[0]["grad_norm"] == 0
    np.testing.assert_allclose(kept[1]["grad_norm"], optax.tree.norm(mean), rtol=RTOL)
    assert kept[2] == kept[1]
    assert updates[0] == updates[2] == 0
    np.testing.assert_allclose(updates[1], kept[1]["update_norm"], rtol=RTOL)


def test_loss_scale():
    scaled = jax.tree.map(lambda g: 1024 * g, G0)
    bad = jax.tree.map(lambda g: g * jnp.inf, G0)
    inside = ox.dynamic_loss_scale(with_sgd(), init_scale=1024.0)
    around = ox.with_metrics(ox.dynamic_loss_scale(sgd(), init_scale=1024.0))
    for tx, size in ((inside, 1.0), (around, 1024.0)):
        _, state = tx.update(scaled, tx.init(P0), P0)
        found = ox.metrics(state)["all"]["grad_norm"]
        np.testing.assert_allclose(found, size * optax.tree.norm(G0), rtol=RTOL)
        _, state = tx.update(bad, state, P0)
        skipped = ox.metrics(state)["all"]
        if tx is inside:
            assert skipped["grad_norm"] == found
        else:
            assert skipped["grad_norm"] == np.inf
            assert skipped["update_norm"] == 0


def test_inside_of_master_weights_are_the_masters():
    p = jax.tree.map(lambda p: p.astype("bfloat16"), P0)
    tx = ox.master_weights(ox.with_metrics(ox.sgd(1e-4)))
    _, state = tx.update(G0, tx.init(p), p)
    # The parameters did not move, their masters did.
    masters = state.kept["master"]
    _, state = tx.update(G0, state, p)
    found = ox.metrics(state)["all"]
    update = optax.tree.scale(-1e-4, G0)
    assert_metrics(found, expected(G0, update, masters))


def test_none_and_several():
    message = (
        r"metrics: the state has 0 parts made by ox.with_metrics; it must have one"
    )
    for state in (sgd().init(P0), (), None, {"a": jnp.ones(2)}):
        with pytest.raises(ValueError, match=message):
            ox.metrics(state)
    labels = {"dense": {"kernel": "matrices", "bias": "vectors"}}
    tx = optax.partition({"matrices": with_sgd(), "vectors": with_sgd()}, labels)
    _, state = tx.update(G0, tx.init(P0), P0)
    with pytest.raises(ValueError, match=r"has 2 parts .* pass the part that you"):
        ox.metrics(state)
    for label, name in (("matrices", "kernel"), ("vectors", "bias")):
        found = ox.metrics(state.inner_states[label])["all"]
        g, p = G0["dense"][name], P0["dense"][name]
        assert_metrics(found, expected(g, -0.1 * g, p))


def test_of_two_around_each_other_the_outer_one_is_read():
    tx = ox.with_metrics(optax.chain(optax.scale(2.0), with_sgd()))
    _, state = tx.update(G0, tx.init(P0), P0)
    outer, inner = ox.metrics(state)["all"], ox.metrics(state.inner_state)["all"]
    np.testing.assert_allclose(inner["grad_norm"], 2 * outer["grad_norm"], rtol=RTOL)


# Devices


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_norms_of_sharded_arrays_are_of_the_whole(axis_type: AxisType):
    shapes = {"rows": (8, 4), "columns": (4, 16), "copies": (3,)}
    specs = {"rows": P("data", None), "columns": P(None, "data"), "copies": P()}
    params, grads = (normal_tree(shapes, seed=seed) for seed in (1, 2))
    tx = ox.with_metrics(ox.sgd(0.1), {"rows": "a", "columns": "a", "copies": "b"})
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    with jax.set_mesh(mesh):
        placed = [
            jax.tree.map(
                lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
                tree,
                specs,
            )
            for tree in (params, grads)
        ]
        state = tx.init(placed[0])
        abstract = jax.eval_shape(tx.update, placed[1], state, placed[0])[1]
        _, after = jax.jit(tx.update)(placed[1], state, placed[0])
    for one, other in zip(
        jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True
    ):
        assert jax.typeof(one).sharding.spec == jax.typeof(other).sharding.spec
    updates = optax.tree.scale(-0.1, grads)
    for label, names in (("a", ["rows", "columns"]), ("b", ["copies"])):
        parts = ([t[name] for name in names] for t in (grads, updates, params))
        wanted = expected(*parts)
        found = ox.metrics(after)[label]
        assert all(value.sharding.is_fully_replicated for value in found.values())
        assert_metrics(found, wanted)


def test_state_can_be_placed_and_mapped():
    mesh = jax.make_mesh((8,), ("data",))
    specs = jax.tree.map(lambda p: P(), P0)
    # A function is asked about the parameters ...
    tx = ox.with_metrics(sgd(), ox.label_params)
    placed = ox.state_sharding(tx, P0, ox.Placement(mesh, specs))
    assert jax.tree.structure(placed) == jax.tree.structure(tx.init(P0))
    # ... of which optax has none here, while a tree needs none.
    tx = ox.with_metrics(sgd(), ox.label_params(P0))
    marked, plain = (
        optax.tree_map_params(
            each, lambda _: "param", each.init(P0), transform_non_params=lambda _: "no"
        )
        for each in (tx, sgd())
    )
    assert marked.metrics == dict.fromkeys(
        ("adamw", "muon"), dict.fromkeys(ZEROS, "no")
    )
    assert marked.inner_state == plain


# Flax


def test_flax_linen_train_state_with_boxes():
    from flax import linen as nn
    from flax.training.train_state import TrainState

    init = nn.with_partitioning(nn.initializers.normal(0.1), (None, "model"))
    model = nn.Dense(2, kernel_init=init)
    x = jnp.ones((4, 3))
    params = {"Dense_0": model.init(jax.random.key(0), x)["params"]}
    grads = jax.tree.map(jnp.ones_like, params)
    for labels in (ox.label_params, ox.label_params(params)):
        tx = ox.with_metrics(ox.muon(0.1), labels)
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        after = state.apply_gradients(grads=grads)
        found = ox.metrics(after)
        assert found.keys() == {"muon", "adamw"}
        # Ones: the kernel has six, the bias two.
        np.testing.assert_allclose(found["muon"]["grad_norm"], 6**0.5, rtol=RTOL)
        np.testing.assert_allclose(found["adamw"]["grad_norm"], 2**0.5, rtol=RTOL)
        assert_same_types(after.opt_state, state.opt_state)


def test_flax_nnx_optimizer():
    from flax import nnx

    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    grads = jax.tree.map(jnp.ones_like, params)
    for labels in (ox.label_params, ox.label_params(params)):
        tx = optax.chain(ox.with_metrics(ox.muon(0.0), labels))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, grads)
        for state in (optimizer, optimizer.opt_state):
            found = ox.metrics(state)
            assert found.keys() == {"muon", "adamw"}
            assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found))
            norms = [found[label]["grad_norm"] for label in ("muon", "adamw")]
            np.testing.assert_allclose(norms, [6**0.5, 2**0.5], rtol=RTOL)
            size = np.hypot(*(found[label]["param_norm"] for label in found))
            wanted = np.linalg.norm(np.concatenate([p.ravel() for p in before]))
            np.testing.assert_allclose(size, wanted, rtol=RTOL)
