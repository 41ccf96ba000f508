"""Norms of gradients, updates and parameters against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_same_types, assert_trees_equal
from tests.problems import MIXED_SHAPES, cast, gradients, normal_tree
from tests.report.norms import NAMES, RTOL, ZEROS, assert_metrics, expected

PARAMS = normal_tree(MIXED_SHAPES, seed=1)
GRADS = gradients(MIXED_SHAPES, steps=4)
SMALL = {"dense": {"kernel": jnp.ones((5, 4)), "bias": jnp.ones(4)}}

# Whole subtrees have a label, single leaves have one, and several share one.
GROUPS = {
    "embedding": "table",
    "attention": "blocks",
    "layers": {"kernel": "blocks", "bias": "vectors"},
    "norm": {"scale": "vectors"},
    "temperature": "vectors",
}
# The same, written out.
IN_GROUP = {
    "table": lambda tree: tree["embedding"],
    "blocks": lambda tree: (tree["attention"], tree["layers"]["kernel"]),
    "vectors": lambda tree: (tree["layers"]["bias"], tree["norm"], tree["temperature"]),
}


def by_rank(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


IN_RANK = {
    "matrix": lambda tree: [x for x in jax.tree.leaves(tree) if x.ndim > 1],
    "vector": lambda tree: [x for x in jax.tree.leaves(tree) if x.ndim <= 1],
}
# Labels as they are given, and what is under each of them.
LABELS = {
    "none": (None, {"all": lambda tree: tree}),
    "string": ("everything", {"everything": lambda tree: tree}),
    "tree": (GROUPS, IN_GROUP),
    "function": (by_rank, IN_RANK),
}


def measured(params, grads=None, tx=None, **arguments):
    """What one step measures; the gradient is the parameters unless given."""
    grads = params if grads is None else grads
    tx = ox.with_metrics(optax.identity() if tx is None else tx, **arguments)
    _, state = tx.update(grads, tx.init(params), params)
    return ox.metrics(state)


# Values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("labels", LABELS)
def test_is_numpy_in_float64_step_by_step(labels: str, dtype: str):
    given, groups = LABELS[labels]
    plain = ox.adamw(0.1, weight_decay=0.1)
    tx = ox.with_metrics(plain, given)
    params = cast(PARAMS, dtype)
    state, plain_state = tx.init(params), plain.init(params)
    assert ox.metrics(state) == dict.fromkeys(groups, ZEROS)
    for g in GRADS:
        g = cast(g, dtype)
        updates, plain_state = plain.update(g, plain_state, params)
        ours, after = tx.update(g, state, params)
        assert_trees_equal(ours, updates)
        assert_trees_equal(after.inner_state, plain_state)
        assert_same_types(after, state)
        found = ox.metrics(after)
        assert found.keys() == groups.keys()
        for label, under in groups.items():
            # Of the parameters before the step.
            assert_metrics(found[label], expected(*map(under, (g, ours, params))))
        params, state = optax.apply_updates(params, updates), after


def test_labels_of_the_routing_tell_muon_from_adamw():
    tx = ox.with_metrics(ox.muon(0.1), ox.label_params)
    labels = jax.tree.leaves(ox.label_params(PARAMS))
    assert set(labels) == {"muon", "adamw"}
    updates, state = jax.jit(tx.update)(GRADS[0], tx.init(PARAMS), PARAMS)
    assert ox.metrics(state).keys() == {"muon", "adamw"}
    for label, found in ox.metrics(state).items():

        def under(tree, label=label):
            leaves = zip(jax.tree.leaves(tree), labels, strict=True)
            return [leaf for leaf, its in leaves if its == label]

        assert_metrics(found, expected(*map(under, (GRADS[0], updates, PARAMS))))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ox.adamw(0.1, weight_decay=0.1),
        lambda: optax.lion(0.1),
        lambda: optax.chain(ox.clip_by_global_norm(1.0), ox.lamb(0.1)),
    ],
    ids=["adamw", "optax.lion", "clipped-lamb"],
)
def test_compiled_updates_are_unchanged(make):
    plain, tx = make(), ox.with_metrics(make())
    state, plain_state = tx.init(PARAMS), plain.init(PARAMS)
    update, plain_update = jax.jit(tx.update), jax.jit(plain.update)
    for g in GRADS[:2]:
        ours, state = update(g, state, PARAMS)
        updates, plain_state = plain_update(g, plain_state, PARAMS)
        assert_trees_equal(ours, updates)


def test_gradients_are_what_arrives_and_updates_what_is_emitted():
    g, p = jnp.asarray([30.0, 40.0]), jnp.asarray([6.0, 8.0])
    clip, rule = ox.clip_by_global_norm(5.0), ox.sgd(0.1)
    inside = optax.chain(clip, ox.with_metrics(rule))
    around = ox.with_metrics(optax.chain(clip, rule))
    for tx, norm in ((inside, 5.0), (around, 50.0)):
        found = ox.metrics(tx.update(g, tx.init(p), p)[1])["all"]
        wanted = {
            "grad_norm": norm,
            "update_norm": 0.5,
            "param_norm": 10.0,
            "update_rms": 0.5 / 2**0.5,
            "param_rms": 10 / 2**0.5,
            "update_to_param": 0.05,
        }
        assert_metrics(found, wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_squares_of_low_precision_are_float32(dtype: str):
    # 300² is infinity in float16, and nine bits less of it are there in bfloat16.
    p = 300 * normal_tree({"w": (64, 64)}, seed=3)["w"].astype(dtype)
    assert_metrics(measured(p)["all"], expected(p, p, p))


def test_sums_are_no_running_sums():
    # Adding ones to a float32 one by one ends at 2^24.
    p = jnp.ones(2**25, jnp.float16)
    norm = jax.jit(lambda p: measured(p)["all"]["param_norm"])(p)
    np.testing.assert_allclose(norm, 2**12.5, rtol=RTOL)


def test_complex_parameters_count_by_their_size():
    rng = np.random.default_rng(0)
    p, g = (
        jnp.asarray(rng.standard_normal(5) + 1j * rng.standard_normal(5), "complex64")
        for _ in range(2)
    )
    tx = ox.sgd(0.1)
    update, _ = tx.update(g, tx.init(p), p)
    assert_metrics(measured(p, g, tx)["all"], expected(g, update, p))


@pytest.mark.usefixtures("x64")
def test_float64_is_summed_in_float64():
    # Squares of them are no numbers of float32, nor is the sum of both.
    p = {"a": jnp.asarray([3e25, 4e25]), "b": jnp.asarray([1.2e26], jnp.float64)}
    assert p["a"].dtype == jnp.float64
    assert_metrics(measured(p)["all"], expected(p, p, p))
    # One leaf in float32 beside one in float64.
    mixed = {"a": p["a"], "b": jnp.ones(3, jnp.float32)}
    assert_metrics(measured(mixed)["all"], expected(mixed, mixed, mixed))


def test_ratios_with_zero():
    zero, one = jnp.zeros(3), jnp.ones(3)
    with jax.debug_nans(True):
        assert measured(zero, zero)["all"]["update_to_param"] == 0
        assert measured(one, zero)["all"]["update_to_param"] == 0
        assert measured(zero, one)["all"]["update_to_param"] == np.inf


def test_limits_of_float32():
    found = measured(jnp.full(4, 1e25), jnp.full(4, 1e-25))["all"]
    assert found["param_norm"] == np.inf
    assert found["grad_norm"] == 0
    # The documented ones: the norm, and one entry.
    assert np.isfinite(measured(jnp.full(4, 0.9e19))["all"]["param_norm"])
    assert measured(jnp.full(4, 1.1e-19))["all"]["param_norm"] > 0
    found = measured(jnp.ones(2), jnp.asarray([jnp.nan, 1.0]))["all"]
    for name in NAMES:
        assert np.isnan(found[name]) == (not name.startswith("param")), name


# Trees


def test_holes_and_empty_leaves_are_passed_over():
    w = jnp.asarray([3.0, 4.0])
    holes = {"none": None, "masked": optax.MaskedNode(), "empty": jnp.zeros((0, 3))}
    for labels in (None, "all", dict.fromkeys(("w", *holes), "all")):
        found = measured({"w": w} | holes, labels=labels)
        assert_metrics(found["all"], expected(w, w, w))
    assert measured(holes) == measured({}) == {"all": ZEROS}
    assert measured({}, labels=by_rank) == {}


@pytest.mark.parametrize(
    ("labels", "others"),
    [
        # A tree is known as a whole; a function sees what is left of the parameters.
        ({"w": "matrix", "b": "vector"}, {"vector": ZEROS}),
        (by_rank, {}),
    ],
    ids=["tree", "function"],
)
def test_labels_of_masked_trees(labels, others):
    params = {"w": jnp.asarray([[3.0, 4.0]]), "b": jnp.asarray([12.0])}
    tx = optax.masked(ox.with_metrics(ox.sgd(0.1), labels), {"w": True, "b": False})
    _, state = tx.update(params, tx.init(params), params)
    found = ox.metrics(state)
    w = params["w"]
    assert_metrics(found.pop("matrix"), expected(w, -0.1 * w, w))
    assert found == others


def test_extra_arguments_reach_the_transformation():
    tx = ox.with_metrics(ox.sophia(0.1))
    plain = ox.sophia(0.1)
    hessian = jax.tree.map(jnp.abs, PARAMS)
    ours, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, hessian=hessian)
    theirs, _ = plain.update(GRADS[0], plain.init(PARAMS), PARAMS, hessian=hessian)
    assert_trees_equal(ours, theirs)


# Transformations of JAX


def test_a_scan_stacks_them_and_vmap_keeps_them_apart():
    tx = ox.with_metrics(ox.sgd(0.1))
    p = jnp.ones(2)
    grads = jnp.asarray([[3.0, 4.0], [6.0, 8.0]])

    def step(state, g):
        _, state = tx.update(g, state, p)
        return state, state

    _, states = jax.lax.scan(step, tx.init(p), grads)
    members = jax.vmap(lambda g: step(tx.init(p), g)[0])(grads)
    for stacked in (states, members):
        norms = ox.metrics(stacked)["all"]["grad_norm"]
        np.testing.assert_allclose(norms, [5.0, 10.0], rtol=RTOL)


def test_one_reduction_for_each_leaf_and_quantity():
    tx = ox.with_metrics(optax.scale(2.0), by_rank)
    jaxpr = jax.make_jaxpr(tx.update)(GRADS[0], tx.init(PARAMS), PARAMS)
    names = [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]
    assert names.count("reduce_sum") == 3 * len(jax.tree.leaves(PARAMS))
    assert sum("reduce" in name for name in names) == names.count("reduce_sum")


def training_temporaries(tx) -> float:
    """Bytes per parameter that a step of training a deep network stores on a CPU."""
    params = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 12
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32)

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    compiled = step.lower(params, jax.eval_shape(tx.init, params), x).compile()
    size = sum(p.size for p in params)
    return compiled.memory_analysis().temp_size_in_bytes / size


def test_a_training_step_stores_no_more_than_single_leaves():
    # An update that is measured is stored, and a parameter that is overwritten: of two
    # layers in twelve, and not of all of them.
    plain = training_temporaries(ox.adamw(0.1))
    assert training_temporaries(ox.with_metrics(ox.adamw(0.1))) <= plain + 4 * 2 / 12


# Errors


SGD = ox.with_metrics(ox.sgd(0.1))


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (
            TypeError,
            lambda: ox.with_metrics(0.1),
            r"with_metrics: tx=0.1 is not allowed; it must be an optax.Gradient",
        ),
        (
            TypeError,
            lambda: ox.with_metrics(ox.sgd(0.1), 3),
            r"with_metrics: labels=3 is not allowed; it must be a string",
        ),
        (
            TypeError,
            lambda: ox.with_metrics(ox.sgd(0.1), {"dense": {"kernel": "a", "bias": 1}}),
            r"with_metrics: labels=1 at 'dense/bias' is not allowed; it must be a str",
        ),
        (
            TypeError,
            lambda: ox.with_metrics(
                ox.sgd(0.1), lambda p: jax.tree.map(jnp.ndim, p)
            ).init(SMALL),
            r"with_metrics: labels=1 at 'dense/bias' is not allowed",
        ),
        (
            ValueError,
            lambda: ox.with_metrics(ox.sgd(0.1), {"conv": "a"}).init(SMALL),
            r"with_metrics: labels is not a prefix of the parameters' tree: ",
        ),
        (
            TypeError,
            lambda: ox.with_metrics(optax.identity()).init({"n": jnp.ones(2, "int8")}),
            r"with_metrics: parameter 'n' of dtype int8 is not allowed",
        ),
        (
            ValueError,
            lambda: SGD.update(SMALL, SGD.init(SMALL)),
            r"with_metrics: params=None is not allowed; .*update\(grads, state, params",
        ),
        (
            ValueError,
            lambda: SGD.update(SMALL, ox.sgd(0.1).init(SMALL), SMALL),
            r"with_metrics: a state with tuple is not allowed; it must be a Metri",
        ),
        (
            ValueError,
            lambda: SGD.update(
                SMALL, ox.with_metrics(ox.sgd(0.1), "matrices").init(SMALL), SMALL
            ),
            r"a state with the labels \['matrices'\] is not .* the labels \['all'\]",
        ),
    ],
)
def test_wrong_arguments_are_refused(error, call, message: str):
    with pytest.raises(error, match=message):
        call()


def test_labels_that_change_are_refused():
    # In the state they would change its structure from one step to the next.
    answers = iter(["a", "b"])
    tx = ox.with_metrics(ox.sgd(0.1), lambda params: next(answers))
    state = tx.init(SMALL)
    with pytest.raises(ValueError, match=r"labels \['a'\] is not .* labels \['b'\]"):
        tx.update(SMALL, state, SMALL)
