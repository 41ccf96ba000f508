"""Named optimizers: chains only, each readable beside its paper's algorithm."""
