"""Optimizers for JAX beyond optax: from SGD to Muon, routed by what a parameter is.

Everything that transforms gradients is a plain `optax.GradientTransformation`. The
text that signatures share (learning rates, axes, masks, dtypes) is in
`optaxplus.custom_types`.
"""

from optaxplus import numerics, partition
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.optimizers.adaptive import adam, adamw
from optaxplus.optimizers.classical import sgd
from optaxplus.optimizers.factored import adafactor
from optaxplus.optimizers.layerwise import lamb, lars
from optaxplus.optimizers.matrix import muon
from optaxplus.optimizers.sign import lion
from optaxplus.partition.inference import (
    infer_matrix_axes,
    infer_roles,
    label_params,
)
from optaxplus.partition.routing import route
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.report.memory import MemoryReport, memory_report
from optaxplus.report.routing_table import RoutingTable, explain_routing
from optaxplus.transforms.adaptive import ScaleByAdamState, scale_by_adam
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.clipping import clip_by_global_norm, clip_update_rms
from optaxplus.transforms.factored import FactoredRmsState, factored_rms
from optaxplus.transforms.layerwise import scale_by_param_rms, trust_ratio
from optaxplus.transforms.momentum import (
    ScaleByEmaState,
    ScaleByMomentumState,
    scale_by_ema,
    scale_by_momentum,
)
from optaxplus.transforms.orthogonalized import (
    orthogonalize_via_newton_schulz,
    scale_by_matrix_shape,
)
from optaxplus.transforms.sign import ScaleByLionState, scale_by_lion, scale_by_sign

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_RULES",
    "FactoredRmsState",
    "MatrixAxes",
    "MemoryReport",
    "RoutingTable",
    "Rule",
    "ScaleByAdamState",
    "ScaleByEmaState",
    "ScaleByLionState",
    "ScaleByMomentumState",
    "adafactor",
    "adam",
    "adamw",
    "chain_in_float32",
    "clip_by_global_norm",
    "clip_update_rms",
    "explain_routing",
    "factored_rms",
    "infer_matrix_axes",
    "infer_roles",
    "label_params",
    "lamb",
    "lars",
    "lion",
    "memory_report",
    "muon",
    "numerics",
    "orthogonalize_via_newton_schulz",
    "partition",
    "route",
    "scale_by_adam",
    "scale_by_ema",
    "scale_by_lion",
    "scale_by_matrix_shape",
    "scale_by_momentum",
    "scale_by_param_rms",
    "scale_by_sign",
    "sgd",
    "trust_ratio",
]
