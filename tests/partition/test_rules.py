"""What the default rules say of names and shapes, without a model around them."""

import re

import pytest

from optaxplus import DEFAULT_RULES, MatrixAxes, Rule
from optaxplus.partition.inference import decide, infer_matrix_axes, infer_roles
from tests.partition.model_zoo import MODELS
from tests.partition.routing_tables import abstract, routing

IN_OUT = MatrixAxes((0,), (1,))
VECTOR = MatrixAxes((), (0,))

# path and shape -> role, fan_in, fan_out
PLAIN_NAMES = {
    ("wte", (11, 6)): ("embedding", (0,), (1,)),
    ("wpe", (8, 6)): ("embedding", (0,), (1,)),
    ("model/emb", (11, 6)): ("embedding", (0,), (1,)),
    ("tok_embeddings/weight", (11, 6)): ("embedding", (0,), (1,)),
    ("embed/w", (11, 6)): ("embedding", (0,), (1,)),
    ("pos_embedding", (1, 8, 6)): ("embedding", (1,), (2,)),
    ("cls", (1, 1, 6)): ("embedding", (1,), (2,)),
    ("lm_head", (6, 11)): ("head", (0,), (1,)),
    ("lm_head/w", (6, 11)): ("head", (0,), (1,)),
    ("unembedding", (6, 11)): ("head", (0,), (1,)),
    ("classifier/kernel", (6, 3)): ("head", (0,), (1,)),
    ("logits_dense/kernel", (6, 3)): ("head", (0,), (1,)),
    ("classifier/bias", (3,)): ("vector", (), (0,)),
    ("h/0/attn/c_proj/w", (6, 6)): ("hidden", (0,), (1,)),
    ("h/0/mlp/c_fc/weight", (6, 24)): ("hidden", (0,), (1,)),
    ("h/0/mlp/c_fc/b", (24,)): ("vector", (), (0,)),
    ("h/0/ln_1/gamma", (6,)): ("vector", (), (0,)),
    ("h/0/ln_1/beta", (6,)): ("vector", (), (0,)),
    ("temperature", ()): ("vector", (), ()),
    ("norm/scale", ()): ("vector", (), ()),
    ("norms/scale", (3, 6)): ("vector", (), (1,)),
    ("w", (4, 5)): ("hidden", (0,), (1,)),
    # A head or an embedding is the whole name, not a part of it.
    ("multihead/w", (4, 5)): ("hidden", (0,), (1,)),
    ("embedder/w", (4, 5)): ("hidden", (0,), (1,)),
    ("embed_projection/kernel", (4, 5)): ("hidden", (0,), (1,)),
    ("heads", (4, 5)): ("hidden", (0,), (1,)),
}


@pytest.mark.parametrize(("path", "shape"), PLAIN_NAMES)
def test_plain_names(path: str, shape):
    assert routing(abstract({path: shape})) == {path: PLAIN_NAMES[path, shape]}


# Evidence: kernel and bias of one module -> axes of the kernel, axes of the bias
STACKS = {
    "dense": ((4, 5), (5,), ((0,), (1,)), (0,)),
    "scanned_dense": ((3, 4, 5), (3, 5), ((1,), (2,)), (1,)),
    "heads": ((4, 2, 3), (2, 3), ((0,), (1, 2)), (0, 1)),
    "scanned_heads": ((5, 4, 2, 3), (5, 2, 3), ((1,), (2, 3)), (1, 2)),
    "merged_heads": ((2, 3, 4), (4,), ((0, 1), (2,)), (0,)),
    "scanned_merged_heads": ((5, 2, 3, 4), (5, 4), ((1, 2), (3,)), (1,)),
    "convolution_1d": ((3, 4, 5), (5,), ((0, 1), (2,)), (0,)),
    "convolution_2d": ((3, 3, 4, 5), (5,), ((0, 1, 2), (3,)), (0,)),
    "scanned_convolution": ((2, 3, 3, 4, 5), (2, 5), ((1, 2, 3), (4,)), (1,)),
    "three_output_axes": ((4, 3, 2, 5), (3, 2, 5), ((0,), (1, 2, 3)), (0, 1, 2)),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_bias_tells_stacks_from_heads_and_windows(name: str):
    kernel, bias, (fan_in, fan_out), bias_out = STACKS[name]
    assert routing(abstract({"m/kernel": kernel, "m/bias": bias})) == {
        "m/kernel": ("hidden", fan_in, fan_out),
        "m/bias": ("vector", (), bias_out),
    }


@pytest.mark.parametrize(
    ("kernel", "bias"),
    [
        ((3, 3, 5), (3, 5)),  # three layers, or three inputs of 3 × 5 outputs
        ((3, 4, 3, 5), (3, 5)),  # three layers of convolutions, or outputs (3, 5)
        ((4, 2, 3), (7,)),  # neither
        ((4, 2, 3), ()),
    ],
)
def test_a_bias_that_allows_two_readings_or_none_decides_nothing(kernel, bias):
    with pytest.raises(ValueError, match=r"'m/kernel' of shape"):
        infer_roles(abstract({"m/kernel": kernel, "m/bias": bias}))


@pytest.mark.parametrize("name", ["bias", "b", "beta"])
def test_an_undecided_bias_is_never_a_matrix(name: str):
    message = rf"'m/{name}' of shape \(3, 5\)"
    with pytest.raises(ValueError, match=message):
        infer_roles(abstract({f"m/{name}": (3, 5)}))
    with pytest.raises(ValueError, match=message):
        infer_roles(abstract({f"m/{name}": (3, 5), "m/w": (4, 5)}))
    assert infer_roles(abstract({f"m/{name}": (5,)})) == {"m": {name: "vector"}}


def test_scale_beside_a_bias_is_a_norm():
    shapes = {"norm/scale": (3, 5), "norm/bias": (3, 5)}
    stacked = ("vector", (), (1,))
    assert routing(abstract(shapes)) == dict.fromkeys(shapes, stacked)


def test_every_default_rule_is_optional_and_decides_somewhere():
    assert not any(rule.required for rule in DEFAULT_RULES)
    extra = abstract(
        {
            "per_layer_embeddings": (11, 3, 6),
            "layers/moe/wi_0_bias": (4, 6),
            "attention/wq_b/kernel": (6, 2, 3),
            "attention/norm/scale": (6,),
            "pointwise/kernel": (1, 1, 4, 6),
            "mlp/router/kernel": (6, 4),
            "mlp/gate_proj": (4, 6, 7),
            "temperature": (),
            "mixer/A_log": (6, 3),
            "log_variance": (1, 1, 6),
            "equinox/weight": (8, 1, 3, 3),
            "equinox/bias": (8, 1, 1),
        }
    )
    trees = [extra, *(build() for build in MODELS.values())]
    decided = set()
    for tree in trees:
        # What nothing decides, see the golden tables, goes to a rule behind.
        rest = Rule(r"", MatrixAxes((), ()), "other", required=False)
        decisions = decide("test", tree, (*DEFAULT_RULES, rest))
        decided |= {decision.rule for decision in decisions}
    assert decided >= set(DEFAULT_RULES)


# Rules of one's own


def test_the_first_rule_that_matches_decides():
    frozen, hidden = Rule("w", IN_OUT, "frozen"), Rule("w$", IN_OUT, "hidden")
    tree = abstract({"a/w": (4, 5)})
    assert infer_roles(tree, (frozen, hidden)) == {"a": {"w": "frozen"}}
    assert infer_roles(tree, (hidden, frozen)) == {"a": {"w": "hidden"}}


def test_patterns_are_searched_anywhere():
    rule = Rule(r"block_\d+/.*/w$", IN_OUT, "mine")
    tree = abstract({"model/block_3/attn/w": (4, 5), "model/w": (4, 5)})
    assert infer_roles(tree, (rule, *DEFAULT_RULES)) == {
        "model": {"block_3": {"attn": {"w": "mine"}}, "w": "hidden"}
    }


def test_a_function_of_path_shape_and_siblings_may_decline():
    seen = []

    def axes(path, shape, siblings):
        seen.append((path, shape, dict(siblings)))
        return IN_OUT if "up" in siblings else None

    rule = Rule(r"", axes, "gated")
    tree = abstract({"mlp/up": (4, 5), "mlp/gate": (4, 5), "w": (4, 5)})
    assert infer_roles(tree, (rule, *DEFAULT_RULES)) == {
        "mlp": {"gate": "gated", "up": "gated"},
        "w": "hidden",
    }
    beside = {"gate": (4, 5), "up": (4, 5)}
    beside |= {f"../mlp/{name}": shape for name, shape in beside.items()}
    beside["../w"] = (4, 5)
    assert seen == [
        ("mlp/gate", (4, 5), beside),
        ("mlp/up", (4, 5), beside),
        ("w", (4, 5), {"w": (4, 5)}),
    ]


def test_negative_axes_are_resolved():
    rule = Rule("w", MatrixAxes((-2,), (-1,)), "hidden")
    tree = abstract({"w": (3, 4, 5)})
    assert infer_matrix_axes(tree, (rule,)) == {"w": MatrixAxes((1,), (2,))}


def test_rules_of_ones_own_may_speak_of_one_layer():
    shapes = {"layers/query/kernel": (5, 12, 3, 4), "layers/norm/scale": (5, 12)}
    shapes["layers/down/kernel"] = (5, 20, 12)
    per_head = Rule("query/kernel$", MatrixAxes((0,), (2,)), "hidden", per_layer=True)
    rules = (per_head, *DEFAULT_RULES)
    table = routing(abstract(shapes), rules)
    assert table["layers/query/kernel"] == ("hidden", (1,), (3,))
    # Nothing proves a stack of a single kernel, so it is the whole shape there.
    alone = routing(abstract({"query/kernel": (12, 3, 4)}), rules)
    assert alone == {"query/kernel": ("hidden", (0,), (2,))}


@pytest.mark.parametrize("argument", ["required", "per_layer"])
def test_flags_that_are_none_are_refused(argument: str):
    with pytest.raises(TypeError, match=f"Rule: {argument}='x' is not allowed"):
        Rule("w", IN_OUT, "hidden", **{argument: "x"})


@pytest.mark.parametrize("pattern", ["(", "*w", None, 3, b"w"])
def test_patterns_that_are_no_regular_expression_are_refused(pattern):
    message = rf"Rule: pattern={re.escape(repr(pattern))} is not allowed; .* regular"
    with pytest.raises(ValueError, match=message):
        Rule(pattern, IN_OUT, "hidden")


@pytest.mark.parametrize("axes", [None, (0, 1), "hidden"])
def test_axes_that_are_none_are_refused(axes):
    message = rf"Rule: axes={re.escape(repr(axes))} is not allowed; it must be MatrixAx"
    with pytest.raises(TypeError, match=message):
        Rule("w", axes, "hidden")


@pytest.mark.parametrize("role", ["", None, 3])
def test_roles_that_are_no_words_are_refused(role):
    with pytest.raises(
        ValueError, match=f"Rule: role={role!r} is not allowed; .* word"
    ):
        Rule("w", IN_OUT, role)
