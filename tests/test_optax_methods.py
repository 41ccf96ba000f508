"""Methods that are optax's own work inside and around what is here."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_finite, assert_same_types
from tests.problems import normal_tree

SHAPES = {"dense": {"kernel": (5, 4), "bias": (4,)}}
TARGETS = normal_tree(SHAPES, seed=1)
START = normal_tree(SHAPES, seed=2, scale=0.3)


def loss_of(params: Any) -> jax.Array:
    """½ of the squared distance to a target."""
    differences = jax.tree.map(lambda p, target: p - target, params, TARGETS)
    return 0.5 * optax.tree.norm(differences, squared=True)


def sam(learning_rate: float) -> optax.GradientTransformation:
    """Sharpness-aware minimization around Lion, against normalised SGD."""
    adversary = optax.chain(optax.contrib.normalize(), ox.sgd(0.01))
    return optax.contrib.sam(ox.lion(learning_rate), adversary, sync_period=2)


# Row -> (transformation, accessor of the parameters to evaluate). Half are optax's
# wrappers around ours, half ours around optax's, two stand side by side.
Evaluate = Callable[[Any, Any], Any]
METHODS: dict[str, tuple[optax.GradientTransformation, Evaluate]] = {
    "schedule_free(adamw)": (
        optax.contrib.schedule_free(ox.adamw(0.3, b1=0.0), learning_rate=0.3),
        optax.contrib.schedule_free_eval_params,
    ),
    "schedule_free(muon)": (
        optax.contrib.schedule_free(ox.muon(0.3, b1=0.0), learning_rate=0.3),
        optax.contrib.schedule_free_eval_params,
    ),
    "sam(lion)": (sam(0.03), lambda state, params: params),
    "mechanize(stable_adamw)": (
        optax.contrib.mechanize(ox.stable_adamw(0.1)),
        lambda state, params: params,
    ),
    "clipped prodigy": (
        optax.chain(ox.clip_by_global_norm(1.0), optax.contrib.prodigy()),
        lambda state, params: params,
    ),
    "lookahead(dadapt_adamw)": (
        ox.lookahead(optax.contrib.dadapt_adamw(), every_k=4),
        lambda state, params: params,
    ),
    "accumulate(momo)": (
        ox.accumulate(optax.contrib.momo(0.2), every_k=2),
        lambda state, params: params,
    ),
    "clipped galore": (
        optax.chain(ox.clip_by_global_norm(10.0), optax.contrib.galore(0.1, rank=2)),
        lambda state, params: params,
    ),
    "partition(prodigy, muon)": (
        optax.partition(
            {"muon": ox.muon(0.1), "adamw": optax.contrib.prodigy()}, ox.label_params
        ),
        lambda state, params: params,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_trains_together(name: str) -> None:
    tx, evaluate = METHODS[name]
    tx = optax.with_extra_args_support(tx)
    state = tx.init(START)
    # optax.contrib.sam takes no extra arguments.
    needs_loss = "momo" in name

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss_of)(params)
        extra = {"value": value} if needs_loss else {}
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), value

    (params, final), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=150))(
        (START, state)
    )
    assert_finite(params)
    assert_same_types(final, jax.eval_shape(lambda s: s, state))
    assert loss_of(evaluate(final, params)) < 0.3 * loss_of(START)
    assert jnp.isfinite(loss_of(params))
