"""Adam-mini: one second moment for each block of a transformer."""

import operator
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, Mask, PyTree, Scalar, ScalarOrSchedule
from optaxplus.numerics.hyperparameters import is_zero
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition.routing import route
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.transforms.adaptive.adam_mini import scale_by_adam_mini
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.weight_decay import descend

__all__ = ["adam_mini"]

_QUERY_OR_KEY = r"(^|/)(query|key|q_proj|k_proj|wq|wk)(/(kernel|weight|w))?$"
_BIAS = r"(^|/)(bias|b|beta)$"


def _block(path: str, role: str, axes: MatrixAxes) -> MatrixAxes:
    """The coordinates of one parameter that share a second moment, as its vectors.

    The authors' principle: the smallest dense blocks of the Hessian.
    """
    if re.search(_BIAS, path):
        return MatrixAxes((), ())  # Every coordinate: Adam.
    if not axes.is_matrix:
        return axes
    if role == "embedding":
        return MatrixAxes((), axes.fan_out)  # A token.
    if re.search(_QUERY_OR_KEY, path):
        if axes.splits:
            return axes
        if len(axes.fan_out) == 2:
            return MatrixAxes(axes.fan_in, axes.fan_out[1:])  # A head.
    return MatrixAxes((), axes.fan_in)  # An output neuron.


def adam_mini(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay: str = "decoupled",
    rules: Sequence[Rule] = DEFAULT_RULES,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Adam-mini: AdamW with half the state and AdamW's learning rates.

    One second moment serves an attention head of a query or key projection, a token of
    an embedding, an output neuron of any other matrix, a whole norm; biases keep one
    for every coordinate. In a stack every layer has its own. State: 4 bytes per
    parameter.

    A query or key projection stored as (features, heads·head_dim) does not show its
    heads and counts by output neurons; for heads give it a rule whose axes have
    `splits=(head_dim,) * heads`. What became of every parameter:
    `jax.tree.map(jnp.shape, optax.tree.get(tx.init(params), "nu"))`.

    Links: `scale_by_adam_mini`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. AdamW's.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator. > 0.
      weight_decay: Decay per step, >= 0, or a schedule of it; relative to the learning
        rate unless `decay` is "independent". Other than 0 it makes `update` need
        params. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all but the
        frozen. The authors leave out norms: `mask=optaxplus.decay_mask` leaves out
        every vector.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      rules: What every parameter is, see `optaxplus.infer_roles`. Static.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation whose update has the dtype of the gradient. Parameters of the
      role "frozen" do not change.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, no rule decides a parameter, the mask
        does not fit, or `update` is called without the params that it needs.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxplus as ox
      >>> query, out = jnp.ones((8, 2, 4)), jnp.ones((2, 4, 8))
      >>> params = {"query": {"kernel": query}, "out": {"kernel": out}}
      >>> state = ox.adam_mini(1e-3).init(params)
      >>> jax.tree.map(jnp.shape, optax.tree.get(state, "nu"))
      {'out': {'kernel': (1, 1, 8)}, 'query': {'kernel': (1, 2, 1)}}

    References:
      Zhang et al., arXiv 2406.16793, Algorithm 1; the authors' package adam-mini 1.1.1.
    """
    name = "adam_mini"
    validation.check_learning_rate(name, learning_rate)
    validation.check_weight_decay(name, weight_decay)
    dtypes: dict[str, Any] = {"mu_dtype": mu_dtype, "nu_dtype": nu_dtype}
    # Made here, so that bad arguments are refused now rather than at init.
    scale_by_adam_mini(b1, b2, eps=eps, **dtypes)
    descend(learning_rate, weight_decay, mask=mask, decay=decay)

    def build(roles: PyTree, axes: PyTree) -> optax.GradientTransformation:
        blocks = jax.tree_util.tree_map_with_path(
            lambda path, *leaf: _block(trees.path_text(path), *leaf), roles, axes
        )
        trainable = jax.tree.map(lambda role: role != "frozen", roles)

        def decayed(params: PyTree) -> PyTree:
            # The roles as a prefix: a mask may have the boxes of Flax's parameters.
            return jax.tree.map(
                lambda trains, chosen: jax.tree.map(lambda c: c and trains, chosen),
                trainable,
                trees.resolve_mask(name, mask, params),
            )

        frozen = jax.tree.map(operator.not_, trainable)
        return optax.chain(
            optax.masked(
                scale_by_adam_mini(b1, b2, eps=eps, axes=blocks, **dtypes), trainable
            ),
            optax.masked(optax.set_to_zero(), frozen),
            descend(learning_rate, weight_decay, mask=decayed, decay=decay),
        )

    return chain_in_float32(
        route(build, rules, name=name),
        requires_params=None if is_zero(weight_decay) else name,
    )
