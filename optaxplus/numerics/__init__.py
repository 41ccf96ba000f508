"""Array algorithms: arrays in, arrays out; neither optax nor pytrees."""

from optaxplus.numerics.coefficients import COEFFICIENT_TABLES, CoefficientTable
from optaxplus.numerics.matrix_roots import inverse_root
from optaxplus.numerics.polar import polar_factor
from optaxplus.numerics.polar_express import polar_express_coefficients

__all__ = [
    "COEFFICIENT_TABLES",
    "CoefficientTable",
    "inverse_root",
    "polar_express_coefficients",
    "polar_factor",
]
