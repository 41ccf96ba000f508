"""Published models as abstract parameters: shapes and names, nothing allocated.

The blocks of a model are stacked along the first axis, as `flax.linen.scan` stacks
them, under the names that Flax code uses: of the attention of Flax for GPT-2, of the
checkpoints of Meta and Hugging Face for LLaMA, of MaxText for the experts of Mixtral
and of big_vision for the vision transformers. The default rules decide every parameter.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from optaxplus import validation
from optaxplus.custom_types import DTypeName, PyTree

__all__ = ["MODELS", "abstract_params"]

# A module: the shapes of its arrays and its modules, by name.
_Shapes = Mapping[str, Any]


def _in_stack(depth: int, module: _Shapes) -> _Shapes:
    """The same module `depth` times."""
    return jax.tree.map(
        lambda shape: (depth, *shape), module, is_leaf=lambda x: isinstance(x, tuple)
    )


def _dense(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> _Shapes:
    return {"kernel": (*inputs, *outputs), "bias": outputs}


def _layer_norm(width: int) -> _Shapes:
    return {"scale": (width,), "bias": (width,)}


def _attention(width: int, heads: int) -> _Shapes:
    """As `flax.linen.MultiHeadAttention` has it, with biases."""
    each = (heads, width // heads)
    into = {name: _dense((width,), each) for name in ("query", "key", "value")}
    return {**into, "out": _dense(each, (width,))}


def _gpt2(*, width: int, depth: int, heads: int) -> _Shapes:
    """The table of tokens is the output head, too, so there is none."""
    vocabulary, context, mlp = 50257, 1024, 4 * width
    block = {
        "ln_1": _layer_norm(width),
        "attn": _attention(width, heads),
        "ln_2": _layer_norm(width),
        "mlp": {
            "c_fc": _dense((width,), (mlp,)),
            "c_proj": _dense((mlp,), (width,)),
        },
    }
    return {
        "wte": {"embedding": (vocabulary, width)},
        "wpe": {"embedding": (context, width)},
        "h": _in_stack(depth, block),
        "ln_f": _layer_norm(width),
    }


def _llama(
    *,
    width: int,
    depth: int,
    heads: int,
    mlp: int,
    kv_heads: int | None = None,
    experts: int | None = None,
) -> _Shapes:
    """Without biases; with `experts` the MLP is theirs, and a router's."""
    vocabulary, head_size, kv_heads = 32000, width // heads, kv_heads or heads
    into, back = (width, mlp), (mlp, width)
    if experts is None:
        names = {"gate_proj": into, "up_proj": into, "down_proj": back}
        feed_forward = {"mlp": {name: {"kernel": s} for name, s in names.items()}}
    else:
        names = {"wi_0": into, "wi_1": into, "wo": back}
        stacks = {name: (experts, *shape) for name, shape in names.items()}
        gate = {"kernel": (width, experts)}
        feed_forward = {"MoeBlock_0": {"gate": gate, **stacks}}
    block = {
        "input_layernorm": {"scale": (width,)},
        "self_attn": {
            "q_proj": {"kernel": (width, heads, head_size)},
            "k_proj": {"kernel": (width, kv_heads, head_size)},
            "v_proj": {"kernel": (width, kv_heads, head_size)},
            "o_proj": {"kernel": (heads, head_size, width)},
        },
        "post_attention_layernorm": {"scale": (width,)},
        **feed_forward,
    }
    return {
        "embed_tokens": {"embedding": (vocabulary, width)},
        "layers": _in_stack(depth, block),
        "norm": {"scale": (width,)},
        "lm_head": {"kernel": (width, vocabulary)},
    }


def _vit(*, width: int, depth: int, heads: int, patch: int) -> _Shapes:
    """For images of 224 x 224 in colour and the 1,000 classes of ImageNet."""
    places, mlp = (224 // patch) ** 2 + 1, 4 * width
    block = {
        "LayerNorm_0": _layer_norm(width),
        "MultiHeadDotProductAttention_0": _attention(width, heads),
        "LayerNorm_1": _layer_norm(width),
        "MlpBlock_0": {
            "Dense_0": _dense((width,), (mlp,)),
            "Dense_1": _dense((mlp,), (width,)),
        },
    }
    return {
        "embedding": _dense((patch, patch, 3), (width,)),
        "cls": (1, 1, width),
        "pos_embedding": (1, places, width),
        "Transformer": {
            "encoderblock": _in_stack(depth, block),
            "encoder_norm": _layer_norm(width),
        },
        "head": _dense((width,), (1000,)),
    }


MODELS: Mapping[str, Callable[[], _Shapes]] = {
    # Radford et al., Language models are unsupervised multitask learners (2019), table
    # 2; heads of 64.
    "gpt2-small": partial(_gpt2, width=768, depth=12, heads=12),
    "gpt2-medium": partial(_gpt2, width=1024, depth=24, heads=16),
    "gpt2-large": partial(_gpt2, width=1280, depth=36, heads=20),
    "gpt2-xl": partial(_gpt2, width=1600, depth=48, heads=25),
    # Touvron et al., LLaMA, arXiv 2302.13971, table 2; 7B and 13B of Llama 2 are alike.
    "llama-7b": partial(_llama, width=4096, depth=32, heads=32, mlp=11008),
    "llama-13b": partial(_llama, width=5120, depth=40, heads=40, mlp=13824),
    "llama-33b": partial(_llama, width=6656, depth=60, heads=52, mlp=17920),
    "llama-65b": partial(_llama, width=8192, depth=80, heads=64, mlp=22016),
    # Touvron et al., Llama 2, arXiv 2307.09288, with grouped queries.
    "llama-70b": partial(_llama, width=8192, depth=80, heads=64, kv_heads=8, mlp=28672),
    # Jiang et al., Mixtral of experts, arXiv 2401.04088, table 1.
    "mixtral-8x7b": partial(
        _llama, width=4096, depth=32, heads=32, kv_heads=8, mlp=14336, experts=8
    ),
    # Dosovitskiy et al., An image is worth 16x16 words, arXiv 2010.11929, table 1; S is
    # from Touvron et al., DeiT, arXiv 2012.12877, table 1.
    "vit-s/16": partial(_vit, width=384, depth=12, heads=6, patch=16),
    "vit-b/16": partial(_vit, width=768, depth=12, heads=12, patch=16),
    "vit-l/16": partial(_vit, width=1024, depth=24, heads=16, patch=16),
    "vit-h/14": partial(_vit, width=1280, depth=32, heads=16, patch=14),
}
"""The shapes of every model that has a name."""


def abstract_params(model: str, dtype: DTypeName = "float32") -> PyTree:
    """The parameters of a published model as shapes, without any memory for them.

    For `optaxplus.memory_report`, `explain_routing` and `plan_placement`. The blocks
    are stacked along the first axis.

    Args:
      model: "gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama-7b",
        "llama-13b", "llama-33b", "llama-65b", "llama-70b" (Llama 2), "mixtral-8x7b",
        "vit-s/16", "vit-b/16", "vit-l/16" or "vit-h/14".
      dtype: Of all parameters.

    Returns:
      Nested dictionaries of `jax.ShapeDtypeStruct`s.

    Raises:
      TypeError: If `dtype` is no floating-point dtype.
      ValueError: If there is no model of this name.

    Example:
      >>> import optaxplus as ox
      >>> params = ox.abstract_params("llama-70b", "bfloat16")
      >>> params["layers"]["mlp"]["up_proj"]["kernel"]
      ShapeDtypeStruct(shape=(80, 8192, 28672), dtype=bfloat16)
    """
    validation.check_choice("abstract_params", "model", model, MODELS)
    validation.check_floating_dtype("abstract_params", dtype=dtype)
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        MODELS[model](),
        is_leaf=lambda x: isinstance(x, tuple),
    )
