"""Real Flax models and realistic plain trees, as abstract parameter trees.

`MODELS[name]()` is the tree of one model; nothing is allocated. The sizes within
a model differ from one another, so that an axis of a shape can be told by its size. The
linen models are here, the others in `model_zoo_nnx.py`.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from examples.gpt import GPT, GPTConfig
from tests.partition.model_zoo_nnx import NNX_MODELS, PLAIN_TREES

WIDTH, MLP, VOCABULARY, CONTEXT, LAYERS, EXPERTS = 12, 20, 31, 9, 5, 7
HEADS, KV_HEADS, HEAD = 6, 2, 4  # HEADS * HEAD is not WIDTH, as in Gemma.
RANK, CLASSES, WINDOW = 2, 17, 3

TOKENS = np.arange(2 * CONTEXT, dtype=np.int32).reshape(2, CONTEXT)
SEQUENCE = jax.ShapeDtypeStruct((2, CONTEXT, WIDTH), "float32")


# Linen


class Layers(nn.Module):
    """Dense layers and norms, with and without biases."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
        x = nn.LayerNorm()(x)
        x = nn.LayerNorm(use_bias=False)(x)
        x = nn.RMSNorm()(x)
        x = nn.GroupNorm(num_groups=4)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.Dense(20, name="dense")(x)
        x = nn.Dense(13, use_bias=False, name="dense_bare")(x)
        x = nn.DenseGeneral((3, 4), name="split")(x)
        x = nn.DenseGeneral(15, axis=(-2, -1), name="merge")(x)
        x = nn.DenseGeneral((2, 5, 6), use_bias=False, name="split_bare")(x)
        x = nn.DenseGeneral(14, axis=(-3, -2, -1), use_bias=False, name="merge_bare")(x)
        x = nn.DenseGeneral((7, 8), name="split_again")(x)
        x = nn.DenseGeneral((10, 11), axis=(-2, -1), name="regroup")(x)
        return nn.Dense(VOCABULARY, name="lm_head")(x[..., 0])


class Attention(nn.Module):
    """Flax's attention under each of its names."""

    @nn.compact
    def __call__(self, x, memory):
        attention = nn.MultiHeadDotProductAttention
        # Three heads of four, and six of four which together are wider than x.
        wide = {"num_heads": HEADS, "qkv_features": HEADS * HEAD}
        x = attention(num_heads=3, name="attention")(x)
        x = attention(num_heads=3, use_bias=False, name="attention_bare")(x)
        x = attention(**wide, name="wide")(x)
        x = attention(**wide, use_bias=False, name="wide_bare")(x)
        x = attention(**wide, normalize_qk=True, name="normalized")(x)
        x = attention(**wide, out_features=WIDTH, name="cross")(x, memory)
        x = nn.MultiHeadAttention(num_heads=3)(x)
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            return nn.SelfAttention(num_heads=3)(x)


class FusedAttention(nn.Module):
    """Query, key and value from one kernel, of two axes or of four."""

    heads: int = 6
    flat: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        shape = (3, self.heads, width // self.heads)
        dense = partial(nn.DenseGeneral, use_bias=self.use_bias)
        if self.flat:
            qkv = nn.Dense(3 * width, use_bias=self.use_bias, name="qkv")(x)
            qkv = qkv.reshape(*x.shape[:-1], *shape)
        else:
            qkv = dense(shape, name="qkv")(x)
        y = nn.dot_product_attention(*jnp.moveaxis(qkv, -3, 0))
        if self.flat:
            return dense(width, name="out")(y.reshape(x.shape))
        return dense(width, axis=(-2, -1), name="out")(y)


class FusedQkv(nn.Module):
    """A block for each form of the fused projection."""

    @nn.compact
    def __call__(self, x):
        for flat in (True, False):
            for use_bias in (True, False):
                name = ("flat" if flat else "heads") + ("" if use_bias else "_bare")
                y = nn.LayerNorm(name=f"{name}_norm")(x)
                x = x + FusedAttention(flat=flat, use_bias=use_bias, name=name)(y)
        return x


class ConvolutionStack(nn.Module):
    """Convolutions over as many dimensions as the input has."""

    @nn.compact
    def __call__(self, x):
        dimensions = x.ndim - 2
        window = (WINDOW,) * dimensions
        x = nn.Conv(5, window)(x)
        x = nn.Conv(6, window, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.Conv(6, window, feature_group_count=6, name="depthwise")(x)
        x = nn.Conv(
            6, window, feature_group_count=6, use_bias=False, name="depthwise_bare"
        )(x)
        x = nn.Conv(7, (1,) * dimensions, use_bias=False, name="pointwise")(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.ConvTranspose(8, window)(x)
        return nn.ConvTranspose(9, window, use_bias=False)(x)


class Convolutions(nn.Module):
    """A stack for inputs of one, two and three dimensions, and a classifier."""

    @nn.compact
    def __call__(self, signal, image, volume):
        signal = nn.ConvLocal(4, (WINDOW,), padding="VALID", name="local")(signal)
        features = 0
        for name, x in (("signal", signal), ("image", image), ("volume", volume)):
            x = ConvolutionStack(name=name)(x)
            features += x.mean(axis=range(1, x.ndim - 1))
        return nn.Dense(CLASSES, name="head")(features)


class Recurrent(nn.Module):
    """Every recurrent cell; a cell of `nn.RNN` is named after its class."""

    @nn.compact
    def __call__(self, tokens, video):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
        for cell in (
            nn.LSTMCell,
            nn.OptimizedLSTMCell,
            nn.GRUCell,
            nn.SimpleCell,
            nn.MGUCell,
        ):
            nn.RNN(cell(5))(x)
        x = nn.RNN(nn.LSTMCell(5, name="cell"))(x)
        nn.RNN(nn.ConvLSTMCell(8, (WINDOW, WINDOW)))(video)
        return nn.Dense(CLASSES, name="head")(x)


def scan(block, axis: int):
    """`block`, LAYERS times, its parameters stacked along `axis`."""
    return nn.scan(
        nn.remat(block, prevent_cse=False),
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=LAYERS,
    )


class LlamaAttention(nn.Module):
    """Grouped-query attention; the kernels have an axis of heads unless `flat`."""

    flat: bool = False

    @nn.compact
    def __call__(self, x):
        dense = partial(nn.DenseGeneral, use_bias=False)

        def project(name, heads):
            shape = (heads * HEAD,) if self.flat else (heads, HEAD)
            y = dense(shape, name=name)(x)
            return y.reshape(*x.shape[:-1], heads, HEAD)

        y = jax.nn.dot_product_attention(
            project("q_proj", HEADS),
            project("k_proj", KV_HEADS),
            project("v_proj", KV_HEADS),
            is_causal=True,
        )
        if self.flat:
            return dense(x.shape[-1], name="o_proj")(y.reshape(*x.shape[:-1], -1))
        return dense(x.shape[-1], axis=(-2, -1), name="o_proj")(y)


class LlamaMlp(nn.Module):
    """SwiGLU."""

    @nn.compact
    def __call__(self, x):
        dense = partial(nn.Dense, use_bias=False)
        y = nn.silu(dense(MLP, name="gate_proj")(x)) * dense(MLP, name="up_proj")(x)
        return dense(x.shape[-1], name="down_proj")(y)


class LlamaBlock(nn.Module):
    flat: bool = False

    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm(name="input_norm")(x)
        x = x + LlamaAttention(self.flat, name="attention")(y)
        y = nn.RMSNorm(name="post_attention_norm")(x)
        return x + LlamaMlp(name="mlp")(y), None


class Llama(nn.Module):
    """LLaMA without rotary positions, its blocks apart or stacked."""

    axis: int | None = None
    flat: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
        if self.axis is None:
            for i in range(LAYERS):
                x, _ = LlamaBlock(self.flat, name=f"layers_{i}")(x, None)
        else:
            x, _ = scan(LlamaBlock, self.axis)(self.flat, name="layers")(x, None)
        x = nn.RMSNorm(name="final_norm")(x)
        return nn.Dense(VOCABULARY, use_bias=False, name="lm_head")(x)


def llama(stack: Literal["none", "axis_0", "axis_1"]) -> tuple[nn.Module, tuple]:
    """The same network with its blocks apart or stacked, and example inputs.

    The stack along the given axis of `layers_0/...`, `layers_1/...` and so on in the
    one tree of parameters is `layers/...` in another.
    """
    return Llama({"none": None, "axis_0": 0, "axis_1": 1}[stack]), (TOKENS,)


class Experts(nn.Module):
    """Gated experts as bare parameters, and each token's output from each of them."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal(batch_axis=0)
        wi_0 = self.param("wi_0", init, (EXPERTS, WIDTH, MLP))
        wi_1 = self.param("wi_1", init, (EXPERTS, WIDTH, MLP))
        wo = self.param("wo", init, (EXPERTS, MLP, WIDTH))
        y = nn.silu(jnp.einsum("btd,edf->ebtf", x, wi_0))
        y = y * jnp.einsum("btd,edf->ebtf", x, wi_1)
        return jnp.einsum("ebtf,efd->ebtd", y, wo)


class ExpertMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, name="down")(nn.relu(nn.Dense(MLP, name="up")(x)))


class MoE(nn.Module):
    """A block with experts of each kind; the embedding is also the head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        x = embed(tokens)
        vmapped = nn.vmap(
            ExpertMlp,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=EXPERTS,
        )
        for i, experts in enumerate((Experts, vmapped)):
            x = x + MoEMlp(experts, name=f"layers_{i}")(x)
        return embed.attend(nn.RMSNorm(name="final_norm")(x))


class MoEMlp(nn.Module):
    experts: Any

    @nn.compact
    def __call__(self, x):
        x = nn.RMSNorm(name="norm")(x)
        weights = nn.softmax(nn.Dense(EXPERTS, use_bias=False, name="router")(x))
        y = self.experts(name="experts")(x)
        return jnp.einsum("ebtd,bte->btd", y, weights)


class MoeBlock(Experts):
    """MaxText's: the gate is a module beside the bare parameters of the experts."""

    @nn.compact
    def __call__(self, x):
        weights = nn.softmax(nn.Dense(EXPERTS, use_bias=False, name="gate")(x))
        return jnp.einsum("ebtd,bte->btd", super().__call__(x), weights)


class MaxTextBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(
            HEADS, qkv_features=HEADS * HEAD, use_bias=False, name="self_attention"
        )
        x = x + attention(nn.RMSNorm(name="pre_self_attention_layer_norm")(x))
        y = nn.RMSNorm(name="post_self_attention_layer_norm")(x)
        return x + MoeBlock(name="MoeBlock_0")(y), None


class MaxTextMoE(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH, name="token_embedder")(tokens)
        x, _ = scan(MaxTextBlock, self.axis)(name="layers")(x, None)
        x = nn.RMSNorm(name="decoder_norm")(x)
        return nn.Dense(VOCABULARY, use_bias=False, name="logits_dense")(x)


class LoRADense(nn.Module):
    """A frozen kernel and its two factors, over any number of axes.

    `inputs` axes of x are contracted: `lora_a` has them and the rank, `lora_b` the rank
    and `features`.
    """

    features: tuple[int, ...]
    inputs: int = 1

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal()
        shape = x.shape[-self.inputs :]
        kernel = self.param("kernel", init, shape + self.features)
        lora_a = self.param("lora_a", init, (*shape, RANK))
        lora_b = self.param("lora_b", nn.initializers.zeros, (RANK, *self.features))
        y = jnp.tensordot(x, jax.lax.stop_gradient(kernel), self.inputs)
        return y + jnp.tensordot(jnp.tensordot(x, lora_a, self.inputs), lora_b, 1)


class LoRAModules(nn.Module):
    """A dense layer and, as two more of them, its factors."""

    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(RANK, use_bias=False, name="lora_a")(x)
        y = nn.Dense(self.features, use_bias=False, name="lora_b")(y)
        return y + nn.Dense(self.features, name="base")(x)


class LoRA(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = LoRADense((HEADS, HEAD), name="query")(nn.LayerNorm(name="norm")(x))
        x = LoRADense((WIDTH,), inputs=2, name="out")(x)
        x = LoRADense((MLP,), name="up")(x)
        return LoRAModules(WIDTH, name="down")(x)


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(MLP)(x))
        return nn.Dense(x.shape[-1])(y)


class Encoder1DBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=6)(nn.LayerNorm()(x))
        return x + MlpBlock()(nn.LayerNorm()(x))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Encoder1DBlock(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class ViT(nn.Module):
    """As in big_vision: patches of (4, 4), 16 of them."""

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(WIDTH, (4, 4), (4, 4), "VALID", name="embedding")(image)
        x = x.reshape(x.shape[0], -1, WIDTH)
        init = nn.initializers.normal()
        x = x + self.param("pos_embedding", init, (1, *x.shape[1:]))
        cls = self.param("cls", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        x = Encoder(name="Transformer")(x)
        return nn.Dense(CLASSES, name="head")(x[:, 0])


class RelativePositions(nn.Module):
    """A bias for each head and distance."""

    @nn.compact
    def __call__(self, length):
        init = nn.initializers.normal()
        table = self.param("rel_embedding", init, (HEADS, 8))
        places = jnp.arange(length)
        distances = jnp.abs(places[:, None] - places)
        return table[:, jnp.clip(distances, max=7)]


class T5Attention(nn.Module):
    @nn.compact
    def __call__(self, x, bias):
        dense = partial(nn.Dense, HEADS * HEAD, use_bias=False)
        query, key, value = (
            dense(name=name)(x).reshape(*x.shape[:-1], HEADS, HEAD)
            for name in ("query", "key", "value")
        )
        y = nn.dot_product_attention(query, key, value, bias=bias)
        y = y.reshape(*x.shape[:-1], -1)
        return nn.Dense(WIDTH, use_bias=False, name="out")(y)


class T5Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = partial(nn.Dense, use_bias=False)
        y = nn.gelu(dense(MLP, name="wi_0")(x)) * dense(MLP, name="wi_1")(x)
        return dense(WIDTH, name="wo")(y)


class T5Layer(nn.Module):
    @nn.compact
    def __call__(self, x, bias):
        y = nn.RMSNorm(name="pre_attention_layer_norm")(x)
        x = x + T5Attention(name="attention")(y, bias)
        return x + T5Mlp(name="mlp")(nn.RMSNorm(name="pre_mlp_layer_norm")(x))


class T5(nn.Module):
    """The encoder, with the names of T5X and kernels of two axes."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="shared_embedding")
        x = embed(tokens)
        bias = RelativePositions(name="relpos_bias")(x.shape[1])
        for i in range(2):
            x = T5Layer(name=f"layers_{i}")(x, bias)
        return embed.attend(nn.RMSNorm(name="encoder_norm")(x))


def _linen(model: nn.Module, *inputs: Any) -> Callable[[], Any]:
    init = partial(jax.eval_shape, model.init)
    return lambda: init(jax.random.key(0), *inputs)["params"]


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, "float32")


MODELS: dict[str, Callable[[], Any]] = {
    "linen_layers": _linen(Layers(), TOKENS),
    "linen_gpt": _linen(
        GPT(GPTConfig(WIDTH, depth=2, head_size=4, context=CONTEXT, vocabulary=31)),
        TOKENS,
    ),
    "linen_attention": _linen(Attention(), SEQUENCE, _floats(2, 8, 14)),
    "linen_fused_qkv": _linen(FusedQkv(), SEQUENCE),
    "linen_convolutions": _linen(
        Convolutions(),
        _floats(2, 13, 4),  # `local` leaves 11 places of it.
        _floats(2, 10, 10, 4),
        _floats(2, 10, 10, 10, 4),
    ),
    "linen_recurrent": _linen(Recurrent(), TOKENS, _floats(2, CONTEXT, 10, 10, 4)),
    "linen_llama": _linen(Llama(), TOKENS),
    "linen_llama_scan": _linen(Llama(axis=0), TOKENS),
    "linen_llama_scan_axis_1": _linen(Llama(axis=1), TOKENS),
    "linen_hf_llama_scan": _linen(Llama(axis=0, flat=True), TOKENS),
    "linen_moe": _linen(MoE(), TOKENS),
    "linen_moe_scan": _linen(MaxTextMoE(axis=0), TOKENS),
    "linen_moe_scan_axis_1": _linen(MaxTextMoE(axis=1), TOKENS),
    "linen_lora": _linen(LoRA(), SEQUENCE),
    "linen_vit": _linen(ViT(), _floats(2, 16, 16, 3)),
    "linen_t5": _linen(T5(), TOKENS),
    **NNX_MODELS,
    **PLAIN_TREES,
}
