"""The inner estimates in the host's memory, and the adapter between `drrho_torch.ContrastiveLoss` and estimators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import array_api_compat.torch
import numpy as np
import torch
from torch import Tensor

from drrho_core import checks
from drrho_core.state.inner import COLUMNS, OWNER, EstimatorOfRows
from drrho_core.state.table import Column, storage_dtype
from drrho_core.state.table import Table as RowTable

_XP = array_api_compat.torch


class Pending(NamedTuple):
    """Rows on their way to the host."""

    samples: Tensor
    rows: Tensor
    arrived: torch.cuda.Event


class HostTable(RowTable):
    """A table in the host's memory, page-locked if its rows belong on a GPU, to which copies are asynchronous.

    All columns lie side by side, so that a batch is one copy to read and one to write.

    Parameters
    ----------
    columns : tuple of Column
        The columns.
    num_samples : int
        n >= 1.
    device : str or torch.device
        The device on which rows are returned and expected.
    dtype : torch.dtype, optional
        float32 (default) or wider.
    owner : str
        The table's name in messages.
    """

    def __init__(
        self,
        columns: tuple[Column, ...],
        num_samples: int,
        *,
        device: str | torch.device,
        dtype: torch.dtype | None = None,
        owner: str,
    ) -> None:
        super().__init__(columns, owner, _XP)
        num_samples = checks.integer("num_samples", num_samples, minimum=1)
        try:
            like = torch.empty(0, device=device, dtype=torch.float32)
        except (RuntimeError, AssertionError, TypeError) as error:  # no device has this name, or it is not there
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device must be 'cpu' or another that torch has, got {device!r}: {reason}") from error
        self._like = like.to(storage_dtype(like, dtype, _XP))
        self._start(self._fresh(num_samples))

    def _start(self, state: Tensor) -> None:
        """Adopt a state (n, columns), with a stream of its own if the device is a GPU."""
        self._pinned = self._like.device.type == "cuda"
        self._stream = torch.cuda.Stream(self._like.device) if self._pinned else None  # type: ignore[no-untyped-call]
        self._pending: Pending | None = None
        self._state = self.index_like = state
        self.row_like, self.num_samples = self._like, state.shape[0]

    def _fresh(self, num_samples: int) -> Tensor:
        """Return rows of samples that no batch has visited, page-locked if the device is a GPU."""
        row = torch.tensor([column.fresh for column in self.columns], dtype=self._like.dtype)
        pinned = self._like.device.type == "cuda"
        rows = torch.empty((num_samples, len(self.columns)), dtype=self._like.dtype, pin_memory=pinned)
        return rows.copy_(row.expand_as(rows))

    def __getstate__(self) -> dict[str, Any]:
        """Leave streams and rows on their way out of copies: they belong to this object."""
        self.settle()
        return {"columns": self.columns, "owner": self.owner, "_like": self._like, "_state": self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the numbers into page-locked memory, and open a stream."""
        vars(self).update(state, xp=_XP)
        rows = self._fresh(self._state.shape[0])
        self._start(rows.copy_(self._state))

    def read(self, index: Tensor) -> tuple[Tensor, ...]:
        """Return copies of the rows on the device; a GPU's current stream waits for them, not the host."""
        pending = self._pending
        if pending is not None and bool(torch.any(torch.isin(index, pending.samples))):
            self.settle()
        rows = torch.empty((index.shape[0], len(self.columns)), dtype=self._like.dtype, pin_memory=self._pinned)
        torch.index_select(self._state, 0, index, out=rows)
        if self._stream is not None:
            current = torch.cuda.current_stream(self._like.device)
            with torch.cuda.stream(self._stream):
                rows = rows.to(self._like.device, non_blocking=True)
            current.wait_stream(self._stream)
            rows.record_stream(current)
        return tuple([column.contiguous() for column in rows.unbind(1)])

    def write(self, index: Tensor, rows: Mapping[str, Tensor]) -> Self:
        """Write rows, on a GPU by starting their copy to the host; the next call that needs them stores them."""
        self.settle()
        together = torch.stack(list(rows.values()), dim=1)
        if self._stream is None:
            self._state[index] = together.cpu()
            return self
        self._stream.wait_stream(torch.cuda.current_stream(self._like.device))
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
        with torch.cuda.stream(self._stream):
            host.copy_(together, non_blocking=True)
            arrived.record(self._stream)
        together.record_stream(self._stream)
        self._pending = Pending(index.clone(), host, arrived)
        return self

    def settle(self) -> None:
        """Store the rows that a `write` left on their way."""
        if self._pending is not None:
            samples, rows, arrived = self._pending
            arrived.synchronize()
            self._state[samples] = rows
            self._pending = None

    def resized(self, num_samples: int) -> Self:
        """Return a new table: the old rows first, then rows that no batch has visited."""
        self.settle()
        grown = type(self)(
            self.columns, num_samples, device=self._like.device, dtype=self._like.dtype, owner=self.owner
        )
        grown._state[: self.num_samples] = self._state
        return grown

    def arrays(self) -> Mapping[str, Tensor]:
        """Return every column (n,) by name: views of the state on the host."""
        self.settle()
        return {column.name: self._state[:, place] for place, column in enumerate(self.columns)}

    def replace(self, arrays: Mapping[str, Tensor]) -> None:
        """Copy an array (n,) into every column."""
        self.settle()
        for place, column in enumerate(self.columns):
            self._state[:, place] = arrays[column.name]


class HostEstimator(EstimatorOfRows):
    """Both directions' logarithmic inner estimates in the host's memory, for rows on a device.

    The methods are those of `drrho_core.InnerEstimator`.

    Parameters
    ----------
    num_samples : int
        n >= 1. The state takes 8 n bytes of the host's memory in float32, page-locked if the device is a GPU.
    device : str or torch.device
        The device on which `gather` returns rows, and on which `scatter` expects them.
    dtype : torch.dtype, optional
        float32 (default) or wider.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    `sample_index` lies on the host, where the batch was drawn: reading it there costs nothing, and it is always
    checked. Copies to and from a GPU are asynchronous. `scatter` does not wait for the rows: it starts the copy to the
    host on a stream of its own and returns. The rows are written by the next call that needs them: a `gather` of one of
    the same samples, which waits; the next `scatter`; or a call that reads the whole state. On the CPU the rows are
    those of `drrho_core.InnerEstimator`, bit for bit. Rows on a GPU are not read: nan is stored.

    Examples
    --------
    >>> estimator = HostEstimator(4, device="cpu")
    >>> estimator = estimator.scatter(torch.tensor([2, 0]), torch.tensor([0.5, 1.5]), torch.tensor([0.0, 1.0]))
    >>> [side.tolist() for side in estimator.gather(torch.tensor([0, 1]))]
    [[1.5, -inf], [1.0, -inf]]
    """

    table: HostTable

    def __init__(self, num_samples: int, *, device: str | torch.device, dtype: torch.dtype | None = None) -> None:
        self.table = HostTable(COLUMNS, num_samples, device=device, dtype=dtype, owner=OWNER)

    def __repr__(self) -> str:
        """Show size, device and dtype."""
        dtype = self.table.row_like.dtype
        return f"HostEstimator(num_samples={self.num_samples}, device='{self.device}', dtype={dtype})"

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return torch.device(self.table.row_like.device)

    @property
    def log_inner_image(self) -> Tensor:
        """The image anchors' state on the host, (n,); ``-inf`` = never visited."""
        return self.table.arrays()["log_inner_image"]

    @property
    def log_inner_text(self) -> Tensor:
        """The text anchors' state on the host, (n,)."""
        return self.table.arrays()["log_inner_text"]


class Table:
    """An estimator object as tensors: it may keep tensors itself, on any device, or NumPy arrays, say in a file.

    Parameters
    ----------
    estimator : object
        It has `num_samples`, `gather`, `scatter`, `grow`, `state_dict` and `load_state_dict` as
        `drrho_core.InnerEstimator` has them.

    Raises
    ------
    TypeError
        If it is no such object.
    """

    METHODS = ("gather", "scatter", "grow", "state_dict", "load_state_dict")
    NAMES = ("log_inner_image", "log_inner_text")

    def __init__(self, estimator: Any) -> None:
        missing = [name for name in ("num_samples", *self.METHODS) if not hasattr(estimator, name)]
        if missing or isinstance(estimator, type):
            raise TypeError(
                "estimator must be None or an estimator object such as drrho_core.InnerEstimator, got "
                f"{estimator if isinstance(estimator, type) else type(estimator).__name__}"
            )
        self.estimator = estimator
        side = getattr(estimator, "log_inner_image", None)
        # The device that the index has to be on; None for NumPy arrays.
        self._index_device = side.device if isinstance(side, Tensor) else None
        try:
            rows, _ = estimator.gather(self._index(torch.zeros(0, dtype=torch.int64)))
        except TypeError:
            rows = None
        if not isinstance(rows, (Tensor, np.ndarray)):
            raise TypeError(
                f"estimator must keep torch tensors or NumPy arrays, got {type(estimator).__name__} of another library"
            )
        rows = torch.as_tensor(rows)
        self.dtype, self._row_device = rows.dtype, rows.device

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return int(self.estimator.num_samples)

    def gather(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows of a batch on `device`."""
        image, text = self.estimator.gather(self._index(index))
        return torch.as_tensor(image).to(device), torch.as_tensor(text).to(device)

    def scatter(self, index: Tensor, log_inner_image: Tensor, log_inner_text: Tensor) -> None:
        """Write the rows of a batch."""
        rows = [self._rows(side.to(self._row_device)) for side in (log_inner_image, log_inner_text)]
        self.estimator = self.estimator.scatter(self._index(index), *rows)

    def grow(self, num_samples: int) -> None:
        """Make room for more samples."""
        self.estimator = self.estimator.grow(num_samples)

    def state_dict(self, prefix: str) -> dict[str, Any]:
        """Return the estimator's state: tables under the names of a module's buffers, all else below ``estimator.``."""
        return {
            f"{prefix}{name if name in self.NAMES else f'estimator.{name}'}": (
                torch.as_tensor(value) if isinstance(value, np.ndarray) else value
            )
            for name, value in self.estimator.state_dict().items()
        }

    def keys(self, prefix: str, state_dict: Mapping[str, Any]) -> dict[str, str]:
        """Return the entries of a module's state that are the estimator's, and their names there."""
        found = {f"{prefix}{name}": name for name in self.NAMES if f"{prefix}{name}" in state_dict}
        start = f"{prefix}estimator."
        return found | {key: key.removeprefix(start) for key in state_dict if key.startswith(start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the entries that `keys` has found, converted to the type and place of the table."""
        self.estimator.load_state_dict(
            {
                name: self._rows(value.to(self._index_device or "cpu", self.dtype)) if name in self.NAMES else value
                for name, value in state.items()
            }
        )

    def _index(self, index: Tensor) -> Any:
        return index.cpu().numpy() if self._index_device is None else index.to(self._index_device)

    def _rows(self, rows: Tensor) -> Any:
        return rows.detach().cpu().numpy() if self._index_device is None else rows.detach()
