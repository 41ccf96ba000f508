"""Optimizers for JAX beyond optax: from SGD to Muon, routed by what a parameter is.

Everything that transforms gradients is a plain `optax.GradientTransformation`. Named
optimizers (`adam`, `muon`, …) are chains of links (`scale_by_adam`, `descend`, …),
which their docstrings name.

The formulas of a link, its sources and where it differs from optax stand at the top of
its module: `help(ox.scale_by_adam.__module__)`. The text that signatures share
(learning rates, axes, masks, dtypes, what "Static" means) is in
`help("optaxplus.custom_types")`.
"""

from optaxplus import numerics, partition
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.optimizers.adam_variants import adan, ademamix, adopt, stable_adamw
from optaxplus.optimizers.adaptive import adam, adamw, amsgrad, nadam, radam
from optaxplus.optimizers.averaged import ranger
from optaxplus.optimizers.blockwise import adam_mini
from optaxplus.optimizers.classical import adagrad, rmsprop, sgd
from optaxplus.optimizers.curvature import sophia
from optaxplus.optimizers.dion import dion
from optaxplus.optimizers.factored import adafactor, came
from optaxplus.optimizers.kronecker import shampoo, soap
from optaxplus.optimizers.layerwise import lamb, lars
from optaxplus.optimizers.low_rank import apollo
from optaxplus.optimizers.muon import muon
from optaxplus.optimizers.muon_variants import adamuon, normuon
from optaxplus.optimizers.psgd import kron
from optaxplus.optimizers.qk_clip import qk_clip
from optaxplus.optimizers.quantized import adamw8bit, lion8bit
from optaxplus.optimizers.scion import scion
from optaxplus.optimizers.sign import lion, signum
from optaxplus.optimizers.variance_reduced import mars
from optaxplus.partition.inference import (
    infer_matrix_axes,
    infer_roles,
    label_params,
)
from optaxplus.partition.routing import route
from optaxplus.partition.rules import DEFAULT_RULES, LORA_RULES, Rule, stacked
from optaxplus.precision.loss_scale import (
    LossScaleState,
    dynamic_loss_scale,
    loss_scale,
    skipped_steps,
)
from optaxplus.precision.quantized_state import (
    QuantizedArray,
    QuantizedState,
    dequantize_state,
    quantize_state,
)
from optaxplus.precision.weights import (
    RoundedWeightsState,
    compensated,
    master_weights,
    stochastic_rounding,
)
from optaxplus.report.memory import MemoryReport, memory_report
from optaxplus.report.metrics import MetricsState, metrics, with_metrics
from optaxplus.report.models import abstract_params
from optaxplus.report.placement_plan import PlacementPlan, plan_placement
from optaxplus.report.routing_table import RoutingTable, explain_routing
from optaxplus.sharding.placement import Placement
from optaxplus.sharding.state_specs import state_sharding
from optaxplus.transforms.accumulation import AccumulateState, accumulate
from optaxplus.transforms.adaptive.adagrad import ScaleByAdagradState, scale_by_adagrad
from optaxplus.transforms.adaptive.adam import ScaleByAdamState, scale_by_adam
from optaxplus.transforms.adaptive.adam_mini import (
    ScaleByAdamMiniState,
    scale_by_adam_mini,
)
from optaxplus.transforms.adaptive.adan import ScaleByAdanState, scale_by_adan
from optaxplus.transforms.adaptive.ademamix import (
    ScaleByAdemamixState,
    scale_by_ademamix,
)
from optaxplus.transforms.adaptive.adopt import ScaleByAdoptState, scale_by_adopt
from optaxplus.transforms.adaptive.nadam import ScaleByNadamState, scale_by_nadam
from optaxplus.transforms.adaptive.radam import ScaleByRadamState, scale_by_radam
from optaxplus.transforms.adaptive.rmsprop import ScaleByRmspropState, scale_by_rmsprop
from optaxplus.transforms.adaptive.stable_adam import (
    ScaleByStableAdamState,
    scale_by_stable_adam,
)
from optaxplus.transforms.averaging import LookaheadState, lookahead
from optaxplus.transforms.cautious import CautiousState, cautious
from optaxplus.transforms.centralization import centralize
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.clipping import clip_by_global_norm, clip_update_rms
from optaxplus.transforms.confidence import ScaleByConfidenceState, scale_by_confidence
from optaxplus.transforms.curvature import ScaleBySophiaState, scale_by_sophia
from optaxplus.transforms.dion import ScaleByDionState, scale_by_dion
from optaxplus.transforms.factored import FactoredRmsState, factored_rms
from optaxplus.transforms.hessian_estimates import gauss_newton_bartlett, hutchinson
from optaxplus.transforms.layerwise import scale_by_param_rms, trust_ratio
from optaxplus.transforms.low_rank import ScaleByApolloState, scale_by_apollo
from optaxplus.transforms.momentum import (
    ScaleByEmaState,
    ScaleByMomentumState,
    scale_by_ema,
    scale_by_momentum,
)
from optaxplus.transforms.norm_lmo import scale_by_norm_lmo
from optaxplus.transforms.normalized import (
    NormalizeNeuronsState,
    ScaleByAdamuonState,
    normalize_neurons,
    scale_by_adamuon,
)
from optaxplus.transforms.orthogonalized import (
    orthogonalize_via_newton_schulz,
    scale_by_matrix_shape,
)
from optaxplus.transforms.psgd import ScaleByKronState, scale_by_kron
from optaxplus.transforms.shampoo import ScaleByShampooState, scale_by_shampoo
from optaxplus.transforms.sign import ScaleByLionState, scale_by_lion, scale_by_sign
from optaxplus.transforms.soap import ScaleBySoapState, scale_by_soap
from optaxplus.transforms.variance_reduction import MarsCorrectionState, mars_correction
from optaxplus.transforms.weight_decay import DescendState, decay_mask, descend

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_RULES",
    "LORA_RULES",
    "AccumulateState",
    "CautiousState",
    "DescendState",
    "FactoredRmsState",
    "LookaheadState",
    "LossScaleState",
    "MarsCorrectionState",
    "MatrixAxes",
    "MemoryReport",
    "MetricsState",
    "NormalizeNeuronsState",
    "Placement",
    "PlacementPlan",
    "QuantizedArray",
    "QuantizedState",
    "RoundedWeightsState",
    "RoutingTable",
    "Rule",
    "ScaleByAdagradState",
    "ScaleByAdamMiniState",
    "ScaleByAdamState",
    "ScaleByAdamuonState",
    "ScaleByAdanState",
    "ScaleByAdemamixState",
    "ScaleByAdoptState",
    "ScaleByApolloState",
    "ScaleByConfidenceState",
    "ScaleByDionState",
    "ScaleByEmaState",
    "ScaleByKronState",
    "ScaleByLionState",
    "ScaleByMomentumState",
    "ScaleByNadamState",
    "ScaleByRadamState",
    "ScaleByRmspropState",
    "ScaleByShampooState",
    "ScaleBySoapState",
    "ScaleBySophiaState",
    "ScaleByStableAdamState",
    "abstract_params",
    "accumulate",
    "adafactor",
    "adagrad",
    "adam",
    "adam_mini",
    "adamuon",
    "adamw",
    "adamw8bit",
    "adan",
    "ademamix",
    "adopt",
    "amsgrad",
    "apollo",
    "came",
    "cautious",
    "centralize",
    "chain_in_float32",
    "clip_by_global_norm",
    "clip_update_rms",
    "compensated",
    "decay_mask",
    "dequantize_state",
    "descend",
    "dion",
    "dynamic_loss_scale",
    "explain_routing",
    "factored_rms",
    "gauss_newton_bartlett",
    "hutchinson",
    "infer_matrix_axes",
    "infer_roles",
    "kron",
    "label_params",
    "lamb",
    "lars",
    "lion",
    "lion8bit",
    "lookahead",
    "loss_scale",
    "mars",
    "mars_correction",
    "master_weights",
    "memory_report",
    "metrics",
    "muon",
    "nadam",
    "normalize_neurons",
    "normuon",
    "numerics",
    "orthogonalize_via_newton_schulz",
    "partition",
    "plan_placement",
    "qk_clip",
    "quantize_state",
    "radam",
    "ranger",
    "rmsprop",
    "route",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_adam_mini",
    "scale_by_adamuon",
    "scale_by_adan",
    "scale_by_ademamix",
    "scale_by_adopt",
    "scale_by_apollo",
    "scale_by_confidence",
    "scale_by_dion",
    "scale_by_ema",
    "scale_by_kron",
    "scale_by_lion",
    "scale_by_matrix_shape",
    "scale_by_momentum",
    "scale_by_nadam",
    "scale_by_norm_lmo",
    "scale_by_param_rms",
    "scale_by_radam",
    "scale_by_rmsprop",
    "scale_by_shampoo",
    "scale_by_sign",
    "scale_by_soap",
    "scale_by_sophia",
    "scale_by_stable_adam",
    "scion",
    "sgd",
    "shampoo",
    "signum",
    "skipped_steps",
    "soap",
    "sophia",
    "stable_adamw",
    "stacked",
    "state_sharding",
    "stochastic_rounding",
    "trust_ratio",
    "with_metrics",
]
