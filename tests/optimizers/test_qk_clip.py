"""QK-Clip: the logits after it are γ times those before, and nothing else changes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from tests.assertions import (
    assert_same_types,
    assert_trees_close,
    assert_trees_equal,
)
from tests.optimizers.attentions import (
    NOPE,
    RANK,
    ROPE,
    SIX,
    SIZE,
    TAU,
    VALUE,
    WIDTH,
    clip,
    gamma,
    normal,
)
from tests.problems import normal_tree

TIME = 5
X = np.random.default_rng(0).standard_normal((TIME, WIDTH))


def project(module: dict, heads: int, x: np.ndarray = X) -> np.ndarray:
    """(time, heads, head size), in float64, from kernels with or without heads."""
    kernel = np.asarray(module["kernel"], np.float64)
    y = x @ kernel.reshape(kernel.shape[0], -1)
    if "bias" in module:
        y = y + np.asarray(module["bias"], np.float64).reshape(-1)
    return y.reshape(len(x), heads, -1)


def logits_of(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """(heads, time, time); the heads of a group follow one another."""
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    return np.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1])


def assert_scaled(after: np.ndarray, before: np.ndarray, by: np.ndarray) -> None:
    """Every logit is that of before times the factor of its head, in float64."""
    np.testing.assert_allclose(after, by[:, None, None] * before, rtol=1e-12)
    assert np.abs(before).min() > 1e-6


# The rule, in float64


@pytest.mark.parametrize("key_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("is_flat", [False, True], ids=["heads", "flat"])
@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
def test_logits(x64, key_heads: int, is_flat: bool, bias: bool):
    """Multi-head, grouped and multi-query attention."""

    def shapes(heads):
        out = (heads * SIZE,) if is_flat else (heads, SIZE)
        return {"kernel": (WIDTH, *out)} | ({"bias": out} if bias else {})

    params = {
        "block": {"attention": {"query": shapes(6), "key": shapes(key_heads)}},
    }
    params["block"]["attention"]["value"] = shapes(key_heads)
    params = normal(params)
    after = clip(params, {"block": {"attention": SIX}})

    def logits(tree):
        module = tree["block"]["attention"]
        return logits_of(project(module["query"], 6), project(module["key"], key_heads))

    assert_scaled(logits(after), logits(params), gamma(SIX))
    attention, was = after["block"]["attention"], params["block"]["attention"]
    assert_trees_equal(attention["value"], was["value"])
    # The key takes the root of the least γ of its group.
    least = gamma(SIX).reshape(key_heads, -1).min(axis=1)
    for name in was["key"]:
        scale = np.asarray(attention["key"][name] / was["key"][name])
        scale = scale.reshape(-1, key_heads, SIZE)
        expected = np.broadcast_to(np.sqrt(least)[:, None], scale.shape)
        np.testing.assert_allclose(scale, expected, rtol=1e-12)


def test_own_keys_share_equally(x64):
    params = normal(
        {"query": {"kernel": (WIDTH, 6, SIZE)}, "key": {"kernel": (WIDTH, 6, SIZE)}}
    )
    after = clip(params, SIX)
    for name in ("query", "key"):
        scale = after[name]["kernel"] / params[name]["kernel"]
        expected = np.broadcast_to(np.sqrt(gamma(SIX))[:, None], scale.shape)
        np.testing.assert_allclose(scale, expected, rtol=1e-12)


def test_largest_logit_becomes_the_threshold(x64):
    """With the largest logits of the attention itself, not of heads made up."""
    params = normal(
        {"query": {"kernel": (WIDTH, 6, SIZE)}, "key": {"kernel": (WIDTH, 3, SIZE)}}
    )

    def largest(tree):
        query, key = project(tree["query"], 6), project(tree["key"], 3)
        return logits_of(query, key).max(axis=(1, 2))

    before = largest(params)
    threshold = float(np.sort(before)[2:4].mean())
    after = largest(clip(params, before, threshold=threshold))
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-12)


LATENT = np.random.default_rng(3).standard_normal((TIME, RANK))
SHARED_ROPE = np.random.default_rng(4).standard_normal((TIME, ROPE))


@pytest.mark.parametrize("is_flat", [False, True], ids=["heads", "flat"])
@pytest.mark.parametrize("is_stored_apart", [False, True], ids=["fused", "apart"])
def test_latent_attention(x64, is_flat: bool, is_stored_apart: bool):
    def shape(size):
        return {"kernel": (RANK, 6 * size) if is_flat else (RANK, 6, size)}

    others = {"wkv_a": {"kernel": (WIDTH, RANK + ROPE)}, "kv_norm": {"scale": (RANK,)}}
    if is_stored_apart:
        names = {"query": "q_nope", "key": "k_nope", "query_rope": "q_rope"}
        arguments: dict[str, Any] = names
        projections = {"q_nope": shape(NOPE), "q_rope": shape(ROPE)}
        projections |= {"k_nope": shape(NOPE), "v": shape(VALUE)}
    else:
        arguments = {"nope_dim": NOPE}
        # The norm stands before the projection, of the latent, whatever its name.
        others["q_norm"] = {"scale": (RANK,)}
        projections = {"wq_b": shape(NOPE + ROPE), "wkv_b": shape(NOPE + VALUE)}
    params = normal({"attention": projections | others})
    after = clip(params, {"attention": {"max_logits": SIX}}, **arguments)

    def logits_and_values(tree):
        of = {
            name: project(module, 6, LATENT)
            for name, module in tree["attention"].items()
            if name in projections
        }
        if is_stored_apart:
            nope, rope, key, value = (of[name] for name in projections)
        else:
            nope, rope = np.split(of["wq_b"], [NOPE], axis=-1)
            key, value = np.split(of["wkv_b"], [NOPE], axis=-1)
        rotary = np.broadcast_to(SHARED_ROPE[:, None], (TIME, 6, ROPE))
        query = np.concatenate([nope, rope], axis=-1)
        return logits_of(query, np.concatenate([key, rotary], axis=-1)), value

    (before, value), (now, value_now) = map(logits_and_values, (params, after))
    assert_scaled(now, before, gamma(SIX))
    np.testing.assert_array_equal(value_now, value)
    for name in others:
        assert_trees_equal(after["attention"][name], params["attention"][name])


# What is left alone

PARAMS = normal_tree(
    {
        "a": {"query": {"kernel": (WIDTH, 6, SIZE)}, "key": {"kernel": (WIDTH, 6, 4)}},
        "b": {"query": {"kernel": (WIDTH, 6, SIZE)}, "key": {"kernel": (WIDTH, 6, 4)}},
        "norm": {"scale": (WIDTH,)},
    },
    seed=5,
)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_heads_below_the_threshold_keep_every_bit(dtype, wrap):
    """Whatever the numbers are: denormal, negative zero, infinite, NaN."""
    kernel = np.array(PARAMS["a"]["query"]["kernel"])
    kernel[0, 0] = [1e-40, -0.0, np.inf, np.nan]
    params = {"query": {"kernel": kernel}, "key": {"kernel": kernel[:, ::-1]}}
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    below = np.array([-np.inf, -1e30, -TAU, 0.0, TAU, np.nextafter(TAU, 0)])
    assert bits(wrap(clip)(params, below)) == bits(params)
    # No finite factor is known: such a step is for a guard to skip.
    for unknown in (np.nan, np.inf):
        assert bits(wrap(clip)(params, np.full(6, unknown))) == bits(params)
    # One head that is clipped touches no other.
    below[3] = 3.0
    after = wrap(clip)(params, below)
    others = [0, 1, 2, 4, 5]
    for name in params:
        ours, theirs = (tree[name]["kernel"] for tree in (after, params))
        assert bits(ours[:, others]) == bits(theirs[:, others])
        assert bits(ours[:, 3]) != bits(theirs[:, 3])


def test_heads_of_a_group_whose_logit_is_not_finite():
    """The others of the group are clipped as if it were below the threshold."""
    params = {"query": {"kernel": PARAMS["a"]["query"]["kernel"]}}
    params["key"] = {"kernel": PARAMS["a"]["key"]["kernel"][:, :3]}
    for unknown in (np.nan, np.inf):
        logits = np.where(np.arange(6) == 1, unknown, SIX)
        expected = clip(params, np.where(np.arange(6) == 1, 0.0, SIX))
        assert_trees_equal(clip(params, logits), expected)


def test_modules_that_are_not_named_are_the_same_arrays():
    after = clip(PARAMS, {"a": SIX})
    for path in (("b", "query", "kernel"), ("b", "key", "kernel"), ("norm", "scale")):
        ours, theirs = after, PARAMS
        for name in path:
            ours, theirs = ours[name], theirs[name]
        assert ours is theirs
    assert_same_types(after, PARAMS)
    assert bits(after["a"]) != bits(PARAMS["a"])


# Dtypes and structures


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_rounded_once(dtype, strict_promotion):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    logits = {"a": jnp.asarray(SIX, dtype), "b": jnp.asarray(SIX)}
    after = clip(params, logits)
    wide = clip(jax.tree.map(lambda p: p.astype(jnp.float32), params), logits)
    assert_trees_equal(after, jax.tree.map(lambda p: p.astype(dtype), wide))


def test_projections_of_different_dtypes():
    params = {"query": PARAMS["a"]["query"], "key": PARAMS["a"]["key"]}
    params["key"] = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["key"])
    assert_same_types(clip(params, SIX), params)


def sown(module: str, *arrays: Any) -> dict:
    return {module: {"max_logits": tuple(arrays)}}


def test_what_max_logits_may_be():
    expected = clip(PARAMS, {"a": jnp.asarray(SIX)})
    state = nnx.State({"a": {"max_logits": nnx.Intermediate((jnp.asarray(SIX),))}})
    for max_logits in (
        {"a": SIX.astype(np.float32)},
        {"a": {"max_logits": jnp.asarray(SIX)}},
        sown("a", jnp.asarray(SIX)),
        freeze(sown("a", SIX)),
        # A module called several times.
        sown("a", SIX - 2, SIX, np.minimum(SIX, 1)),
        {"intermediates": sown("a", SIX)},
        # Other intermediates.
        sown("a", SIX) | {"norm": {"__call__": (jnp.ones((2, 3)),)}, "nowhere": SIX},
        # From a module without parameters inside the attention.
        {"a": {"attention_op": {"max_logits": (SIX,)}}},
        {"a/max_logits": SIX},
        state,
        nnx.to_pure_dict(state),
    ):
        assert_trees_equal(clip(PARAMS, max_logits), expected)


def test_a_bare_array_is_of_the_root():
    attention = PARAMS["a"]
    expected = clip(PARAMS, {"a": SIX})["a"]
    for max_logits in (SIX, (SIX,), {"max_logits": SIX}, {"intermediates": (SIX,)}):
        assert_trees_equal(clip(attention, max_logits), expected)


def test_structures_of_params():
    expected = clip(PARAMS, {"a": SIX, "b": SIX - 3})
    both = {"a": SIX, "b": SIX - 3}
    assert_trees_equal(clip(freeze(PARAMS), freeze(both)), freeze(expected))
    assert_trees_equal(clip({"params": PARAMS}, both), {"params": expected})
    after = clip([PARAMS["a"], PARAMS["b"]], [SIX, SIX - 3])
    assert_trees_equal(after, [expected["a"], expected["b"]])
    flat = {
        "a/query/kernel": PARAMS["a"]["query"]["kernel"],
        "a/key/kernel": PARAMS["a"]["key"]["kernel"],
        "nothing": None,
    }
    after = clip(flat, {"a": SIX})
    np.testing.assert_array_equal(after["a/key/kernel"], expected["a"]["key"]["kernel"])
    assert after["nothing"] is None
    boxed = jax.tree.map(
        lambda p: nn.Partitioned(p, ("data",) + (None,) * (p.ndim - 1)), PARAMS
    )
    unboxed = nn.meta.unbox(clip(boxed, both))
    assert_trees_equal(unboxed, expected)
    assert clip(boxed, both)["a"]["key"]["kernel"].names == ("data", None, None)
    state = nnx.State(jax.tree.map(nnx.Param, PARAMS))
    after = clip(state, both)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert_trees_equal(nnx.to_pure_dict(after), expected)


# Compilation and devices


def test_compiles_once_into_the_memory_of_the_parameters():
    compiled = jax.jit(lambda p, s, t: ox.qk_clip(p, s, threshold=t), donate_argnums=0)
    logits = {"a": jnp.asarray(SIX), "b": jnp.asarray(SIX)}
    copy = partial(jax.tree.map, jnp.copy)
    for threshold in (TAU, 0.5, np.inf):
        after = compiled(copy(PARAMS), logits, jnp.float32(threshold))
        if np.isinf(threshold):
            assert bits(after) == bits(PARAMS)
        else:
            # The compiler contracts the factors in other orders.
            expected = clip(PARAMS, logits, threshold=threshold)
            assert_trees_close(after, expected, rtol=3e-7)
    assert compiled._cache_size() == 1
    whole = compiled.lower(PARAMS, logits, TAU).compile().memory_analysis()
    kernel = PARAMS["a"]["query"]["kernel"].nbytes
    assert whole.temp_size_in_bytes < kernel
    assert_same_types(after, jax.eval_shape(clip, PARAMS, logits))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_many_devices(axis_type: AxisType):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (axis_type,) * 2)
    params = normal_tree(
        {
            "attention": {
                "query": {"kernel": (8, 8, 4), "bias": (8, 4)},
                "key": {"kernel": (8, 4, 4), "bias": (4, 4)},
            },
            "flat": {"qkv": {"kernel": (32, 96)}},
        },
        seed=0,
    )
    logits = {
        "attention": jnp.linspace(-1.0, 6.0, 8),
        "flat": jnp.linspace(6.0, -1.0, 8),
    }
    expected = clip(params, logits)
    specs = {
        "attention": {
            "query": {"kernel": P("data", "model", None), "bias": P("model", None)},
            "key": {"kernel": P("data", "model", None), "bias": P("model", None)},
        },
        "flat": {"qkv": {"kernel": P("data", "model")}},
    }

    def place(tree, specs):
        return jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
        )

    placed = place(params, specs)
    for of_heads in (P(), P("model"), P("data")):
        spread = place(logits, {"attention": of_heads, "flat": of_heads})
        with jax.set_mesh(mesh):
            for function in (jax.jit(clip), *([clip] if of_heads == P() else [])):
                after = function(placed, spread)
                for (path, ours), spec in zip(
                    jax.tree.leaves_with_path(after),
                    jax.tree.leaves(specs),
                    strict=True,
                ):
                    wanted = NamedSharding(mesh, spec)
                    assert ours.sharding.is_equivalent_to(wanted, ours.ndim), path
                assert_trees_close(after, expected, rtol=3e-7)


# Whole models


def attend(query, key, value, mask=None, module=None, **_: Any):
    """Attention that sows its largest logits, in linen and in NNX."""
    groups = query.shape[-2] // key.shape[-2]
    key, value = (jnp.repeat(x, groups, axis=-2) for x in (key, value))
    scaled = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    logits = jnp.einsum("...qhd,...khd->...hqk", scaled, key)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    largest = jnp.max(logits, axis=(0, -2, -1))
    if module is not None:
        kind = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
        module.sow(kind, "max_logits", largest)
    return nn.dot_product_attention(query, key, value, mask=mask)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        attention = nn.MultiHeadDotProductAttention(
            num_heads=4,
            attention_fn=attend,
            bias_init=nn.initializers.normal(),
            name="attention",
        )
        return x + attention(nn.LayerNorm()(x), mask=mask, sow_weights=True), None


INPUTS = 3 * normal_tree({"x": (2, 6, 16)}, seed=0)["x"]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scanned_linen_model(axis: int):
    """The logits of the clipped model are at most the threshold, all layers at once."""
    model = nn.scan(
        Block,
        variable_axes={"params": axis, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=2,
    )()
    mask = nn.make_causal_mask(INPUTS[..., 0])
    params = model.init(jax.random.key(0), INPUTS, mask)["params"]

    @jax.jit
    def logits(params):
        _, sown = model.apply({"params": params}, INPUTS, mask, mutable="intermediates")
        return sown["intermediates"]

    (before,) = jax.tree.leaves(logits(params))
    threshold = float(np.median(before))
    after = clip(params, logits(params), threshold=threshold)
    # What comes out of the first layer changes with its attention, so the logits of the
    # second are not what they would be.
    (now,) = jax.tree.leaves(logits(after))
    expected = np.minimum(before[0], threshold)
    np.testing.assert_allclose(now[0], expected, rtol=1e-5)
    assert (np.asarray(before) > threshold).any(axis=1).all()
    assert (now[1][before[1] > threshold] < before[1][before[1] > threshold]).all()


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(
            4, 16, num_kv_heads=2, decode=False, attention_fn=attend, rngs=rngs
        )

    def __call__(self, x):
        return x + self.attention(x, sow_weights=True)


def test_an_nnx_model_in_training():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ox.sgd(1e-3), wrt=nnx.Param)

    def loss_fn(model, x):
        return jnp.mean(model(x) ** 2)

    @nnx.jit
    def train_step(model, optimizer, x):
        captured = nnx.capture(loss_fn, nnx.Intermediate)
        (_, sown), grads = nnx.value_and_grad(captured, has_aux=True)(model, x)
        optimizer.update(model, grads)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, ox.qk_clip(params, sown, threshold=0.5))
        return sown

    def largest(model):
        _, sown = nnx.capture(model, nnx.Intermediate)(INPUTS)
        (largest,) = jax.tree.leaves(sown)
        return np.asarray(largest)

    before = largest(model)
    momentum = jax.tree.leaves(nnx.state(optimizer))
    (of_step,) = jax.tree.leaves(train_step(model, optimizer, INPUTS))
    np.testing.assert_allclose(of_step, before, rtol=1e-6)
    assert before.max() > 2
    # One small step, of which the function does not know, lies between.
    np.testing.assert_allclose(largest(model), np.minimum(before, 0.5), rtol=0.02)
    assert len(jax.tree.leaves(nnx.state(optimizer))) == len(momentum)
