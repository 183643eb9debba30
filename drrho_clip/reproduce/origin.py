"""The origin of a row: the machine, the versions of the libraries, and the commit of this library."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

__all__ = ["commit_of", "machine", "versions"]

# Results, pages and pictures in this folder of a clone are not code, and they change while the experiments run.
_RESULTS: Final = "docs/claims"
# The widest vectors come first.
_VECTORS: Final = {"avx512f": "AVX-512", "avx2": "AVX2"}


def machine(device: str = "") -> str:
    """Return kind of machine, system, number of cores, vector instructions and a GPU; no name of a host.

    The figures of a training depend on the vector instructions, because they determine how products are rounded.

    Parameters
    ----------
    device : str
        The GPU that computes; empty without one.
    """
    parts = (platform.machine(), platform.system(), f"{os.cpu_count()} cores", _instructions(), device)
    return ", ".join(filter(None, parts))


def _instructions() -> str:
    """Return the widest vector instructions of an x86 processor under Linux, and nothing elsewhere."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return ""
    return next((words for flag, words in _VECTORS.items() if flag in flags), "")


def versions(backend: str) -> dict[str, str]:
    """Return the versions of Python, of this library and of the libraries that compute, by name."""
    numbers = {"python": platform.python_version()}
    for package in ("drrho-core", "numpy", "scipy", backend):
        try:
            numbers[package] = version(package)
        # The distribution of a backend's library need not have the name of the backend.
        except PackageNotFoundError:
            numbers[package] = "unknown"
    return numbers


def commit_of(folder: Path) -> str:
    """Return the commit of the clone that holds a folder, with "+" if code of the clone has changed since.

    Outside a clone the result is "unknown".
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", f":(top,exclude){_RESULTS}")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
