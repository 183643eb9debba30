"""Keeps the inner estimates in the host's memory, for training on a GPU or another device.

The inner estimates of a sample are two numbers, one for the image anchor and one for the text anchor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import array_api_compat.torch
import torch
from torch import Tensor

from drrho_core import checks
from drrho_core.state.inner import COLUMNS, OWNER, EstimatorOfRows
from drrho_core.state.table import Column, storage_dtype
from drrho_core.state.table import Table as Table

_XP = array_api_compat.torch


class Pending(NamedTuple):
    """Rows of a batch whose copy to the host has started, but which are not stored in the table yet."""

    samples: Tensor  # (b,) the rows of the table to write to
    rows: Tensor  # (b, columns) the target of the copy, on the host
    arrived: torch.cuda.Event  # reports when the copy is complete


class HostTable(Table):
    """A table in the host's memory for batches on a device.

    If the device is a GPU, the memory is page-locked, so that copies are asynchronous. The columns of a sample lie side
    by side, so that a batch takes one copy to read and one copy to write.

    Parameters
    ----------
    columns : tuple of Column
        The columns.
    num_samples : int
        Number of samples n, at least 1.
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
        # torch refuses to make this empty tensor if the device does not exist. The tensor also stores dtype and device
        # of the rows.
        try:
            like = torch.empty(0, device=device, dtype=torch.float32)
        except (RuntimeError, AssertionError, TypeError) as error:  # a malformed name, or a missing device
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device must be 'cpu' or another that torch has, got {device!r}: {reason}") from error
        self._like = like.to(storage_dtype(like, dtype, _XP))
        self._start(self._fresh(num_samples))

    def _start(self, state: Tensor) -> None:
        """Use `state` (n, columns) as the numbers of this table; if the device is a GPU, make a stream for copies."""
        self._pinned = self._like.device.type == "cuda"
        self._stream = torch.cuda.Stream(self._like.device) if self._pinned else None  # type: ignore[no-untyped-call]
        self._pending: Pending | None = None
        self._state = self.index_like = state
        self.row_like, self.num_samples = self._like, state.shape[0]

    def _fresh(self, num_samples: int) -> Tensor:
        """Return rows for samples that no batch has visited, in page-locked memory if the device is a GPU."""
        # Page-locked memory lets the GPU copy without the host's help.
        row = torch.tensor([column.fresh for column in self.columns], dtype=self._like.dtype)
        pinned = self._like.device.type == "cuda"
        rows = torch.empty((num_samples, len(self.columns)), dtype=self._like.dtype, pin_memory=pinned)
        return rows.copy_(row.expand_as(rows))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of this object gets: all numbers, but neither the stream nor pending rows."""
        self.settle()
        return {"columns": self.columns, "owner": self.owner, "_like": self._like, "_state": self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the numbers; if the device is a GPU, into page-locked memory and with a new stream."""
        vars(self).update(state, xp=_XP)
        # A pickled tensor is not page-locked any more.
        rows = self._fresh(self._state.shape[0])
        self._start(rows.copy_(self._state))

    def read(self, index: Tensor) -> tuple[Tensor, ...]:
        """Return copies of the rows on the device; on a GPU only the current stream waits for the copies."""
        # Pending rows are stored first, but only if this batch reads at least one of them.
        pending = self._pending
        if pending is not None and bool(torch.any(torch.isin(index, pending.samples))):
            self.settle()
        rows = torch.empty((index.shape[0], len(self.columns)), dtype=self._like.dtype, pin_memory=self._pinned)
        torch.index_select(self._state, 0, index, out=rows)
        # The copy to the GPU runs on a separate stream. `record_stream` keeps the memory of the rows reserved until the
        # current stream has used the rows.
        if self._stream is not None:
            current = torch.cuda.current_stream(self._like.device)
            with torch.cuda.stream(self._stream):
                rows = rows.to(self._like.device, non_blocking=True)
            current.wait_stream(self._stream)
            rows.record_stream(current)
        return tuple([column.contiguous() for column in rows.unbind(1)])

    def write(self, index: Tensor, rows: Mapping[str, Tensor]) -> Self:
        """Write rows. Rows on a GPU are only sent to the host; a later call stores them, see `HostEstimator`."""
        # Writes must keep their order, so pending rows of an earlier batch are stored first.
        self.settle()
        together = torch.stack(list(rows.values()), dim=1)
        if self._stream is None:
            self._state[index] = together.cpu()
            return self
        # The copy starts after the current stream has computed the rows; the event tells when the copy is complete.
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
        """Wait for the copy of the pending rows, if there are any, and store these rows in the table."""
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
    """Keeps logarithms of the inner estimates in the host's memory, and returns and expects rows on a device.

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
    `sample_index` lies on the host, where its values can be read without waiting for a GPU, so the values are always
    checked. Copies to and from a GPU are asynchronous. `scatter` does not wait for the rows: it starts the copy to the
    host on a separate stream and returns. The rows are written by the next call that needs them: a `gather` of one of
    the same samples, which waits for the copy; the next `scatter`; or a call that reads the whole state. On the CPU the
    rows are those of `drrho_core.InnerEstimator`, bit for bit. The values of rows on a GPU are not checked, so even nan
    is stored.

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
        """The logarithmic inner estimates of the image anchors on the host, (n,); ``-inf`` = never visited."""
        return self.table.arrays()["log_inner_image"]

    @property
    def log_inner_text(self) -> Tensor:
        """The logarithmic inner estimates of the text anchors on the host, (n,)."""
        return self.table.arrays()["log_inner_text"]
