"""What of the model zoo is not linen: NNX models, and trees as other libraries have.

See `model_zoo.py`, which exports them with the linen models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.partition.routing_tables import abstract

WIDTH, MLP, VOCABULARY, CONTEXT, LAYERS, EXPERTS = 12, 20, 31, 9, 5, 7
HEADS, KV_HEADS, HEAD = 6, 2, 4  # HEADS * HEAD is not WIDTH, as in Gemma.
RANK, CLASSES, WINDOW = 2, 17, 3

# NNX


class Layers(nnx.Module):
    """Dense layers, norms and convolutions, with and without biases."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.layer_norm_bare = nnx.LayerNorm(WIDTH, use_bias=False, rngs=rngs)
        self.rms_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.group_norm = nnx.GroupNorm(WIDTH, num_groups=4, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, 20, rngs=rngs)
        self.dense_bare = nnx.Linear(20, 13, use_bias=False, rngs=rngs)
        bare = partial(nnx.LinearGeneral, use_bias=False, rngs=rngs)
        self.split = nnx.LinearGeneral(13, (3, 4), rngs=rngs)
        self.merge = nnx.LinearGeneral((3, 4), 15, axis=(-2, -1), rngs=rngs)
        self.split_bare = bare(15, (2, 5, 6))
        self.merge_bare = bare((2, 5, 6), 14, axis=(-3, -2, -1))
        self.split_again = nnx.LinearGeneral(14, (7, 8), rngs=rngs)
        self.regroup = nnx.LinearGeneral((7, 8), (10, 11), axis=(-2, -1), rngs=rngs)
        # The input axis stands between the output axes of its kernel.
        self.einsum = nnx.Einsum("btd,hdk->bthk", (16, 11, 18), (16, 18), rngs=rngs)
        for name, dimensions in (("signal", 1), ("image", 2), ("volume", 3)):
            setattr(self, name, Convolutions(dimensions, rngs))
        self.lm_head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)


class Convolutions(nnx.Module):
    """Convolutions over `dimensions` dimensions."""

    def __init__(self, dimensions: int, rngs: nnx.Rngs):
        window = (WINDOW,) * dimensions
        self.conv = nnx.Conv(4, 5, window, rngs=rngs)
        self.conv_bare = nnx.Conv(5, 6, window, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        depthwise = partial(nnx.Conv, 6, 6, window, feature_group_count=6, rngs=rngs)
        self.depthwise = depthwise()
        self.depthwise_bare = depthwise(use_bias=False)
        one = (1,) * dimensions
        self.pointwise = nnx.Conv(6, 7, one, use_bias=False, rngs=rngs)
        self.up = nnx.ConvTranspose(7, 8, window, rngs=rngs)
        self.up_bare = nnx.ConvTranspose(8, 9, window, use_bias=False, rngs=rngs)


class Attention(nnx.Module):
    """Flax's attention in its variants."""

    def __init__(self, rngs: nnx.Rngs):
        # Three heads of four, and six of four which together are wider than the input.
        plain = partial(nnx.MultiHeadAttention, 3, WIDTH, keep_rngs=False, rngs=rngs)
        wide = partial(
            nnx.MultiHeadAttention,
            HEADS,
            WIDTH,
            qkv_features=HEADS * HEAD,
            keep_rngs=False,
            rngs=rngs,
        )
        self.attention = plain()
        self.attention_bare = plain(use_bias=False)
        self.wide = wide()
        self.wide_bare = wide(use_bias=False)
        self.normalized = wide(normalize_qk=True)
        self.cross = wide(in_kv_features=14)
        self.grouped = wide(num_kv_heads=KV_HEADS)
        self.grouped_bare = wide(num_kv_heads=KV_HEADS, use_bias=False)


class Recurrent(nnx.Module):
    """Every recurrent cell; `rnn` holds its own in `rnn/cell`."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.lstm = nnx.LSTMCell(WIDTH, 5, rngs=rngs)
        self.optimized_lstm = nnx.OptimizedLSTMCell(WIDTH, 5, rngs=rngs)
        self.gru = nnx.GRUCell(WIDTH, 5, rngs=rngs)
        self.simple = nnx.SimpleCell(WIDTH, 5, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(WIDTH, 5, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(5, CLASSES, rngs=rngs)


class Mlp(nnx.Module):
    def __init__(self, *, use_bias: bool, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, MLP, use_bias=use_bias, rngs=rngs)
        self.down = nnx.Linear(MLP, WIDTH, use_bias=use_bias, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    """A block of a transformer; without biases, its norms are RMSNorm."""

    def __init__(self, *, use_bias: bool, rngs: nnx.Rngs):
        norm = nnx.LayerNorm if use_bias else nnx.RMSNorm
        self.ln_1 = norm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS,
            WIDTH,
            HEADS * HEAD,
            decode=False,
            use_bias=use_bias,
            keep_rngs=False,
            rngs=rngs,
        )
        self.ln_2 = norm(WIDTH, rngs=rngs)
        self.mlp = Mlp(use_bias=use_bias, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nnx.Module):
    """Learned positions, a list of blocks and an output head of its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.wte = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.wpe = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(use_bias=True, rngs=rngs) for _ in range(2)])
        self.ln_f = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def stack(build: Callable[[nnx.Rngs], nnx.Module], size: int, rngs: nnx.Rngs):
    """`size` modules as one, with the first axis of every parameter to tell them."""
    return nnx.vmap(build, in_axes=0, out_axes=0)(rngs.split(size))


class Scan(nnx.Module):
    """Blocks without biases, built as one by vmap and applied by scan."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = stack(lambda r: Block(use_bias=False, rngs=r), LAYERS, rngs)
        self.final_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        scanned = nnx.scan(
            lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return self.lm_head(self.final_norm(scanned(self.embed(tokens), self.blocks)))


class Ensemble(nnx.Module):
    """As many linear layers as there are experts, each with a bias."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = stack(lambda r: nnx.Linear(WIDTH, MLP, rngs=r), EXPERTS, rngs)
        self.down = stack(lambda r: nnx.Linear(MLP, CLASSES, rngs=r), EXPERTS, rngs)


class LoRA(nnx.Module):
    """Flax's two ways to have low-rank factors beside a kernel."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.LoRALinear(WIDTH, MLP, lora_rank=RANK, rngs=rngs)
        base = nnx.Linear(MLP, 13, rngs=rngs)
        self.down = nnx.LoRA(MLP, RANK, 13, base_module=base, rngs=rngs)


class Readout(nnx.Module):
    """Logits from the rows of an embedding that belongs to the model."""

    def __init__(self, embed: nnx.Embed, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.embed = embed

    def __call__(self, x):
        return self.embed.attend(self.norm(x))


class Tied(nnx.Module):
    """One embedding in two places; NNX lists it under the first by name."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.mlp = Mlp(use_bias=True, rngs=rngs)
        self.output = Readout(self.embed, rngs)

    def __call__(self, tokens):
        return self.output(self.mlp(self.embed(tokens)))


class Experts(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.wi_0 = nnx.Param(init(rngs.params(), (EXPERTS, WIDTH, MLP)))
        self.wi_1 = nnx.Param(init(rngs.params(), (EXPERTS, WIDTH, MLP)))
        self.wo = nnx.Param(init(rngs.params(), (EXPERTS, MLP, WIDTH)))


class MoE(nnx.Module):
    """Gated experts as bare parameters, and what chooses between them."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.router = nnx.Linear(WIDTH, EXPERTS, use_bias=False, rngs=rngs)
        self.experts = Experts(rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)


class ResidualBlock(nnx.Module):
    """Two convolutions and, where the channels change, a third for the shortcut."""

    def __init__(self, inputs: int, inner: int, outputs: int, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1 = conv(inputs, inner, (WINDOW, WINDOW))
        self.bn1 = nnx.BatchNorm(inner, rngs=rngs)
        self.conv2 = conv(inner, outputs, (WINDOW, WINDOW))
        self.bn2 = nnx.BatchNorm(outputs, rngs=rngs)
        if inputs != outputs:
            self.shortcut = conv(inputs, outputs, (1, 1))
            self.shortcut_bn = nnx.BatchNorm(outputs, rngs=rngs)


class ResNet(nnx.Module):
    """Convolutions without biases beside norms, and a classifier."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(4, 8, (WINDOW, WINDOW), use_bias=False, rngs=rngs)
        self.stem_bn = nnx.BatchNorm(8, rngs=rngs)
        self.blocks = nnx.List(
            [ResidualBlock(8, 9, 8, rngs), ResidualBlock(8, 11, 10, rngs)]
        )
        self.head = nnx.Linear(10, CLASSES, rngs=rngs)


def _nnx(model: Callable[[nnx.Rngs], nnx.Module]) -> Callable[[], Any]:
    return lambda: nnx.state(nnx.eval_shape(lambda: model(nnx.Rngs(0))), nnx.Param)


NNX_MODELS: dict[str, Callable[[], Any]] = {
    "nnx_layers": _nnx(Layers),
    "nnx_attention": _nnx(Attention),
    "nnx_recurrent": _nnx(Recurrent),
    "nnx_gpt": _nnx(GPT),
    "nnx_scan": _nnx(Scan),
    "nnx_ensemble": _nnx(Ensemble),
    "nnx_lora": _nnx(LoRA),
    "nnx_tied": _nnx(Tied),
    "nnx_moe": _nnx(MoE),
    "nnx_cnn": _nnx(ResNet),
}


# Trees as other libraries have them


def _blocks(prefix: str, block: dict[str, tuple[int, ...]]) -> dict:
    """Two blocks: {prefix}0/... and {prefix}1/... ."""
    return {f"{prefix}{i}/{path}": block[path] for i in range(2) for path in block}


def gpt2_dict() -> Any:
    """The names of GPT-2, with its head tied to `wte`."""
    block = {"ln_1/weight": (WIDTH,), "ln_1/bias": (WIDTH,)}
    block |= {"attn/c_attn/w": (WIDTH, 3 * WIDTH), "attn/c_attn/b": (3 * WIDTH,)}
    block |= {"attn/c_proj/w": (WIDTH, WIDTH), "attn/c_proj/b": (WIDTH,)}
    block |= {"ln_2/weight": (WIDTH,), "ln_2/bias": (WIDTH,)}
    block |= {"mlp/c_fc/w": (WIDTH, MLP), "mlp/c_fc/b": (MLP,)}
    block |= {"mlp/c_proj/w": (MLP, WIDTH), "mlp/c_proj/b": (WIDTH,)}
    shapes = {"wte": (VOCABULARY, WIDTH), "wpe": (CONTEXT, WIDTH)}
    shapes |= {"ln_f/weight": (WIDTH,), "ln_f/bias": (WIDTH,)}
    return abstract(shapes | _blocks("h/", block))


def gpt2_dict_bare() -> Any:
    """The same without biases: the arrays themselves bear the names."""
    block = {"ln_1": (WIDTH,), "ln_2": (WIDTH,)}
    block |= {"attn/c_attn": (WIDTH, 3 * WIDTH), "attn/c_proj": (WIDTH, WIDTH)}
    block |= {"mlp/c_fc": (WIDTH, MLP), "mlp/c_proj": (MLP, WIDTH)}
    shapes = {"wte": (VOCABULARY, WIDTH), "wpe": (CONTEXT, WIDTH), "ln_f": (WIDTH,)}
    return abstract(shapes | _blocks("h/", block))


def haiku_transformer() -> Any:
    """Haiku's two levels: the whole name of a module, then that of a parameter."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {
        "transformer": {"pos_embs": (CONTEXT, WIDTH)},
        "transformer/~/embed": {"embeddings": (VOCABULARY, WIDTH)},
        "transformer/~/lstm/linear": {"w": (WIDTH + 7, 4 * 7), "b": (4 * 7,)},
        "transformer/~/linear": {"w": (7, WIDTH), "b": (WIDTH,)},
        "transformer/layer_norm": {"scale": (WIDTH,), "offset": (WIDTH,)},
        "transformer/linear_1": {"w": (WIDTH, VOCABULARY), "b": (VOCABULARY,)},
    }
    for i in range(2):
        block, wide = f"transformer/h{i}", HEADS * HEAD
        for name in ("query", "key", "value"):
            modules[f"{block}_attn/{name}"] = {"w": (WIDTH, wide), "b": (wide,)}
        modules |= {
            f"{block}_attn/linear": {"w": (wide, WIDTH), "b": (WIDTH,)},
            f"{block}_ln_1": {"scale": (WIDTH,), "offset": (WIDTH,)},
            f"{block}_ln_2": {"scale": (WIDTH,), "offset": (WIDTH,)},
            f"{block}_mlp/~/linear_0": {"w": (WIDTH, MLP), "b": (MLP,)},
            f"{block}_mlp/~/linear_1": {"w": (MLP, WIDTH), "b": (WIDTH,)},
        }
    return {name: abstract(shapes) for name, shapes in modules.items()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    """A linear layer or a convolution of Equinox: outputs come first."""

    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LSTMCell:
    weight_ih: Any
    weight_hh: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EquinoxMlp:
    layers: tuple[Affine, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EquinoxConvLSTM:
    convs: tuple[Affine, ...]
    cell: LSTMCell
    linear: Affine


def equinox_mlp() -> EquinoxMlp:
    """Three layers, the second without a bias."""
    return EquinoxMlp(
        (
            Affine(**abstract({"weight": (20, 12), "bias": (20,)})),
            Affine(**abstract({"weight": (15, 20)}), bias=None),
            Affine(**abstract({"weight": (17, 15), "bias": (17,)})),
        )
    )


def equinox_conv_lstm() -> EquinoxConvLSTM:
    """Convolutions, a recurrent cell and a linear layer."""
    first = {"weight": (8, 4, WINDOW, WINDOW), "bias": (8, 1, 1)}
    second = {"weight": (10, 8, WINDOW, WINDOW)}
    cell = {"weight_ih": (20, 10), "weight_hh": (20, 5), "bias": (20,)}
    return EquinoxConvLSTM(
        convs=(Affine(**abstract(first)), Affine(**abstract(second), bias=None)),
        cell=LSTMCell(**abstract(cell)),
        linear=Affine(**abstract({"weight": (17, 5), "bias": (17,)})),
    )


def gemma_dict() -> Any:
    """The names of google-deepmind/gemma; grouped-query attention with three keys."""
    block = {
        "attn/q_einsum/w": (HEADS, WIDTH, HEAD),
        "attn/kv_einsum/w": (2, 3, WIDTH, HEAD),
        "attn/attn_vec_einsum/w": (HEADS, HEAD, WIDTH),
        "mlp/gating_einsum": (2, MLP, WIDTH),
        "mlp/linear": (MLP, WIDTH),
        "pre_attention_norm/scale": (WIDTH,),
        "pre_ffw_norm/scale": (WIDTH,),
    }
    shapes = {"embedder/input_embedding": (VOCABULARY, WIDTH)}
    shapes |= {"final_norm/scale": (WIDTH,)}
    return abstract(shapes | _blocks("layer_", block))


def meta_llama_dict() -> Any:
    """The names of Meta's LLaMA, of PyTorch: outputs come first."""
    block = {
        "attention/wq/weight": (HEADS * HEAD, WIDTH),
        "attention/wk/weight": (KV_HEADS * HEAD, WIDTH),
        "attention/wv/weight": (KV_HEADS * HEAD, WIDTH),
        "attention/wo/weight": (WIDTH, HEADS * HEAD),
        "feed_forward/w1/weight": (MLP, WIDTH),
        "feed_forward/w2/weight": (WIDTH, MLP),
        "feed_forward/w3/weight": (MLP, WIDTH),
        "attention_norm/weight": (WIDTH,),
        "ffn_norm/weight": (WIDTH,),
    }
    shapes = {"tok_embeddings/weight": (VOCABULARY, WIDTH), "norm/weight": (WIDTH,)}
    shapes |= {"output/weight": (VOCABULARY, WIDTH)}
    return abstract(shapes | _blocks("layers/", block))


PLAIN_TREES: dict[str, Callable[[], Any]] = {
    tree.__name__: tree
    for tree in (
        gpt2_dict,
        gpt2_dict_bare,
        haiku_transformer,
        equinox_mlp,
        equinox_conv_lstm,
        gemma_dict,
        meta_llama_dict,
    )
}
