"""The torch backend."""

from __future__ import annotations

from drrho_torch.backend import TorchBackend

__all__ = ["TorchBackend"]
