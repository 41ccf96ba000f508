"""Norms of gradients, updates and parameters, measured where the update is made.

For the entries x of all parameters of one label, in number n:

    norm(x) = sqrt(Σ |x|²),      rms(x) = norm(x) / sqrt(n)

`optax.monitor` measures what passes one place of a chain, in a state whose structure
its first update changes; here both ends of a transformation and the parameters are
measured, and the state can be the carry of a scan.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import PyTree
from optaxplus.numerics.norms import abs_square

__all__ = ["MetricsState", "metrics", "with_metrics"]

_NAMES = (
    "grad_norm",
    "update_norm",
    "param_norm",
    "update_rms",
    "param_rms",
    "update_to_param",
)
_ALL = "all"


class MetricsState(NamedTuple):
    """State of `with_metrics`.

    Attributes:
      metrics: Label -> name -> what was measured in the last update, zeros before the
        first; shape (), float32. `metrics` reads it.
      inner_state: State of the wrapped transformation.
    """

    metrics: dict[str, dict[str, jax.Array]]
    inner_state: Any


def with_metrics(
    tx: optax.GradientTransformation,
    labels: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Measures the gradients, updates and parameters of any transformation.

    Updates are those of `tx`, unchanged. The state has for every label the float32
    scalars `grad_norm`, `update_norm`, `param_norm`, `update_rms`, `param_rms` and
    `update_to_param`, which `metrics` reads:

    - of the gradient as it arrives here: behind `clip_by_global_norm` in a chain the
      clipped one, around that chain the other; inside of `dynamic_loss_scale` without
      the scale;
    - of the update as `tx` emits it: of a whole optimizer with its learning rate and
      weight decay;
    - of the parameters before that update, as they arrive here: inside of
      `master_weights` the float32 ones;
    - `update_to_param` is update_norm / param_norm: 0 where both are 0, infinite where
      only the parameters are.

    Put it inside of `accumulate` and `optax.MultiSteps`, where it keeps what it found
    in the last real update; around them it measures the steps that only add up, too.

    Norms of sharded arrays are those of the whole; inside of `jax.shard_map`, of one
    device's part. Squares are summed in float32 (float64 for float64): entries below
    1e-19 count as 0, and a norm above 1.8e19 is infinite.

    Costs what `optax.tree.norm` of the same three trees in the training step would: a
    reduction of each leaf, for which compilers for CPUs store updates that they would
    otherwise apply at once.

    State: 24 bytes a label.

    Args:
      tx: A whole optimizer or any other transformation, ours or optax's.
      labels: Which parameters are measured together: a pytree of strings, a prefix of
        the parameters' tree, as `ox.label_params` and `optax.partition` have it; a
        function from the parameters to one, such as `ox.label_params` itself; or None,
        one label "all". A label of a pytree whose parameters are all masked away has
        zeros. `optax.tree_map_params`, which looks at the state of no parameters, needs
        a pytree and no function. Static.

    Returns:
      A transformation with state `MetricsState` that needs params; emits what `tx`
      emits and passes extra arguments on to it.

    Raises:
      TypeError: If `tx` is no transformation, a label is no string, or a parameter is
        not floating point.
      ValueError: If the labels are not a prefix of the parameters' tree or not those of
        the state, or `update` is called without params.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> tx = ox.with_metrics(ox.sgd(0.1), labels={"w": "matrices", "b": "biases"})
      >>> params = {"w": jnp.full((2, 2), 2.0), "b": jnp.zeros(2)}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> for name, value in ox.metrics(state)["matrices"].items():
      ...     print(name, round(float(value), 3))
      grad_norm 4.0
      update_norm 0.4
      param_norm 4.0
      update_rms 0.2
      param_rms 2.0
      update_to_param 0.1
    """
    name = "with_metrics"
    validation.check_transformation(name, "tx", tx)
    if not trees.is_function(labels):
        _check_strings(name, labels)
    wrapped = optax.with_extra_args_support(tx)

    def init_fn(params: PyTree) -> MetricsState:
        trees.check_floating(name, params)
        label_tree = _label_tree(name, labels, params)
        # `optax.tree_map_params` asks for the state of something without leaves.
        if jax.tree.leaves(params):
            _spread(name, label_tree, params)
        return MetricsState(
            metrics={
                label: {metric: jnp.zeros([], jnp.float32) for metric in _NAMES}
                for label in _distinct(label_tree)
            },
            inner_state=wrapped.init(params),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, MetricsState]:
        validation.check_params(name, params)
        label_tree = _label_tree(name, labels, params)
        _check_state(name, state, _distinct(label_tree))
        new, inner_state = wrapped.update(
            updates, state.inner_state, params, **extra_args
        )
        groups = [_by_label(name, label_tree, tree) for tree in (updates, new, params)]
        return new, MetricsState(
            metrics={
                label: _measure(*(group[label] for group in groups))
                for label in _distinct(label_tree)
            },
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def metrics(state: PyTree) -> dict[str, dict[str, jax.Array]]:
    """What `with_metrics` measured in the last update.

    Args:
      state: State with a `MetricsState` in it, at any depth: of an optimizer, or a
        `TrainState`, or an `nnx.Optimizer`. Of states stacked by a scan or `jax.vmap`
        the scalars come stacked, too.

    Returns:
      {label: {name: float32 scalar}}, zeros before the first update. Of one
      `with_metrics` around another, the outer one's: `metrics(outer.inner_state)`
      reads the inner one.

    Raises:
      ValueError: If there is none in it, or more than one beside each other, as where
        every group of a partition has its own.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(optax.clip(1.0), ox.with_metrics(ox.adamw(1e-3)))
      >>> state = tx.init(jnp.ones(3))
      >>> print(ox.metrics(state)["all"]["grad_norm"])
      0.0
    """

    def is_measured(node: Any) -> bool:
        return isinstance(node, MetricsState)

    found = trees.find_nodes(state, is_measured)
    if len(found) != 1:
        raise ValueError(
            f"metrics: the state has {len(found)} parts made by ox.with_metrics; it "
            "must have one. Of several, pass the part that you mean."
        )
    (measured,) = found
    # NNX puts variables in the place of arrays.
    arrays = [array for _, array in trees.leaves_with_paths(measured.metrics)]
    values = trees.unflatten_like(measured.metrics, arrays)
    # In the order of their names here, not in that of the alphabet.
    return {
        label: {metric: of_label[metric] for metric in _NAMES}
        for label, of_label in values.items()
    }


class _Sum(NamedTuple):
    """Of the entries of one label: Σ |x|², and how many there are."""

    squares: jax.Array
    count: int

    @property
    def norm(self) -> jax.Array:
        return jnp.sqrt(self.squares)

    @property
    def rms(self) -> jax.Array:
        return self.norm / math.sqrt(max(self.count, 1))


def _measure(grad: _Sum, update: _Sum, param: _Sum) -> dict[str, jax.Array]:
    wide = np.result_type(update.squares.dtype, param.squares.dtype)
    length, size = update.norm.astype(wide), param.norm.astype(wide)
    both_zero = (length == 0) & (size == 0)
    values = {
        "grad_norm": grad.norm,
        "update_norm": update.norm,
        "param_norm": param.norm,
        "update_rms": update.rms,
        "param_rms": param.rms,
        "update_to_param": length / jnp.where(both_zero, jnp.ones_like(size), size),
    }
    return {metric: values[metric].astype(jnp.float32) for metric in _NAMES}


def _by_label(name: str, labels: PyTree, tree: PyTree) -> dict[str, _Sum]:
    """The sum of each label, in the widest dtype of its parts."""
    parts: dict[str, list[jax.Array]] = {label: [] for label in _distinct(labels)}
    for label, leaf in zip(
        _spread(name, labels, tree), jax.tree.leaves(tree), strict=True
    ):
        parts[label].append(leaf)

    def total(leaves: list[jax.Array]) -> _Sum:
        squares = [jnp.sum(abs_square(trees.widen(leaf))) for leaf in leaves]
        dtype = np.result_type(jnp.float32, *(square.dtype for square in squares))
        return _Sum(
            sum((s.astype(dtype) for s in squares), start=jnp.zeros([], dtype)),
            sum(jnp.size(leaf) for leaf in leaves),
        )

    return {label: total(leaves) for label, leaves in parts.items()}


def _label_tree(name: str, labels: Any, params: PyTree) -> PyTree:
    if not trees.is_function(labels):
        return _ALL if labels is None else labels
    label_tree = labels(params)
    _check_strings(name, label_tree)
    return label_tree


def _distinct(labels: PyTree) -> list[str]:
    return sorted(set(jax.tree.leaves(labels)))


def _spread(name: str, labels: PyTree, tree: PyTree) -> list[str]:
    """The label of every leaf of `tree`, in the order of its leaves."""
    try:
        spread = jax.tree.map(
            lambda label, subtree: jax.tree.map(lambda _: label, subtree), labels, tree
        )
    except ValueError as error:
        raise ValueError(
            f"{name}: labels is not a prefix of the parameters' tree: {error}"
        ) from error
    return jax.tree.leaves(spread)


def _check_strings(name: str, labels: PyTree) -> None:
    for path, label in trees.leaves_with_paths(labels):
        if not isinstance(label, str):
            raise TypeError(
                f"{name}: labels={label!r}{f' at {path!r}' if path else ''} is not "
                "allowed; it must be a string."
            )


def _check_state(name: str, state: Any, labels: list[str]) -> None:
    """Refuses the state of another wrapper, or of other labels."""
    found = list(state.metrics) if isinstance(state, MetricsState) else None
    if found is None or sorted(found) != labels:
        it = type(state).__name__ if found is None else f"the labels {sorted(found)}"
        raise ValueError(
            f"{name}: a state with {it} is not allowed; it must be a MetricsState with "
            f"the labels {labels}, as init makes it."
        )
