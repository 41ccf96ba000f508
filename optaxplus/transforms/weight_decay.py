"""Steps downhill with weight decay, in the forms that papers mean by those words.

For a direction u, parameters p, learning rate η and decay λ the update is

    decoupled     -η·(u + λ·p)
    independent   -η·u - λ·p
    cautious      -η·(u + λ·p·[u·p >= 0])           only where the step shrinks p too
    proximal      -η·(u + λ·p) / (1 + η·λ)          p <- (p - η·u) / (1 + η·λ)

Letters to arguments: η is `learning_rate`, λ is `weight_decay`.

Sources: Loshchilov and Hutter, Decoupled weight decay regularization, arXiv 1711.05101,
in the form of PyTorch and optax ("decoupled"); the paper's own is "independent" with a
λ that follows the schedule of η but not its size, so give `weight_decay` a schedule;
Chen et al., Cautious weight decay, arXiv
2510.12402; Zhuang et al., Understanding AdamW through proximal methods, arXiv
2202.00089, and Adan, arXiv 2208.06677 ("proximal").
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Mask, PyTree, Scalar, ScalarOrSchedule
from optaxplus.numerics.hyperparameters import is_zero
from optaxplus.numerics.norms import agreement
from optaxplus.partition.inference import decide
from optaxplus.partition.rules import DEFAULT_RULES, Rule

__all__ = ["DescendState", "decay_mask", "descend"]


class DescendState(NamedTuple):
    """State of `descend` where a learning rate or weight decay is a schedule.

    Attributes:
      count: Finished updates; shape (), int32.
    """

    count: jax.Array


def _decoupled(u: jax.Array, p: jax.Array, lr: Scalar, decay: Scalar) -> jax.Array:
    return -lr * (u + decay * p)


def _independent(u: jax.Array, p: jax.Array, lr: Scalar, decay: Scalar) -> jax.Array:
    return -lr * u - decay * p


def _cautious(u: jax.Array, p: jax.Array, lr: Scalar, decay: Scalar) -> jax.Array:
    return -lr * (u + jnp.where(agreement(u, p) >= 0, decay * p, jnp.zeros_like(p)))


def _proximal(u: jax.Array, p: jax.Array, lr: Scalar, decay: Scalar) -> jax.Array:
    return -lr * (u + decay * p) / (1 + lr * decay)


_FORMS: dict[str, Callable[..., jax.Array]] = {
    "decoupled": _decoupled,
    "independent": _independent,
    "cautious": _cautious,
    "proximal": _proximal,
}


def descend(
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule = 0.0,
    *,
    mask: Mask = None,
    decay: str = "decoupled",
) -> optax.GradientTransformation:
    """Turns a direction into a step: learning rate and weight decay, the last link.

    Args:
      learning_rate: See `optaxplus.custom_types`.
      weight_decay: Coefficient of the parameters, >= 0, or a schedule of it. Relative
        to the learning rate unless the form is "independent": there it is the part of
        the parameter that every step removes, 1e-5 to 1e-4 as a rule, whatever the
        learning rate does. Other than 0 it makes `update` need params. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all,
        `decay_mask` all but vectors.
      decay: With η the learning rate, λ the decay, u the direction and p the
        parameters, "decoupled": p - η·(u + λ·p); "independent": p - η·u - λ·p;
        "cautious": as "decoupled" where the step shrinks p too, else without decay;
        "proximal": (p - η·u) / (1 + η·λ). Static.

    Returns:
      A transformation with state `DescendState` if something is a schedule, else an
      empty one; emits float32.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, the mask does not fit, or `update` is
        called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(ox.scale_by_sign(), ox.descend(0.1, 0.5, decay="cautious"))
      >>> params = jnp.array([1.0, 1.0])
      >>> updates, _ = tx.update(jnp.array([1.0, -1.0]), tx.init(params), params)
      >>> print(updates)
      [-0.15  0.1 ]

    References:
      Loshchilov and Hutter, arXiv 1711.05101 ("decoupled", as in PyTorch, and
      "independent"); Chen et al., arXiv 2510.12402 ("cautious"); Zhuang et al., arXiv
      2202.00089 ("proximal").
    """
    name = "descend"
    validation.check_learning_rate(name, learning_rate)
    validation.check_weight_decay(name, weight_decay)
    validation.check_choice(name, "decay", decay, _FORMS)
    decays = not is_zero(weight_decay)
    is_scheduled = callable(learning_rate) or callable(weight_decay)

    def init_fn(params: PyTree) -> Any:
        trees.check_floating(name, params)
        trees.resolve_mask(name, mask, params)
        return DescendState(jnp.zeros([], jnp.int32)) if is_scheduled else _EMPTY

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, Any]:
        def at_this_step(argument: str, value: ScalarOrSchedule) -> Any:
            now = value(state.count) if callable(value) else value
            if jnp.ndim(now):
                raise ValueError(
                    f"{name}: {argument}(step) of shape {jnp.shape(now)} is not "
                    "allowed; a schedule must return a scalar."
                )
            return now

        lr = at_this_step("learning_rate", learning_rate)
        coefficient = at_this_step("weight_decay", weight_decay)

        def step(u: jax.Array) -> jax.Array:
            return -trees.scalar_for(lr, u) * trees.widen(u)

        def decayed_step(u: jax.Array, p: jax.Array, is_decayed: bool) -> jax.Array:
            if not is_decayed:
                return step(u)
            wide = trees.widen(u)
            weights = trees.widen(p).astype(wide.dtype)
            scalars = trees.scalar_for(lr, u), trees.scalar_for(coefficient, u)
            return _FORMS[decay](wide, weights, *scalars)

        if is_scheduled:
            state = DescendState(trees.increment(state.count))
        if not decays:
            return jax.tree.map(step, updates), state
        validation.check_params(name, params)
        mask_tree = trees.resolve_mask(name, mask, params)
        return jax.tree.map(decayed_step, updates, params, mask_tree), state

    return optax.GradientTransformation(init_fn, update_fn)


_EMPTY = optax.EmptyState()


def decay_mask(params: PyTree, rules: Sequence[Rule] = DEFAULT_RULES) -> PyTree:
    """The usual choice of what decays: matrices do; biases, norms and scalars do not.

    Args:
      params: Tree of arrays, tracers or `jax.ShapeDtypeStruct`s.
      rules: As in `optaxplus.infer_matrix_axes`.

    Returns:
      A pytree of bools with the structure of `params`: False where the role is
      "vector". As a callable it is a mask itself: `mask=decay_mask`.

    Raises:
      TypeError: If it is called with a step count instead of parameters, or `rules`
        holds anything but rules.
      ValueError: As in `optaxplus.infer_matrix_axes`.

    Example:
      >>> import functools, jax.numpy as jnp, optaxplus as ox
      >>> ox.decay_mask({"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}})
      {'dense': {'bias': False, 'kernel': True}}
      >>> rule = ox.Rule("shift$", ox.MatrixAxes((), (-1,)), "vector", required=False)
      >>> mask = functools.partial(ox.decay_mask, rules=(rule, *ox.DEFAULT_RULES))
    """
    if isinstance(params, jax.Array | int):
        if jnp.issubdtype(jnp.result_type(params), jnp.integer):
            raise TypeError(
                "decay_mask: it was called with a step count, as a schedule is. Under "
                "optax.inject_hyperparams pass static_args=('mask',)."
            )
    remedy = "mask=functools.partial(ox.decay_mask, rules={rules})"
    decisions = decide("decay_mask", params, rules, remedy)
    return trees.unflatten_like(params, [d.role != "vector" for d in decisions])
