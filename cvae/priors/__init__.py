"""Priors p(z|y) and the flows that they are made of."""
