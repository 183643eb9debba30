"""Parts of several commands: the option ``--device``, opening a backend, a file of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drrho_clip import outputs
from drrho_clip.errors import BadInput
from drrho_clip.options import FLAG, TEXT, setting
from drrho_core.backend import Backend, get_backend

__all__ = ["allow_unfinished_option", "build_backend", "check_page", "device_option", "write_json"]


def device_option() -> Any:
    """Return the field of the option ``--device``."""
    return setting(
        None,
        rule=TEXT,
        shown="a GPU if the array library can use one, otherwise the CPU",
        help="Device, by the name that the array library gives it, such as cpu or cuda:0.",
    )


def allow_unfinished_option(subject: str) -> Any:
    """Return the field of the option ``--allow-unfinished``; `subject` names the run in the help."""
    return setting(False, rule=FLAG, help=f"{subject} need not be finished.")


def build_backend(name: str, device: str | None, dtype: str) -> Backend:
    """Open a backend; raise BadInput if backend, device or dtype is unknown or not installed."""
    try:
        return get_backend(name, device=device, dtype=dtype)
    except (ValueError, ImportError) as error:
        raise BadInput(str(error)) from error


def write_json(path: Path | None, content: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> None:
    """Write results to a JSON file; do nothing if `path` is None."""
    if path is not None:
        outputs.write_json(path, content)


def check_page(name: str, path: Path | None) -> None:
    """Raise BadInput if a page cannot be written to `path`; the suffix protects other files from a slip of the hand."""
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".htm"):
        raise BadInput(f"{name} must be a file that ends in .html, got {path}")
    outputs.check_file(path, name)
