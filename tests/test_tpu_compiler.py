"""What the compiler for real TPUs makes of the optimizers; no TPU is needed."""

import os
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies

import optaxplus as ox

pytestmark = pytest.mark.tpu

SHAPES = {
    "dense": {"kernel": (1024, 512), "bias": (512,)},
    "attn": {"query": {"kernel": (1024, 8, 128)}, "out": {"kernel": (8, 128, 1024)}},
}
LEAVES = 4


@pytest.fixture(scope="module")
def params():
    """Abstract parameters on one chip of a v5e."""
    pytest.importorskip("libtpu", reason="install the extra `tpu` for the TPU compiler")
    # Without it libtpu asks a metadata server which machine this is, and waits.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def compiled_step(tx, params):
    """The whole optimizer step, parameters and state donated, as compiled HLO."""
    sharding = params["dense"]["kernel"].sharding
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
    )

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    return step.lower(params, state, params).compile()


def fusions(compiled):
    text = compiled.as_text()
    return len(re.findall(r" fusion\(", text[text.index("ENTRY") :]))


ELEMENTWISE = {
    "sgd": ox.sgd(0.1),
    "nesterov": ox.sgd(0.1, momentum=0.9, nesterov=True),
    "adagrad": ox.adagrad(0.1, weight_decay=0.1),
    "rmsprop": ox.rmsprop(0.1, centered=True, momentum=0.9),
    "adam": ox.adam(0.1),
    "adamw": ox.adamw(0.1),
    "adamw-cautious": ox.adamw(0.1, decay="cautious"),
    "amsgrad": ox.amsgrad(0.1),
    "nadam": ox.nadam(0.1, weight_decay=0.1),
    "radam": ox.radam(0.1, weight_decay=0.1),
    "ranger": ox.ranger(0.1, gradient_centralization=False, weight_decay=0.1),
    "adan": ox.adan(0.1, weight_decay=0.1),
    "adopt": ox.adopt(0.1, weight_decay=0.1),
    "ademamix": ox.ademamix(0.1, alpha_warmup=9.0, b3_warmup=9.0),
    "lion": ox.lion(0.1),
    "signum": ox.signum(0.1),
}
# The norm, mean or fraction of each matrix or vector first.
WITH_A_REDUCTION = {
    "clip_by_global_norm": optax.chain(ox.clip_by_global_norm(1.0), ox.adamw(0.1)),
    "lamb": ox.lamb(0.1, weight_decay=0.1),
    "stable_adamw": ox.stable_adamw(0.1),
    "centralize": optax.chain(ox.centralize(), ox.adamw(0.1)),
    "cautious": optax.chain(ox.cautious(ox.scale_by_adam()), ox.descend(0.1)),
    "mars": ox.mars(0.1),
}
# Two norms of different arrays; a mean whose average is stored.
WITH_TWO = {
    "lars": ox.lars(0.1, weight_decay=0.1),
    "adam_mini": ox.adam_mini(0.1),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_elementwise_step_is_one_fusion_a_leaf_without_temporaries(name, params):
    compiled = compiled_step(ELEMENTWISE[name], params)
    assert fusions(compiled) == LEAVES
    assert compiled.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.parametrize("name", [*WITH_A_REDUCTION, *WITH_TWO])
def test_a_reduction_is_one_fusion_more_a_leaf(name, params):
    tx = (WITH_A_REDUCTION | WITH_TWO)[name]
    reductions = 1 if name in WITH_A_REDUCTION else 2
    assert fusions(compiled_step(tx, params)) <= (1 + reductions) * LEAVES


def test_muon_multiplies_bfloat16_matrices_into_float32(params):
    text = compiled_step(ox.muon(0.1), params).as_text()
    dtype_of = dict(re.findall(r"%([\w.-]+) = (\w+)\[", text))
    products = re.findall(
        r" = (\w+)\[[^\n]*? convolution\(%([\w.-]+), %([\w.-]+)\)", text
    )
    # For each of the two shapes, up to transposition, a first step of three products
    # and the Gram matrix of extreme scales; then a loop over steps of three products
    # for the square one, over pairs of steps of seven products for the long one.
    assert len(products) == (4 + 3) + (4 + 7)
    for result, left, right in products:
        assert (result, dtype_of[left], dtype_of[right]) == ("f32", "bf16", "bf16")
