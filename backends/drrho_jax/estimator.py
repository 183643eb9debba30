"""The inner estimates on a JAX device, updated where they are."""

from __future__ import annotations

from typing import Self

import jax

from drrho_core import InnerEstimator
from drrho_core.estimator import check_rows


class DonatingEstimator(InnerEstimator):
    """`drrho_core.InnerEstimator` for JAX arrays that `scatter` overwrites: it hands its buffers on (donation).

    JAX's arrays never change, so `drrho_core.InnerEstimator` copies all n samples in each `scatter`: half of a step's
    time for 100 million. This one costs what the batch costs. In return arrays that were taken out of it
    (``log_inner_image``, ``log_inner_text``) are deleted by the next `scatter`; take `state_dict`, which copies.

    Parameters and methods are those of `drrho_core.InnerEstimator`. For eager code, with the step itself under
    `jax.jit` or not; where gather and scatter are inside, donate the state to that function (``donate_argnums``).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> estimator = DonatingEstimator(4, like=jnp.zeros(1))
    >>> same = estimator.scatter(jnp.asarray([2, 0]), jnp.asarray([0.5, 1.5]), jnp.asarray([0.0, 1.0]))
    >>> same is estimator, estimator.log_inner_image.tolist()
    (True, [1.5, -inf, 0.5, -inf])
    """

    def scatter(self, index: jax.Array, log_inner_image: jax.Array, log_inner_text: jax.Array, /) -> Self:
        """Write the rows of a batch and return this estimator; see `drrho_core.InnerEstimator.scatter`."""
        index = self._checked(index)
        state = self.log_inner_image
        check_rows(log_inner_image, log_inner_text, size=index.shape[0], like=state, xp=self._xp)
        self.log_inner_image, self.log_inner_text = _write(
            self.log_inner_image, self.log_inner_text, index, log_inner_image, log_inner_text
        )
        return self


def _set(
    image: jax.Array, text: jax.Array, index: jax.Array, image_rows: jax.Array, text_rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return image.at[index].set(image_rows), text.at[index].set(text_rows)


_write = jax.jit(_set, donate_argnums=(0, 1))
