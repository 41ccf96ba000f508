"""What the compiler for real TPUs makes of the optimizers; no TPU is needed."""

import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from benchmarks.hlo_cost import hlo_cost
from optaxplus.numerics.matrix_roots import (
    by_platform,
    eigenbasis,
    iterated_eigenbasis,
    next_eigenbasis,
)

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


QUANTIZED = {
    "adamw": ox.adamw(0.1),
    "lion": ox.lion(0.1),
    "momentum": ox.sgd(0.1, momentum=0.9),
    "optax": optax.adamw(0.1),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_are_two_fusions_more_a_leaf_without_temporaries(name, params):
    compiled = compiled_step(ox.quantize_state(QUANTIZED[name]), params)
    # The largest entry of every block, and the codes. Biases have none.
    assert fusions(compiled) <= 3 * (LEAVES - 1) + 1
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * size


@pytest.mark.parametrize(
    ("shape", "reduces"),
    [
        ((4096, 8192), 0),
        # Blocks of 344, 320 and 224 rows: the largest of every eight rows first. The
        # compiler aborts where 11008 rows are reduced 344 at a time.
        ((11008, 4096), 2),
        ((5120, 13824), 2),
        ((14336, 4096), 2),
        # Odd factors of 75 and 375.
        ((9600, 4096), 2),
        ((12000, 4096), 2),
    ],
    ids=str,
)
def test_blocks_of_any_length_are_reduced_where_they_are_computed(
    params, shape, reduces
):
    sharding = params["dense"]["kernel"].sharding
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    compiled = compiled_step(
        ox.quantize_state(ox.adamw(0.1)), {"dense": {"kernel": kernel}}
    )
    text = compiled.as_text()
    assert fusions(compiled) <= 3
    assert len(re.findall(r" reduce\(", text[text.index("ENTRY") :])) <= reduces
    # Nothing as large as a moment is kept.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * 4 * np.prod(shape)


def test_low_precision_weights_are_rounded_in_the_fusion_of_the_update(params):
    narrow = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=p.sharding),
        params,
    )
    wrapped = compiled_step(ox.master_weights(ox.adamw(0.1)), narrow)
    assert fusions(wrapped) == LEAVES
    noisy = compiled_step(ox.stochastic_rounding(ox.adamw(0.1)), narrow)
    # Numbers of rows and columns, which the noise is made of, are vectors.
    large = re.findall(r"= \S*\[\d+,\d+[^=]*? fusion\(", noisy.as_text())
    assert len(large) <= LEAVES
    for compiled in (wrapped, noisy):
        assert compiled.memory_analysis().temp_size_in_bytes < 1e5


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


def test_programs_of_bases_do_not_grow_with_the_matrix(params):
    sharding = params["dense"]["kernel"].sharding
    first = by_platform(lambda x: (eigenbasis(x),), lambda x: (iterated_eigenbasis(x),))
    refresh = by_platform(next_eigenbasis, partial(next_eigenbasis, by_panels=True))

    def instructions(function, n):
        x = jax.ShapeDtypeStruct((1, n, n), jnp.float32, sharding=sharding)
        return jax.jit(function).lower(x).compile().as_text().count(" = ")

    for function in (first, lambda x: refresh(x, x)):
        # Decompositions of their own have 4 and 25 times as many.
        assert instructions(function, 512) < 1.3 * instructions(function, 256)


# Eight chips


def test_only_scales_of_codes_move():
    pytest.importorskip("libtpu", reason="install the extra `tpu` for the TPU compiler")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = Mesh(np.array(topology.devices), ("fsdp",))
    # Blocks of 256 along the first axis: whole ones on a chip, halves, and none cut.
    shapes = {"up": (4096, 512), "query": (1024, 512), "down": (512, 4096)}
    specs = {"up": P("fsdp", None), "query": P("fsdp", None), "down": P(None, "fsdp")}
    params = {
        name: {
            "kernel": jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=NamedSharding(mesh, specs[name])
            )
        }
        for name, shape in shapes.items()
    }
    tx = ox.adamw8bit(0.1)
    shardings = ox.state_sharding(tx, params)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    wanted = jax.tree.map(lambda p: p.sharding, params), shardings
    update = jax.jit(tx.update, out_shardings=wanted)
    cost = hlo_cost(update.lower(params, state, params).compile().as_text())
    # The largest entries of half blocks: two for each of 4 blocks in 512 columns, of
    # two moments, gathered or reduced; no more than one of them twice.
    assert 0 < cost.wire_bytes <= 2 * 2 * (2 * 4 * 512) * 4


def sharded_update(mode, **arguments):
    """The orthogonalization of two layers under FSDP on eight chips, as HLO."""
    pytest.importorskip("libtpu", reason="install the extra `tpu` for the TPU compiler")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    axis_type = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = Mesh(np.array(topology.devices), ("fsdp",), axis_types=(axis_type,))
    shapes = {"query": (8, 512, 512), "up": (8, 512, 2048), "down": (8, 2048, 512)}
    specs = {name: P(None, "fsdp") for name in shapes} | {"down": P(None, None, "fsdp")}
    grads = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, specs[name])
        )
        for name, shape in shapes.items()
    }
    tx = ox.orthogonalize_via_newton_schulz(
        axes=ox.MatrixAxes((-2,), (-1,)),
        placement=ox.Placement.like(grads) if mode == "placement" else "auto",
        **arguments,
    )
    shardings = jax.tree.map(lambda x: x.sharding, grads)
    update = jax.jit(lambda g: tx.update(g, ())[0], out_shardings=shardings)
    return update.lower(grads).compile().as_text()


@pytest.mark.parametrize("mode", ["explicit", "placement", "auto"])
def test_eight_chips_move_whole_matrices_once(mode):
    cost = hlo_cost(sharded_update(mode, ns_coeffs="polar_express_paper"))
    kinds = {kind: found.count for kind, found in cost.collectives.items()}
    assert kinds == {"all-to-all": 2}
    assert cost.collectives_in_products == 0
    entries = 8 * (512 * 512 + 2 * 512 * 2048)
    # There and back in bfloat16, 7/8 of an eighth of them; nothing is padded.
    assert cost.wire_bytes <= 1.001 * 2 * 2 * entries / 8 * 7 / 8
    # The standard form of five steps, shared out evenly.
    products = 8 * 5 * (6 * 512**3 + 2 * (4 * 512**2 * 2048 + 2 * 512**3))
    assert cost.flops <= 1.001 * products / 8


@pytest.mark.parametrize(
    "rule",
    [
        ox.scale_by_soap,
        partial(ox.scale_by_shampoo, root_method="newton"),
        ox.scale_by_kron,
    ],
    ids=["soap", "shampoo", "kron"],
)
def test_eight_chips_move_matrices_and_what_belongs_to_them_once(rule):
    pytest.importorskip("libtpu", reason="install the extra `tpu` for the TPU compiler")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = Mesh(np.array(topology.devices), ("fsdp",), axis_types=(AxisType.Explicit,))
    shapes = {"query": (8, 128, 128), "up": (8, 128, 256), "one": (128, 128)}
    specs = {"query": P(None, "fsdp"), "up": P(None, None, "fsdp"), "one": P("fsdp")}
    grads = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, specs[name])
        )
        for name, shape in shapes.items()
    }
    tx = rule(axes=ox.MatrixAxes((-2,), (-1,)))
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, grads),
        ox.state_sharding(tx, grads),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        update = jax.jit(tx.update, donate_argnums=1).lower(grads, state)
    cost = hlo_cost(update.compile().as_text())
    # There and back, by one of two branches: what changes in a refresh alone comes back
    # from a refresh alone.
    kinds = {kind: found.count for kind, found in cost.collectives.items()}
    assert kinds == {"all-to-all": 2}
