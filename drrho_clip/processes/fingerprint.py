"""Facts that all processes of a run must share: settings, data, program, libraries, sizes and parameters.

If these differ, array libraries abort without an explanation, or they train a model that nobody wanted. So the
processes compare the facts before the first step: first one hash, and the facts themselves only if the hashes differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from drrho_clip.errors import AgreedError
from drrho_clip.processes.judge import ranks_in_words
from drrho_clip.processes.protocol import Gathering
from drrho_core import __version__

__all__ = ["digest_of_arrays", "facts_of_program", "require_equal"]

_PROJECT = "drrho-core"
# Extras of the project whose libraries take no part in training.
_TOOLS = ("test", "dev", "docs")
_MOST_NAMED = 3


def require_equal(processes: Gathering, facts: Mapping[str, Any]) -> None:
    """Compare facts among all processes.

    Parameters
    ----------
    processes : Gathering
        The processes, which all call this function at the same time.
    facts : mapping
        For each name of a fact the value, which JSON can hold. The entries of a mapping are compared one by one.

    Raises
    ------
    AgreedError
        On all processes, with the same message, if a fact differs.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> processes = SimpleNamespace(gather=lambda value: [value, {"batch_size": 7} if isinstance(value, dict) else ""])
    >>> require_equal(processes, {"batch_size": 8})
    Traceback (most recent call last):
        ...
    drrho_clip.errors.AgreedError: batch_size must be the same on all processes, got 8 on rank 0, 7 on rank 1
    """
    flat = dict(_entries("", facts))
    text = json.dumps(flat, sort_keys=True)
    hashes = processes.gather(hashlib.sha256(text.encode()).hexdigest())
    if len(set(hashes)) == 1:
        return
    everywhere = processes.gather(flat)
    names = sorted(set().union(*everywhere))
    differing = [name for name in names if len({_shown(entries, name) for entries in everywhere}) > 1]
    sentences = []
    for name in differing[:_MOST_NAMED]:
        ranks: dict[str, list[int]] = {}
        for rank, entries in enumerate(everywhere):
            ranks.setdefault(_shown(entries, name), []).append(rank)
        values = ", ".join(f"{value} on {ranks_in_words(own)}" for value, own in ranks.items())
        sentences.append(f"{name} must be the same on all processes, got {values}")
    if len(differing) > _MOST_NAMED:
        sentences.append(f"{len(differing) - _MOST_NAMED} more differ")
    raise AgreedError("; ".join(sentences))


def facts_of_program(packages: Sequence[str]) -> dict[str, Any]:
    """Return the identity of the program: version and source, Python, and the libraries that it uses.

    Parameters
    ----------
    packages : sequence of str
        Names of the packages whose source counts, such as "drrho_core".
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        "byte_order": sys.byteorder,
        "source": {name: _digest_of_source(name) for name in packages},
        "library": _versions(),
    }


def digest_of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Return a digest of names, dtypes, shapes and values of arrays.

    Examples
    --------
    >>> digest_of_arrays({"x": np.zeros(2)}) == digest_of_arrays({"x": np.zeros((2, 1))})
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, array.dtype.str, list(np.shape(arrays[name]))]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _entries(prefix: str, facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the facts without mappings inside: the entry "b" of the mapping "a" is called "a.b"."""
    entries: list[tuple[str, Any]] = []
    for name, value in facts.items():
        entries += _entries(f"{prefix}{name}.", value) if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return entries


def _shown(entries: Mapping[str, Any], name: str) -> str:
    """Return a value in words; a fact that a process lacks is "none"."""
    return json.dumps(entries[name], sort_keys=True) if name in entries else "none"


def _digest_of_source(package: str) -> str:
    """Return a digest of all Python files of a package; their dates and their folder do not count."""
    file = import_module(package).__file__
    assert file is not None
    folder = Path(file).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        # A checkout on another system may have other ends of lines.
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that the project may train with, as far as they are installed."""
    try:
        requirements = metadata.requires(_PROJECT) or []
    # A checkout that is not installed records no requirements.
    except metadata.PackageNotFoundError:
        requirements = ["numpy"]
    versions: dict[str, str] = {}
    for requirement in requirements:
        words, _, condition = requirement.partition(";")
        if any(f"'{extra}'" in condition.replace('"', "'") for extra in _TOOLS):
            continue
        name = re.match(r"[\w.-]+", words)
        assert name is not None
        # An extra that is not installed is no difference by itself; the run would not have come so far.
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name[0]] = metadata.version(name[0])
    return versions
