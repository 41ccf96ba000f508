"""AdaGrad: gradients divided by the root of the sum of all their squares.

    s_t = s_{t-1} + |g_t|²,      u_t = g_t / (sqrt(s_t + ε_root) + ε)

Letters to arguments: ε, ε_root are `eps`, `eps_root`, s_0 is `initial_accumulator`; s
is the state's `sum_of_squares`.

Source: Duchi, Hazan, Singer, Adaptive subgradient methods for online learning, JMLR 12
(2011), Figure 1, in the form of PyTorch. Differs from optax in the defaults: there s_0
is 0.1 and an ε of 1e-7 stands under the root.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_epsilon
from optaxplus.numerics.norms import abs_square

__all__ = ["ScaleByAdagradState", "scale_by_adagrad"]


class ScaleByAdagradState(NamedTuple):
    """State of `scale_by_adagrad`.

    Attributes:
      sum_of_squares: Sum s; like the parameters, real, in `nu_dtype`.
    """

    sum_of_squares: PyTree


def _adagrad_leaf(
    g: jax.Array, sum_of_squares: jax.Array, *, eps: Scalar, eps_root: Scalar
) -> tuple[jax.Array, jax.Array]:
    """One leaf: (u, s)."""
    wide = trees.widen(g)
    s = trees.widen(sum_of_squares) + abs_square(wide)
    return wide / (jnp.sqrt(s + eps_root) + eps), s.astype(sum_of_squares.dtype)


def scale_by_adagrad(
    *,
    initial_accumulator: Scalar = 0.0,
    eps: Scalar = 1e-10,
    eps_root: Scalar = 0.0,
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Divides the gradient by the root of the sum of its squares so far.

    Coordinates that are rarely active keep long steps; every step length only falls.

    Args:
      initial_accumulator: What the sum starts from, in units of the squared gradient.
        >= 0.
      eps: Added outside the square root, in units of the gradient. >= 0; eps and
        eps_root may not both be 0.
      eps_root: Added inside the square root. >= 0.
      nu_dtype: Dtype of the sum, see `optaxplus.custom_types`. In bfloat16 it stops
        growing once a square is less than 1/256 of it. Static.

    Returns:
      A transformation with state `ScaleByAdagradState`; emits float32. Where squared
      gradients overflow float32 (|g| > 1.8e19) the update is 0 from then on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = jnp.array([4.0, -1.0])
      >>> tx = ox.scale_by_adagrad()
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates, state = tx.update(grads, state)
      >>> print(updates, state.sum_of_squares)
      [ 0.70710677 -0.70710677] [32.  2.]

    References:
      Duchi, Hazan, Singer, JMLR 12 (2011), Figure 1; `torch.optim.Adagrad`.
    """
    name = "scale_by_adagrad"
    validation.check_non_negative(name, initial_accumulator=initial_accumulator)
    validation.check_epsilon(name, eps=eps, eps_root=eps_root)
    validation.check_floating_dtype(name, nu_dtype=nu_dtype)
    eps = as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleByAdagradState:
        zeros = trees.init_moment(name, params, nu_dtype, real=True)
        start = jax.tree.map(
            lambda zero: zero + jnp.asarray(initial_accumulator, zero.dtype), zeros
        )
        return ScaleByAdagradState(start)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdagradState]:
        del params
        updates, sums = trees.map_several(
            lambda g, s: _adagrad_leaf(g, s, eps=eps, eps_root=eps_root),
            2,
            updates,
            state.sum_of_squares,
        )
        return updates, ScaleByAdagradState(sums)

    return optax.GradientTransformation(init_fn, update_fn)
