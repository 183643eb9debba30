"""The numpy backend."""

from __future__ import annotations

from drrho_numpy.backend import NumpyBackend

__all__ = ["NumpyBackend"]
