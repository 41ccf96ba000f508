"""PSGD-Kron: whitened updates for weight matrices."""

from collections.abc import Sequence

import optax

from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.optimizers.matrix import Fallback, matrices_and_others
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.transforms.psgd import scale_by_kron

__all__ = ["kron"]


def kron(
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None = None,
    b1: Scalar = 0.9,
    preconditioner_learning_rate: Scalar = 0.1,
    init_scale: Scalar = 1.0,
    update_interval: int = 34,
    warmup_steps: int = 500,
    interval_growth: Scalar | None = 1e-3,
    max_dim: int = 8192,
    max_update_rms: Scalar | None = 1.1,
    seed: int = 0,
    weight_decay: ScalarOrSchedule = 0.1,
    decay: str = "decoupled",
    mask: Mask = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
    adamw_learning_rate: ScalarOrSchedule | None = None,
    adamw_b1: Scalar = 0.9,
    adamw_b2: Scalar = 0.95,
    adamw_eps: Scalar = 1e-8,
    adamw_weight_decay: ScalarOrSchedule | None = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
    factor_dtype: DTypeName = "float32",
    fallback: Fallback = None,
) -> optax.GradientTransformationExtraArgs:
    """PSGD-Kron: matrices whitened by Kronecker factors that are fitted to them."""
    name = "kron"

    def direction(axes: Axes) -> optax.GradientTransformation:
        return scale_by_kron(
            b1,
            preconditioner_learning_rate=preconditioner_learning_rate,
            init_scale=init_scale,
            update_interval=update_interval,
            warmup_steps=warmup_steps,
            interval_growth=interval_growth,
            max_dim=max_dim,
            max_update_rms=max_update_rms,
            seed=seed,
            axes=axes,
            mu_dtype=mu_dtype,
            factor_dtype=factor_dtype,
        )

    return matrices_and_others(
        name,
        direction,
        learning_rate,
        clip_norm=clip_norm,
        weight_decay=weight_decay,
        decay=decay,
        mask=mask,
        rules=rules,
        adamw_learning_rate=adamw_learning_rate,
        adamw_b1=adamw_b1,
        adamw_b2=adamw_b2,
        adamw_eps=adamw_eps,
        adamw_weight_decay=adamw_weight_decay,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        placement=None,
        fallback=fallback,
    )
