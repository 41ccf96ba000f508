"""QK-Clip: every form in which attentions keep their projections, and what is none."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxplus as ox
from tests.assertions import assert_same_types, assert_trees_equal
from tests.optimizers.attentions import (
    SIX,
    SIZE,
    WIDTH,
    clip,
    gamma,
    normal,
)

# Forms of parameters, against kernels (features, heads, head size)


def assert_same_as_heads(params, max_logits, back, **arguments) -> None:
    """`back` takes params to query and key (features, heads, head size)."""
    after = clip(params, max_logits, **arguments)
    expected = clip(back(params), SIX)
    assert_trees_equal(back(after), expected)
    assert_same_types(after, params)


def heads_of(query, key):
    return {"query": {"kernel": query}, "key": {"kernel": key}}


def test_einsums_of_gemma():
    shapes = {
        "q_einsum": {"w": (6, WIDTH, SIZE)},
        "kv_einsum": {"w": (2, 3, WIDTH, SIZE)},
    }
    params = {"layer_0": {"attn": normal(shapes)}}

    def back(tree):
        attn = tree["layer_0"]["attn"]
        key = attn["kv_einsum"]["w"][0]
        return heads_of(jnp.moveaxis(attn["q_einsum"]["w"], 0, 1), key.swapaxes(0, 1))

    assert_same_as_heads(params, {"layer_0": {"attn": SIX}}, back)
    after = clip(params, {"layer_0": {"attn": SIX}})["layer_0"]["attn"]["kv_einsum"]
    value = params["layer_0"]["attn"]["kv_einsum"]["w"][1]
    np.testing.assert_array_equal(after["w"][1], value)


FUSED_WIDTH = 6 * SIZE


def fused_thirds(names=("qkv", "kernel", "bias")):
    module, weight, bias = names
    return {module: {weight: (FUSED_WIDTH, 3 * FUSED_WIDTH), bias: (3 * FUSED_WIDTH,)}}


@pytest.mark.parametrize(
    "shapes",
    [
        {"qkv": {"kernel": (WIDTH, 3, 6, SIZE), "bias": (3, 6, SIZE)}},
        {"to_qkv": {"kernel": (WIDTH, 3, 6, SIZE)}},
        fused_thirds(),
        fused_thirds(("c_attn", "w", "b")),
        {"c_attn": (FUSED_WIDTH, 3 * FUSED_WIDTH)},
    ],
    ids=["counted", "counted-bare", "thirds", "thirds-w", "thirds-bare"],
)
def test_fused_projections(shapes):
    params = {"attn": normal(shapes)}
    after = clip(params, {"attn": SIX})
    leaves = zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True)
    for ours, theirs in leaves:
        scale = np.asarray(ours / theirs).reshape(-1, 3, 6, SIZE)
        expected = np.ones((3, 6, 1))
        expected[:2, :, 0] = np.sqrt(gamma(SIX))
        np.testing.assert_allclose(
            scale, np.broadcast_to(expected, scale.shape), rtol=1e-6
        )
        np.testing.assert_array_equal(
            np.asarray(ours).reshape(-1, 3, 6 * SIZE)[:, 2],
            np.asarray(theirs).reshape(-1, 3, 6 * SIZE)[:, 2],
        )


def test_fused_projections_of_grouped_queries_by_axes():
    params = {"attn": normal({"qkv": {"kernel": (WIDTH, (6 + 2 + 2) * SIZE)}})}
    axes = ox.MatrixAxes((0,), (1,), splits=(6 * SIZE, 2 * SIZE, 2 * SIZE))

    def back(tree):
        kernel = tree["attn"]["qkv"]["kernel"].reshape(WIDTH, 10, SIZE)
        return heads_of(kernel[:, :6], kernel[:, 6:8])

    assert_same_as_heads(params, {"attn": SIX}, back, axes=axes)


def test_weights_out_first():
    """As in PyTorch and Equinox; a bias tells, or axes do."""
    shapes = {
        "q_proj": {"weight": (6 * SIZE, WIDTH), "bias": (6 * SIZE,)},
        "k_proj": {"weight": (3 * SIZE, WIDTH), "bias": (3 * SIZE,)},
    }
    params = normal(shapes)

    def back(tree):
        weights = (tree[f"{name}_proj"]["weight"].T for name in "qk")
        return heads_of(*(w.reshape(WIDTH, -1, SIZE) for w in weights))

    assert_same_as_heads(params, SIX, back)
    bare = {name: {"weight": module["weight"]} for name, module in params.items()}
    assert_same_as_heads(bare, SIX, back, axes=ox.MatrixAxes((1,), (0,)))


def test_bare_arrays_and_their_biases():
    params = normal({"wq": (WIDTH, 6 * SIZE), "wk": (WIDTH, SIZE), "bq": (6 * SIZE,)})

    def back(tree):
        heads = (tree[name].reshape(WIDTH, -1, SIZE) for name in ("wq", "wk"))
        return heads_of(*heads)

    assert_same_as_heads(params, {"max_logits": SIX}, back)
    scale = clip(params, SIX)["bq"] / params["bq"]
    by_kernel = clip(params, SIX)["wq"][0] / params["wq"][0]
    np.testing.assert_allclose(scale, by_kernel, rtol=1e-6)


def test_axes_of_rules_and_of_single_heads():
    shapes = {
        "query": {"kernel": (WIDTH, 6, SIZE), "bias": (6, SIZE)},
        "key": {"kernel": (WIDTH, 3, SIZE), "bias": (3, SIZE)},
    }
    params = normal({"attention": shapes | {"out": {"kernel": (6, SIZE, WIDTH)}}})
    logits = {"attention": SIX}
    expected = clip(params, logits)
    assert_trees_equal(clip(params, logits, axes=ox.infer_matrix_axes), expected)
    per_head = (
        ox.Rule("(query|key)/kernel$", ox.MatrixAxes((-3,), (-1,)), "hidden"),
        ox.Rule("(query|key)/bias$", ox.MatrixAxes((), (-1,)), "vector"),
        *ox.DEFAULT_RULES,
    )
    axes = ox.infer_matrix_axes(params, per_head)
    assert_trees_equal(clip(params, logits, axes=axes), expected)


def test_fused_projections_whose_heads_are_matrices_of_their_own():
    params = {"attn": normal({"qkv": {"kernel": (WIDTH, 3, 6, SIZE)}})}
    expected = clip(params, {"attn": SIX})
    after = clip(params, {"attn": SIX}, axes=ox.MatrixAxes((0,), (3,)))
    assert_trees_equal(after, expected)


def test_attentions_further_down_are_others():
    heads = {"kernel": (WIDTH, 6, SIZE)}
    inner = {"query": heads, "qkv": {"kernel": (WIDTH, 3, 6, SIZE)}}
    params = normal({"query": heads, "key": heads, "memory": {"inner": inner}})
    after = clip(params, SIX)
    assert_trees_equal(after["memory"], params["memory"])
    assert_trees_equal(after["query"], clip(heads_of(*bare(params)), SIX)["query"])


def bare(tree):
    return tree["query"]["kernel"], tree["key"]["kernel"]


def test_names_by_argument():
    params = normal(
        {"proj": {"q_up": (WIDTH, 6, SIZE), "k_up": {"kernel": (WIDTH, 6, SIZE)}}}
    )

    def back(tree):
        return heads_of(tree["proj"]["q_up"], tree["proj"]["k_up"]["kernel"])

    assert_same_as_heads(params, SIX, back, query="proj/q_up", key=r"proj/k_\w+")


# Stacks of layers

LAYERS = 3
STACKED = np.stack([SIX, SIX - 3, SIX[::-1]])


def layer_shapes(is_flat: bool):
    def out(heads):
        return (heads * SIZE,) if is_flat else (heads, SIZE)

    return {
        "query": {"kernel": (WIDTH, *out(6)), "bias": out(6)},
        "key": {"kernel": (WIDTH, *out(2)), "bias": out(2)},
        "norm": {"scale": (WIDTH,)},
    }


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("is_flat", [False, True], ids=["heads", "flat"])
def test_a_stack_is_its_layers(axis: int, is_flat: bool):
    layers = [normal(layer_shapes(is_flat), seed) for seed in range(LAYERS)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x, axis=axis), *layers)
    after = clip({"layers": stacked}, {"layers": {"max_logits": (STACKED,)}})["layers"]
    assert_same_types(after, stacked)
    for index, layer in enumerate(layers):
        ours = jax.tree.map(lambda x, i=index: jnp.take(x, i, axis=axis), after)
        assert_trees_equal(ours, clip(layer, STACKED[index]))


def test_stacks_in_stacks():
    layers = [normal(layer_shapes(False), seed) for seed in range(2 * LAYERS)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 3, *x[0].shape), *layers)
    logits = np.stack([STACKED, STACKED[::-1]])
    after = clip(stacked, logits)
    for index, layer in enumerate(layers):
        place = divmod(index, 3)
        ours = jax.tree.map(lambda x, place=place: x[place], after)
        assert_trees_equal(ours, clip(layer, logits[place]))


def test_as_many_layers_as_features():
    """The norm beside the kernels tells which axis counts layers, or axes do."""
    shapes = {
        "query": {"kernel": (LAYERS, LAYERS, 6, SIZE)},
        "key": {"kernel": (LAYERS, LAYERS, 6, SIZE)},
    }
    params = {"layers": normal(shapes)}
    logits = {"layers": STACKED}
    with pytest.raises(ValueError, match=r"may count the \(3,\) layers"):
        clip(params, logits)

    def scale_of_layers(tree):
        return np.asarray(
            tree["layers"]["query"]["kernel"] / params["layers"]["query"]["kernel"]
        )[..., 0]

    expected = np.sqrt([gamma(layer) for layer in STACKED])
    for first in (0, 1):
        axes = ox.MatrixAxes((1 - first,), (2, 3))
        scale = scale_of_layers(clip(params, logits, axes=axes))
        np.testing.assert_allclose(
            scale,
            np.broadcast_to(np.expand_dims(expected, 1 - first), scale.shape),
            rtol=1e-6,
        )
    params["layers"]["bias_of_norm"] = {"scale": jnp.ones((LAYERS, WIDTH))}
    by_norm = scale_of_layers(clip(params, logits))
    np.testing.assert_allclose(
        by_norm, np.broadcast_to(expected[:, None], by_norm.shape), rtol=1e-6
    )


# What is refused, before anything is computed


def refused(error, params, max_logits, message, **arguments) -> None:
    """Abstractly: paths and shapes in, a message out."""

    def abstract(tree):
        return jax.tree.map(
            lambda leaf: (
                jax.ShapeDtypeStruct(leaf, "float32")
                if isinstance(leaf, tuple)
                else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            ),
            tree,
            is_leaf=lambda node: isinstance(node, tuple) and node != (),
        )

    with pytest.raises(error, match=f"qk_clip: .*{message}"):
        jax.eval_shape(
            partial(clip, **arguments), abstract(params), abstract(max_logits)
        )


Q, K = {"query/kernel": (7, 6, 4)}, {"key/kernel": (7, 3, 4)}
LATENT = {"wq_b/kernel": (6, 6, 5), "wkv_b/kernel": (6, 6, 8)}


@pytest.mark.parametrize(
    ("heads", "shapes", "message"),
    [
        # The number of heads.
        (
            (4,),
            Q | K,
            r"parameter 'm/query/kernel' of shape \(7, 6, 4\) does not fit max_logits "
            r"of shape \(4,\), which are 4 heads of the query: it has 6 heads. A "
            r"kernel must be \(features, heads, head size\) or",
        ),
        (
            (2, 6),
            Q | K,
            r"shape \(7, 6, 4\) .*, which are \(2,\) layers and 6 heads of the query: "
            r"it has no axes of \(2,\) layers",
        ),
        (
            (6,),
            {"query/kernel": (3, 7, 6, 4)} | K,
            r"shape \(3, 7, 6, 4\) .* which of its axes are heads is not known",
        ),
        ((6,), {"query/kernel": (7, 23)} | K, "query.* 23 are not heads of equal size"),
        ((6,), Q | {"key/kernel": (7, 10)}, "key.* 10 are not heads of equal size"),
        ((6,), Q | {"key/kernel": (7, 4, 4)}, "its 4 heads do not divide the 6 heads"),
        (
            (6,),
            Q | {"key/kernel": (7, 3, 5)},
            "its heads are of size 5 and those of the query of 4; .* needs nope_dim",
        ),
        (
            (6,),
            Q | K | {"query/bias": (6, 5)},
            r"'m/query/bias' of shape \(6, 5\) .* its heads are not of 4",
        ),
        (
            (6,),
            Q | K | {"key/bias": (6, 4)},
            r"'m/key/bias' of shape \(6, 4\) .* it is not 3 heads",
        ),
        # Names.
        (
            (6,),
            Q | {"value/kernel": (7, 3, 4)},
            "module 'm' has no key projection; its parameters are 'query/kernel', "
            "'value/kernel'. Say what it is called",
        ),
        ((6,), Q | K | {"q": (7, 6, 4)}, "module 'm' has several query projections"),
        (
            (6,),
            Q | K | {"query/lora_a": (7, 2)},
            "parameter 'm/query/lora_a' stands beside a query or key projection and",
        ),
        (
            (6,),
            {"q": (7, 6, 4), "k": (7, 6, 4), "q_lora_b": (2, 6, 4)},
            "parameter 'm/q_lora_b' stands beside a query or key projection and",
        ),
        (
            (6,),
            Q | K | {"query_ln/scale": (4,)},
            "parameter 'm/query_ln/scale' normalises queries or keys behind their",
        ),
        (
            (6,),
            LATENT,
            "parameter 'm/wq_b/kernel' is a projection of latent attention; pass nope",
        ),
        # Forms.
        (
            (6,),
            {"q/weight": (24, 7), "k/weight": (24, 7)},
            r"'m/q/weight' of shape \(24, 7\) .* which of its axes .* pass axes",
        ),
        ((6,), {"qkv/kernel": (7, 72)}, r"'m/qkv/kernel' of shape \(7, 72\) .* which"),
        ((6,), {"qkv/kernel": (7, 3, 5, 4)}, r"'m/qkv/kernel' .* it has 5 heads"),
        ((6,), {"c_conv_qkv/kernel": (3, 7, 5, 4)}, "c_conv_qkv.* which of its axes"),
    ],
)
def test_models_that_do_not_fit_are_refused(heads, shapes, message):
    params = {f"m/{path}": shape for path, shape in shapes.items()}
    refused(ValueError, params, {"m": heads}, message)


@pytest.mark.parametrize(
    ("max_logits", "message"),
    [
        ({}, "max_logits is empty; it must hold an array of shape .* did it sow"),
        ({"m": {"max_logits": ()}}, "max_logits is empty"),
        (
            {"typo": (6,)},
            "max_logits has logits at 'typo', but there are no parameters in a module "
            "'typo'; the modules at the top are 'm'",
        ),
        (
            {"block": {"m": {"max_logits": (6,)}}},
            "'block/m/max_logits', but .* 'block'",
        ),
        ({"typo": {"max_logits": (6,)}}, "the root of the parameters has no query"),
        ({"m": [(6,), (6,)]}, "max_logits has logits at 'm/0', but .* module 'm/0'"),
        (
            {"m": np.float32(1)},
            r"max_logits\['m'\] of shape \(\) is not allowed; it must be \(heads,\)",
        ),
        (
            {"m": {"max_logits": (6,), "attention_op": {"max_logits": (5,)}}},
            r"\['m/.*max_logits'\] of shape \(.,\) .*, and \(.,\) as the first one",
        ),
    ],
)
def test_logits_of_nothing_are_refused(max_logits, message):
    params = {f"m/{path}": shape for path, shape in (Q | K).items()}
    refused(ValueError, params, max_logits, message)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"threshold": 0.0}, "threshold=0.0 is not allowed; .* > 0"),
        (ValueError, {"threshold": np.inf}, "threshold=inf is not allowed"),
        (TypeError, {"threshold": "100"}, "threshold='100' is not allowed"),
        (ValueError, {"nope_dim": 0}, "nope_dim=0 is not allowed; .* integer >= 1"),
        (TypeError, {"nope_dim": 1.5}, "nope_dim=1.5 is not allowed"),
        (ValueError, {"nope_dim": 2}, "has a key for each of the 6 heads"),
        (ValueError, {"query": "("}, r"query='\(' is not allowed; .* a regular"),
        (ValueError, {"key": None}, "key=None is not allowed; .* a regular"),
        (ValueError, {"query_rope": "["}, r"query_rope='\[' is not allowed"),
        (ValueError, {"query_rope": "rope"}, "module 'm' has no rotary projection"),
        (
            ValueError,
            {"axes": ox.MatrixAxes((0,), (2,), splits=(2, 2))},
            r"'m/query/kernel' .* splits=\(2, 2\)\) are not those of heads",
        ),
        (
            ValueError,
            {"axes": ox.MatrixAxes((), (0,))},
            r"'m/query/kernel' .* are not those of heads",
        ),
        (
            ValueError,
            {"axes": {"m/query/kernel": ox.MatrixAxes((0,), (1, 2))}},
            "axes is not a prefix of the parameters' tree",
        ),
        (TypeError, {"axes": "heads"}, "axes='heads' for parameter"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message):
    params = {f"m/{path}": shape for path, shape in (Q | K).items()}
    refused(error, params, {"m": (6,)}, message, **arguments)


def test_axes_without_layers_are_refused():
    params = {f"m/{path}": shape for path, shape in (Q | K).items()}
    axes = ox.MatrixAxes((0,), (1, 2))
    message = r"'m/query/kernel' .* MatrixAxes\(.* leave it no axes of layers"
    refused(ValueError, params, {"m": (2, 6)}, message, axes=axes)


def test_parts_without_rotary_position_are_no_larger_than_heads():
    params = {f"m/{path}": shape for path, shape in LATENT.items()}
    message = "nope_dim=6 is more than the size of its heads, 8, or of those .* 5"
    refused(ValueError, params, {"m": (6,)}, message, nope_dim=6)


@pytest.mark.parametrize("dtype", ["int8", "complex64"])
def test_wrong_dtypes_are_refused(dtype: str):
    def params(dtype):
        shapes = {f"m/{path}": shape for path, shape in (Q | K).items()}
        return {name: np.ones(shape, dtype) for name, shape in shapes.items()}

    message = f"parameter 'm/.*' of dtype {dtype} is not allowed; it must be real"
    refused(TypeError, params(dtype), {"m": (6,)}, message)
    message = rf"max_logits\['m'\] of dtype {dtype} is not allowed; it must be real"
    logits = {"m": np.ones(6, dtype)}
    refused(TypeError, params("float32"), logits, message)
