"""Routing inside a training loop: Flax's optimizers, boxes, frozen and own roles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import optaxplus as ox
from optaxplus import DEFAULT_RULES, MatrixAxes, Rule
from tests.assertions import assert_same_types, assert_trees_close, assert_trees_equal
from tests.partition.routing_tables import abstract
from tests.problems import normal_tree

IN_OUT = MatrixAxes((0,), (1,))
SHAPES = {
    "wte": (5, 4),
    "dense": {"kernel": (4, 3), "bias": (3,)},
    "base": {"w": (4, 4)},
}
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = normal_tree(SHAPES, seed=1)
FREEZE = (Rule(r"^base/", IN_OUT, "frozen"), *DEFAULT_RULES)


# What `build` is given


def test_build_sees_roles_and_axes_of_the_whole_tree():
    seen = []

    def build(roles, axes):
        seen.append((roles, axes))
        return optax.identity()

    tx = ox.route(build, FREEZE)
    state = tx.init(PARAMS)
    tx.update(GRADS, state, PARAMS)
    roles, axes = seen[0]
    assert seen == [(roles, axes)] * 2
    assert roles == {
        "wte": "embedding",
        "dense": {"kernel": "hidden", "bias": "vector"},
        "base": {"w": "frozen"},
    }
    assert axes == {
        "wte": IN_OUT,
        "dense": {"kernel": IN_OUT, "bias": MatrixAxes((), (0,))},
        "base": {"w": IN_OUT},
    }


def test_state_and_updates_are_those_of_the_inner_transformation():
    inner = optax.adam(0.1)
    tx = ox.route(lambda roles, axes: inner)
    state, expected_state = tx.init(PARAMS), inner.init(PARAMS)
    assert_trees_equal(state, expected_state)
    result = tx.update(GRADS, state, PARAMS)
    assert_trees_equal(result, inner.update(GRADS, expected_state, PARAMS))


def test_extra_arguments_pass_and_unknown_ones_are_dropped():
    def update(updates, state, params=None, *, value=None, **extra):
        assert set(extra) <= {"unknown"}
        return jax.tree.map(lambda u: u * value, updates), state

    reads = optax.GradientTransformationExtraArgs(lambda params: (), update)
    updates, _ = ox.route(lambda *_: reads).update(GRADS, (), PARAMS, value=2.0)
    assert_trees_equal(updates, jax.tree.map(lambda g: g * 2.0, GRADS))
    plain = ox.route(lambda *_: optax.scale(3.0))
    updates, _ = plain.update(GRADS, plain.init(PARAMS), PARAMS, unknown=1)
    assert_trees_equal(updates, jax.tree.map(lambda g: g * 3.0, GRADS))


def test_evidence_reaches_groups_that_do_not_see_it():
    # The bias that tells the stack is masked away from the group of matrices.
    params = {
        "layers": {"kernel": normal_tree((3, 4, 5), seed=0), "bias": jnp.ones((3, 5))}
    }
    tx = ox.route(
        lambda roles, axes: optax.partition(
            {"hidden": ox.trust_ratio(axes=axes), "vector": optax.identity()},
            lambda _: roles,
        )
    )
    updates, _ = tx.update(params, tx.init(params), params)
    # Each of the three layers has ratio 1: its update is as long as its weights.
    assert_trees_close(updates, params, rtol=1e-6)
    doubled = {"layers": {**params["layers"]}}
    doubled["layers"]["kernel"] = doubled["layers"]["kernel"].at[0].multiply(2.0)
    updates, _ = tx.update(doubled, tx.init(params), params)
    assert_trees_close(updates, params, rtol=1e-6)  # one step length a layer


def test_abstract_parameters():
    tx = ox.muon(0.1, rules=FREEZE)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    state = jax.eval_shape(tx.init, shapes)
    assert_same_types(state, jax.eval_shape(lambda: tx.init(PARAMS)))


def test_errors_carry_the_name_of_the_optimizer():
    tree = abstract({"e": (2, 3, 4)})
    for name in ("muon", "adam_mini", "mars"):
        with pytest.raises(ValueError, match=f"^{name}: no rule decides"):
            getattr(ox, name)(0.1).init(tree)
    tx = ox.route(lambda *_: optax.identity(), name="mine")
    with pytest.raises(ValueError, match=r"^mine: no rule decides"):
        tx.init(tree)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (DEFAULT_RULES, r"route: no rule decides .*'e' of shape \(2, 3, 4\)"),
        (
            (
                Rule("x", IN_OUT, "hidden"),
                Rule("e", MatrixAxes((1,), (2,)), "hidden"),
            ),
            "route: the rule 'x' matches no parameter",
        ),
        (
            (Rule("e", MatrixAxes((0,), (4,)), "hidden"),),
            "route: parameter 'e': .*axis 4",
        ),
    ],
)
def test_errors_come_at_init(rules, message: str):
    tx = ox.route(lambda *_: optax.identity(), rules)
    with pytest.raises(ValueError, match="(?s)" + message):
        tx.init(abstract({"e": (2, 3, 4)}))


# Frozen parameters and roles of one's own


def test_frozen_parameters_have_no_state_and_do_not_move():
    tx = ox.muon(0.1, rules=FREEZE)
    state = tx.init(PARAMS)
    moments = [x.shape for x in jax.tree.leaves(state) if x.shape]
    # Muon's average of the kernel; Adam's two moments of embedding and bias.
    assert sorted(moments) == sorted([(4, 3), (5, 4), (5, 4), (3,), (3,)])
    updates, _ = tx.update(GRADS, state, PARAMS)
    np.testing.assert_array_equal(updates["base"]["w"], np.zeros((4, 4)))
    without = {name: PARAMS[name] for name in ("wte", "dense")}
    small = ox.muon(0.1)
    expected, _ = small.update(
        {name: GRADS[name] for name in without}, small.init(without), without
    )
    assert_trees_equal({name: updates[name] for name in without}, expected)


def test_everything_frozen_is_no_state_at_all():
    rules = (Rule(r"", lambda path, shape, siblings: _any_axes(shape), "frozen"),)
    tx = ox.muon(0.1, rules=rules)
    assert not [x for x in jax.tree.leaves(tx.init(PARAMS)) if x.shape]
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, GRADS))


def _any_axes(shape: tuple[int, ...]) -> MatrixAxes:
    return MatrixAxes((), tuple(range(len(shape))))


def test_a_nan_gradient_of_a_frozen_parameter_does_no_harm():
    grads = {**GRADS, "base": {"w": jnp.full((4, 4), jnp.nan)}}
    tx = ox.muon(0.1, rules=FREEZE, clip_norm=1.0)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_trees_equal(updates, expected)


def test_integer_parameters_may_be_frozen():
    params = {"w": jnp.ones((2, 3)), "step": jnp.ones((), jnp.int32)}
    rules = (Rule("step", MatrixAxes((), ()), "frozen"), *DEFAULT_RULES)
    tx = ox.muon(0.1, rules=rules)
    updates, _ = tx.update(params, tx.init(params), params)
    assert_trees_equal(updates["step"], jnp.zeros((), jnp.int32))
    with pytest.raises(TypeError, match="parameter 'step' of dtype int32"):
        ox.muon(0.1).init(params)


def test_roles_of_ones_own_go_to_their_fallback():
    rules = (Rule(r"^wte", IN_OUT, "sparse"), *FREEZE)
    tx = ox.muon(0.1, rules=rules, fallback={"sparse": optax.sgd(0.5)})
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["wte"], -0.5 * GRADS["wte"])
    # The others stay with AdamW.
    plain = ox.muon(0.1, rules=FREEZE)
    expected, _ = plain.update(GRADS, plain.init(PARAMS), PARAMS)
    assert_trees_equal(updates["dense"], expected["dense"])


def test_a_role_without_a_transformation_is_refused_at_init():
    rules = (Rule(r"^wte", IN_OUT, "sparse"), *DEFAULT_RULES)
    message = r"muon: parameter 'wte' has the label 'sparse', .*fallback=\{'sparse': "
    with pytest.raises(ValueError, match=message):
        ox.muon(0.1, rules=rules).init(PARAMS)


# Clipping before the split


def trainable(tree):
    return {name: tree[name] for name in ("wte", "dense")}


def test_clip_norm_is_the_norm_of_all_trainable_gradients():
    scaled = jax.tree.map(lambda g: 100.0 * g, GRADS)
    # Adam's eps is as large as the clipped gradient, so that its size shows; matrices
    # go to plain SGD by a role of their own.
    rules = (Rule(r"kernel$", IN_OUT, "plain"), *FREEZE)
    arguments = {
        "rules": rules,
        "fallback": {"plain": optax.sgd(1.0)},
        "adamw_eps": 1.0,
    }
    clipped, plain = ox.muon(1.0, clip_norm=0.7, **arguments), ox.muon(1.0, **arguments)
    norm = optax.tree.norm(trainable(scaled))
    assert norm > 10 * optax.tree.norm(trainable(GRADS))
    by_hand = jax.tree.map(lambda g: g * 0.7 / norm, scaled)
    updates, _ = clipped.update(scaled, clipped.init(PARAMS), PARAMS)
    expected, _ = plain.update(by_hand, plain.init(PARAMS), PARAMS)
    # Float32 roundings.
    assert_trees_close(updates, expected, rtol=1e-5)
    kernel = 0.7 * optax.tree.norm(scaled["dense"]["kernel"]) / norm
    np.testing.assert_allclose(
        optax.tree.norm(updates["dense"]["kernel"]), kernel, rtol=1e-5
    )


def test_clip_norm_leaves_short_gradients():
    clipped, plain = (
        ox.muon(0.1, clip_norm=1e3, rules=FREEZE),
        ox.muon(0.1, rules=FREEZE),
    )
    ours, _ = clipped.update(GRADS, clipped.init(PARAMS), PARAMS)
    theirs, _ = plain.update(GRADS, plain.init(PARAMS), PARAMS)
    assert_trees_equal(ours, theirs)


# Flax's training loops


class Linen(nn.Module):
    partitioned: bool = False

    @nn.compact
    def __call__(self, tokens):
        init = nn.initializers.lecun_normal()
        if self.partitioned:
            init = nn.with_partitioning(init, ("in", "out"))
        x = nn.Embed(7, 4, name="embed")(tokens)
        x = nn.Dense(8, kernel_init=init, name="up")(x)
        return nn.Dense(7, use_bias=False, name="lm_head")(jnp.tanh(x))


TOKENS = jnp.arange(14).reshape(2, 7) % 7


def loss_of(logits: jax.Array) -> jax.Array:
    targets = jnp.roll(TOKENS, 1, axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def linen_loss(model):
    return lambda params: loss_of(model.apply({"params": params}, TOKENS))


def test_flax_train_state():
    model = Linen()
    params = model.init(jax.random.key(0), TOKENS)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=ox.muon(0.05))
    structure = jax.tree.structure(state)

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(linen_loss(model))(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(20):
        state, loss = step(state)
        losses.append(float(loss))
    assert jax.tree.structure(state) == structure
    # The targets are a function of the tokens, which twenty steps of 0.05 learn.
    assert losses[-1] < 0.5 * losses[0]


def test_linen_partitioning_boxes():
    boxed_model, model = Linen(partitioned=True), Linen()
    boxed = boxed_model.init(jax.random.key(0), TOKENS)["params"]
    assert isinstance(boxed["up"]["kernel"], nn.Partitioned)
    params = nn.unbox(boxed)
    tx = ox.muon(0.05)

    @partial(jax.jit, static_argnums=0)
    def step(loss, params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    loss, boxed_loss = linen_loss(model), linen_loss(boxed_model)
    state, boxed_state = tx.init(params), tx.init(boxed)
    for _ in range(3):
        params, state = step(loss, params, state)
        boxed, boxed_state = step(boxed_loss, boxed, boxed_state)
    assert isinstance(boxed["up"]["kernel"], nn.Partitioned)
    assert_trees_equal(nn.unbox(boxed), params)
    assert_trees_equal(nn.unbox(boxed_state), state)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.lm_head = nnx.Linear(8, 7, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        return self.lm_head(jnp.tanh(self.up(self.embed(tokens))))


def nnx_loss(model):
    return loss_of(model(TOKENS))


def test_nnx_optimizer():
    model = Nnx(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    params = nnx.as_pure(params)
    optimizer = nnx.Optimizer(model, ox.muon(0.05), wrt=nnx.Param)
    tx = ox.muon(0.05)
    state = tx.init(params)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(nnx_loss)(model)
        optimizer.update(model, grads)
        return loss

    @jax.jit
    def step_on_arrays(params, state):
        grads = jax.grad(lambda p: nnx_loss(nnx.merge(graph, p)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    losses = []
    for _ in range(4):
        losses.append(float(step(model, optimizer)))
        params, state = step_on_arrays(params, state)
    # The same steps as on bare arrays; two programs may round differently, which
    # bfloat16 products inside Muon show as 2^-9 of an update of 0.05·0.2.
    trained = nnx.as_pure(nnx.state(model, nnx.Param))
    assert_trees_close(trained, params, rtol=1e-3)
    assert losses[-1] < losses[0]


LABELLED = {"muon": optax.set_to_zero(), "adamw": optax.sgd(1.0)}


@pytest.mark.parametrize("combine", [optax.partition, optax.multi_transform])
def test_nnx_labels_reach_optax(combine):
    model = Nnx(nnx.Rngs(0))
    before = nnx.as_pure(nnx.state(model, nnx.Param))
    before = jax.tree.map(jnp.copy, before)
    tx = combine(LABELLED, ox.label_params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(nnx_loss)(model))
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(after["up"]["kernel"], before["up"]["kernel"])
    assert np.abs(after["lm_head"]["kernel"] - before["lm_head"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("combine", [optax.partition, optax.multi_transform])
@pytest.mark.parametrize("as_tree", [False, True])
def test_train_state_takes_labels(combine, as_tree: bool):
    model = Linen()
    params = model.init(jax.random.key(0), TOKENS)["params"]
    labels = ox.label_params(params) if as_tree else ox.label_params
    tx = combine(LABELLED, labels)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    after = state.apply_gradients(grads=jax.grad(linen_loss(model))(params)).params
    np.testing.assert_array_equal(after["up"]["kernel"], params["up"]["kernel"])
    assert np.abs(after["lm_head"]["kernel"] - params["lm_head"]["kernel"]).max() > 1e-3


def test_rules_are_checked_at_construction():
    with pytest.raises(TypeError, match=r"rules=Rule\(.*must be a sequence of Rule"):
        ox.muon(0.1, rules=ox.Rule("w", ox.MatrixAxes((0,), (1,)), "hidden"))
    with pytest.raises(TypeError, match="rules='x' is not allowed; every entry"):
        ox.muon(0.1, rules=("x",))
