"""Optimizers and formats by their names."""

import math
import re

import jax
import pytest

import optaxplus as ox
from optaxplus.report.recipes import OPTIMIZERS, Recipe, lora_factors

PARAMS = {
    "embed": {"embedding": jax.ShapeDtypeStruct((512, 256), "float32")},
    "layers": {
        "attention": {
            "query": {"kernel": jax.ShapeDtypeStruct((16, 256, 4, 64), "float32")},
            "key": {"kernel": jax.ShapeDtypeStruct((16, 256, 4, 64), "float32")},
            "value": {"kernel": jax.ShapeDtypeStruct((16, 256, 4, 64), "float32")},
            "out": {"kernel": jax.ShapeDtypeStruct((16, 4, 64, 256), "float32")},
        },
        "norm": {"scale": jax.ShapeDtypeStruct((16, 256), "float32")},
    },
}
MATRICES = 4 * 16 * 256 * 256
NUM_PARAMS = MATRICES + 512 * 256 + 16 * 256
MIXED = {"weights": "bfloat16", "grads": "float32", "master": "float32"}


def test_every_named_optimizer_has_its_name():
    named = {
        name
        for name in ox.__all__
        if getattr(getattr(ox, name), "__module__", "").startswith(
            "optaxplus.optimizers."
        )
    }
    assert named == {*OPTIMIZERS, "qk_clip"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_counted_on_one_device_and_on_many(name):
    recipe = Recipe(name)
    whole = recipe.report(PARAMS)
    assert whole.state == ox.memory_report(recipe.build(), PARAMS).state
    assert whole.per_device is None
    cut = recipe.report(PARAMS, {"fsdp": 4, "tensor": 2})
    assert cut.total == whole.total
    share = cut.per_device
    assert share["total"] == share["params"] + share["grads"] + share["state"]
    assert whole.total <= 8 * share["total"]
    # The norms are whole, everything else is cut into eight.
    assert share["params"] == 4 * ((NUM_PARAMS - 16 * 256) // 8 + 16 * 256)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe("sgd"), 8),
        (Recipe("sgd(momentum=0.9)"), 12),
        (Recipe(" sgd( momentum=0.9, nesterov=True ) "), 12),
        (Recipe("adamw()"), 16),
        (Recipe("adamw(mu_dtype='bfloat16', nu_dtype='bfloat16')"), 12),
        (Recipe("adamw(learning_rate=0.1)"), 16),
        (Recipe("adamw", weights="bfloat16"), 12),
        (Recipe("adamw", grads="bfloat16"), 14),
        (Recipe("adamw", **MIXED), 18),
        (Recipe("adamw", **MIXED | {"weights": "float16"}), 18),
        (Recipe("adamw", **MIXED | {"master": "24bit"}), 15),
    ],
    ids=str,
)
def test_bytes_per_parameter(recipe, expected):
    # Counters of steps are all that comes on top.
    assert 0 <= recipe.report(PARAMS).total - expected * NUM_PARAMS <= 16


def test_8_bits():
    report = Recipe("adamw", state="8bit").report(PARAMS)
    kept = 8 * 512 * 256  # The table's moments, in float32.
    codes = 2 * (NUM_PARAMS - 512 * 256)
    # Four bytes of scale for each of 256 codes (64 where the last axis has no more).
    scales = 4 * codes
    assert kept + codes + scales / 256 <= report.state <= kept + codes + scales / 60


def test_learning_rate_is_given_once():
    assert Recipe("adamw(learning_rate=0.5)").build().init({}) is not None


@pytest.mark.parametrize("rank", [8, 16])  # 16: as many as there are layers.
@pytest.mark.parametrize("name", ["adamw", "muon", "lamb", "adafactor", "adamw8bit"])
def test_lora(name, rank):
    factors, rules = lora_factors(PARAMS, rank)
    num_factors = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(factors))
    # In and out of every matrix are 256 wide.
    assert num_factors == 4 * 16 * rank * (256 + 256)
    assert set(jax.tree.leaves(ox.infer_roles(factors, rules))) == {"other", "hidden"}
    recipe = Recipe(name, lora=rank)
    report = recipe.report(PARAMS)
    assert report.num_params == NUM_PARAMS + num_factors
    assert report.params == 4 * report.num_params
    assert report.grads == 4 * num_factors
    assert 0 < report.state < 4 * 3 * num_factors
    share = recipe.report(PARAMS, {"fsdp": 4}).per_device
    assert share["params"] < report.params / 3


def test_lora_routes_b_to_muon():
    factors, rules = lora_factors(PARAMS, 16)
    rows = {row.path: row for row in ox.explain_routing(factors, rules).rows}
    query = rows["layers/attention/query/lora_b"]
    assert (query.label, query.matrix) == ("muon", "16 x (16 -> 256)")
    out = rows["layers/attention/out/lora_a"]
    assert (out.label, out.matrix) == ("adamw", "16 x (256 -> 16)")


def test_lora_has_masters_of_its_factors_alone():
    report = Recipe("sgd", weights="bfloat16", master="float32", lora=8).report(PARAMS)
    num_factors = report.grads // 2
    assert 0 <= report.state - 4 * num_factors <= 16


def test_factors_beside_bare_arrays():
    params = {
        "layers": {"experts": {"up": jax.ShapeDtypeStruct((3, 8, 16), "float32")}}
    }
    factors, rules = lora_factors(params, 2)
    shapes = {key: leaf.shape for key, leaf in factors["layers"]["experts"].items()}
    assert shapes == {"up_lora_a": (3, 8, 2), "up_lora_b": (3, 2, 16)}
    assert len(rules) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "adamx"}, "optimizer='adamx' is not allowed; .* 'adafactor', "),
        ({"optimizer": "adam w"}, "it must be a name, or a name with keyword"),
        ({"optimizer": ""}, "it must be a name, or a name with keyword"),
        ({"optimizer": "ox.adam"}, "it must be a name, or a name with keyword"),
        ({"optimizer": "sgd(0.1)"}, "it must be a name, or a name with keyword"),
        ({"optimizer": "sgd\0"}, "it must be a name, or a name with keyword"),
        ({"optimizer": "sgd(speed=1)"}, "arguments of sgd are 'learning_rate', "),
        ({"optimizer": "moun"}, r"did you mean 'muon'\?"),
        ({"optimizer": "muon(learn_rate=1)"}, r"did you mean 'learning_rate'\?"),
        (
            {"optimizer": "sgd(momentum=0.9, momentum=0.0)"},
            "momentum must be given once",
        ),
        ({"optimizer": "sgd(**{})"}, "arguments of sgd are 'learning_rate', "),
        ({"optimizer": "sgd(momentum=exit())"}, "momentum must be a number, a word"),
        ({"optimizer": "sgd(momentum=2)"}, "momentum=2 is not allowed"),
        (
            {"weights": "int8"},
            "weights='int8' is not allowed; .* 'float32', 'bfloat16'",
        ),
        ({"grads": "float64"}, "grads='float64' is not allowed; .* 'float32'"),
        ({"master": "24bit"}, "master='24bit' is not allowed with weights='float32'"),
        ({"weights": "bfloat16", "master": "16bit"}, "master='16bit' .* '24bit'"),
        ({"state": "4bit"}, "state='4bit' is not allowed; it must be one of '8bit'"),
        ({"lora": 0}, "lora=0 is not allowed; it must be an integer >= 1"),
    ],
    ids=str,
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


def test_refuses_what_is_no_text():
    with pytest.raises(
        TypeError, match=re.escape("Recipe: optimizer=1 is not allowed")
    ):
        Recipe(1)


def test_nothing_is_evaluated(tmp_path):
    touched = tmp_path / "touched"
    with pytest.raises(ValueError, match="momentum must be a number"):
        Recipe(f"sgd(momentum=open({str(touched)!r}, 'w'))")
    assert not touched.exists()
