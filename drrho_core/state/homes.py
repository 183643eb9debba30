"""The inner estimates of a training run, stored in a *home*: the device's memory, the host's memory, or a file.

A backend connects the core with one array library. Each backend builds estimators in the homes that it supports
(`Backend.homes`). In every other home the NumPy backend builds the estimator, and `RunEstimator` copies each batch of
rows between NumPy and the run's backend. So a run may combine any backend with any home.

In the home ``"split"`` the numbers are on the devices of all ranks, processes that share each batch: each rank stores
those of ceil(n / W) samples; see `drrho_core.state.sharded_table`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from drrho_core._array_api import Array
from drrho_core.backend import Backend, Home, get_backend
from drrho_core.contrastive.ranks import Ranks
from drrho_core.state.inner import EstimatorOfRows, InnerEstimator

HOMES = ("device", "host", "file", "split")
"""The names of the homes in the settings of a training run."""


class RunEstimator:
    """The inner estimates of a training run in any home; indices are NumPy arrays, rows are the backend's arrays.

    `make_estimator` builds this object. A saved state holds NumPy arrays for every home, so a run may be continued in
    another home than the home in which it started.

    Parameters
    ----------
    home : Home
        The estimator that a backend has built, and the function that converts NumPy arrays to the estimator's arrays.
    to_numpy : callable
        The function that converts the estimator's arrays to NumPy arrays.
    foreign : Backend, optional
        The run's backend, if another backend has built the estimator. Then rows are converted between the two.
    """

    def __init__(self, home: Home, *, to_numpy: Callable[[Array], Any], foreign: Backend | None = None) -> None:
        self.estimator: EstimatorOfRows = home.estimator
        self._from_numpy, self._to_numpy, self._foreign = home.from_numpy, to_numpy, foreign

    @property
    def num_samples(self) -> int:
        """Number of samples n."""
        return self.estimator.num_samples

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays that `state_dict` returns."""
        return tuple(column.name for column in self.estimator.table.columns)

    @property
    def own_range(self) -> tuple[int, int]:
        """The ids of the samples in `state_dict`: from the first number up to the second, exclusive."""
        return self.estimator.table.own_range

    def gather(self, sample_index: Any, /) -> tuple[Array, Array]:
        """Return the rows of a batch as arrays of the backend; `sample_index` is a NumPy array of integers, (b,)."""
        # The index is on the host. It is copied to the device only if the estimator is stored there.
        image, text = self.estimator.gather(self._from_numpy(sample_index))
        if self._foreign is None:
            return image, text
        return self._foreign.asarray(image), self._foreign.asarray(text)

    def scatter(self, sample_index: Any, log_inner_image: Array, log_inner_text: Array, /) -> None:
        """Write the rows of a batch: arrays (b,) of the backend, and their `sample_index` as a NumPy array."""
        if self._foreign is not None:
            to_numpy = self._foreign.to_numpy
            log_inner_image, log_inner_text = to_numpy(log_inner_image), to_numpy(log_inner_text)
        self.estimator = self.estimator.scatter(self._from_numpy(sample_index), log_inner_image, log_inner_text)

    def state_dict(self) -> dict[str, Any]:
        """Return ``log_inner_image`` and ``log_inner_text`` as NumPy arrays (n,); if ranks split them, the own rows."""
        # If the home is a file, the estimator's own `state_dict` describes the file and holds no numbers.
        return {name: self._to_numpy(array) for name, array in self.estimator.table.arrays().items()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Replace the state by NumPy arrays (n,) of all samples, which an estimator in any home may have saved.

        Raises
        ------
        TypeError, ValueError
            If names, shapes, dtypes or values do not fit this object; then nothing has been changed.
        """
        table = self.estimator.table
        # The own rows are cut out on the host, so the device never holds the rows of all samples.
        own = table.own_rows_of(state)
        table.load_state_dict({name: self._from_numpy(array) for name, array in own.items()})

    def close(self) -> None:
        """Close the file, if the home is a file."""
        # Memory is freed together with the object, but a file stays locked until it is closed.
        close = getattr(self.estimator, "close", None)
        if close is not None:
            close()


def make_estimator(
    home: str,
    num_samples: int,
    /,
    *,
    backend: Backend,
    path: str | os.PathLike[str] | None = None,
    ranks: Ranks | None = None,
) -> RunEstimator:
    """Build the inner estimates of a training run in a home.

    Parameters
    ----------
    home : str
        One of `HOMES`. ``"device"``: the memory of the backend's device. ``"host"``: the host's memory, 8 n bytes in
        float32. ``"file"``: a sparse file, for a state that is too large for the memory. ``"split"``: the devices of
        all ranks, and without `ranks` the device.
    num_samples : int
        n >= 1, the number of samples in the data set.
    backend : Backend
        The run's backend. The rows have the dtype of this backend.
    path : path, optional
        The file, needed for ``"file"`` and refused for the other homes. An existing file is opened.
    ranks : Ranks, optional
        The ranks that split the rows, for the home ``"split"`` only. All of them call the same methods at the same
        time, with the rows of their own pairs.

    Returns
    -------
    RunEstimator
        The estimator. No sample counts as visited, unless `path` is an existing file.

    Raises
    ------
    TypeError, ValueError
        If there is no such home, or an argument breaks these rules.

    Examples
    --------
    >>> import numpy as np
    >>> estimator = make_estimator("host", 4, backend=get_backend("numpy"))
    >>> estimator.scatter(np.asarray([2, 0]), *np.asarray([[0.5, 1.5], [0.0, 1.0]], dtype="float32"))
    >>> [side.tolist() for side in estimator.gather(np.asarray([0, 1]))]
    [[1.5, -inf], [1.0, -inf]]
    """
    if home not in HOMES:
        raise ValueError(f"home must be one of {', '.join(HOMES)}, got {home!r}")
    if (home == "file") != (path is not None):
        rule = "be given for the home 'file'" if home == "file" else f"be None for the home {home!r}"
        raise ValueError(f"path must {rule}, got {path!r}")
    if ranks is not None:
        if home != "split":
            raise ValueError(f"ranks must be None for the home {home!r}, got {ranks!r}")
        estimator = InnerEstimator(num_samples, like=backend.asarray([0.0]), ranks=ranks)
        return RunEstimator(Home(estimator, backend.asarray), to_numpy=backend.to_numpy)
    home = "device" if home == "split" else home
    if home in backend.homes:
        return RunEstimator(backend.estimator(home, num_samples, path=path), to_numpy=backend.to_numpy)
    # The backend lacks this home: NumPy stores the rows in the host's memory or in a file, and batches are copied.
    host = get_backend("numpy", dtype=backend.dtype)
    return RunEstimator(host.estimator(home, num_samples, path=path), to_numpy=host.to_numpy, foreign=backend)
