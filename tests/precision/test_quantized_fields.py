"""State in 8 bits: which fields are in codes, of every optimizer and of optax's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optaxplus as ox
from optaxplus import trees
from tests.cases import NAMED
from tests.precision.codes import PARAMS, arrays

# Fields of large leaves that are not in codes.
EXACT = {
    "ademamix": {"mu_slow"},  # an average over 10,000 steps
    "adan": {"previous_grads"},  # the next gradient is subtracted from it
    "mars": {"previous_grads"},
    "dion": {"basis"},
    "kron": {"factor_in", "factor_out"},
    "soap": {"factor_in", "factor_out", "basis_in", "basis_out"},
    "shampoo": {"factor_in", "factor_out", "root_in", "root_out"},
    "ranger": {"slow"},  # parameters
    "lookahead": {"slow"},
}


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_moments_of_every_optimizer_are_found(case):
    params = {"dense": {"kernel": jnp.ones((64, 64))}}
    if "8bit" in case.name:
        return
    if case.name == "rmsprop-centered":
        with pytest.raises(ValueError, match="centered=False"):
            ox.quantize_state(case.make()).init(params)
        return
    state = ox.quantize_state(case.make()).init(params)
    exact = {
        path.removesuffix("/dense/kernel").rpartition("/")[2]
        for path, leaf in trees.leaves_with_paths(state)
        if leaf.size >= 4096 and leaf.dtype.itemsize > 1
    }
    assert exact <= EXACT.get(case.name.split("-")[0], set())
    wide = trees.leaves_with_paths(jax.eval_shape(case.make().init, params))
    large = [path for path, leaf in wide if leaf.size >= 4096]
    assert len(arrays(state)) == len(large) - len(exact)


@pytest.mark.parametrize(
    ("tx", "fields"),
    [
        (optax.sgd(0.1, momentum=0.9), ["trace"]),
        (optax.adamw(0.1), ["mu", "nu"]),
        (optax.lion(0.1), ["mu"]),
        (optax.rmsprop(0.1), ["nu"]),
        (optax.adagrad(0.1), ["sum_of_squares"]),
        (optax.ema(0.9), ["ema"]),
        (optax.contrib.muon(0.1), ["mu"]),
        (optax.amsgrad(0.1), ["mu", "nu", "nu_max"]),
        (optax.chain(optax.clip(1.0), optax.adabelief(0.1)), ["mu", "nu"]),
    ],
    ids=[
        "sgd",
        "adamw",
        "lion",
        "rmsprop",
        "adagrad",
        "ema",
        "muon",
        "amsgrad",
        "belief",
    ],
)
def test_moments_of_optax_are_found(tx, fields):
    params = {"dense": {"kernel": jnp.ones((64, 64))}}
    state = ox.quantize_state(tx).init(params)
    signed = [name not in ("nu", "nu_max", "sum_of_squares") for name in fields]
    assert [array.signed for array in arrays(state)] == signed


def test_small_leaves_embeddings_and_reduced_statistics_stay_float32():
    state = ox.adamw8bit(1e-3).init(PARAMS)
    mu = optax.tree.get(state, "mu")
    assert isinstance(mu["dense"]["kernel"], ox.QuantizedArray)
    assert mu["embed"]["embedding"].dtype == jnp.float32
    assert mu["norm"]["scale"].dtype == jnp.float32
    everything = ox.adamw8bit(1e-3, keep=(), min_size=1).init(PARAMS)
    assert len(arrays(everything)) == 2 * len(jax.tree.leaves(PARAMS))
    kernel = (
        ox.Rule("kernel", ox.MatrixAxes((0,), (1,)), "special"),
        *ox.DEFAULT_RULES,
    )
    kept = ox.adamw8bit(1e-3, rules=kernel, keep=("special",)).init(PARAMS)
    kinds = {array.codes.shape for array in arrays(kept)}
    assert kinds == {(600, 16)}


def test_a_parameter_without_a_role_is_in_codes():
    # The default rules cannot tell what this is, and nobody asked.
    params = {"strange": jnp.ones((8, 32, 64))}
    with pytest.raises(ValueError, match="strange"):
        ox.infer_roles(params)
    assert len(arrays(ox.adamw8bit(1e-3).init(params))) == 2


@pytest.mark.parametrize(
    ("tx", "fields"),
    [
        (optax.sm3(0.1), {"nu": "signed"}),
        (optax.contrib.sophia(0.1), {"mu": "signed", "nu": "signed"}),
    ],
    ids=["sm3", "sophia"],
)
def test_a_field_nu_that_may_be_negative(tx, fields):
    params = {"dense": {"kernel": jnp.ones((64, 64))}}
    with pytest.raises(ValueError, match=r"'nu' of \w+ .*fields=\{'nu': 'signed'\}"):
        ox.quantize_state(tx).init(params)
    codes = arrays(ox.quantize_state(tx, fields=fields).init(params))
    assert [array.signed for array in codes] == [True] * len(fields)


class OwnState(NamedTuple):
    velocity: optax.Params


def test_fields_of_other_names():
    inner = optax.GradientTransformation(
        lambda params: OwnState(jax.tree.map(jnp.zeros_like, params)),
        lambda g, state, params=None: (g, OwnState(g)),
    )
    params = {"dense": {"kernel": jnp.ones((64, 64))}}
    with pytest.raises(
        ValueError, match=r"'velocity'.*fields=\{'velocity': 'signed'\}"
    ):
        ox.quantize_state(inner).init(params)
    tx = ox.quantize_state(inner, fields={"velocity": "signed"})
    assert len(arrays(tx.init(params))) == 1


def test_the_state_of_nnx_is_read():
    """Which has variables in the place of arrays."""
    model = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
    tx = ox.quantize_state(ox.adamw(1e-3), min_size=1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.cos, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    mu = optax.tree.get(ox.dequantize_state(optimizer.opt_state), "mu")
    found, g = mu["kernel"], grads["kernel"]
    np.testing.assert_allclose(found, 0.1 * g, rtol=0.3, atol=1e-4 * np.max(g))
