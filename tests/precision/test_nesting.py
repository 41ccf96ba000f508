"""Wrappers around wrappers: sensible orders train, the others say why not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_same_types
from tests.precision.weight_rules import FAST
from tests.problems import normal_tree
from tests.selection import mostly

SHAPES = {"hidden": {"kernel": (64, 96), "bias": (96,)}, "head": {"kernel": (96, 4)}}
X = normal_tree({"x": (32, 64)}, seed=3)["x"]
Y = jnp.sin(X[:, :4])
STEPS = 40

adamw = partial(ox.adamw, 0.01, weight_decay=0.01)
in_codes = partial(ox.quantize_state, min_size=1)
master_24 = partial(ox.master_weights, bits=24)


def loss_of(params):
    wide = optax.tree.cast(params, "float32")
    hidden = jnp.tanh(X @ wide["hidden"]["kernel"] + wide["hidden"]["bias"])
    return jnp.mean((hidden @ wide["head"]["kernel"] - Y) ** 2)


def start():
    params = normal_tree(SHAPES, seed=0)
    return jax.tree.map(lambda p: (0.1 * p).astype("bfloat16"), params)


def train(tx):
    params = start()
    state = tx.init(params)
    types = jax.eval_shape(lambda s: s, state)

    @jax.jit
    def step(params, state):
        try:
            scale = ox.loss_scale(state)
        except ValueError:
            scale = 1.0
        grads = jax.grad(lambda p: loss_of(p) * scale)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    assert_same_types(state, types)
    return params


SENSIBLE = {
    "scaled, 24 bits, codes": lambda: ox.dynamic_loss_scale(
        master_24(in_codes(adamw()))
    ),
    "24 bits, scaled, codes": lambda: master_24(
        ox.dynamic_loss_scale(in_codes(adamw()))
    ),
    "codes, master": lambda: in_codes(ox.master_weights(adamw())),
    "codes, scaled": lambda: in_codes(ox.dynamic_loss_scale(adamw())),
    "master, accumulated, codes": lambda: ox.master_weights(
        ox.accumulate(in_codes(adamw()), 2)
    ),
    "accumulated, 24 bits, codes": lambda: ox.accumulate(
        master_24(in_codes(adamw())), 2
    ),
    "MultiSteps, compensated, codes": lambda: optax.MultiSteps(
        ox.compensated(in_codes(adamw())), 2
    ).gradient_transformation(),
    "stochastic, MultiSteps": lambda: ox.stochastic_rounding(
        optax.MultiSteps(adamw(), 2).gradient_transformation()
    ),
    "compensated, lookahead, codes": lambda: ox.compensated(
        ox.lookahead(in_codes(adamw()))
    ),
    "codes, lookahead": lambda: ox.master_weights(in_codes(ox.lookahead(adamw()))),
    "24 bits, Muon in codes": lambda: master_24(in_codes(ox.muon(0.01))),
    "stochastic, chain": lambda: ox.stochastic_rounding(
        optax.chain(
            ox.clip_by_global_norm(1.0),
            in_codes(ox.cautious(ox.scale_by_adam())),
            ox.descend(0.01),
        )
    ),
    "24 bits, if finite": lambda: master_24(optax.apply_if_finite(adamw(), 3)),
    "injected": lambda: ox.master_weights(
        optax.inject_hyperparams(ox.adamw)(learning_rate=0.01, b2=0.999)
    ),
    "injected codes": lambda: optax.inject_hyperparams(
        ox.adamw8bit,
        static_args=("block_size", "min_size"),
        hyperparam_dtype=jnp.float32,
    )(learning_rate=0.01, min_size=1),
    "groups": lambda: optax.partition(
        {"a": master_24(in_codes(adamw())), "b": ox.compensated(ox.lion(0.002))},
        {"hidden": {"kernel": "a", "bias": "b"}, "head": {"kernel": "b"}},
    ),
}


# Every wrapper at least once.
BY_DEFAULT = {
    "stochastic, chain",
    "scaled, 24 bits, codes",
    "codes, master",
    "accumulated, 24 bits, codes",
    "MultiSteps, compensated, codes",
    "codes, lookahead",
    "24 bits, Muon in codes",
    "injected codes",
    "groups",
}


@pytest.mark.parametrize("name", mostly(BY_DEFAULT, SENSIBLE))
def test_sensible_orders_train(name):
    # AdamW in float32 leaves 2 % of the loss, half as many steps 15 %.
    assert loss_of(train(SENSIBLE[name]())) < 0.3 * loss_of(start())


@pytest.mark.parametrize(
    "outer", [ox.master_weights, master_24, ox.stochastic_rounding, ox.compensated]
)
@pytest.mark.parametrize(
    "inner", [ox.master_weights, master_24, ox.stochastic_rounding, ox.compensated]
)
def test_weights_are_rounded_once(outer, inner):
    with pytest.raises(ValueError, match="keep one of master_weights, stochastic"):
        outer(ox.accumulate(inner(adamw()), 2)).init(start())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: ox.lookahead(ox.compensated(adamw())),
            r"^lookahead: .*Put the wrapper around lookahead",
        ),
        (
            lambda: ox.cautious(ox.master_weights(adamw())),
            r"^cautious: .*decides how weights are rounded",
        ),
        (
            lambda: ox.chain_in_float32(master_24(adamw())),
            r"^chain_in_float32: .*decides how weights are rounded",
        ),
        (
            lambda: ox.muon(0.1, fallback=ox.stochastic_rounding(adamw())),
            r"decides how weights are rounded",
        ),
        (
            lambda: in_codes(optax.chain(in_codes(adamw()))),
            r"^quantize_state: inner is quantized already",
        ),
        (
            lambda: ox.dynamic_loss_scale(
                ox.master_weights(ox.dynamic_loss_scale(adamw()))
            ),
            r"^dynamic_loss_scale: inner scales losses already",
        ),
    ],
    ids=["lookahead", "cautious", "chain", "fallback", "codes", "scale"],
)
def test_senseless_orders_say_why(build, message):
    with pytest.raises(ValueError, match=message):
        build().init(start())


# Micro-batches


@pytest.mark.slow
@pytest.mark.parametrize("name", ["master_weights", "24", "stochastic", "compensated"])
def test_micro_batches_equal_one_batch(name):
    wrap = {
        "master_weights": ox.master_weights,
        "24": master_24,
        "stochastic": ox.stochastic_rounding,
        "compensated": ox.compensated,
    }[name]
    params = start()

    def loss(params, x, y):
        return jnp.mean((x @ params["head"]["kernel"].astype("float32") - y) ** 2)

    x = normal_tree({"x": (32, 96)}, seed=5)["x"]
    inner = in_codes(adamw())
    whole = wrap(inner)
    state = whole.init(params)
    updates, _ = whole.update(jax.grad(loss)(params, x, Y), state, params)
    expected = optax.apply_updates(params, updates)
    for split in (wrap(ox.accumulate(inner, 4)), ox.accumulate(wrap(inner), 4)):
        found, state = params, split.init(params)
        update = jax.jit(split.update, compiler_options=FAST)
        for part in range(4):
            rows = slice(8 * part, 8 * part + 8)
            # Gradients of micro-batches in float32: in bfloat16 their sum is another.
            wide = optax.tree.cast(params, "float32")
            grads = jax.grad(loss)(wide, x[rows], Y[rows])
            updates, state = update(grads, state, found)
            found = optax.apply_updates(found, updates)
        for ours, theirs in zip(
            jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
        ):
            assert ours.dtype == jnp.bfloat16
            # The gradient of the whole batch was rounded to bfloat16 before: Adam's
            # first step is the sign of it, and the weights end within a spacing.
            np.testing.assert_allclose(
                ours.astype("float32"),
                theirs.astype("float32"),
                rtol=2.0**-7,
                atol=1e-4,
            )
