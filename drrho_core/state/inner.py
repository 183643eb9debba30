"""The inner estimates u of SogCLR: one logarithm per sample and direction, in a table of two columns.

Each column (n,) holds log u in float32 or wider. ``-inf`` marks a sample that was never visited: no batch has contained
this sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from drrho_core._array_api import Array
from drrho_core._validate import LOG_STATE
from drrho_core.contrastive.ranks import Ranks
from drrho_core.state.sharded_table import make_table
from drrho_core.state.table import Column, Table

COLUMNS = (Column("log_inner_image", -float("inf"), LOG_STATE), Column("log_inner_text", -float("inf"), LOG_STATE))
"""The columns of every table of inner estimates: the logarithms of the image anchors and of the text anchors."""

OWNER = "the estimator"
"""The name of a table of inner estimates in messages."""


class EstimatorOfRows:
    """The logarithms of both directions' inner estimates in a table, which may be stored in any memory.

    A subclass builds the table and documents its memory. All estimators inherit the methods of this class.

    Attributes
    ----------
    table : Table
        A table with the columns `COLUMNS`.
    """

    table: Table

    @property
    def num_samples(self) -> int:
        """Number of samples n."""
        return self.table.num_samples

    def gather(self, index: Array, /) -> tuple[Array, Array]:
        """Return the rows of a batch.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of the batch: in [0, n), no repeats.

        Returns
        -------
        tuple of arrays, shape (b,)
            Copies of the image anchors' and the text anchors' rows.

        Raises
        ------
        TypeError, ValueError
            If `index` breaks these rules. Values are read on the host and outside tracing only.
        """
        # As in `COLUMNS`, images come first.
        image, text = self.table.gather(index)
        return image, text

    def scatter(self, index: Array, log_inner_image: Array, log_inner_text: Array, /) -> Self:
        """Write the rows of a batch and return the estimator to use from now on.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of the batch: in [0, n), no repeats (libraries treat repeats differently).
        log_inner_image, log_inner_text : array, shape (b,)
            Updated rows, in the state's dtype.

        Returns
        -------
        the same class
            This estimator, updated in place, if the library's arrays can be written to; else a new estimator.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules; nothing has been written then.
        """
        return self._around(self.table.scatter(index, log_inner_image, log_inner_text))

    def grow(self, num_samples: int, /) -> Self:
        """Return an estimator of `num_samples` >= n samples: the old rows first, the new ones never visited."""
        return self._around(self.table.grow(num_samples))

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the state by name: ``log_inner_image`` and ``log_inner_text``, each (n,).

        If ranks share the estimator, each array holds the own rows, and ``rows`` holds their first id, the id after the
        last, and n.
        """
        return self.table.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Replace the state by one that `state_dict` returned.

        Parameters
        ----------
        state : mapping
            ``log_inner_image`` and ``log_inner_text``, arrays (n,) of this library, device and dtype. With `ranks` the
            own rows together with ``rows``, or all n rows.

        Raises
        ------
        ValueError, TypeError
            If names, shapes, dtypes or values do not fit this object; then nothing has been changed.
        """
        self.table.load_state_dict(state)

    def _around(self, table: Table) -> Self:
        """Return self if `table` is the table of this estimator, else a new estimator with `table`."""
        if table is self.table:
            return self
        # The copy is made without the constructor, because the constructor would build an empty table.
        other = object.__new__(type(self))
        vars(other).update(vars(self), table=table)
        return other


class InnerEstimator(EstimatorOfRows):
    """The logarithms of both directions' inner estimates for a data set of n samples.

    Parameters
    ----------
    num_samples : int
        n >= 1, the number of samples in the data set.
    like : array
        Any array of the library that the state is to use, on the device that is to store the state.
    dtype : dtype, optional
        float32 or wider. Default: the dtype of `like` if this is a floating dtype wider than float32, else float32.
    ranks : Ranks, optional
        The ranks that share each batch. If it is given, each of the W ranks stores ceil(n / W) rows only, and all ranks
        have to call the same methods at the same time. Default: this object stores all rows.

    Attributes
    ----------
    log_inner_image, log_inner_text : array, shape (n,)
        The state; ``-inf`` = never visited. With `ranks` these are the own rows.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    The state is log u_i with the inner estimates u_i of SogCLR (arXiv 2202.12387). Every `index` is an array (b,) of
    integers in [0, n) without repeats; with `ranks`, no id may occur twice in the batch of all ranks. A step of
    `gather` and `scatter` then brings 8 + 4 s bytes per own pair from every other rank, if a number has s bytes and an
    id has 8.

    Examples
    --------
    >>> import numpy as np
    >>> estimator = InnerEstimator(4, like=np.zeros(1))
    >>> estimator = estimator.scatter(np.asarray([2, 0]), np.asarray([0.5, 1.5]), np.asarray([0.0, 1.0]))
    >>> estimator.log_inner_image.tolist()
    [1.5, -inf, 0.5, -inf]
    >>> [side.tolist() for side in estimator.gather(np.asarray([0, 1]))]
    [[1.5, -inf], [1.0, -inf]]
    """

    def __init__(self, num_samples: int, *, like: Array, dtype: Any = None, ranks: Ranks | None = None) -> None:
        # The state is stored in arrays of the library and on the device of `like`.
        self.table = make_table(COLUMNS, num_samples, like=like, dtype=dtype, owner=OWNER, ranks=ranks)

    def __repr__(self) -> str:
        """Show size and dtype."""
        return f"{type(self).__name__}(num_samples={self.num_samples}, dtype={self.log_inner_image.dtype})"

    @property
    def log_inner_image(self) -> Array:
        """The image anchors' state, (n,)."""
        return self.table.arrays()["log_inner_image"]

    @property
    def log_inner_text(self) -> Array:
        """The text anchors' state, (n,)."""
        return self.table.arrays()["log_inner_text"]
