"""What the library needs of pytrees beyond `optax.tree`.

Paths as text, trees of parameters in the dtype of the arithmetic, and maps that
return several trees.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxplus.custom_types import DTypeName, Mask, PyTree
from optaxplus.numerics.hyperparameters import Scalar

__all__ = [
    "cast_like",
    "check_floating",
    "check_not_outermost",
    "compute_dtype",
    "find_nodes",
    "increment",
    "init_moment",
    "is_function",
    "is_holder",
    "leaves_with_paths",
    "map_several",
    "path_text",
    "real_dtype",
    "resolve_mask",
    "scalar_for",
    "unflatten_like",
    "widen",
]


def is_function(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether `value` is to be called, and not a tree that can be called.

    A module of NNX or Equinox is both a tree and callable, and so is a tree of axes or
    bools of its structure.
    """
    return callable(value) and jax.tree_util.all_leaves([value])


def is_holder(node: Any) -> bool:
    """Whether `node` is a box around one array (NNX Variable, linen metadata).

    Recognised by their interfaces, so that Flax is not imported. A box counts as one
    leaf: `nnx.Optimizer` passes Variables to `init` and bare arrays to `update`, and
    both have to be the same tree to us.
    """
    return hasattr(node, "get_raw_value") or hasattr(node, "replace_boxed")


def path_text(key_path: tuple[Any, ...]) -> str:
    """A key path as "block_0/attn/query/kernel"."""
    return "/".join(_key_text(key) for key in key_path)


def _key_text(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def leaves_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """(path, leaf) for every leaf; a box gives its array under its own path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_holder)
    return [
        (path_text(path), array)
        for path, node in flat
        for array in (jax.tree.leaves(node) if is_holder(node) else [node])
    ]


def unflatten_like(tree: PyTree, values: Sequence[Any]) -> PyTree:
    """One value for each of `leaves_with_paths(tree)`, in the structure of `tree`.

    A box is replaced by its value, so that the result of an NNX state has the
    structure of `nnx.as_pure(state)`.
    """
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_holder), values)


def compute_dtype(dtype: Any) -> jnp.dtype:
    """The dtype in which a leaf of `dtype` is computed: at least float32."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def real_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of the real and imaginary parts."""
    return jnp.dtype(jnp.finfo(dtype).dtype)


def widen(x: jax.Array) -> jax.Array:
    """`x` in the dtype of the arithmetic."""
    x = jnp.asarray(x)
    return x.astype(compute_dtype(x.dtype))


def scalar_for(scalar: ArrayLike, x: jax.Array) -> Scalar:
    """A scalar of the program in the real dtype in which the leaf `x` is computed.

    Python numbers stay: they take the dtype of whatever they meet. NumPy's do not.
    """
    if isinstance(scalar, int | float) and not isinstance(scalar, np.generic):
        return scalar
    return jnp.asarray(scalar).astype(real_dtype(compute_dtype(x.dtype)))


def increment(count: jax.Array) -> jax.Array:
    """Count + 1, saturating at the largest integer."""
    return jnp.asarray(optax.safe_increment(count))


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Each leaf of `tree` in the dtype of the same leaf of `like`."""

    def cast(x: jax.Array, reference: jax.Array) -> jax.Array:
        dtype = jnp.result_type(reference)
        return x if x.dtype == dtype else x.astype(dtype)

    return jax.tree.map(cast, tree, like)


def map_several(
    function: Callable[..., tuple[Any, ...]], count: int, tree: PyTree, *rest: PyTree
) -> tuple[PyTree, ...]:
    """`jax.tree.map` for a function that returns `count` values: a tree of each.

    Args:
      function: Called with the leaf of `tree` and the subtrees of `rest` there.
      count: Number of values that `function` returns.
      tree: Determines the structure; the others may have it as a prefix.
      *rest: More trees.

    Returns:
      `count` trees of the structure of `tree`.
    """
    treedef = jax.tree.structure(tree)
    results = jax.tree.leaves(
        jax.tree.map(lambda *leaves: _Values(function(*leaves)), tree, *rest),
        is_leaf=lambda node: isinstance(node, _Values),
    )
    return tuple(
        jax.tree.unflatten(treedef, [result.values[index] for result in results])
        for index in range(count)
    )


class _Values:
    """The values of one leaf, opaque to `jax.tree`."""

    def __init__(self, values: tuple[Any, ...]):
        self.values = values


def init_moment(
    function: str, params: PyTree, dtype: DTypeName, *, real: bool = False
) -> PyTree:
    """Zeros in the shape and sharding of each parameter.

    Args:
      function: Name of the caller, for messages.
      params: Arrays or abstract arrays.
      dtype: Real floating-point dtype of the accumulator. "float32" stands for the
        width of the arithmetic, see `optaxplus.custom_types`.
      real: Whether the accumulator is real for complex parameters too.

    Raises:
      TypeError: If a parameter is not floating point, with its path, or is complex
        where `dtype` has no complex counterpart.
    """
    check_floating(function, params)
    return jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=_moment_dtype(function, p, dtype, real)),
        params,
    )


def _moment_dtype(
    function: str, param: jax.Array, dtype: DTypeName, real: bool
) -> jnp.dtype:
    dtype = jnp.dtype(dtype)
    param_dtype = jnp.result_type(param)
    is_complex = jnp.issubdtype(param_dtype, jnp.complexfloating)
    if dtype == jnp.float32:
        wide = compute_dtype(param_dtype)
        return real_dtype(wide) if real else wide
    if not is_complex or real:
        return dtype
    raise TypeError(
        f"{function}: a moment dtype of {dtype} is not allowed for complex parameters; "
        "it must be 'float32', which keeps them complex."
    )


def resolve_mask(function: str, mask: Mask, tree: PyTree) -> PyTree:
    """One bool for every leaf of `tree`.

    Args:
      function: Name of the caller, for messages.
      mask: See `optaxplus.custom_types`; None is True everywhere.
      tree: Parameters or updates.

    Raises:
      TypeError: If an entry is not a bool.
      ValueError: If the mask is not a prefix of the tree.
    """
    if mask is None:
        return jax.tree.map(lambda _: True, tree)
    if is_function(mask):
        mask = mask(tree)
    for path, entry in leaves_with_paths(mask):
        if not isinstance(entry, bool | np.bool_):
            raise TypeError(
                f"{function}: mask={entry!r}{f' at {path!r}' if path else ''} is not "
                "allowed; it must be True or False."
            )
    try:
        return jax.tree.map(
            lambda entry, subtree: jax.tree.map(lambda _: bool(entry), subtree),
            mask,
            tree,
        )
    except ValueError as error:
        raise ValueError(
            f"{function}: mask is not a prefix of the parameters' tree: {error}"
        ) from error


def check_floating(function: str, params: PyTree, *, real: bool = False) -> None:
    """Refuses parameters that are not floating point, naming the path.

    Args:
      function: Name of the caller, for messages.
      params: Tree of arrays or abstract arrays.
      real: Whether complex parameters are refused too.
    """
    allowed = jnp.floating if real else jnp.inexact
    for path, leaf in leaves_with_paths(params):
        if not jnp.issubdtype(jnp.result_type(leaf), allowed):
            raise TypeError(
                f"{function}: parameter {path!r} of dtype {jnp.result_type(leaf)} is "
                f"not allowed; it must be {'real ' if real else ''}floating point. "
                "Mask it away (optax.masked); optaxplus.muon leaves parameters of the "
                "role 'frozen' alone."
            )


def check_not_outermost(function: str, state: PyTree) -> PyTree:
    """Refuses the state of a wrapper whose updates nobody may change any more.

    Args:
      function: Name of the caller, which changes updates.
      state: State of what it wraps; the types of such wrappers have an attribute
        `outermost`.

    Returns:
      The state.
    """

    def is_outermost(node: Any) -> bool:
        return hasattr(node, "outermost")

    if find_nodes(state, is_outermost):
        raise ValueError(
            f"{function}: there is a wrapper inside that decides how weights are "
            "rounded, such as master_weights; what comes after it would change that. "
            f"Put the wrapper around {function}."
        )
    return state


def find_nodes(tree: PyTree, is_wanted: Callable[[Any], bool]) -> list[Any]:
    """Every node for which `is_wanted` is true, but for those inside of another."""
    return list(filter(is_wanted, jax.tree.leaves(tree, is_leaf=is_wanted)))
