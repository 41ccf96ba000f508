"""What benchmarks/routing.py says of Muon in optax and here is what they do."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optaxplus as ox
from benchmarks import routing
from benchmarks.routing import MODELS, OPTAX, OURS, Route, Truth

BY_NAME = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            model,
            id=model.name,
            marks=[pytest.mark.slow] if model.name in ("ResNet-50", "ViT-B/16") else [],
        )
        for model in MODELS
    ],
)
def test_an_update_shows_the_routes(model):
    params = model.build(**model.small)
    for library, routes in routing.routes(params).items():
        leaves, structure = jax.tree.flatten(params)
        shapes = [leaf.shape for leaf in leaves]
        expected = list(map(gradient_and_direction, shapes, routes))
        grads = structure.unflatten([grad for grad, _ in expected])
        updates = first_update(routing.optimizers()[library], grads)
        for update, (_, direction) in zip(
            jax.tree.leaves(updates), expected, strict=True
        ):
            assert cosine(-update, direction) > 0.97


def first_update(tx, grads):
    """The update of parameters that are zero; compiling takes longest, so in haste."""
    params = jax.tree.map(jnp.zeros_like, grads)
    return jax.jit(
        lambda: tx.update(grads, tx.init(params), params)[0],
        compiler_options={"xla_backend_optimization_level": 0},
    )()


def gradient_and_direction(shape, route):
    """A gradient, and the first step that a route means for it.

    That of Adam is the sign, that of Muon the polar factor of every matrix, of which
    singular values from 10 to 1 keep the gradient away.
    """
    array = np.random.default_rng(0).normal(size=shape)
    if route.optimizer == "Adam":
        return jnp.asarray(array, "float32"), np.sign(array)
    matrices, undo = as_matrices(array, route)
    u, values, vh = np.linalg.svd(matrices, full_matrices=False)
    scale = np.geomspace(10, 1, values.shape[-1])
    return jnp.asarray(undo(u * scale @ vh), "float32"), undo(u @ vh)


def as_matrices(array, route):
    """The matrices of a route, and the way back."""
    matrix = (*route.fan_in, *route.fan_out)
    order = (*(axis for axis in range(array.ndim) if axis not in matrix), *matrix)
    moved = np.transpose(array, order)
    columns = math.prod(array.shape[axis] for axis in route.fan_out)
    rows = math.prod(array.shape[axis] for axis in route.fan_in)
    return moved.reshape(-1, rows, columns), lambda matrices: np.transpose(
        matrices.reshape(moved.shape), np.argsort(order)
    )


def cosine(a, b):
    return (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))


@BY_NAME
def test_our_routes_are_those_of_the_public_functions(model):
    params = model.build(**model.small)
    labels = jax.tree.leaves(ox.label_params(params))
    axes = jax.tree.leaves(ox.infer_matrix_axes(params))
    routes = routing.routes(params)[OURS]
    for label, matrix, route in zip(labels, axes, routes, strict=True):
        assert label == {"Muon": "muon", "Adam": "adamw"}[route.optimizer]
        if label == "muon":
            assert (matrix.fan_in, matrix.fan_out) == (route.fan_in, route.fan_out)


@pytest.mark.parametrize("model", MODELS[-2:], ids=lambda model: model.name)
def test_vision_models_classify(model):
    module = {"ViT-B/16": routing.ViT, "ResNet-50": routing.ResNet}[model.name]
    sizes = model.small
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), "float32")
    logits = nnx.eval_shape(lambda x: module(**sizes, rngs=nnx.Rngs(0))(x), images)
    assert logits.shape == (2, sizes["classes"])


def test_optax_takes_stacked_norms_for_a_matrix():
    params = {"norm": {"scale": jnp.ones((12, 768))}}
    state = jax.eval_shape(optax.contrib.muon(1e-3).init, params)
    groups = optax.tree.get(state, "inner_states")
    momentum = optax.tree.get(groups["muon"], "mu")
    second = optax.tree.get(groups["adam"], "nu")
    assert momentum["norm"]["scale"].shape == (12, 768)
    assert isinstance(second["norm"]["scale"], optax.MaskedNode)
    assert routing.takers(optax.contrib.muon(1e-3), params) == ["Muon"]
    assert routing.takers(ox.muon(1e-3), params) == ["Adam"]


def test_a_parameter_without_moments_is_noticed():
    with pytest.raises(ValueError, match="no moment"):
        routing.takers(
            optax.masked(optax.adam(1e-3), {"a": True, "b": False}),
            {"a": jnp.ones(2), "b": jnp.ones(2)},
        )


@pytest.mark.parametrize(
    ("truth", "route", "expected"),
    [
        (Truth("", "", (-3, -2), (-1,)), Route("Muon", (2, 1), (3,)), "right"),
        (Truth("", "", (-2,), (-1,)), Route("Muon", (0, 1, 2), (3,)), "wrong matrix"),
        (Truth("", "", (-2,), (-1,)), Route("Muon", (3,), (2,)), "wrong matrix"),
        (Truth("", "", (-2,), (-1,)), Route("Adam"), "to Adam"),
        (Truth("", ""), Route("Muon", (0,), (1,)), "to Muon"),
        (Truth("", ""), Route("Adam"), "right"),
    ],
)
def test_verdict(truth, route, expected):
    assert routing.verdict(truth, route, (5, 4, 3, 2)) == expected


@BY_NAME
def test_committed_results_are_those_of_the_package(model):
    results = json.loads(routing.RESULTS.read_text("utf-8"))
    (committed,) = (it for it in results["models"] if it["name"] == model.name)
    fresh = json.loads(json.dumps(routing.follow(model, model.sizes)))
    for document in (committed, fresh):  # Another optax may do otherwise.
        for entry in (document["totals"], *document["parameters"]):
            del entry[OPTAX]
    assert committed == fresh, "run benchmarks/routing.py and benchmarks/readme.py"


def test_script_prints_both_tables_and_writes_results(tmp_path, monkeypatch, capsys):
    out = tmp_path / "routing.json"
    monkeypatch.setattr(sys, "argv", ["routing.py", "--small", "--out", str(out)])
    routing.main()
    printed = capsys.readouterr().out
    results = json.loads(out.read_text("utf-8"))
    assert {"date", "versions", "models"} <= results.keys()
    for model in results["models"]:
        assert model["name"] in printed
        for library in (OPTAX, OURS):
            totals = model["totals"][library]
            assert totals["hidden"] + totals["others"] == model["num_params"]
            parts = (totals[key] for key in ("right matrix", "wrong matrix", "to Adam"))
            assert sum(parts) == totals["hidden"]
            assert totals["to Muon"] <= totals["others"]


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [(0, 5, "none"), (5, 5, "100 %"), (1, 9999, "0.1 %"), (9999, 10000, "99.9 %")],
)
def test_share_is_never_rounded_to_all_or_nothing(part, whole, expected):
    assert routing.share(part, whole) == expected
