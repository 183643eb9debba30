"""What the tiles spend their time on, which a backend may do with another routine of its library.

``a @ b`` and ``exp`` are what a library thinks best, and on some processors they take two to four times as long as they
have to. A backend that knows better registers its routine, which is asked for once per batch, never per tile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TypeAlias

from drrho_core._array_api import Array, Namespace, is_compiling, library

Product: TypeAlias = Callable[[Array, Array], Array]
"""``product(a, b)`` returns ``a @ b`` for two matrices, either of which may be a transposed view."""

Choose: TypeAlias = Callable[[Array], Product | None]
"""``choose(like)`` returns the product for matrices of the dtype and device of `like`, or None for the library's own.

It is not asked where torch.compile traces.
"""

Exponential: TypeAlias = Callable[[Array, bool], Array]
"""``exponential(x, overwrite)`` returns ``exp(x)``, and may overwrite `x` with it if it is allowed to.

Fresh memory costs as much as the exponential.
"""

_EXPONENTIALS: dict[str, Exponential] = {}
_CHOICES: dict[str, Choose] = {}


def register_product(name: str, choose: Choose) -> None:
    """Let `choose` say how the tiles of a library's arrays are multiplied.

    Parameters
    ----------
    name : str
        The library, named as its namespace without the wrapper's: ``torch``, ``jax.numpy``.
    choose : callable
        ``choose(like)``, as in `Choose`.
    """
    _CHOICES[name] = choose


def product_for(like: Array, xp: Namespace) -> Product:
    """Return the product for matrices of the library, dtype and device of `like`: ``a @ b`` if no backend objects."""
    choose = None if is_compiling(xp) else _CHOICES.get(library(xp))
    its = None if choose is None else choose(like)
    return operator.matmul if its is None else its


def register_exponential(name: str, exponential: Exponential) -> None:
    """Let `exponential` be the exponential of a library's tiles, named as for `register_product`."""
    _EXPONENTIALS[name] = exponential


def exp_for(xp: Namespace) -> Exponential:
    """Return the exponential for a library's tiles: its own if no backend objects."""
    registered = _EXPONENTIALS.get(library(xp))
    return (lambda x, _overwrite: xp.exp(x)) if registered is None else registered
