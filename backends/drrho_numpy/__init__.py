"""NumPy: the backend of the harness, and an estimator that keeps the inner estimates in a file."""

from __future__ import annotations

from drrho_numpy.backend import NumpyBackend
from drrho_numpy.estimator import MemoryMappedEstimator

__all__ = ["MemoryMappedEstimator", "NumpyBackend"]
