"""What the compiler for CPUs makes of the optimizers: no parameter-sized temporary."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxplus as ox
from tests.cases import NAMED

PARAMS = {
    "dense": {"kernel": (256, 512), "bias": (512,)},
    "other": {"kernel": (256, 512), "bias": (512,)},
    "attn": {"query": {"kernel": (256, 4, 128)}, "out": {"kernel": (4, 128, 256)}},
    "layers": {"up": {"kernel": (2, 256, 512), "bias": (2, 512)}},
}


def temporary_bytes_per_parameter(tx, dtype=jnp.float32) -> float:
    """Of the whole optimizer step, parameters and state donated."""
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        PARAMS,
        is_leaf=lambda node: isinstance(node, tuple),
    )

    tx = optax.with_extra_args_support(tx)

    def step(params, state, grads):
        # Sophia's estimate of the Hessian, which the others ignore.
        updates, state = tx.update(grads, state, params, hessian=grads)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    compiled = step.lower(params, jax.eval_shape(tx.init, params), params).compile()
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return compiled.memory_analysis().temp_size_in_bytes / size


def clipped(tx):
    return optax.chain(ox.clip_by_global_norm(1.0), tx)


# Rows, columns and scalars are temporaries too: 0.1 bytes per parameter.
NONE = 0.1
# One number per parameter and the like.
ONE = 4.0 + NONE
WITHOUT_TEMPORARIES = {
    "sgd": ox.sgd(0.1),
    "momentum": ox.sgd(0.1, momentum=0.9),
    "nesterov": ox.sgd(0.1, momentum=0.9, nesterov=True),
    "adagrad": ox.adagrad(0.1),
    "rmsprop": ox.rmsprop(0.1, centered=True, momentum=0.9),
    "adam": ox.adam(0.1),
    "adamw": ox.adamw(0.1, weight_decay=0.1),
    "adamw-independent": ox.adamw(0.1, weight_decay=0.1, decay="independent"),
    "clipped-adamw": clipped(ox.adamw(0.1, weight_decay=0.1)),
    "amsgrad": ox.amsgrad(0.1),
    "nadam": ox.nadam(0.1, weight_decay=0.1),
    "radam": ox.radam(0.1, weight_decay=0.1),
    "ademamix": ox.ademamix(0.1, alpha_warmup=9.0, b3_warmup=9.0, weight_decay=0.1),
    "adam_mini": ox.adam_mini(0.1, weight_decay=0.1),
    "apollo-mini": ox.apollo(0.1, rank=1, scaling="tensor", scale=128.0),
    "lion": ox.lion(0.1),
    "clipped-lion": clipped(ox.lion(0.1)),
    "signum": ox.signum(0.1, weight_decay=0.1),
    "lars": ox.lars(0.1, weight_decay=0.1),
    "scion-per_output": ox.scion(0.1, norms={"hidden": ("per_output", 1.0)}),
    "sophia": ox.sophia(0.1, weight_decay=0.1),
    "adafactor": ox.adafactor(0.1),
    "adafactor-b1": ox.adafactor(0.1, b1=0.9),
    "adafactor-unfactored": ox.adafactor(0.1, min_dim_size_to_factor=10_000),
}
WITH_ONE = {
    # The decayed gradient, which enters the square and the update.
    "adagrad-weight_decay": ox.adagrad(0.1, weight_decay=0.1),
    "rmsprop-weight_decay": ox.rmsprop(0.1, weight_decay=0.1),
    # The direction, which its own sign looks at.
    "adamw-cautious": ox.adamw(0.1, weight_decay=0.1, decay="cautious"),
    # The direction, which is stored between its norm and its use.
    "lamb": ox.lamb(0.1, weight_decay=0.1),
    # The direction, which both the parameters and their slow copies look at.
    "lookahead": ox.lookahead(ox.adamw(0.1)),
    "ranger": ox.ranger(0.1),
    # What is read by two others when its own memory is overwritten: v, g of before.
    "adopt": ox.adopt(0.1, weight_decay=0.1),
    "adan": ox.adan(0.1, weight_decay=0.1),
    "mars": ox.mars(0.1),
    # The update, between its distance from the average and that average.
    "came": ox.came(0.1),
}
# XLA stores a constant in the shape of the parameter in front of some sums.
WITH_TWO = {
    "stable_adamw": ox.stable_adamw(0.1),
    "cautious": optax.chain(ox.cautious(ox.scale_by_adam()), ox.descend(0.1, 0.1)),
    # Both branches hand over an update and a sum.
    "accumulate": ox.accumulate(ox.adamw(0.1), every_k=2),
}
# The old codes of each moment, which others may read when the new ones are written over
# them. No float32 moment is ever decoded as a whole.
WITH_CODES = {
    "adamw8bit": ox.adamw8bit(0.1),
    "clipped-adamw8bit": clipped(ox.adamw8bit(0.1)),
    "quantized-optax": ox.quantize_state(optax.adamw(0.1)),
}
WITH_CODES_OF_ONE = {
    "lion8bit": ox.lion8bit(0.1),
    "quantized-nesterov": ox.quantize_state(ox.sgd(0.1, momentum=0.9, nesterov=True)),
    "quantized-rmsprop": ox.quantize_state(ox.rmsprop(0.1)),
}
ALLOWED = {
    **dict.fromkeys(WITH_CODES, 2 + NONE),
    **dict.fromkeys(WITH_CODES_OF_ONE, 1 + NONE),
    **dict.fromkeys(WITHOUT_TEMPORARIES, NONE),
    **dict.fromkeys(WITH_ONE, ONE),
    **dict.fromkeys(WITH_TWO, 2 * ONE),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_temporaries_of_a_donated_step(name: str):
    lists = WITHOUT_TEMPORARIES, WITH_ONE, WITH_TWO, WITH_CODES, WITH_CODES_OF_ONE
    (tx,) = (named[name] for named in lists if name in named)
    assert temporary_bytes_per_parameter(tx) <= ALLOWED[name]


# Two results that need the float32 update, and the old correction.
WEIGHTS = {
    "master_weights": (ox.master_weights(ox.adamw(0.1)), NONE),
    "master_weights-24": (ox.master_weights(ox.adamw(0.1), bits=24), 6.0),
    "stochastic_rounding": (ox.stochastic_rounding(ox.adamw(0.1)), NONE),
    "compensated": (ox.compensated(ox.adamw(0.1)), 6.0 + NONE),
    # Beside that the codes; the update is the last thing that needs them.
    "master_weights-24-codes": (
        ox.master_weights(ox.adamw8bit(0.1), bits=24),
        9.0 + NONE,
    ),
    # Moments in bfloat16 are decoded as a whole, in float32.
    "bfloat16-moments": (ox.quantize_state(optax.adamw(0.1)), 8.0 + NONE),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_temporaries_of_bfloat16_weights(name: str):
    tx, allowed = WEIGHTS[name]
    assert temporary_bytes_per_parameter(tx, jnp.bfloat16) <= allowed


def test_every_optimizer_is_in_one_of_the_lists():
    factories = {case.factory.__name__ for case in NAMED if hasattr(ox, case.name)}
    listed = {name.partition("-")[0] for name in ALLOWED}
    # Products of matrices have temporaries of their own.
    products = {"muon", "normuon", "adamuon", "dion", "kron", "shampoo", "soap"}
    assert factories - products <= listed
