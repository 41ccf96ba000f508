"""Gradient transformations: how a gradient becomes an update."""
