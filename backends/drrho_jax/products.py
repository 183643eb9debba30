"""The matrix product behind a float32 tile, in full float32. Tiles divide the matrix of all pairs of a batch.

By default an accelerator rounds the factors of a float32 product, on a GPU to TensorFloat-32. Similarities would then
have errors of 1e-3. If the user has set ``jax_default_matmul_precision``, that setting applies instead.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from drrho_core.checks import Array
from drrho_core.extend import Matmul


def choose(like: Array) -> Matmul | None:
    """Return the product for tiles of the dtype of `like`, or None for JAX's own product."""
    user_setting = getattr(jax.config, "jax_default_matmul_precision", None)
    # A CPU never rounds the factors, and factors in half types (float16, bfloat16) need no rounding.
    if like.dtype != jnp.float32 or user_setting is not None or jax.default_backend() == "cpu":
        return None
    return partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
