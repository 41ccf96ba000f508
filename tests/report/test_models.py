"""The shapes of published models: as many parameters as published, routed rightly."""

import math

import jax
import pytest

import optaxplus as ox
from optaxplus.report.models import MODELS

# GPT-2: the presets of keras-hub (keras_hub/src/models/gpt2/gpt2_presets.py), which
# count the table of tokens once.
# LLaMA 7B and 13B, and Llama 2 70B: `model_param_count` of Together's Python client
# (https://github.com/togethercomputer/together-python, version 0.2). 33B and 65B: the
# printed checkpoints in docs/quant of https://github.com/juncongmoo/pyllama; table 2 of
# arXiv 2302.13971 has 6.7, 13.0, 32.5 and 65.2 billion.
# Mixtral: keras_hub/src/models/mixtral/mixtral_presets.py.
# ViT: `num_params` in torchvision/models/vision_transformer.py, for H/14 that of
# IMAGENET1K_SWAG_LINEAR_V1. S is deit_small_patch16_224 of timm, "22.1 M" in its card.
NUM_PARAMS = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-70b": 68_976_648_192,
    "mixtral-8x7b": 46_702_792_704,
    "vit-s/16": 22_050_664,
    "vit-b/16": 86_567_656,
    "vit-l/16": 304_326_632,
    "vit-h/14": 632_045_800,
}

# What is no vector, by the end of its path.
ROLES = {
    "gpt2": {
        "embedding": {"wte/embedding", "wpe/embedding"},
        "hidden": {
            *(f"h/attn/{name}/kernel" for name in ("query", "key", "value", "out")),
            "h/mlp/c_fc/kernel",
            "h/mlp/c_proj/kernel",
        },
    },
    "llama": {
        "embedding": {"embed_tokens/embedding"},
        "head": {"lm_head/kernel"},
        "hidden": {
            *(f"layers/self_attn/{name}_proj/kernel" for name in "qkvo"),
            *(f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")),
        },
    },
    "mixtral": {
        "embedding": {"embed_tokens/embedding"},
        "head": {"lm_head/kernel"},
        "other": {"layers/MoeBlock_0/gate/kernel"},
        "hidden": {
            *(f"layers/self_attn/{name}_proj/kernel" for name in "qkvo"),
            *(f"layers/MoeBlock_0/{name}" for name in ("wi_0", "wi_1", "wo")),
        },
    },
    "vit": {
        "embedding": {"cls", "pos_embedding", "embedding/kernel"},
        "head": {"head/kernel"},
        "hidden": {
            *(
                f"Transformer/encoderblock/MultiHeadDotProductAttention_0/{name}/kernel"
                for name in ("query", "key", "value", "out")
            ),
            *(f"Transformer/encoderblock/MlpBlock_0/Dense_{i}/kernel" for i in (0, 1)),
        },
    },
}
each_model = pytest.mark.parametrize("name", MODELS)


def test_every_model_has_a_published_number():
    assert NUM_PARAMS.keys() == MODELS.keys()


@each_model
def test_number_of_parameters(name):
    leaves = jax.tree.leaves(ox.abstract_params(name))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == NUM_PARAMS[name]


@each_model
def test_every_parameter_has_its_role(name):
    rows = ox.explain_routing(ox.abstract_params(name)).rows
    roles = {}
    for row in rows:
        roles.setdefault(row.role, set()).add(row.path)
    vectors = roles.pop("vector")
    assert roles == ROLES[name.split("-")[0]]
    assert {path.split("/")[-1] for path in vectors} <= {"bias", "scale"}
    labels = ox.label_params(ox.abstract_params(name))
    assert set(jax.tree.leaves(labels)) == {"adamw", "muon"}


@pytest.mark.parametrize(
    ("name", "path", "matrix"),
    [
        ("gpt2-xl", "h/attn/query/kernel", "48 x (1600 -> 1600)"),
        ("gpt2-xl", "h/attn/query/bias", "48 x 1600"),
        ("gpt2-xl", "h/ln_1/scale", "48 x 1600"),
        ("llama-7b", "layers/self_attn/o_proj/kernel", "32 x (4096 -> 4096)"),
        ("llama-70b", "layers/self_attn/k_proj/kernel", "80 x (8192 -> 1024)"),
        ("llama-70b", "layers/self_attn/o_proj/kernel", "80 x (8192 -> 8192)"),
        ("llama-70b", "layers/mlp/down_proj/kernel", "80 x (28672 -> 8192)"),
        ("mixtral-8x7b", "layers/MoeBlock_0/wi_0", "256 x (4096 -> 14336)"),
        ("mixtral-8x7b", "layers/MoeBlock_0/gate/kernel", "32 x (4096 -> 8)"),
        ("vit-b/16", "embedding/kernel", "(768 -> 768)"),
    ],
)
def test_every_layer_is_a_matrix_of_its_own(name, path, matrix):
    rows = ox.explain_routing(ox.abstract_params(name)).rows
    assert {row.path: row.matrix for row in rows}[path] == matrix


def test_dtype():
    leaves = jax.tree.leaves(ox.abstract_params("vit-s/16", "bfloat16"))
    assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}


def test_docstring_lists_all():
    for name in MODELS:
        assert f'"{name}"' in ox.abstract_params.__doc__


def test_refuses_other_names():
    with pytest.raises(
        ValueError, match=r"abstract_params: model='gpt2' is not .* 'gpt2-small', "
    ):
        ox.abstract_params("gpt2")


def test_refuses_a_dtype_that_is_not_floating():
    with pytest.raises(TypeError, match="abstract_params: dtype='int8' is not"):
        ox.abstract_params("gpt2-small", "int8")
