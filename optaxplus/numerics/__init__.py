"""Array algorithms: arrays in, arrays out; neither optax nor pytrees."""

from optaxplus.numerics.coefficients import COEFFICIENT_TABLES, CoefficientTable
from optaxplus.numerics.newton_schulz import polar_factor

__all__ = ["COEFFICIENT_TABLES", "CoefficientTable", "polar_factor"]
