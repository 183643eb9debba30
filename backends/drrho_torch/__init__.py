"""PyTorch: the backend of the harness, and the loss as a module for a loop of one's own."""

from __future__ import annotations

from drrho_torch.backend import TorchBackend
from drrho_torch.estimator import HostEstimator
from drrho_torch.loss import ContrastiveLoss, drrho_risk

__all__ = ["ContrastiveLoss", "HostEstimator", "TorchBackend", "drrho_risk"]
