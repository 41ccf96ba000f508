"""MARS: variance reduction for large models."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import optax

from optaxplus import validation
from optaxplus.custom_types import DTypeName, PyTree, Scalar, ScalarOrSchedule
from optaxplus.numerics.hyperparameters import is_zero
from optaxplus.numerics.newton_schulz import check_compute_dtype
from optaxplus.partition.routing import route
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.transforms.adaptive.adam import scale_by_adam
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.momentum import scale_by_ema
from optaxplus.transforms.orthogonalized import (
    orthogonalize_via_newton_schulz,
    scale_by_matrix_shape,
)
from optaxplus.transforms.sign import scale_by_sign
from optaxplus.transforms.variance_reduction import mars_correction
from optaxplus.transforms.weight_decay import descend

__all__ = ["mars"]


def mars(
    learning_rate: ScalarOrSchedule,
    *,
    variant: str = "adamw",
    b1: Scalar = 0.95,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-8,
    gamma: Scalar = 0.025,
    max_norm: Scalar | None = 1.0,
    weight_decay: ScalarOrSchedule = 0.0,
    decay: str = "decoupled",
    correct_vectors: bool = False,
    adamw_learning_rate: ScalarOrSchedule | None = None,
    adamw_b1: Scalar = 0.9,
    adamw_b2: Scalar = 0.95,
    adamw_weight_decay: ScalarOrSchedule = 0.1,
    rules: Sequence[Rule] = DEFAULT_RULES,
    compute_dtype: str = "bfloat16",
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """MARS: a variance-reduced gradient in front of AdamW, Lion or Muon.

    Matrices, embeddings among them, get the corrected gradient; vectors get AdamW.
    State: 12 bytes per parameter (8 in the variants "lion" and "shampoo"), 8 in
    vectors.

    Links of matrices: `mars_correction`; `scale_by_adam`, or `scale_by_ema` and
    `scale_by_sign` ("lion"), or `scale_by_ema`, `orthogonalize_via_newton_schulz` and
    `scale_by_matrix_shape` ("shampoo"); `descend`. Of vectors: `scale_by_adam`,
    `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 3e-3 is usual for "adamw",
        1e-4 for "lion", 2e-2 for "shampoo".
      variant: The rule after the correction: "adamw"; "lion", the sign of its moving
        average; or "shampoo", that average orthogonalized by five Newton-Schulz steps
        as in Muon. Static.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1). Of "adamw" alone.
      eps: Added to the denominators of "adamw" and of vectors. > 0.
      gamma: Strength of the correction, see `optaxplus.mars_correction`. >= 0.
      max_norm: Largest norm of a matrix's corrected gradient. > 0, or None. Static if
        None.
      weight_decay: Decay of matrices per step, >= 0, or a schedule of it; relative to
        the learning rate unless `decay` is "independent". Static if 0.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      correct_vectors: Whether vectors are treated as matrices are (`optimize_1d` of
        the authors). Not with "shampoo". Static.
      adamw_learning_rate: Learning rate of vectors; None is `learning_rate`. Static if
        None.
      adamw_b1: Decay rate of the first moment of vectors, in [0, 1).
      adamw_b2: Decay rate of the second moment of vectors, in [0, 1).
      adamw_weight_decay: Decay of vectors, >= 0, or a schedule of it; the authors'
        default decays them and not the matrices, 0 is the usual choice elsewhere.
        Static if 0.
      rules: Which parameters are matrices, see `optaxplus.infer_matrix_axes`; those of
        the role "frozen" do not change. Static.
      compute_dtype: Dtype of the matrix products of "shampoo", see
        `optaxplus.orthogonalize_via_newton_schulz`. Static.
      mu_dtype: Dtype of the first moment and the last gradient, see
        `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment, which "lion" and "shampoo" have in vectors
        alone. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params
      where something decays.

    Raises:
      TypeError: If an argument has a wrong type, a parameter is not floating point, or
        a matrix is complex under "shampoo".
      ValueError: If an argument is out of range, no rule decides a parameter, or
        `update` is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((64, 16)), "bias": jnp.ones(16)}}
      >>> tx = ox.mars(3e-3)
      >>> ox.memory_report(tx, params).by_label
      {'adamw': 132, 'frozen': 0, 'mars': 12292}

    References:
      Yuan et al., arXiv 2411.10438, equations 2.3 and 2.4; AGI-Arena/MARS with
      `is_approx=True`. The clipping is that of one matrix, as there; Levanter's is that
      of the whole tree.
    """
    name = "mars"
    if adamw_learning_rate is None:
        adamw_learning_rate = learning_rate
    validation.check_learning_rate(name, learning_rate)
    validation.check_learning_rate(name, adamw_learning_rate, "adamw_learning_rate")
    validation.check_weight_decay(name, weight_decay)
    validation.check_weight_decay(name, adamw_weight_decay, "adamw_weight_decay")
    validation.check_decay_rate(
        name, b1=b1, b2=b2, adamw_b1=adamw_b1, adamw_b2=adamw_b2
    )
    validation.check_positive(name, eps=eps)
    check_compute_dtype(name, compute_dtype)
    validation.check_flag(name, correct_vectors=correct_vectors)
    validation.check_choice(name, "variant", variant, ("adamw", "lion", "shampoo"))
    if variant == "shampoo" and correct_vectors:
        raise ValueError(
            "mars: correct_vectors=True is not allowed with variant='shampoo'; only "
            "matrices can be orthogonalized."
        )
    dtypes: dict[str, Any] = {"mu_dtype": mu_dtype, "nu_dtype": nu_dtype}

    def corrected(axes: PyTree) -> optax.GradientTransformation:
        correction = mars_correction(
            gamma=gamma, b1=b1, max_norm=max_norm, axes=axes, mu_dtype=mu_dtype
        )
        rule = {
            "adamw": lambda: (scale_by_adam(b1, b2, eps=eps, **dtypes),),
            "lion": lambda: (scale_by_ema(b1, mu_dtype=mu_dtype), scale_by_sign()),
            "shampoo": lambda: (
                scale_by_ema(b1, mu_dtype=mu_dtype),
                orthogonalize_via_newton_schulz(
                    ns_coeffs="jordan",
                    normalization="frobenius",
                    compute_dtype=compute_dtype,
                    axes=axes,
                ),
                scale_by_matrix_shape("keller", axes=axes),
            ),
        }[variant]
        return optax.chain(
            correction, *rule(), descend(learning_rate, weight_decay, decay=decay)
        )

    adamw = optax.chain(
        scale_by_adam(adamw_b1, adamw_b2, eps=eps, **dtypes),
        descend(adamw_learning_rate, adamw_weight_decay, decay=decay),
    )
    corrected(None)  # Refuses bad arguments now rather than at init.

    def build(roles: PyTree, axes: PyTree) -> optax.GradientTransformation:
        def label(role: str, is_corrected: bool) -> str:
            return "frozen" if role == "frozen" else "mars" if is_corrected else "adamw"

        labels = jax.tree.map(
            lambda role, leaf_axes: label(role, leaf_axes.is_matrix or correct_vectors),
            roles,
            axes,
        )
        groups: dict[Hashable, optax.GradientTransformation] = {
            "mars": corrected(axes),
            "adamw": adamw,
            "frozen": optax.set_to_zero(),
        }
        return optax.partition(groups, lambda _: labels)

    decays = not (is_zero(weight_decay) and is_zero(adamw_weight_decay))
    return chain_in_float32(
        route(build, rules, name=name), requires_params=name if decays else None
    )
