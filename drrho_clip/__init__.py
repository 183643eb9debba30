"""The training harness: data, training step, training loop, evaluation, checkpoints, report and command line.

All computations on a device go through a backend, an adapter with the interface `drrho_core.backend.Backend` for one
array library (see `drrho_core.backend`). The harness itself imports no array library but NumPy.
"""

# Nothing is imported here before it is used, so that the command line can show the help without loading NumPy.
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drrho_clip.features import ReferenceFeatures

__all__ = ["ReferenceFeatures"]


def __getattr__(name: str) -> Any:
    """Return a public name of the package, which is imported now."""
    if name == "ReferenceFeatures":
        from drrho_clip.features import ReferenceFeatures

        return ReferenceFeatures
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
