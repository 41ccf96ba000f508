"""Names and shapes of public code that a careless rule gets silently wrong."""

import pickle
import re

import pytest

import optaxplus as ox
from optaxplus import DEFAULT_RULES, LORA_RULES, MatrixAxes, Rule
from tests.partition.routing_tables import abstract, routing

ERROR = "an error"
HIDDEN_1D = ("hidden", (0, 1), (2,))
VECTOR = ("vector", (), (0,))

# name of the trap: {path: (shape, (role, fan_in, fan_out) or ERROR)}
TRAPS = {
    # Attention below a stack or a policy called after experts.
    "attention in moe_layers": {
        "moe_layers/self_attention/query/kernel": (
            (64, 4, 16),
            ("hidden", (0,), (1, 2)),
        ),
        "moe_layers/self_attention/value/kernel": (
            (64, 4, 16),
            ("hidden", (0,), (1, 2)),
        ),
        "moe_layers/self_attention/out/kernel": ((4, 16, 64), HIDDEN_1D),
        "moe_layers/self_attention/wq_b/kernel": (
            (24, 4, 16),
            ("hidden", (0,), (1, 2)),
        ),
    },
    "convolution of an expert policy": {
        "ExpertPolicy_0/Conv_0/kernel": ((3, 3, 3, 32), ("hidden", (0, 1, 2), (3,))),
        "ExpertPolicy_0/Conv_0/bias": ((32,), VECTOR),
    },
    "dispatch of a soft mixture": {"moe/phi": ((64, 8, 4), ERROR)},
    "groups of queries": {
        "attn/query/kernel": ((64, 2, 4, 16), ("hidden", (0,), (1, 2, 3))),
        "attn/query/bias": ((2, 4, 16), ("vector", (), (0, 1, 2))),
        "attn/key/kernel": ((64, 2, 16), ERROR),
        "attn/value/kernel": ((64, 2, 16), ERROR),
        "attn/out/kernel": ((2, 4, 16, 64), ("hidden", (0, 1, 2), (3,))),
        "attn/out/bias": ((64,), VECTOR),
    },
    "convolutions to query, key and value": {
        "qkv_conv/kernel": ((3, 3, 64, 192), ("hidden", (0, 1, 2), (3,))),
        "qkv_conv/bias": ((192,), VECTOR),
        "qkv_dwconv/kernel": ((3, 3, 1, 192), ("other", (0, 1, 2), (3,))),
        "qkv_dwconv/bias": ((192,), VECTOR),
        "bare/qkv_conv/kernel": ((3, 3, 64, 192), ("hidden", (0, 1, 2), (3,))),
    },
    "four times as wide is no LSTM": {
        "mlp/w_h": ((64, 256), ("hidden", (0,), (1,))),
        "mlp/w_o": ((256, 64), ("hidden", (0,), (1,))),
        "ff/dense_h/kernel": ((64, 256), ("hidden", (0,), (1,))),
        "ff/dense_h/bias": ((256,), VECTOR),
    },
    "flat paths with dots": {
        "model.embed_tokens.weight": ((100, 32), ("embedding", (0,), (1,))),
        "lm_head.weight": ((100, 32), ("head", (1,), (0,))),
        "model.layers.0.mlp.up.weight": ((64, 32), ("hidden", (1,), (0,))),
        "model.layers.0.mlp.up.bias": ((64,), VECTOR),
    },
    "transposed kernels": {
        "ConvTranspose_0/kernel": ((4, 4, 16, 32), ("hidden", (0, 1, 3), (2,))),
        "ConvTranspose_0/bias": ((16,), VECTOR),
        "Conv_0/kernel": ((3, 3, 16, 32), ERROR),
        "Conv_0/bias": ((7,), VECTOR),
    },
    "vectors that broadcast": {
        "actor/log_std": ((1, 6), ("vector", (), (0, 1))),
        "att/time_mix_k": ((1, 1, 32), ("vector", (), (0, 1, 2))),
        "style/const": ((4, 4, 512), ERROR),
        "mlp/kernel": ((1, 6), ("hidden", (0,), (1,))),
    },
    "numbers for every channel": {
        "mixer/A_log": ((64, 16), ("vector", (), (0, 1))),
        "att/time_faaaa": ((8, 8), ("vector", (), (0, 1))),
        "att/time_maa_w1": ((8, 40), ("hidden", (0,), (1,))),
    },
    "layers named after norms": {
        "block/ada_norm/w": ((32, 64), ("hidden", (0,), (1,))),
        "block/ada_norm/b": ((64,), VECTOR),
        "block/norm_proj/weight": ((64, 32), ("hidden", (1,), (0,))),
        "block/norm_proj/bias": ((64,), VECTOR),
        "block/lnet/w": ((32, 64), ("hidden", (0,), (1,))),
    },
    "tables of many names": {
        f"{name}": ((50, 16), ("embedding", (0,), (1,)))
        for name in (
            "codebook",
            "latents",
            "pos",
            "positional_encoding",
            "embedding_table",
            "embeds/weight",
            "prompt",
            "memory_tokens",
            "inducing_points",
        )
    },
    "a shared scalar in a scanned block": {
        "l/d/kernel": ((4, 8, 16), ("hidden", (1,), (2,))),
        "l/d/bias": ((4, 16), ("vector", (), (1,))),
        "l/vec": ((4, 16), ("vector", (), (1,))),
        "l/shared": ((), ("vector", (), ())),
    },
    "a gate before numbered experts": {
        "moe/gate/kernel": ((64, 2), ("other", (0,), (1,))),
        "moe/experts/0/w1/kernel": ((64, 128), ("hidden", (0,), (1,))),
        "moe/experts/1/w1/kernel": ((64, 128), ("hidden", (0,), (1,))),
    },
    "a gate of a GLU": {
        "mlp/gate/kernel": ((64, 128), ("hidden", (0,), (1,))),
        "mlp/up/kernel": ((64, 128), ("hidden", (0,), (1,))),
    },
    "a norm for every head": {
        "wq/kernel": ((4, 64, 16), ERROR),
        "wo/kernel": ((4, 16, 64), ERROR),
        "q_norm/scale": ((4, 16), ("vector", (), (1,))),
    },
    "a scan of square convolutions": {
        "stage/conv1/kernel": ((3, 3, 3, 64, 64), ERROR),
        "stage/conv2/kernel": ((3, 3, 3, 64, 64), ERROR),
    },
    "one head for all queries": {
        "attn/keys/kernel": ((64, 1, 16), ("hidden", (0,), (1, 2))),
        "attn/keys/bias": ((1, 16), ("vector", (), (0, 1))),
    },
    "depthwise in the order of Equinox": {
        "conv/weight": ((64, 1, 7, 7), ("other", (1, 2, 3), (0,))),
        "conv/bias": ((64, 1, 1), ("vector", (), (0, 1, 2))),
    },
    "scales of logits are no head": {
        "logits_scale": ((), ("vector", (), ())),
        "logit_bias": ((31,), VECTOR),
        "logitdense/kernel": ((16, 31), ("head", (0,), (1,))),
        "value_head/kernel": ((16, 1), ("head", (0,), (1,))),
        "attn/q_head/kernel": ((16, 31), ("hidden", (0,), (1,))),
        "action_logits/weights": ((16, 31), ("head", (0,), (1,))),
        "block/score/kernel": ((16, 31), ("hidden", (0,), (1,))),
    },
    "Haiku's weight and bias of a stack": {
        "lru/w": ((4, 16, 16), ("hidden", (1,), (2,))),
        "lru/b": ((4, 16), ("vector", (), (1,))),
    },
    "evidence beside heads and tables": {
        "lm_head/kernel": ((64, 4, 1024), ("head", (0,), (1, 2))),
        "lm_head/bias": ((4, 1024), ("vector", (), (0, 1))),
        "head/kernel": ((3, 3, 64, 21), ("head", (0, 1, 2), (3,))),
        "head/bias": ((21,), VECTOR),
        "time_embed/weight": ((64, 32), ("hidden", (1,), (0,))),
        "time_embed/bias": ((64,), VECTOR),
        "patch_embedding/weight": ((96, 3, 16, 16), ("embedding", (1, 2, 3), (0,))),
        "patch_embedding/bias": ((96, 1, 1), ("vector", (), (0, 1, 2))),
    },
    "a stack of convolutions among strangers": {
        "convs/kernel": ((4, 3, 3, 64, 64), ERROR),
        "linear/kernel": ((64, 10), ("hidden", (0,), (1,))),
    },
    "a stack of convolutions along the second axis": {
        "layers/Conv_0/kernel": ((3, 7, 3, 8, 32), ERROR),
        "layers/up/kernel": ((8, 7, 5), ERROR),
        "layers/down/kernel": ((5, 7, 8), ERROR),
    },
    "a stack in a stack beside a convolution": {
        "layers/moe/up/kernel": ((4, 8, 64, 128), ("hidden", (2,), (3,))),
        "layers/moe/up/bias": ((4, 8, 128), ("vector", (), (2,))),
        "layers/conv/kernel": ((4, 3, 64, 64), ("hidden", (1, 2), (3,))),
    },
    "query, key and value of three heads": {
        "attn/qkv/kernel": ((192, 3, 3, 64), ERROR),
        "attn/qkv/bias": ((3, 3, 64), ERROR),
    },
    "routers in a stack that nothing proves": {
        "layers/experts/router/kernel": ((6, 64, 8), ERROR),
        "moe_layer/attn/wo/kernel": ((4, 16, 64), ERROR),
        "memoe/w1": ((4, 16, 64), ERROR),
    },
    "transposed convolutions of Haiku": {
        "conv2_d_transpose/w": ((4, 4, 32, 64), ("hidden", (0, 1, 3), (2,))),
    },
    "a layer called norm": {
        "cond_norm/w": ((32, 64), ERROR),
        "rms_norm/weight": ((64,), VECTOR),
    },
    "nonsense": {
        "m/kernel": ((), ("vector", (), ())),
        "m/bias": ((3, 4), ERROR),
    },
    "numbered vectors of a stack": {
        "layers/gamma2": ((48, 8), ("vector", (), (1,))),
        "layers/b1": ((48, 8), ERROR),
        "mlp/b1": ((8,), VECTOR),
    },
    "unusual biases": {
        "attn/gating_b": ((4, 16), ERROR),
        "grn/grn_beta": ((1, 1, 1, 64), ("vector", (), (0, 1, 2, 3))),
    },
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str):
    shapes = {path: shape for path, (shape, _) in TRAPS[name].items()}
    expected = {path: answer for path, (_, answer) in TRAPS[name].items()}
    undecided = [path for path, answer in expected.items() if answer == ERROR]
    if undecided:
        with pytest.raises(ValueError, match="no rule decides") as error:
            ox.infer_roles(abstract(shapes))
        found = re.findall(r"^  '(.*)' of shape", str(error.value), re.MULTILINE)
        assert sorted(found) == sorted(undecided)
    rest = Rule(r"", MatrixAxes((), ()), ERROR, required=False)
    decided = routing(abstract(shapes), (*DEFAULT_RULES, rest))
    answers = {path: ERROR if row[0] == ERROR else row for path, row in decided.items()}
    assert answers == expected


def test_a_factor_of_unknown_spelling_is_not_frozen():
    shapes = {
        "q/kernel": (64, 64),
        "q/lora_a": (64, 8),
        "q/lora_b": (8, 64),
        "v/lora_A/default/weight": (8, 64),
        "q/lora_magnitude": (64,),
    }
    with pytest.raises(ValueError, match="no rule decides") as error:
        ox.infer_roles(abstract(shapes), LORA_RULES)
    message = str(error.value)
    assert "'v/lora_A/default/weight'" in message
    assert "'q/lora_magnitude'" in message
    assert "'q/kernel'" not in message
    # Pasted as it stands, the advice keeps the base frozen.
    assert "and pass rules=(rule_1, rule_2, *ox.LORA_RULES)." in message
    with pytest.raises(ValueError, match="no rule decides") as of_muon:
        ox.muon(0.1, rules=LORA_RULES).init(abstract(shapes))
    assert str(of_muon.value) == message.replace("infer_roles", "muon", 1)


def test_copies_of_the_default_rules_decide_alike():
    # A router that cannot be read stops the default rules, and copies of them.
    tree = abstract({"layers/experts/router/kernel": (6, 64, 8)})
    for rules in (pickle.loads(pickle.dumps(DEFAULT_RULES)), list(DEFAULT_RULES)):
        with pytest.raises(ValueError, match="no rule decides"):
            ox.infer_roles(tree, rules)


def test_functions_without_a_hash_may_be_axes():
    class Axes(dict):
        def __call__(self, path, shape, siblings):
            return MatrixAxes((1,), (2,))

    tree = abstract({"mixer": (2, 3, 4)})
    mine = Rule("mixer", Axes(), "hidden")
    for rules in ((mine, *DEFAULT_RULES), (*DEFAULT_RULES, mine)):
        assert routing(tree, rules)["mixer"] == ("hidden", (1,), (2,))


def test_advice_keeps_rules_of_ones_own():
    mine = (Rule("w", MatrixAxes((0,), (1,)), "hidden"), *DEFAULT_RULES)
    with pytest.raises(ValueError, match="no rule decides") as error:
        ox.infer_roles(abstract({"w": (2, 3), "v": (2, 3, 4)}), mine)
    ending = (
        "and pass rules=(rule_1, *rules), where `rules` are those that you pass now."
    )
    assert str(error.value).endswith(ending)


def test_what_is_declared_a_stack_is_not_asked_as_a_whole():
    # One layer of the kernel is undecided; the whole of it looks like a convolution.
    tree = abstract({"l/Conv_0/kernel": (3, 5, 3, 8, 16), "norm/scale": (8,)})
    rules = (*ox.stacked("^l/", rules=(DEFAULT_RULES[-1],)), *DEFAULT_RULES)
    with pytest.raises(ValueError, match="'l/Conv_0/kernel' of shape"):
        ox.infer_roles(tree, rules)
    mine = Rule("kernel$", MatrixAxes((3,), (4,)), "hidden")
    assert routing(tree, (*rules, mine))["l/Conv_0/kernel"] == ("hidden", (3,), (4,))
