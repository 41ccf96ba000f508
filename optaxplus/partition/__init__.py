"""Which parameter is what, and which of its axes form a matrix."""

from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition.inference import (
    infer_matrix_axes,
    infer_roles,
    label_params,
)
from optaxplus.partition.routing import route
from optaxplus.partition.rules import DEFAULT_RULES, LORA_RULES, Rule, stacked

__all__ = [
    "DEFAULT_RULES",
    "LORA_RULES",
    "MatrixAxes",
    "Rule",
    "infer_matrix_axes",
    "infer_roles",
    "label_params",
    "route",
    "stacked",
]
