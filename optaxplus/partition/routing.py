"""One transformation for the whole tree, which knows what every parameter is."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from optaxplus import trees
from optaxplus.custom_types import PyTree
from optaxplus.partition.inference import decide
from optaxplus.partition.rules import DEFAULT_RULES, Rule, check_rules

__all__ = ["route"]


def route(
    build: Callable[[PyTree, PyTree], optax.GradientTransformation],
    rules: Sequence[Rule] = DEFAULT_RULES,
    *,
    name: str = "route",
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation from the roles and axes of the parameters it meets.

    Inside `optax.partition` a transformation sees only its own group: the bias beside
    a kernel, which tells a stack of layers from a convolution, is masked away. So
    routing happens here, once, on the whole tree, and the groups are told the result.

    Args:
      build: Called with a pytree of roles and a pytree of `MatrixAxes`, both of the
        structure of the parameters, at `init` and at every (traced) `update`; returns
        the transformation to use. It has to return the same one for the same tree.
      rules: As in `optaxplus.infer_matrix_axes`.
      name: What errors call it: the name of the optimizer that is built on it.

    Returns:
      A transformation with the state of the one that `build` returns; extra arguments
      are passed on.

    Raises:
      TypeError: If `rules` is no sequence of rules.
      ValueError: At `init`, as in `optaxplus.infer_matrix_axes`.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.route(
      ...     lambda roles, axes: optax.partition(
      ...         {"hidden": ox.trust_ratio(axes=axes), "vector": optax.identity()},
      ...         lambda _: roles,
      ...     )
      ... )
      >>> state = tx.init({"w": jnp.ones((4, 8)), "b": jnp.ones(8)})
    """
    rules = check_rules(name, rules)

    def transformation(tree: PyTree) -> optax.GradientTransformationExtraArgs:
        decisions = decide(name, tree, rules)
        roles = trees.unflatten_like(tree, [d.role for d in decisions])
        axes = trees.unflatten_like(tree, [d.axes for d in decisions])
        return optax.with_extra_args_support(build(roles, axes))

    def init_fn(params: PyTree) -> optax.OptState:
        return transformation(params).init(params)

    def update_fn(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.OptState]:
        return transformation(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
