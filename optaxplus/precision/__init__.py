"""Wrappers that keep state and weights in fewer bits."""
