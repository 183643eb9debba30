"""The inner estimates on a JAX device, updated where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import jax

from drrho_core import InnerEstimator
from drrho_core.estimator import check_rows
from drrho_jax.arguments import as_jax_array, as_jax_index


class DonatingEstimator(InnerEstimator):
    """`drrho_core.InnerEstimator` for JAX arrays that `scatter` overwrites: it hands its buffers on (donation).

    JAX's arrays never change, so `drrho_core.InnerEstimator` copies all n samples in each `scatter`: half of a step's
    time for 100 million. This one costs what the batch costs. In return arrays that were taken out of it
    (``log_inner_image``, ``log_inner_text``) are deleted by the next `scatter`; take `state_dict`, which copies.

    Parameters and methods are those of `drrho_core.InnerEstimator`; NumPy arrays are taken wherever JAX's are. It is
    for eager code, with the step itself under `jax.jit` or not. A jitted function that gathers and scatters inside
    takes the state of `drrho_jax.init_state` instead, which can be donated to it (``donate_argnums``).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> estimator = DonatingEstimator(4, like=jnp.zeros(1))
    >>> same = estimator.scatter(jnp.asarray([2, 0]), jnp.asarray([0.5, 1.5]), jnp.asarray([0.0, 1.0]))
    >>> same is estimator, estimator.log_inner_image.tolist()
    (True, [1.5, -inf, 0.5, -inf])
    """

    def __init__(self, num_samples: int, *, like: Any, dtype: Any = None) -> None:
        super().__init__(num_samples, like=as_jax_array("like", like), dtype=dtype)

    def scatter(self, index: jax.Array, log_inner_image: jax.Array, log_inner_text: jax.Array, /) -> Self:
        """Write the rows of a batch and return this estimator; see `drrho_core.InnerEstimator.scatter`."""
        index = self._checked(index)
        state = self.log_inner_image
        log_inner_image = as_jax_array("log_inner_image", log_inner_image, state)
        log_inner_text = as_jax_array("log_inner_text", log_inner_text, state)
        check_rows(log_inner_image, log_inner_text, size=index.shape[0], like=state, xp=self._xp)
        self.log_inner_image, self.log_inner_text = _write(
            self.log_inner_image, self.log_inner_text, index, log_inner_image, log_inner_text
        )
        return self

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take over a state as JAX or NumPy arrays; see `drrho_core.InnerEstimator.load_state_dict`."""
        if isinstance(state, Mapping):
            state = {name: as_jax_array(name, value, self.log_inner_image) for name, value in state.items()}
        super().load_state_dict(state)

    def _checked(self, index: Any) -> Any:
        return super()._checked(as_jax_index(index, self.num_samples, self.log_inner_image))


def _set(
    image: jax.Array, text: jax.Array, index: jax.Array, image_rows: jax.Array, text_rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return image.at[index].set(image_rows), text.at[index].set(text_rows)


_write = jax.jit(_set, donate_argnums=(0, 1))
