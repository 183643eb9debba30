"""The cupy backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drrho_cupy.backend import CupyBackend

__all__ = ["CupyBackend"]


def __getattr__(name: str) -> Any:
    """Look CuPy up when its backend is asked for, so that whoever asks learns at once that it is missing."""
    if name != "CupyBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import cupy  # noqa: F401

    from drrho_cupy.backend import CupyBackend

    return CupyBackend
