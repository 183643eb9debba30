"""The methods and their defaults in the words of the help."""

from __future__ import annotations

from typing import Any

from drrho_clip.methods import BASIC, DEFAULTS, DISTILL, METHODS

__all__ = ["defaults_in_words", "methods_in_words"]


def defaults_in_words(name: str) -> str:
    """Return the default of a setting that a method may change, with the defaults of these methods.

    Examples
    --------
    >>> defaults_in_words("gamma_min")
    '0.5; 0.2 for fastclip-v0, fastclip-v1, fastclip-v2, fastclip-v3'
    """
    methods: dict[Any, list[str]] = {}
    for method, described in METHODS.items():
        if name in described.defaults and method in BASIC:
            methods.setdefault(described.defaults[name], []).append(method)
    changes = [f"{value} for {', '.join(names)}" for value, names in methods.items()]
    return "; ".join([str(DEFAULTS[name]), *changes])


def methods_in_words() -> str:
    """Return the names of all methods with their summaries, for the help."""
    lines = [f"{name}, {METHODS[name].summary}" for name in BASIC]
    return "; ".join([*lines, f"{DISTILL}METHOD, the loss of METHOD plus distillation from a reference model"])
