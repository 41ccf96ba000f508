"""The models of `routing.py`, in Flax's own modules.

They are as people publish them, under the names that their sources use: LLaMA as in its
checkpoints and the experts of a Mixtral as in MaxText, both as a scan over blocks; the
vision transformer of the JAX AI stack's tutorial; the residual network of
jax-ml/bonsai. The fifth is `examples/gpt.py`. Only the shapes of their parameters are
used, so nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

# LLaMA and Mixtral: blocks stacked by a scan


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a LLaMA; with experts, those of a Mixtral."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    experts: int = 0


class Attention(nn.Module):
    """Grouped-query attention, without rotary positions: these have no parameters."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same shape."""
        config = self.config
        dense = partial(nn.DenseGeneral, use_bias=False)
        query = dense((config.heads, config.head_size), name="q_proj")(x)
        key = dense((config.kv_heads, config.head_size), name="k_proj")(x)
        value = dense((config.kv_heads, config.head_size), name="v_proj")(x)
        x = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return dense(config.width, axis=(-2, -1), name="o_proj")(x)


class Mlp(nn.Module):
    """SwiGLU."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same shape."""
        config = self.config
        dense = partial(nn.Dense, use_bias=False)
        gate = nn.silu(dense(config.mlp, name="gate_proj")(x))
        hidden = gate * dense(config.mlp, name="up_proj")(x)
        return dense(config.width, name="down_proj")(hidden)


class MoeBlock(nn.Module):
    """Gated experts as bare parameters, as MaxText has them; every token sees all."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same shape."""
        config = self.config
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        into = (config.experts, config.width, config.mlp)
        back = (config.experts, config.mlp, config.width)
        weights = nn.softmax(nn.Dense(config.experts, use_bias=False, name="gate")(x))
        gate = nn.silu(jnp.einsum("btd,edf->btef", x, self.param("wi_0", init, into)))
        hidden = gate * jnp.einsum("btd,edf->btef", x, self.param("wi_1", init, into))
        wo = self.param("wo", init, back)
        return jnp.einsum("btef,efd,bte->btd", hidden, wo, weights)


class Block(nn.Module):
    """One block, in the form that a scan wants."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps (batch, time, width) to the same shape."""
        norm = partial(nn.RMSNorm, epsilon=1e-5)
        attention = Attention(self.config, name="self_attn")
        mlp = MoeBlock(self.config) if self.config.experts else Mlp(self.config)
        x = x + attention(norm(name="input_layernorm")(x))
        return x + mlp(norm(name="post_attention_layernorm")(x)), None


class Llama(nn.Module):
    """A decoder-only transformer without biases."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps (batch, time) to the logits of the next tokens."""
        config = self.config
        x = nn.Embed(config.vocabulary, config.width, name="embed_tokens")(tokens)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.depth,
        )
        x, _ = layers(config, name="layers")(x, None)
        x = nn.RMSNorm(epsilon=1e-5, name="norm")(x)
        return nn.Dense(config.vocabulary, use_bias=False, name="lm_head")(x)


# Vision, in NNX


class EncoderBlock(nnx.Module):
    """A block of the vision transformer, with every bias that Flax's modules have."""

    def __init__(self, width: int, heads: int, mlp: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(width, mlp, rngs=rngs),
            nnx.gelu,
            nnx.Linear(mlp, width, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, patches, width) to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    """Patches, a class token, learned positions, blocks and a classifier."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        image: int,
        patch: int,
        classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        window = (patch, patch)
        self.patch_embeddings = nnx.Conv(
            3, width, window, strides=window, padding="VALID", rngs=rngs
        )
        places = (image // patch) ** 2 + 1
        init = nnx.initializers.truncated_normal(0.02)
        self.position_embeddings = nnx.Param(init(rngs.params(), (1, places, width)))
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.encoder = nnx.Sequential(
            *(EncoderBlock(width, heads, mlp, rngs=rngs) for _ in range(depth))
        )
        self.final_norm = nnx.LayerNorm(width, rngs=rngs)
        self.classifier = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (batch, height, width, 3) to the logits of classes."""
        x = self.patch_embeddings(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.tile(self.cls_token[...], (x.shape[0], 1, 1))
        x = jnp.concatenate([first, x], axis=1) + self.position_embeddings[...]
        return self.classifier(self.final_norm(self.encoder(x))[:, 0])


class Convolution(nnx.Module):
    """A convolution without a bias, and the batch norm that has it instead."""

    def __init__(
        self, inputs: int, outputs: int, window: int, stride: int, *, rngs: nnx.Rngs
    ):
        self.conv = nnx.Conv(
            inputs, outputs, (window, window), stride, use_bias=False, rngs=rngs
        )
        self.bn = nnx.BatchNorm(outputs, use_running_average=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to outputs."""
        return self.bn(self.conv(x))


class Bottleneck(nnx.Module):
    """Three convolutions and, where sizes change, a fourth for the shortcut."""

    def __init__(self, inputs: int, inner: int, stride: int, *, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = partial(nnx.BatchNorm, use_running_average=True, rngs=rngs)
        self.conv0, self.bn0 = conv(inputs, inner, (1, 1)), norm(inner)
        self.conv1, self.bn1 = conv(inner, inner, (3, 3), stride), norm(inner)
        self.conv2, self.bn2 = conv(inner, 4 * inner, (1, 1)), norm(4 * inner)
        downsample = None
        if stride != 1 or inputs != 4 * inner:
            downsample = Convolution(inputs, 4 * inner, 1, stride, rngs=rngs)
        self.downsample = downsample

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to four times `inner` channels."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nnx.relu(self.bn0(self.conv0(x)))
        x = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.bn2(self.conv2(x)) + shortcut)


class BlockGroup(nnx.Module):
    """Bottlenecks of one size, the first of which comes from another."""

    def __init__(
        self, inputs: int, inner: int, blocks: int, stride: int, *, rngs: nnx.Rngs
    ):
        first = Bottleneck(inputs, inner, stride, rngs=rngs)
        others = (Bottleneck(4 * inner, inner, 1, rngs=rngs) for _ in range(1, blocks))
        self.blocks = nnx.List([first, *others])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to four times `inner` channels."""
        for block in self.blocks:
            x = block(x)
        return x


class ResNet(nnx.Module):
    """A residual network with bottlenecks, in groups `layer0`, `layer1`, ..."""

    def __init__(
        self, width: int, blocks: Sequence[int], classes: int, *, rngs: nnx.Rngs
    ):
        self.stem = Convolution(3, width, 7, 2, rngs=rngs)
        self.names = tuple(f"layer{index}" for index in range(len(blocks)))
        channels, inner = width, width
        for name, count in zip(self.names, blocks, strict=True):
            stride = 1 if inner == width else 2
            setattr(self, name, BlockGroup(channels, inner, count, stride, rngs=rngs))
            channels, inner = 4 * inner, 2 * inner
        self.fc = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (batch, height, width, 3) to the logits of classes."""
        x = nnx.relu(self.stem(images))
        x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
        for name in self.names:
            x = getattr(self, name)(x)
        return self.fc(x.mean(axis=(1, 2)))
