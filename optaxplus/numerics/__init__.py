"""Array algorithms: arrays in, arrays out; neither optax nor pytrees."""

from optaxplus.numerics.coefficients import COEFFICIENT_TABLES, CoefficientTable
from optaxplus.numerics.polar import polar_factor
from optaxplus.numerics.polar_express import polar_express_coefficients

__all__ = [
    "COEFFICIENT_TABLES",
    "CoefficientTable",
    "polar_express_coefficients",
    "polar_factor",
]
