"""Steps divided by a running size of the gradient: AdaGrad, Adam and what followed."""
