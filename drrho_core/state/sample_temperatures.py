"""One learned temperature per sample and direction, in a table of four columns: temperatures and momenta.

    m_i <- (1 - beta) m_i + beta s_i,   t_i <- t_i - learning_rate m_i, then projected onto the bounds    (iSogCLR)

t_i is the temperature of anchor i. The slope s_i is the derivative with respect to t_i of what this anchor contributes
to the objective. The momentum m_i is the moving average of s_i. See `drrho_core.state.temperature_updates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drrho_core import _validate
from drrho_core._array_api import Array, Scalar, namespace_of
from drrho_core._validate import FINITE, FINITE_POSITIVE, NOT_NEGATIVE, UNIT_INTERVAL
from drrho_core.contrastive.ranks import Ranks
from drrho_core.state.sharded_table import make_table
from drrho_core.state.table import Column, Table, checked_index, storage_dtype, with_version
from drrho_core.state.temperature_updates import (
    OWNER,
    VERSION,
    TemperatureRows,
    check_bounds,
    check_start,
    move,
)


class PerSampleTemperature:
    """One learned temperature and one momentum per sample and direction (RGCL, iSogCLR), with common bounds.

    Parameters
    ----------
    num_samples : int
        n >= 1, the number of samples in the data set.
    temperature : float
        The first value of all temperatures, within the bounds.
    like : array
        As in `GlobalTemperature`.
    minimum, maximum : float
        Bounds, 0 < minimum <= maximum.
    beta : float
        Weight of the new slope in the moving average of slopes, in (0, 1]; with 1 older slopes are ignored.
    dtype : dtype, optional
        As in `GlobalTemperature`.
    ranks : Ranks, optional
        As in `InnerEstimator`.

    Attributes
    ----------
    temperature_image, temperature_text : array, shape (n,)
        The temperatures of every image anchor and every text anchor.
    momentum_image, momentum_text : array, shape (n,)
        Moving averages of the anchors' slopes, which start at 0.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    See `update_temperature_rows`. Every `index` is an array (b,) of integers in [0, n) without repeats. A batch changes
    no temperature and no momentum of samples that it does not contain.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import contrastive_step
    >>> images, texts, unseen = np.eye(3), np.eye(3)[[0, 2, 1]], np.full(3, -np.inf)
    >>> learned, index = PerSampleTemperature(10, 0.5, like=images), np.asarray([4, 0, 7])
    >>> step = contrastive_step(images, texts, unseen, unseen, temperature=learned.gather(index), radius=0.2)
    >>> learned = learned.update(index, step.temperature_gradient, learning_rate=0.1)
    >>> learned.temperature_image[[4, 0, 7, 9]].round(4).tolist()  # an aligned pair, two swapped pairs, one not visited
    [0.482, 0.5115, 0.5115, 0.5]
    """

    learned = True

    def __init__(
        self,
        num_samples: int,
        temperature: float,
        *,
        like: Array,
        minimum: float = 0.01,
        maximum: float = 1.0,
        beta: float = 0.9,
        dtype: Any = None,
        ranks: Ranks | None = None,
    ) -> None:
        xp = namespace_of({"like": like})
        # The bounds must fit the dtype in which the temperatures are stored, not that of `like`.
        self._minimum, self._maximum = check_bounds(minimum, maximum, storage_dtype(like, dtype, xp), xp)
        self._beta = _validate.number("beta", beta, UNIT_INTERVAL)
        start = check_start(temperature, self._minimum, self._maximum)
        # The order of the columns is that of the rows in `gather` and `update`.
        columns = (
            Column("temperature_image", start, FINITE_POSITIVE),
            Column("temperature_text", start, FINITE_POSITIVE),
            Column("momentum_image", 0.0, FINITE),
            Column("momentum_text", 0.0, FINITE),
        )
        self.table = make_table(columns, num_samples, like=like, dtype=dtype, owner=OWNER, ranks=ranks)

    def __repr__(self) -> str:
        """Show size, bounds and dtype."""
        return (
            f"PerSampleTemperature(num_samples={self.num_samples}, minimum={self._minimum}, maximum={self._maximum}, "
            f"beta={self._beta}, dtype={self.temperature_image.dtype})"
        )

    @property
    def num_samples(self) -> int:
        """Number of samples n."""
        return self.table.num_samples

    @property
    def temperature_image(self) -> Array:
        """The temperatures of the image anchors, (n,)."""
        return self.table.arrays()["temperature_image"]

    @property
    def temperature_text(self) -> Array:
        """The temperatures of the text anchors, (n,)."""
        return self.table.arrays()["temperature_text"]

    @property
    def momentum_image(self) -> Array:
        """The moving averages of the image anchors' slopes, (n,)."""
        return self.table.arrays()["momentum_image"]

    @property
    def momentum_text(self) -> Array:
        """The moving averages of the text anchors' slopes, (n,)."""
        return self.table.arrays()["momentum_text"]

    def gather(self, index: Array, /) -> tuple[Array, Array]:
        """Return the temperatures of a batch, for the argument `temperature` of `contrastive_step`.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of the batch: in [0, n), no repeats.

        Returns
        -------
        tuple of arrays, shape (b,)
            Copies of the image anchors' and the text anchors' temperatures.

        Raises
        ------
        TypeError, ValueError
            If `index` breaks these rules. Values are read on the host and outside tracing only.
        """
        image, text, *_ = self.table.gather(index)
        return image, text

    def for_batch(self, index: Array, /) -> tuple[Array, Array]:
        """Return the temperatures of a batch, as `gather` does."""
        return self.gather(index)

    def after_batch(
        self, index: Array, gradient: tuple[Array, Array], /, *, learning_rate: Scalar
    ) -> PerSampleTemperature:
        """Return the temperatures after one step, as `update` does."""
        return self.update(index, gradient, learning_rate=learning_rate)

    def update(self, index: Array, gradient: tuple[Array, Array], /, *, learning_rate: Scalar) -> PerSampleTemperature:
        """Move the temperatures of a batch and return the object to use from now on.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of the batch: in [0, n), no repeats (libraries treat repeats differently).
        gradient : pair of arrays, shape (b,)
            ``temperature_gradient`` as `contrastive_step` returns it. This method removes the factor 1/2b, which comes
            from the mean over anchors, so the change of a temperature does not depend on the batch size. With `ranks`
            these are the own pairs' gradients of `sharded_contrastive_step`, and b is the batch size of all ranks.
        learning_rate : float or array of shape ()
            Number >= 0. At each visit a temperature changes by this number times the moving average of its slope.

        Returns
        -------
        PerSampleTemperature
            This object, updated in place, if the library's arrays can be written to; else a new object.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules; nothing has been written then.
        """
        table, xp = self.table, self.table.xp
        index, slopes, rate = table.together(
            lambda: self._checked_update(index, gradient, learning_rate),
            {"sample_index": index, "gradient": gradient, "learning_rate": learning_rate},
        )
        # The slope s_i is 2b times the gradient, because the objective is a mean over all 2b anchors of the batch,
        # which several ranks may share.
        factor = 2 * int(index.shape[0]) * table.num_ranks
        bounds, rows = (self._minimum, self._maximum), table.read(index)
        image = move(TemperatureRows(rows[0], rows[2]), slopes[0], factor, rate, bounds, self._beta, xp)
        text = move(TemperatureRows(rows[1], rows[3]), slopes[1], factor, rate, bounds, self._beta, xp)
        moved = (image.temperature, text.temperature, image.momentum, text.momentum)
        names = [column.name for column in table.columns]
        return self._around(table.write(index, dict(zip(names, moved, strict=True))))

    def _checked_update(
        self, index: Array, gradient: tuple[Array, Array], learning_rate: Scalar
    ) -> tuple[Array, list[Array], Scalar]:
        """Check the arguments of `update`, and return the index, both slopes and the learning rate."""
        table, xp = self.table, self.table.xp
        if not isinstance(gradient, (tuple, list)) or len(gradient) != 2:
            table.checked(index)  # an error in the index is raised first
            raise TypeError(f"gradient must be a pair (image, text) of arrays, got {_validate.describe(gradient)}")
        # One call checks index, gradients and learning rate before anything is written.
        given = {"the state": table.index_like, "sample_index": index}
        given |= {f"gradient[{side}]": array for side, array in enumerate(gradient)}
        call = _validate.arrays(given, xp, options={"learning_rate": learning_rate})
        index = checked_index(call, self.num_samples)
        batch_size, dtype = int(index.shape[0]), table.index_like.dtype
        slopes = [
            xp.astype(call.array(f"gradient[{side}]", shape=(batch_size,), meaning="(batch_size,)", rule=FINITE), dtype)
            for side in (0, 1)
        ]
        return index, slopes, call.option("learning_rate", learning_rate, NOT_NEGATIVE, dtype)

    def grow(self, num_samples: int, /) -> PerSampleTemperature:
        """Return temperatures of `num_samples` >= n samples: the old rows, then new rows with the first temperature."""
        return self._around(self.table.grow(num_samples))

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the state by name, each (n,), and its ``version`` of shape ()."""
        return with_version(self.table.state_dict(), VERSION, self.table.xp)

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Replace the state by one that `state_dict` returned; the bounds of this object apply to the next update.

        Raises
        ------
        ValueError, TypeError
            If names, version, shapes, dtypes or values do not fit this object; then nothing has been changed.
        """
        table = self.table
        table.replace(table.together(lambda: table.checked_state(state, VERSION), {}, wait=True))

    def _around(self, table: Table) -> PerSampleTemperature:
        """Return self if `table` is the table of this object, else a new object with `table`."""
        if table is self.table:
            return self
        # The copy is made without the constructor, because the constructor would check everything and build a table.
        other = object.__new__(PerSampleTemperature)
        vars(other).update(vars(self), table=table)
        return other
