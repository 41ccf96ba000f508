"""A small GPT in Flax linen: the model that the training examples share.

A decoder-only transformer with pre-normalisation, learned positions and an untied
output head. The attention layer is Flax's own, so its kernels are three-dimensional:
`query`, `key` and `value` have shape (width, heads, head size) and `out` has shape
(heads, head size, width). An optimizer that works on matrices has to know which axes
belong together; `optaxplus.explain_routing` shows what it decided.

References:
    Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, "Attention Is
    All You Need", 2017, https://arxiv.org/abs/1706.03762 (sinusoids for positions).
    Radford, Wu, Child, Luan, Amodei, Sutskever, "Language Models are Unsupervised
    Multitask Learners", 2019 (GPT-2).
    So, Mańke, Liu, Dai, Shazeer, Le, "Primer: Searching for Efficient Transformers for
    Language Modeling", 2021, https://arxiv.org/abs/2109.08668 (squared ReLU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT; everything that decides the shapes of its parameters.

    Attributes:
        width: Size of the residual stream; a multiple of `head_size`.
        depth: Number of transformer blocks.
        head_size: Size of one attention head.
        context: Longest sequence the model can read.
        vocabulary: Number of distinct tokens; 256 for bytes.
    """

    width: int = 128
    depth: int = 4
    head_size: int = 32
    context: int = 128
    vocabulary: int = 256

    def __post_init__(self) -> None:
        """Checks the sizes against each other."""
        if self.width <= 0 or self.width % self.head_size:
            raise ValueError(
                f"GPTConfig: width must be a positive multiple of head_size "
                f"({self.head_size}), got {self.width}"
            )

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head_size


class MLP(nn.Module):
    """Two dense layers, four times as wide inside, with a squared ReLU."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same shape."""
        width, depth = self.config.width, self.config.depth
        hidden = nn.Dense(4 * width, use_bias=False, name="up")(x)
        hidden = jnp.square(nn.relu(hidden))
        init = _residual_init(depth)
        return nn.Dense(width, use_bias=False, kernel_init=init, name="down")(hidden)


class Block(nn.Module):
    """One transformer block: causal attention, then the MLP, each pre-normalised."""

    config: GPTConfig
    attention_fn: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same shape."""
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.config.heads,
            use_bias=False,
            out_kernel_init=_residual_init(self.config.depth),
            attention_fn=self.attention_fn or nn.dot_product_attention,
            name="attention",
        )
        y = nn.LayerNorm(name="attention_norm")(x)
        # Flax gives a function that is to sow the module to do so.
        x = x + attention(y, mask=mask, sow_weights=self.attention_fn is not None)
        return x + MLP(self.config, name="mlp")(nn.LayerNorm(name="mlp_norm")(x))


class GPT(nn.Module):
    """A decoder-only transformer over tokens.

    Attributes:
        config: Its sizes.
        attention_fn: What computes the attention in place of Flax's
            `dot_product_attention`; called with `module`, into which it may sow.
    """

    config: GPTConfig
    attention_fn: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Computes the logits of the next token at every position.

        Args:
            tokens: (batch, time), integers below `config.vocabulary`; time is at most
                `config.context`.

        Returns:
            (batch, time, vocabulary), float32.
        """
        config = self.config
        init = nn.initializers.normal(0.1)
        token_embedding = nn.Embed(
            config.vocabulary,
            config.width,
            embedding_init=init,
            name="token_embedding",
        )
        position_embedding = nn.Embed(
            config.context,
            config.width,
            embedding_init=_sinusoids,
            name="position_embedding",
        )
        x = token_embedding(tokens) + position_embedding(jnp.arange(tokens.shape[1]))
        mask = nn.make_causal_mask(tokens)
        for index in range(config.depth):
            block = Block(config, self.attention_fn, name=f"block_{index}")
            x = block(x, mask)
        x = nn.LayerNorm(name="final_norm")(x)
        # Small logits: before training, every token is as likely as any other.
        init = nn.initializers.normal(0.02)
        return nn.Dense(
            config.vocabulary, use_bias=False, kernel_init=init, name="lm_head"
        )(x)


def next_token_loss(model: GPT, params: Any, windows: jax.Array) -> jax.Array:
    """Computes the mean cross-entropy of the next token.

    Args:
        model: The model.
        params: Its parameters, without the outer `"params"` of Flax.
        windows: (batch, time + 1), integers: inputs and, one place on, targets.

    Returns:
        A float32 scalar, in nats a token.
    """
    logits = model.apply({"params": params}, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, windows[:, 1:]
    ).mean()


@partial(jax.jit, static_argnames=("model", "length"))
def generate(
    model: GPT,
    params: Any,
    prompt: jax.Array,
    key: jax.Array,
    *,
    length: int,
    temperature: float = 0.8,
) -> jax.Array:
    """Continues a text, reading the last `context` tokens for each new one.

    Args:
        model: The model.
        params: Its parameters, without the outer `"params"` of Flax.
        prompt: (time,), integers; at least one.
        key: The random key of the samples.
        length: Number of tokens to add.
        temperature: Divides the logits; small values give likelier text.

    Returns:
        (time + length,), int32: the prompt and what follows.
    """
    context, given = model.config.context, prompt.shape[0]
    padding = max(length, context)
    tokens = jnp.pad(prompt.astype(jnp.int32), (0, padding))

    def add_token(tokens: jax.Array, end: jax.Array) -> tuple[jax.Array, None]:
        # What lies beyond `end` is not text yet; the causal mask hides it.
        start = jnp.maximum(end - context, 0)
        window = jax.lax.dynamic_slice(tokens, (start,), (context,))
        logits = model.apply({"params": params}, window[None])[0, end - start - 1]
        token = jax.random.categorical(
            jax.random.fold_in(key, end), logits / temperature
        )
        return tokens.at[end].set(token), None

    tokens, _ = jax.lax.scan(add_token, tokens, given + jnp.arange(length))
    return tokens[: given + length]


def _sinusoids(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Positions as waves of many lengths: where the learned table of them starts.

    A shift by one place is a rotation of these vectors. Attention to the byte before is
    then one linear map away, where random vectors leave it to be found for each place.
    The size is that of the token embedding, a root mean square of 0.1.
    """
    del key
    context, width = shape
    places = jnp.arange(context)[:, None]
    waves = places * context ** (-jnp.arange(0, width, 2) / width)
    table = jnp.hstack([jnp.sin(waves), jnp.cos(waves)], dtype=dtype)[:, :width]
    return 0.1 * jnp.sqrt(2) * table


def _residual_init(depth: int) -> nn.initializers.Initializer:
    """Smaller weights for layers that add to the residual stream, as in GPT-2.

    Each of the `depth` blocks adds two outputs to the stream, so their variance is
    divided by `2 * depth` to keep the sum at the size of one of them.
    """
    return nn.initializers.variance_scaling(1 / (2 * depth), "fan_in", "normal")
