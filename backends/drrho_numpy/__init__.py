"""NumPy: the backend of the harness, and an estimator that keeps the inner estimates in a file.

The harness is `drrho_clip`, the training program. The inner estimates are two numbers per sample of the data set.
"""

from __future__ import annotations

from drrho_numpy.backend import NumpyBackend
from drrho_numpy.estimator import MemoryMappedEstimator

__all__ = ["MemoryMappedEstimator", "NumpyBackend"]
