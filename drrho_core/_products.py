"""The matrix products of the tiles, which a backend may do with another routine of its library.

``a @ b`` is what a library thinks best, and on some processors it is wrong by a factor of two. A backend that knows
better registers a choice, which is asked once per batch, never per tile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TypeAlias

from drrho_core._arrays import Array, Namespace, is_compiling, library

Product: TypeAlias = Callable[[Array, Array], Array]
"""``product(a, b)`` returns ``a @ b`` for two matrices, either of which may be a transposed view."""

Choose: TypeAlias = Callable[[Array], Product | None]
"""``choose(like)`` returns the product for matrices of the dtype and device of `like`, or None for the library's own.

It is not asked where torch.compile traces.
"""

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
