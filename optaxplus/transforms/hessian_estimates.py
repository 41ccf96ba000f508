"""Estimates of the diagonal of a Hessian, for `optaxplus.scale_by_sophia`.

    Hutchinson               ĥ = u ⊙ (H·u),   u random with E[u·uᵀ] = 1
    Gauss-Newton-Bartlett    ĥ = B·ĝ ⊙ ĝ,     ĝ the gradient of (1/B)·Σ_b -log p_b(ŷ_b)
                                              at labels ŷ_b drawn from the model's p_b

The first is right on average for the Hessian H of any loss, whatever its sign. The
second is right on average for the Gauss-Newton matrix of a mean of cross-entropies: it
is never negative and needs first derivatives alone.

Source: Liu et al., Sophia, arXiv 2305.14342, Algorithms 1 and 2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxplus import trees, validation
from optaxplus.custom_types import PyTree, Scalar

__all__ = ["gauss_newton_bartlett", "hutchinson"]


def hutchinson(
    loss_fn: Callable[[PyTree], jax.Array],
    params: PyTree,
    key: jax.Array,
    *,
    distribution: str = "normal",
) -> PyTree:
    """Estimates the diagonal of the Hessian of any loss with one random direction.

    The mean over keys is the diagonal. The variance of an entry is the sum of squares
    of the other entries of its row, for "normal" plus twice its own. Costs a gradient
    and its derivative along the direction.

    Args:
      loss_fn: Function of params that returns a real scalar, which JAX can
        differentiate twice. For a Flax module a closure over everything else.
      params: Any pytree. Where the loss is computed in bfloat16 the estimate has its
        accuracy.
      key: JAX random key; a new one for every estimate.
      distribution: Of the direction's entries: "normal", as in the paper, or
        "rademacher", ±1, with the smaller variance.

    Returns:
      A pytree like params: at least float32, in their shapes and boxes. Zeros for
      parameters that are not floating point.

    Raises:
      TypeError: If `key` is no random key, a parameter is complex or `loss_fn` returns
        anything but a real scalar.
      ValueError: If `distribution` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, optaxplus as ox
      >>> loss_fn = lambda params: jnp.sum(jnp.array([1.0, 2.0]) * params**2)
      >>> print(
      ...     ox.hutchinson(
      ...         loss_fn, jnp.ones(2), jax.random.key(0), distribution="rademacher"
      ...     )
      ... )
      [2. 4.]

    References:
      Hutchinson (1989); Bekas, Kokiopoulou and Saad, An estimator for the diagonal of
      a matrix (2007).
    """
    name = "hutchinson"
    draws = {"normal": _normal, "rademacher": _rademacher}
    validation.check_choice(name, "distribution", distribution, draws)
    _check_key(name, key)
    leaves = _Leaves(name, params)

    def loss(values: list[jax.Array]) -> jax.Array:
        value = loss_fn(leaves.params(values))
        if not _is_real(value) or jnp.ndim(value):
            raise TypeError(
                f"{name}: loss_fn returned {_described(value)}, which is not allowed; "
                "it must be a real scalar."
            )
        return value

    keys = jax.random.split(key, max(len(leaves.values), 1))
    directions = [
        draws[distribution](leaf_key, x)
        for leaf_key, x in zip(keys, leaves.values, strict=False)
    ]
    _, products = jax.jvp(jax.grad(loss), (leaves.values,), (directions,))
    return leaves.estimates(
        [
            trees.widen(u) * trees.widen(hu)
            for u, hu in zip(directions, products, strict=True)
        ]
    )


def gauss_newton_bartlett(
    logits_fn: Callable[[PyTree], jax.Array],
    params: PyTree,
    key: jax.Array,
    *,
    batch_size: Scalar | None = None,
    where: jax.Array | None = None,
) -> PyTree:
    """Estimates the diagonal of the Gauss-Newton matrix of a mean of cross-entropies.

    Draws labels from the model itself, so that none are needed. Costs a gradient. The
    gradient is that of the whole batch: under `jax.jit` on a mesh it is so by itself;
    inside of `jax.shard_map` and over micro-batches it would have to be averaged before
    the square.

    Args:
      logits_fn: Function of params that returns logits of shape (..., classes), a term
        of the mean loss for each index of the leading axes: examples, or the tokens of
        all sequences.
      params: Any pytree.
      key: JAX random key; a new one for every estimate.
      batch_size: The factor B, > 0; None is the number of terms.
      where: Bools in the shape of the logits without their last axis, False for terms
        that the loss leaves out, such as padding. None is True everywhere.

    Returns:
      A pytree like params: at least float32, in their shapes and boxes, never negative.
      Zeros for parameters that are not floating point, and if `where` is False
      everywhere.

    Raises:
      TypeError: If an argument has a wrong type, a parameter is complex, or the logits
        are no real array.
      ValueError: If an argument is out of range or shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, optaxplus as ox
      >>> logits_fn = lambda w: jnp.ones((8, 3)) @ w  # Eight examples, four classes.
      >>> estimate = ox.gauss_newton_bartlett(
      ...     logits_fn, jnp.zeros((3, 4)), jax.random.key(0)
      ... )
      >>> estimate.shape
      (3, 4)

    References:
      Liu et al., arXiv 2305.14342, Algorithm 2.
    """
    name = "gauss_newton_bartlett"
    _check_key(name, key)
    if batch_size is not None:
        validation.check_positive(name, batch_size=batch_size)
    leaves = _Leaves(name, params)

    def loss(values: list[jax.Array]) -> jax.Array:
        """√B times the mean, so that squares of gradients need no factor.

        It also keeps the gradients of a mean over many terms from underflowing.
        """
        logits = logits_fn(leaves.params(values))
        if not _is_real(logits) or not jnp.ndim(logits):
            raise TypeError(
                f"{name}: logits_fn returned {_described(logits)}, which is not "
                "allowed; it must be a real array of shape (..., classes)."
            )
        logits = trees.widen(logits)
        labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        # A choice and no look-up, which would need all classes on one device.
        is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
        log_p = jax.nn.log_softmax(logits)
        losses = -jnp.sum(jnp.where(is_label, log_p, 0.0), axis=-1)
        number = jnp.asarray(losses.size, losses.dtype)
        if where is not None:
            losses, number = _chosen(name, losses, where)
        factor = number if batch_size is None else trees.scalar_for(batch_size, losses)
        return jnp.sqrt(factor) * jnp.sum(losses) / jnp.maximum(number, 1.0)

    grads = jax.grad(loss)(leaves.values)
    return leaves.estimates([jnp.square(trees.widen(g)) for g in grads])


def _check_key(function: str, key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    # Keys of jax.random.PRNGKey are bare words.
    is_key = dtype is not None and (
        (jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.ndim == 0)
        or (dtype == jnp.uint32 and key.ndim == 1)
    )
    if not is_key:
        raise TypeError(
            f"{function}: key={key!r} is not allowed; it must be one random key of "
            "JAX, such as jax.random.key(0)."
        )


def _chosen(
    function: str, losses: jax.Array, where: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The losses with zeros where they do not count, and how many do."""
    if getattr(where, "dtype", None) != jnp.bool_:
        raise TypeError(
            f"{function}: where={_described(where)} is not allowed; it must be an "
            "array of bools."
        )
    if jnp.shape(where) != losses.shape:
        raise ValueError(
            f"{function}: where of shape {jnp.shape(where)} is not allowed; it must be "
            f"{losses.shape}, that of the logits without the last axis."
        )
    losses = jnp.where(where, losses, 0.0)
    return losses, jnp.sum(where, dtype=losses.dtype)


def _normal(key: jax.Array, x: jax.Array) -> jax.Array:
    wide = trees.compute_dtype(x.dtype)
    return _like(x, jax.random.normal(key, x.shape, wide))


def _rademacher(key: jax.Array, x: jax.Array) -> jax.Array:
    return _like(x, jax.random.rademacher(key, x.shape, x.dtype))


def _like(x: jax.Array, noise: jax.Array) -> jax.Array:
    """In the dtype of x, and in its sharding where that is a part of types."""
    return jnp.zeros_like(x) + noise.astype(x.dtype)


def _is_real(x: Any) -> bool:
    is_array = isinstance(x, jax.Array | float) or hasattr(x, "dtype")
    return is_array and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _described(x: Any) -> str:
    if not hasattr(x, "dtype"):
        return f"a {type(x).__name__}"
    return f"an array of dtype {x.dtype} and shape {jnp.shape(x)}"


class _Leaves:
    """The floating-point leaves of a tree, by which to differentiate."""

    values: list[jax.Array]

    def __init__(self, function: str, params: PyTree):
        for path, leaf in trees.leaves_with_paths(params):
            if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
                raise TypeError(
                    f"{function}: parameter {path!r} of dtype "
                    f"{jnp.result_type(leaf)} is not allowed; it must be real."
                )
        self._all, self._treedef = jax.tree.flatten(params)
        self._places = [
            place
            for place, leaf in enumerate(self._all)
            if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        ]
        self.values = [jnp.asarray(self._all[place]) for place in self._places]

    def params(self, values: Sequence[jax.Array]) -> PyTree:
        """The tree with other floating-point leaves."""
        return self._with(self._all, values)

    def estimates(self, values: Sequence[jax.Array]) -> PyTree:
        """The tree of `values`, and zeros for the other leaves."""
        others = set(range(len(self._all))) - set(self._places)
        zeros = [
            jnp.zeros(jnp.shape(leaf), jnp.float32) if place in others else None
            for place, leaf in enumerate(self._all)
        ]
        return self._with(zeros, values)

    def _with(self, leaves: Sequence[Any], values: Sequence[jax.Array]) -> PyTree:
        leaves = list(leaves)
        for place, value in zip(self._places, values, strict=True):
            leaves[place] = value
        return jax.tree.unflatten(self._treedef, leaves)
