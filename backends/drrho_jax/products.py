"""Products of float32 tiles in full float32.

By default an accelerator rounds the factors of a float32 product, to TensorFloat-32 on a GPU: similarities would be off
by 1e-3. Somebody who has set ``jax_default_matmul_precision`` has chosen, and gets that.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from drrho_core._array_api import Array
from drrho_core.extend import Matmul


def choose(like: Array) -> Matmul | None:
    """Return the product for tiles of the dtype of `like`, or None for JAX's own."""
    chosen = getattr(jax.config, "jax_default_matmul_precision", None)
    if like.dtype != jnp.float32 or chosen is not None or jax.default_backend() == "cpu":
        return None
    return partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
