"""Axes, roles and labels of real Flax models, in linen and in NNX."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import optaxplus as ox
from examples.gpt import GPT, GPTConfig
from optaxplus import DEFAULT_RULES, MatrixAxes, Rule
from tests.partition.routing_tables import abstract, routing

# What a module of each kind must be, read off its forward product by hand:
# {name: (role, fan_in, fan_out)}.
DENSE = {"kernel": ("hidden", (0,), (1,)), "bias": ("vector", (), (0,))}
NORM = {"scale": ("vector", (), (0,)), "bias": ("vector", (), (0,))}
HEADS = {"kernel": ("hidden", (0,), (1, 2)), "bias": ("vector", (), (0, 1))}
MERGED = {"kernel": ("hidden", (0, 1), (2,)), "bias": ("vector", (), (0,))}
CONV_1D = {"kernel": ("hidden", (0, 1), (2,)), "bias": ("vector", (), (0,))}
CONV_2D = {"kernel": ("hidden", (0, 1, 2), (3,)), "bias": ("vector", (), (0,))}
EMBED = {"embedding": ("embedding", (0,), (1,))}
HEAD = {"kernel": ("head", (0,), (1,)), "bias": ("vector", (), (0,))}


def module(name: str, table, *, bias: bool = True):
    names = table if bias else [entry for entry in table if entry != "bias"]
    return {f"{name}/{entry}": table[entry] for entry in names}


def attention(name: str, *, bias: bool = True):
    rows = module(f"{name}/out", MERGED, bias=bias)
    for projection in ("query", "key", "value"):
        rows |= module(f"{name}/{projection}", HEADS, bias=bias)
    return rows


def stacked(rows):
    """The same, one axis of layers in front of everything."""
    return {
        path: (role, tuple(a + 1 for a in fan_in), tuple(a + 1 for a in fan_out))
        for path, (role, fan_in, fan_out) in rows.items()
    }


def linen_params(model: nn.Module, *inputs):
    """Parameters as shapes, without running or allocating anything."""
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


# Linen


class Layers(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 6, name="embed")(tokens)
        x = nn.LayerNorm(name="norm")(x)
        x = nn.RMSNorm(name="rms")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False, name="bare")(x)
        x = nn.Dense(5, name="dense")(x)
        x = nn.Dense(5, use_bias=False, name="square")(x)
        x = nn.DenseGeneral((3, 4), name="split")(x)
        x = nn.DenseGeneral(7, axis=(-2, -1), name="merge")(x)
        return nn.Dense(11, name="lm_head")(x)


def test_linen_layers():
    assert routing(linen_params(Layers(), jnp.ones((2, 8), int))) == (
        module("embed", EMBED)
        | module("norm", NORM)
        | module("rms", NORM, bias=False)
        | attention("attention")
        | attention("bare", bias=False)
        | module("dense", DENSE)
        | module("square", DENSE, bias=False)
        | module("split", HEADS)
        | module("merge", MERGED)
        | module("lm_head", HEAD)
    )


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = nn.Conv(5, (3, 3), use_bias=False, name="Conv_0")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        x = nn.ConvTranspose(6, (2, 2), name="up")(x)
        x = x.mean(axis=1)
        x = nn.Conv(7, (3,), name="temporal")(x)
        x = nn.Conv(8, (3,), use_bias=False, name="temporal_conv")(x)
        return nn.Dense(3, name="head")(x.mean(axis=1))


def test_linen_convolutions():
    assert routing(linen_params(Convolutions(), jnp.ones((2, 8, 8, 3)))) == (
        module("stem", CONV_2D)
        | module("Conv_0", CONV_2D, bias=False)
        | module("norm", NORM)
        | module("up", CONV_2D)
        | module("temporal", CONV_1D)
        | module("temporal_conv", CONV_1D, bias=False)
        | module("head", HEAD)
    )


@pytest.mark.parametrize(
    ("cell", "with_bias", "without"),
    [
        (nn.LSTMCell(5), ["hi", "hf", "hg", "ho"], ["ii", "if", "ig", "io"]),
        (nn.OptimizedLSTMCell(5), ["hi", "hf", "hg", "ho"], ["ii", "if", "ig", "io"]),
        (nn.GRUCell(5), ["ir", "iz", "in", "hn"], ["hr", "hz"]),
        (nn.SimpleCell(5), ["i"], ["h"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_linen_recurrent_cells(cell, with_bias, without):
    expected = {}
    for name in with_bias:
        expected |= module(f"cell/{name}", DENSE)
    for name in without:
        expected |= module(f"cell/{name}", DENSE, bias=False)
    assert routing(linen_params(nn.RNN(cell), jnp.ones((2, 8, 6)))) == expected


class Block(nn.Module):
    bias: bool = True
    attention: bool = True

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x)
        if self.attention:
            y = nn.MultiHeadDotProductAttention(
                num_heads=2, use_bias=self.bias, name="attention"
            )(y)
        y = nn.Dense(7, use_bias=self.bias, name="up")(y)
        return x + nn.Dense(6, use_bias=self.bias, name="down")(y), None


def scanned(block, length: int) -> nn.Module:
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=length,
    )


def test_linen_scan_with_biases():
    params = linen_params(scanned(Block, 5)(), jnp.ones((2, 8, 6)), None)
    assert routing(params) == stacked(
        module("norm", NORM)
        | attention("attention")
        | module("up", DENSE)
        | module("down", DENSE)
    )


def test_linen_scan_without_biases_is_decided_by_its_norm():
    params = linen_params(scanned(Block, 5)(bias=False), jnp.ones((2, 8, 6)), None)
    expected = stacked(
        module("norm", NORM)
        | attention("attention", bias=False)
        | module("up", DENSE, bias=False)
        | module("down", DENSE, bias=False)
    )
    assert routing(params) == expected
    # Heads that fit together with an axis too many are as good.
    del params["norm"]
    for path in module("norm", NORM):
        del expected[path]
    assert routing(params) == expected


def test_linen_scan_without_evidence_is_refused_and_stacked_by_a_rule():
    model = scanned(Block, 5)(bias=False, attention=False)
    params = linen_params(model, jnp.ones((2, 8, 6)), None)
    del params["norm"]
    message = (
        r"(?s)'down/kernel' of shape \(5, 7, 6\).*'up/kernel' of shape \(5, 6, 7\)"
    )
    with pytest.raises(ValueError, match=message):
        routing(params)
    expected = stacked(
        module("up", DENSE, bias=False) | module("down", DENSE, bias=False)
    )
    mine = Rule(r"(up|down)/kernel$", MatrixAxes((-2,), (-1,)), "hidden")
    assert routing(params, (mine, *DEFAULT_RULES)) == expected
    assert routing(params, (*ox.stacked("(up|down)/"), *DEFAULT_RULES)) == expected


class Projections(nn.Module):
    """Attention projections as plain Dense layers, LLaMA's way, to be scanned."""

    @nn.compact
    def __call__(self, x, _):
        for name in ("query", "key", "value", "out"):
            x = nn.Dense(6, use_bias=False, name=name)(x)
        return x, None


def test_scanned_dense_projections_are_not_taken_for_heads():
    params = linen_params(scanned(Projections, 4)(), jnp.ones((2, 6)), None)
    with pytest.raises(ValueError, match=r"'query/kernel' of shape \(4, 6, 6\)"):
        routing(params)


def test_convolutions_without_biases_beside_norms():
    shapes = {"Conv_0/kernel": (3, 3, 4, 8), "BatchNorm_0/scale": (8,)}
    assert routing(abstract(shapes))["Conv_0/kernel"] == ("hidden", (0, 1, 2), (3,))
    shapes = {"Conv_0/kernel": (5, 3, 4, 8), "BatchNorm_0/scale": (5, 8)}
    assert routing(abstract(shapes))["Conv_0/kernel"] == ("hidden", (1, 2), (3,))
    # Alone: a window of one axis, a square one, or one that may be an axis of layers.
    for window in ((3,), (5,), (3, 3)):
        row = routing(abstract({"Conv_0/kernel": (*window, 4, 8)}))["Conv_0/kernel"]
        rank = len(window)
        assert row == ("hidden", tuple(range(rank + 1)), (rank + 1,))
    for shape in ((5, 3, 4, 8), (5, 3, 3, 4, 8), (3, 3, 3, 4, 8)):
        with pytest.raises(ValueError, match="'Conv_0/kernel' of shape"):
            routing(abstract({"Conv_0/kernel": shape}))


def test_stacked_heads_and_norms_keep_their_role():
    shapes = {"lm_head/kernel": (3, 6, 11), "ln_1": (3, 6), "attn_norm/weight": (3, 6)}
    assert routing(abstract(shapes)) == {
        "lm_head/kernel": ("head", (1,), (2,)),
        "ln_1": ("vector", (), (1,)),
        "attn_norm/weight": ("vector", (), (1,)),
    }


def test_as_many_layers_as_a_head_is_wide():
    # Three layers of heads of size three: the bias (3, 6) of `out` may be a stack of
    # biases (6,) or one bias of the last two axes; the norm of the block decides.
    params = linen_params(scanned(Block, 3)(), jnp.ones((2, 8, 6)), None)
    assert routing(params) == stacked(
        module("norm", NORM)
        | attention("attention")
        | module("up", DENSE)
        | module("down", DENSE)
    )
    with pytest.raises(ValueError, match=r"'out/bias' of shape \(3, 6\)"):
        routing({"out": params["attention"]["out"]})


def test_example_gpt():
    config = GPTConfig(width=8, depth=2, head_size=4, context=6, vocabulary=11)
    params = linen_params(GPT(config), jnp.ones((2, 6), int))
    expected = module("token_embedding", EMBED) | module("position_embedding", EMBED)
    for block in ("block_0", "block_1"):
        expected |= (
            module(f"{block}/attention_norm", NORM)
            | attention(f"{block}/attention", bias=False)
            | module(f"{block}/mlp_norm", NORM)
            | module(f"{block}/mlp/up", DENSE, bias=False)
            | module(f"{block}/mlp/down", DENSE, bias=False)
        )
    expected |= module("final_norm", NORM) | module("lm_head", HEAD, bias=False)
    assert routing(params) == expected


# NNX


class NnxLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.rms = nnx.RMSNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.bare = nnx.MultiHeadAttention(
            2, 6, use_bias=False, decode=False, rngs=rngs
        )
        self.dense = nnx.Linear(6, 5, rngs=rngs)
        self.square = nnx.Linear(5, 5, use_bias=False, rngs=rngs)
        self.split = nnx.LinearGeneral(6, (3, 4), rngs=rngs)
        self.merge = nnx.LinearGeneral((3, 4), 6, axis=(-2, -1), rngs=rngs)
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.stem = nnx.Conv(3, 4, (3,), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(6, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs)])
        self.value = nnx.Linear(3, 4, rngs=rngs)
        self.lstm = nnx.LSTMCell(6, 5, rngs=rngs)
        self.lm_head = nnx.Linear(6, 11, use_bias=False, rngs=rngs)


NNX_LAYERS = (
    module("embed", EMBED)
    | module("norm", NORM)
    | module("rms", NORM, bias=False)
    | attention("attention")
    | attention("bare", bias=False)
    | module("dense", DENSE)
    | module("square", DENSE, bias=False)
    | module("split", HEADS)
    | module("merge", MERGED)
    | module("conv", CONV_2D, bias=False)
    | module("stem", CONV_1D)
    | module("batch_norm", NORM)
    | module("layers/0", DENSE)
    | module("value", DENSE)
    | module("lm_head", HEAD, bias=False)
)
for _gate in ("hi", "hf", "hg", "ho"):
    NNX_LAYERS |= module(f"lstm/{_gate}", DENSE)
for _gate in ("ii", "if_", "ig", "io"):
    NNX_LAYERS |= module(f"lstm/{_gate}", DENSE, bias=False)


@pytest.fixture(scope="module")
def nnx_state():
    return nnx.state(nnx.eval_shape(lambda: NnxLayers(nnx.Rngs(0))), nnx.Param)


def test_nnx_layers(nnx_state):
    assert routing(nnx_state) == NNX_LAYERS


def test_nnx_variables_and_bare_arrays_are_the_same_tree(nnx_state):
    pure = nnx.as_pure(nnx_state)
    assert routing(pure) == NNX_LAYERS
    for infer in (ox.infer_matrix_axes, ox.infer_roles, ox.label_params):
        from_variables, from_arrays = infer(nnx_state), infer(pure)
        assert from_variables == from_arrays
        # The structure of `nnx.as_pure(state)`: no Variable around a label.
        structure = jax.tree.structure(pure)
        assert jax.tree.structure(from_variables) == structure


def test_nnx_vmapped_stack():
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(key):
        return nnx.Linear(6, 7, rngs=nnx.Rngs(key))

    state = nnx.state(build(jax.random.split(jax.random.key(0), 5)), nnx.Param)
    assert routing({"blocks": state}) == stacked(module("blocks", DENSE))


# Boxes


def test_linen_boxes_do_not_change_paths():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            partitioned = nn.with_partitioning(init, ("in", "out"))
            return nn.Dense(5, kernel_init=partitioned, name="dense")(x)

    boxed = linen_params(Boxed(), jnp.ones((2, 6)))
    assert isinstance(boxed["dense"]["kernel"], nn.Partitioned)
    plain = nn.unbox(boxed)
    assert routing(boxed) == routing(plain) == module("dense", DENSE)
    for infer in (ox.infer_matrix_axes, ox.infer_roles, ox.label_params):
        assert infer(boxed) == infer(plain)
