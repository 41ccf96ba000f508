"""What was composed: which parameter goes where, and what it costs."""

from optaxplus.report import plots

__all__ = ["plots"]
