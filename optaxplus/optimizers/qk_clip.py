"""QK-Clip: bounds the logits of attention by the weights that make them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, PyTree, Scalar
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition import names
from optaxplus.partition.attention import (
    Attention,
    Names,
    Projection,
    read_attention,
)
from optaxplus.partition.inference import axes_of
from optaxplus.partition.stacks import Shape

__all__ = ["qk_clip"]

# What `sow` is to call the logits.
_NAME = "max_logits"


def qk_clip(
    params: PyTree,
    max_logits: PyTree,
    *,
    threshold: Scalar = 100.0,
    nope_dim: int | None = None,
    query: str = f"{names.QUERY}|q_einsum|wq_b",
    key: str = f"{names.KEY}|k_einsum|wkv_b",
    query_rope: str | None = None,
    axes: Axes = None,
) -> PyTree:
    r"""QK-Clip: shrinks the queries and keys of heads whose logits grow too large.

    Muon's steps have full rank, and with them the logits of attention can grow without
    bound. MuonClip is Muon followed by this function, but it knows nothing of the
    optimizer. Call it with the parameters *after* the step and the largest logits of
    the forward pass *before* it. For every head h whose largest logit S_h exceeds
    `threshold`, γ_h = threshold / S_h, and its weights and biases shrink such that all
    its logits are multiplied by exactly γ_h; γ_h = 1 elsewhere:

    - own key: query and key by √γ_h each.
    - key shared by a group of heads (grouped queries; with one key, all heads): the
      key by √m, m the least γ of the group, and each query by γ_h / √m. The paper
      leaves this open. A head of the group below the threshold keeps its logits, as
      its query grows by 1 / √m; Megatron-LM multiplies the whole group by m instead.
    - latent attention (`nope_dim`): the parts without rotary position by √γ_h each,
      the rotary part of the query by γ_h. The rotary key, which all heads share, and
      the value behind the key stay.

    Only weights change, never the optimizer's state, so nothing has to be saved. The
    step that made a logit too large has been taken: the next forward pass may exceed
    the threshold by what one step adds. With a norm of queries and keys there is
    nothing to clip, which is an error where the norm has parameters.

    Args:
      params: Tree of parameters: dicts, `FrozenDict`, `nnx.state(model, nnx.Param)`,
        boxed or bare, with or without an outer "params".
      max_logits: The largest logit of every head: of the scaled products of queries and
        keys (by 1/√head size, or whatever the model does) before additive biases, soft
        caps and the softmax, over the batch and all pairs that are not masked. Of
        shape (heads,), heads being those of the query, or (layers, heads) for a stack
        of layers. A tree that follows the modules down to the attentions, as `sow`
        makes it: `{"block_0": {"attention": {"max_logits": (array,)}}}`, with or
        without an outer "intermediates". Where something in it is called "max_logits",
        everything else is ignored; otherwise every leaf is of the module at its own
        path, such as `{"block_0/attention": array}`. Of a tuple of several arrays (a
        module called several times) the largest count. Modules that are not in it
        stay as they are, so a frozen one is left out.
      threshold: Largest logit that is let through. > 0. The paper's 100 is for models
        of billions of parameters; small ones grow less.
      nope_dim: Size of the part of each head without rotary position, which comes
        first, in latent attention (`wq_b`, `wkv_b`, the value behind the key); it
        then holds of every attention in `max_logits`. None for others. Static.
      query: Regular expression for the module of the query projection (or the array,
        where it is bare), relative to the attention. Its bias is found inside, or
        beside it as `bq`, `b_q` or `q_bias`. Static.
      key: The same for the key. Query, key and value in one array are recognised by
        their names: (features, 3, heads, head size), and three equal parts side by
        side (`c_attn`, `qkv`, …). Static.
      query_rope: The same for the rotary part of the query in latent attention, where
        it is apart; then `query` and `key` name the parts without rotary position.
        None where there is none. Static.
      axes: Matrix axes of the parameters, see `optaxplus.custom_types`, whose fan_out
        are (heads, head size) or both in one axis; needed for forms that names and
        shapes do not tell, such as `weight` without a bias. None reads kernels as
        (features, heads, head size) or (features, heads · head size), biases without
        features, Gemma's einsums as (heads, features, head size), and the axes of
        layers in front of them or behind their first axis. Static if a function.

    Returns:
      The parameters, in the structure, dtypes and sharding of `params`. Factors and
      products are float32 (float64 for float64 parameters), rounded once. Heads that
      are not above the threshold, and share no key with one that is, are returned bit
      for bit. A head whose logit is NaN or infinite counts as not above: no factor
      would be right, and such a step is for a finiteness guard to skip.

    Raises:
      TypeError: If an argument, logits or a projection are not of floating point
        numbers, or `nope_dim` no integer.
      ValueError: If an argument is out of range; `max_logits` is empty, names a module
        without query and key, or does not have one number for every head; or a
        projection has an unknown form, as beside low-rank factors. With path and
        shape, before anything is computed.

    References:
      Kimi Team, arXiv 2507.20534 (Algorithm 1); AI-Hypercomputer/maxtext
      (`qk_clip_utils.py`), whose names and layout of latent attention are known here;
      NVIDIA/Megatron-LM (`clip_qk`).

    Example:
      An attention function that Flax's `MultiHeadDotProductAttention` calls with the
      module if `sow_weights=True`. `sow` does nothing unless "intermediates" are asked
      for, and XLA computes the logits once.

      >>> import jax, jax.numpy as jnp, optax, optaxplus as ox
      >>> from flax import linen as nn
      >>> def attend(query, key, value, mask=None, module=None):
      ...     scaled = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
      ...     logits = jnp.einsum("...qhd,...khd->...hqk", scaled, key)
      ...     if mask is not None:
      ...         logits = jnp.where(mask, logits, -jnp.inf)
      ...     if module is not None:
      ...         largest = jnp.max(logits, axis=(0, -2, -1))
      ...         module.sow("intermediates", "max_logits", largest)
      ...     return nn.dot_product_attention(query, key, value, mask=mask)
      >>> model = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attend)
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 16))
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> tx = ox.muon(0.02)

      The training step (for NNX, which has `nnx.capture`, see `examples/qk_clip.py`):

      >>> @jax.jit
      ... def train_step(params, state, x):
      ...     def loss_fn(params):
      ...         y, sown = model.apply(
      ...             {"params": params}, x, sow_weights=True, mutable="intermediates"
      ...         )
      ...         return jnp.mean((y - x) ** 2), sown["intermediates"]
      ...
      ...     grads, max_logits = jax.grad(loss_fn, has_aux=True)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     return ox.qk_clip(params, max_logits, threshold=30.0), state
      >>> params, state = train_step(params, tx.init(params), x)

      The logits are those of the whole batch if the step is compiled as a whole;
      under `shard_map` take `jax.lax.pmax` of them, and of several micro-batches the
      largest.
    """
    validation.check_positive("qk_clip", threshold=threshold)
    if nope_dim is not None:
        validation.check_int("qk_clip", minimum=1, nope_dim=nope_dim)
    known = _check_names(query, key, query_rope)
    leaves = trees.leaves_with_paths(params)
    shapes: dict[str, Shape] = {path: jnp.shape(leaf) for path, leaf in leaves}
    given = _given_axes(axes, params, leaves)
    factors: dict[str, jax.Array] = {}
    for module, logits in _logits_of_modules(max_logits, shapes).items():
        try:
            attention = read_attention(
                module, shapes, logits.shape, known, nope_size=nope_dim, axes=given
            )
        except ValueError as error:
            raise ValueError(f"qk_clip: {error}") from None
        inside = {path: leaf for path, leaf in leaves if path in attention.projections}
        trees.check_floating("qk_clip", inside, real=True)
        factors |= _factors(attention, logits, threshold, nope_dim, inside)
    clipped = [
        _scaled(leaf, factors[path]) if path in factors else leaf
        for path, leaf in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(params), clipped)


# Arguments


def _check_names(query: str, key: str, query_rope: str | None) -> Names:
    known = {"query": query, "key": key}
    known |= {} if query_rope is None else {"query_rope": query_rope}
    for argument, pattern in known.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"qk_clip: {argument}={pattern!r} is not allowed; it must be a regular "
                f"expression ({error})."
            ) from error
    return Names(query, key, query_rope)


def _given_axes(
    axes: Axes, params: PyTree, leaves: list[tuple[str, Any]]
) -> dict[str, MatrixAxes] | None:
    if axes is None:
        return None
    resolved = jax.tree.leaves(axes_of("qk_clip", axes, params))
    return {path: entry for (path, _), entry in zip(leaves, resolved, strict=True)}


def _logits_of_modules(
    max_logits: PyTree, shapes: dict[str, Shape]
) -> dict[str, jax.Array]:
    """The largest logits of every head, by the path of the module in the parameters."""
    flat, _ = jax.tree_util.tree_flatten_with_path(max_logits, is_leaf=_is_entry)
    entries = [(trees.path_text(path), jax.tree.leaves(entry)) for path, entry in flat]
    entries = [(path, arrays) for path, arrays in entries if arrays]
    if not entries:
        raise ValueError(
            "qk_clip: max_logits is empty; it must hold an array of shape (heads,) for "
            "at least one attention. Was the model applied with "
            "mutable='intermediates', and did it sow?"
        )
    named = [path.rpartition("/")[2] == _NAME for path, _ in entries]
    found: dict[str, list[tuple[str, ArrayLike]]] = {}
    for (path, arrays), is_named in zip(entries, named, strict=True):
        if is_named or not any(named):
            module = _module(path, shapes, is_named=is_named)
            found.setdefault(module, []).extend((path, array) for array in arrays)
    return {module: _largest(arrays) for module, arrays in found.items()}


def _is_entry(node: Any) -> bool:
    """Whether a node is all that is said of a module: a box, or arrays that were sown.

    Tuples of arrays are what `sow` makes; lists may be of layers.
    """
    return trees.is_holder(node) or (
        type(node) is tuple and all(hasattr(x, "dtype") for x in node)
    )


def _module(path: str, shapes: dict[str, Shape], *, is_named: bool) -> str:
    """The module in the parameters that logits at `path` are of."""

    def is_there(module: str) -> bool:
        return not module or any(other.startswith(f"{module}/") for other in shapes)

    def enclosing(module: str) -> str:
        return module.rpartition("/")[0]

    module = enclosing(path) if is_named else path
    if not is_there("intermediates"):
        module = re.sub(r"^intermediates(/|$)", "", module)
    if all(other.startswith("params/") for other in shapes):
        module = f"params/{module}".removesuffix("/")
    # The logits may be sown by a module without parameters inside the attention.
    if is_named and not is_there(module):
        module = enclosing(module)
    if not is_there(module):
        tops = sorted({other.partition("/")[0] for other in shapes})
        raise ValueError(
            f"qk_clip: max_logits has logits at {path!r}, but there are no parameters "
            f"in a module {module!r}; the modules at the top are "
            f"{', '.join(map(repr, tops))}."
        )
    return module


def _largest(arrays: list[tuple[str, ArrayLike]]) -> jax.Array:
    """The largest of arrays (*layers, heads), in float32 or float64."""
    checked = []
    for path, array in arrays:
        shape, dtype = jnp.shape(array), jnp.result_type(array)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"qk_clip: max_logits[{path!r}] of dtype {dtype} is not allowed; it "
                "must be real floating point."
            )
        first = jnp.shape(arrays[0][1])
        if not shape or shape != first:
            raise ValueError(
                f"qk_clip: max_logits[{path!r}] of shape {shape} is not allowed; it "
                "must be (heads,), or (layers, heads) in a stack of layers"
                + (f", and {first} as the first one here." if shape != first else ".")
            )
        checked.append(trees.widen(jnp.asarray(array)))
    largest = checked[0]
    for other in checked[1:]:
        largest = jnp.maximum(largest, other)
    return _replicated(largest)


def _replicated(x: jax.Array) -> jax.Array:
    """The same array on every device of an Explicit mesh, which multiplies no other."""
    sharding = jax.typeof(x).sharding
    if not any(axis is not None for axis in sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


# The rule


def _factors(
    attention: Attention,
    logits: jax.Array,
    threshold: Scalar,
    nope_dim: int | None,
    params: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """What every projection is multiplied by, in axes that match its own."""
    dtype = jnp.result_type(*(trees.compute_dtype(p.dtype) for p in params.values()))
    logits = logits.astype(dtype)
    tau = jnp.asarray(threshold).astype(dtype)
    is_above = (logits > tau) & (logits < jnp.inf)
    gamma = jnp.where(is_above, tau / jnp.where(is_above, logits, 1), 1)
    of_query, of_key = _shares(gamma, attention)
    by_head = {
        "query": _by_coordinate(of_query, gamma, attention.query_size, nope_dim),
        "key": _by_coordinate(
            of_key, jnp.ones_like(of_key), attention.key_size, nope_dim
        ),
        "rotary": gamma[..., None],
    }
    return {
        path: _spread(by_head, projection, params[path].shape, gamma.shape[:-1])
        for path, projection in attention.projections.items()
    }


def _shares(gamma: jax.Array, attention: Attention) -> tuple[jax.Array, jax.Array]:
    """What of γ (*layers, heads) the query of every head takes, and every key."""
    if attention.key_heads == attention.heads:
        return jnp.sqrt(gamma), jnp.sqrt(gamma)
    groups = gamma.reshape(*gamma.shape[:-1], attention.key_heads, -1)
    of_key = jnp.sqrt(jnp.min(groups, axis=-1))
    return (groups / of_key[..., None]).reshape(gamma.shape), of_key


def _by_coordinate(
    factor: jax.Array, beyond: jax.Array, size: int, nope_dim: int | None
) -> jax.Array:
    """Factors (*layers, heads, 1), or of each coordinate, `beyond` from nope_dim on."""
    factor = factor[..., None]
    if nope_dim is None:
        return factor
    is_nope = jnp.expand_dims(jnp.arange(size) < nope_dim, range(factor.ndim - 1))
    return jnp.where(is_nope, factor, beyond[..., None])


def _spread(
    by_head: dict[str, jax.Array], projection: Projection, shape: Shape, layers: Shape
) -> jax.Array:
    """The factors of one parameter, with an axis for each of its own."""
    parts = []
    for part, width in zip(projection.parts, projection.sizes, strict=True):
        if part == "value":
            factor = jnp.ones((*layers, 1, 1), by_head["query"].dtype)
        else:
            factor = by_head[part]
        if len(projection.out) == 1:
            # Heads one behind the other.
            heads = factor.shape[-2]
            factor = jnp.broadcast_to(factor, (*layers, heads, width // heads))
            factor = factor.reshape(*layers, width)
        parts.append(factor)
    first_of_out = len(layers)
    if projection.counted is None:
        factor = jnp.concatenate(parts, axis=first_of_out)
        own = (*projection.layers, *projection.out)
    else:
        factor = jnp.stack(jnp.broadcast_arrays(*parts), axis=first_of_out)
        own = (*projection.layers, projection.counted, *projection.out)
    order = sorted(range(len(own)), key=own.__getitem__)
    others = [axis for axis in range(len(shape)) if axis not in own]
    return jnp.expand_dims(factor.transpose(order), others)


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x` times `factor`, rounded once, and to the last bit `x` where that is 1."""
    wide = trees.widen(x)
    factor = factor.astype(wide.dtype)
    return jnp.where(factor == 1, x, (wide * factor).astype(x.dtype))
