"""Sophia: the authors' code, wrappers around it, and Flax."""

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
from tests.assertions import assert_finite, assert_same_types, assert_trees_close
from tests.problems import gradients, normal_tree
from tests.references.sophia_trajectories import load_sophia_trajectories
from tests.selection import mostly

RECORDED = load_sophia_trajectories()
PARAMS = normal_tree({"w": (3, 4), "b": (4,)}, seed=1)
GRADS = gradients({"w": (3, 4), "b": (4,)}, steps=3)
KEY = jax.random.key(0)


def six_times(params):
    return jax.tree.map(lambda p: 6.0 * p, params)


# Relative to the largest parameter: 25 steps of some roundings each.
TOLERANCES = {"float64": 1e-14, "float32": 3e-6}


@pytest.mark.parametrize("dtype", mostly(["float64"], TOLERANCES))
@pytest.mark.parametrize("name", RECORDED.cases)
def test_recorded(name: str, dtype: str):
    """The authors' Sophia-G, and another package's Sophia-H in the paper's order."""
    case = RECORDED.cases[name]
    tx = ox.sophia(case.learning_rate, **case.arguments)
    with jax.enable_x64(dtype == "float64"):

        @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        def train(params, grads, hessians):
            def step(carry, given):
                params, state = carry
                g, hessian = given
                updates, state = tx.update(g, state, params, hessian=hessian)
                params = optax.apply_updates(params, updates)
                return (params, state), params

            return jax.lax.scan(step, (params, tx.init(params)), (grads, hessians))[1]

        ours = train(
            *(
                {key: jnp.asarray(x, dtype) for key, x in tree.items()}
                for tree in (RECORDED.params, RECORDED.grads, case.hessians)
            )
        )
    assert_trees_close(ours, case.trajectories[dtype], rtol=TOLERANCES[dtype])


# Wrappers

WRAPPERS = {
    "accumulate": partial(ox.accumulate, every_k=1),
    "lookahead": partial(ox.lookahead, every_k=3, alpha=1.0),
    "quantize_state": ox.quantize_state,
    "master_weights": ox.master_weights,
    "compensated": ox.compensated,
    "stochastic_rounding": ox.stochastic_rounding,
    "route": lambda tx: ox.route(lambda roles, axes: tx),
    "chain_in_float32": ox.chain_in_float32,
    "MultiSteps": partial(optax.MultiSteps, every_k_schedule=1),
    "apply_if_finite": partial(optax.apply_if_finite, max_consecutive_errors=2),
    "chain": lambda tx: optax.chain(ox.clip_by_global_norm(1e9), tx),
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition({"all": tx}, lambda p: "all"),
}


def run(tx, hessian, grads=GRADS, params=PARAMS):
    state, updates = tx.init(params), []
    for g in grads:
        update, state = tx.update(g, state, params, hessian=hessian)
        updates.append(update)
    return updates


ARGUMENTS = {"gamma": 1.0, "update_interval": 2}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("kind", mostly(["function"], ["pytree", "function"]))
def test_wrappers_pass_the_estimate_on(wrapper, kind: str):
    hessian = six_times if kind == "function" else six_times(PARAMS)
    expected = run(ox.sophia(0.1, **ARGUMENTS), six_times(PARAMS))
    ours = run(wrapper(ox.sophia(0.1, **ARGUMENTS)), hessian)
    # Some are branches, which are compiled; parameters and a step are added and
    # subtracted again.
    for update, wanted in zip(ours, expected, strict=True):
        assert_trees_close(update, wanted, rtol=3e-5)


def test_beside_muon():
    """The estimate of the whole tree reaches the group that is left to Sophia."""
    sophia = ox.sophia(0.1, **ARGUMENTS)
    tx = ox.muon(0.1, fallback=sophia)
    bias = [{"b": g["b"]} for g in GRADS]
    expected = run(sophia, six_times({"b": PARAMS["b"]}), bias, {"b": PARAMS["b"]})
    for hessian in (six_times(PARAMS), lambda _: six_times(PARAMS)):
        for update, wanted in zip(run(tx, hessian), expected, strict=True):
            assert_trees_close({"b": update["b"]}, wanted, rtol=3e-7)


def test_around_a_direction():
    tx = optax.chain(
        ox.cautious(ox.scale_by_sophia(gamma=1.0)), ox.descend(0.1, weight_decay=0.1)
    )
    ours = run(tx, six_times)
    for update, wanted in zip(ours, run(tx, six_times(PARAMS)), strict=True):
        assert_trees_close(update, wanted, rtol=1e-6)  # compiled and not


def test_a_loss_scale_does_not_scale_the_estimate():
    tx = ox.dynamic_loss_scale(ox.sophia(0.1, **ARGUMENTS), init_scale=1024.0)
    scaled = [jax.tree.map(lambda g: 1024.0 * g, g) for g in GRADS]
    expected = run(ox.sophia(0.1, **ARGUMENTS), six_times(PARAMS))
    for update, wanted in zip(run(tx, six_times, scaled), expected, strict=True):
        assert_trees_close(update, wanted, rtol=3e-7)  # compiled and not


def test_accumulation_calls_the_function_once_per_update():
    calls = []

    def hessian(params):
        jax.debug.callback(lambda: calls.append(1))
        return six_times(params)

    tx = ox.accumulate(ox.sophia(0.1, update_interval=1), every_k=3)
    run(tx, hessian)
    jax.effects_barrier()
    assert len(calls) == 1


def test_injected_hyperparameters():
    tx = optax.inject_hyperparams(
        ox.sophia,
        static_args=("update_interval", "first_refresh"),
        hyperparam_dtype=jnp.float32,
    )(learning_rate=0.1, **ARGUMENTS)
    expected = run(ox.sophia(0.1, **ARGUMENTS), six_times(PARAMS))
    for update, wanted in zip(run(tx, six_times), expected, strict=True):
        assert_trees_close(update, wanted, rtol=1e-5)  # 1 - b1 in float32


def test_a_function_gets_the_params_as_they_are():
    narrow = jax.tree.map(lambda p: p.astype("bfloat16"), PARAMS)
    seen = []

    def hessian(params):
        seen.append({leaf.dtype.name for leaf in jax.tree.leaves(params)})
        return six_times(params)

    grads = jax.tree.map(lambda g: g.astype("bfloat16"), GRADS[0])
    for wrapper, dtype in ((lambda tx: tx, "bfloat16"), (ox.master_weights, "float32")):
        tx = wrapper(ox.sophia(0.1))
        tx.update(grads, tx.init(narrow), narrow, hessian=hessian)
        assert seen.pop() == {dtype}


# Codes


def test_codes_stay_between_refreshes_and_keep_signs():
    params = {"dense": {"kernel": normal_tree((64, 256), seed=2)}}
    estimate = jax.tree.map(lambda p: p * jnp.abs(p), params)
    tx = ox.quantize_state(ox.sophia(0.1, update_interval=3))
    update = jax.jit(tx.update)
    state, codes = tx.init(params), []
    for _ in range(4):
        _, state = update(params, state, params, hessian=estimate)
        array = optax.tree.get(state, "hessian")["dense"]["kernel"]
        assert isinstance(array, ox.QuantizedArray) and array.signed
        codes.append(np.asarray(array.codes))
    np.testing.assert_array_equal(codes[0], codes[2])
    assert (codes[3] != codes[2]).any()
    h = np.asarray(array.dequantize())
    assert (np.sign(h) * np.sign(estimate["dense"]["kernel"]) >= 0).all()
    # Gauss-Newton estimates are never negative: none of theirs needs to become 0.
    unsigned = ox.quantize_state(
        ox.sophia(0.1), fields={"mu": "signed", "hessian": "unsigned"}
    )
    squares = jax.tree.map(jnp.square, params)
    _, state = unsigned.update(params, unsigned.init(params), params, hessian=squares)
    assert optax.tree.get(state, "hessian")["dense"]["kernel"].dequantize().min() > 0


# Flax

X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 5)), jnp.float32)
LABELS = jnp.arange(16) % 3


def cross_entropy(logits):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def descends(losses):
    assert_finite(losses)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "estimator",
    mostly(["gauss_newton_bartlett"], ["gauss_newton_bartlett", "hutchinson"]),
)
def test_nnx(estimator: str):
    model = nnx.Sequential(
        nnx.Linear(5, 32, rngs=nnx.Rngs(0)),
        nnx.tanh,
        nnx.Linear(32, 3, rngs=nnx.Rngs(1)),
    )
    tx = ox.sophia(0.03, gamma=0.05, update_interval=4, mask=ox.decay_mask)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, key):
        loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(X)))(model)
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)

        def hessian(params):
            def logits_fn(params):
                return nnx.merge(graphdef, params, rest)(X)

            if estimator == "hutchinson":
                return ox.hutchinson(lambda p: cross_entropy(logits_fn(p)), params, key)
            return ox.gauss_newton_bartlett(logits_fn, params, key)

        optimizer.update(model, grads, hessian=hessian)
        return loss

    types = jax.tree.leaves(jax.eval_shape(lambda s: s, nnx.state(optimizer)))
    losses = [
        float(train_step(model, optimizer, key)) for key in jax.random.split(KEY, 25)
    ]
    descends(losses)
    assert_same_types(jax.tree.leaves(nnx.state(optimizer)), types)


def test_nnx_with_the_boxes_of_a_state():
    model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ox.sophia(0.03), wrt=nnx.Param)
    state = nnx.state(model, nnx.Param)
    kernel = np.array(nnx.as_pure(state)["kernel"])
    optimizer.update(model, state, hessian=state)
    found = optax.tree.get(nnx.as_pure(optimizer.opt_state), "hessian")
    # (1 - b2) of the estimate, up to float32 roundings.
    np.testing.assert_allclose(found["kernel"], 0.01 * kernel, rtol=1e-6)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(0.1), (None, "model"))
        return nn.Dense(3, kernel_init=init)(nn.tanh(nn.Dense(32)(x)))


def test_linen_with_boxes():
    model = Boxed()
    params = model.init(KEY, X)["params"]
    tx = ox.sophia(0.03, gamma=0.05, update_interval=4)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def logits_fn(params):
        return model.apply({"params": params}, X)

    @jax.jit
    def train_step(state, key):
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(logits_fn(p)))(
            state.params
        )
        updates, opt_state = state.tx.update(
            grads,
            state.opt_state,
            state.params,
            hessian=lambda p: ox.gauss_newton_bartlett(logits_fn, p, key),
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state), loss

    losses = []
    for key in jax.random.split(KEY, 25):
        state, loss = train_step(state, key)
        losses.append(float(loss))
    descends(losses)


# Errors


def test_missing_estimates_and_params():
    tx = ox.sophia(0.1)
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match=r"hessian=None.*hessian=\.\.\.\)"):
        tx.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match=r"sophia: params=None"):
        tx.update(PARAMS, state, hessian=PARAMS)
    undecayed = ox.sophia(0.1, weight_decay=0.0)
    undecayed.update(PARAMS, state, hessian=PARAMS)
    with pytest.raises(ValueError, match=r"params=None .*hessian is a function"):
        undecayed.update(PARAMS, state, hessian=six_times)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"learning_rate": -1.0}, ValueError, r"sophia: learning_rate=-1.0 .*>= 0"),
        ({"weight_decay": -1.0}, ValueError, r"sophia: weight_decay=-1.0 .*>= 0"),
        ({"gamma": -1.0}, ValueError, r"gamma=-1.0 .*>= 0"),
        ({"decay": "l2"}, ValueError, r"decay='l2' .*'decoupled'"),
        ({"update_interval": 0}, ValueError, r"update_interval=0 .*>= 1"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, kind, message):
    with pytest.raises(kind, match=message):
        ox.sophia(**{"learning_rate": 0.1} | arguments)
