"""Matrix products in full float32: the product behind a tile, and all products of a function.

Tiles divide the matrix of all pairs of a batch.

By default an accelerator rounds the factors of a float32 product, on a GPU to TensorFloat-32. Similarities would then
have errors of 1e-3. If the user has set ``jax_default_matmul_precision``, that setting applies instead.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from drrho_core.backend import Function
from drrho_core.checks import Array
from drrho_core.extend import Matmul


def choose(like: Array) -> Matmul | None:
    """Return the product for tiles of the dtype of `like`, or None for JAX's own product."""
    user_setting = getattr(jax.config, "jax_default_matmul_precision", None)
    # A CPU never rounds the factors, and factors in half types (float16, bfloat16) need no rounding.
    if like.dtype != jnp.float32 or user_setting is not None or jax.default_backend() == "cpu":
        return None
    return partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def in_full_precision(function: Function) -> Function:
    """Return a function that computes its float32 products in full precision.

    Accelerators would otherwise round the factors to 10 or 8 bits, and a temperature of 0.01 would multiply the
    rounding error by 100.
    """

    def call(*arrays: Any, **named: Any) -> Any:
        with jax.default_matmul_precision("float32"):
            return function(*arrays, **named)

    exact: Any = call
    return exact  # type: ignore[no-any-return]
