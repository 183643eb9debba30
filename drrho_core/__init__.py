"""Steer the training of a model with a reference model: DRRho risk minimization on any array library."""
