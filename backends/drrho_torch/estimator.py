"""The inner estimates in the host's memory, and what `drrho_torch.ContrastiveLoss` asks of an estimator object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import array_api_compat.torch
import numpy as np
import torch
from torch import Tensor

from drrho_core import _validate
from drrho_core._array_api import namespace_of
from drrho_core.estimator import check_index, check_rows, storage_dtype

_XP = array_api_compat.torch


class HostEstimator:
    """Both directions' logarithmic inner estimates on the host, their rows on a device; as `drrho_core.InnerEstimator`.

    Parameters
    ----------
    num_samples : int
        n >= 1. The state takes 8 n bytes of the host's memory in float32, page-locked where the device is a GPU.
    device : str or torch.device
        Where `gather` takes the rows, and where `scatter` expects them.
    dtype : torch.dtype, optional
        float32 (default) or wider.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    `sample_index` lives on the host, where the batch was drawn: a look at it there costs nothing, and it is always
    checked. Copies to and from a GPU are asynchronous. `scatter` does not wait for the rows: it starts their way to the
    host on a stream of its own and returns. They are written by the next call that needs them: a `gather` of one of
    the same samples, which waits; the next `scatter`; or whatever reads the whole state. On the CPU it does what
    `drrho_core.InnerEstimator` does, bit for bit. Rows on a GPU are not looked at: nan goes in.

    Examples
    --------
    >>> estimator = HostEstimator(4, device="cpu")
    >>> estimator = estimator.scatter(torch.tensor([2, 0]), torch.tensor([0.5, 1.5]), torch.tensor([0.0, 1.0]))
    >>> [side.tolist() for side in estimator.gather(torch.tensor([0, 1]))]
    [[1.5, -inf], [1.0, -inf]]
    """

    def __init__(self, num_samples: int, *, device: str | torch.device, dtype: torch.dtype | None = None) -> None:
        num_samples = _validate.integer("num_samples", num_samples, minimum=1)
        try:
            self._like = torch.empty(0, device=device, dtype=torch.float32)
        except (RuntimeError, AssertionError, TypeError) as error:  # bad words, no such device
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device must be 'cpu' or another that torch has, got {device!r}: {reason}") from error
        self._like = self._like.to(storage_dtype(self._like, dtype, _XP))
        self._pinned = self._like.device.type == "cuda"
        self._stream = torch.cuda.Stream(self._like.device) if self._pinned else None  # type: ignore[no-untyped-call]
        self._pending: _Pending | None = None
        self._state = self._never(num_samples)

    def _never(self, num_samples: int) -> Tensor:
        """Both numbers of a sample side by side: one row to read and to write."""
        return torch.full((num_samples, 2), -torch.inf, dtype=self._like.dtype, pin_memory=self._pinned)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the numbers; streams and rows on their way belong to this object."""
        self._settle()
        return _restored, (str(self.device), self._like.dtype, self._state)

    def __repr__(self) -> str:
        """Show what it holds."""
        return f"HostEstimator(num_samples={self.num_samples}, device='{self.device}', dtype={self._like.dtype})"

    @property
    def num_samples(self) -> int:
        """Number of samples n."""
        return self._state.shape[0]

    @property
    def device(self) -> torch.device:
        """Where rows are taken to."""
        return self._like.device

    @property
    def log_inner_image(self) -> Tensor:
        """The image anchors' state on the host, (n,); ``-inf`` = never visited."""
        self._settle()
        return self._state[:, 0]

    @property
    def log_inner_text(self) -> Tensor:
        """The text anchors' state on the host, (n,)."""
        self._settle()
        return self._state[:, 1]

    def gather(self, index: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return the rows of a batch.

        Parameters
        ----------
        index : tensor of integers, shape (b,), on the host
            `sample_index` of the batch: in [0, n), no repeats.

        Returns
        -------
        tuple of tensors, shape (b,)
            The image anchors' and the text anchors' rows on the device; a GPU's current stream waits for them, not the
            host.

        Raises
        ------
        TypeError, ValueError
            If `index` is no such tensor.
        """
        index = self._checked(index)
        pending = self._pending
        if pending is not None and bool(torch.any(torch.isin(index, pending.samples))):
            self._settle()
        rows = torch.empty((index.shape[0], 2), dtype=self._like.dtype, pin_memory=self._pinned)
        torch.index_select(self._state, 0, index, out=rows)
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._stream):
                rows = rows.to(self.device, non_blocking=True)
            current.wait_stream(self._stream)
            rows.record_stream(current)
        image, text = rows.unbind(1)
        return image.contiguous(), text.contiguous()

    def scatter(self, index: Tensor, log_inner_image: Tensor, log_inner_text: Tensor, /) -> HostEstimator:
        """Write the rows of a batch and return this estimator.

        Parameters
        ----------
        index : tensor of integers, shape (b,), on the host
            `sample_index` of the batch: in [0, n), no repeats.
        log_inner_image, log_inner_text : tensor, shape (b,), on the device
            Updated rows, in the state's dtype.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules; nothing has been written then.
        """
        index = self._checked(index)
        check_rows(log_inner_image, log_inner_text, size=index.shape[0], like=self._like, xp=_XP)
        self._settle()
        rows = torch.stack([log_inner_image, log_inner_text], dim=1)
        if self._stream is None:
            self._state[index] = rows.cpu()
            return self
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        with torch.cuda.stream(self._stream):
            host.copy_(rows, non_blocking=True)
            arrived.record(self._stream)
        rows.record_stream(self._stream)
        self._pending = _Pending(index.clone(), host, arrived)
        return self

    def grow(self, num_samples: int, /) -> HostEstimator:
        """Return an estimator of `num_samples` >= n samples: the old rows first, the new ones never visited."""
        num_samples = _validate.integer("num_samples", num_samples, minimum=self.num_samples)
        self._settle()
        grown = HostEstimator(num_samples, device=self.device, dtype=self._like.dtype)
        grown._state[: self.num_samples] = self._state
        return grown

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies by name, on the host: ``log_inner_image`` and ``log_inner_text``, each (n,)."""
        return {name: getattr(self, name).clone() for name in ("log_inner_image", "log_inner_text")}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        """Take over what `state_dict` returned, or that of a `drrho_core.InnerEstimator` on the CPU.

        Parameters
        ----------
        state : mapping
            ``log_inner_image`` and ``log_inner_text``, tensors (n,) on the host, in this dtype.

        Raises
        ------
        TypeError, ValueError
            If names, shapes, dtypes or values differ; nothing has been changed then.
        """
        names = ("log_inner_image", "log_inner_text")
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        if set(state) != set(names):
            raise ValueError(f"state must hold {' and '.join(names)} and nothing else, got {list(state)}")
        image, text = (state[name] for name in names)
        for name in names:
            namespace_of({name: state[name]}, _XP)
            _validate.shape(name, state[name], (self.num_samples,), "(num_samples,)")
        check_rows(image, text, size=self.num_samples, like=self._state, xp=_XP)
        self._settle()
        self._state[:, 0], self._state[:, 1] = image, text

    def _checked(self, index: Tensor) -> Tensor:
        checked: Tensor = check_index(index, self.num_samples, like=self._state, xp=_XP)
        return checked

    def _settle(self) -> None:
        """Write what a `scatter` left on its way."""
        if self._pending is not None:
            samples, rows, arrived = self._pending
            arrived.synchronize()
            self._state[samples] = rows
            self._pending = None


class _Pending(NamedTuple):
    """Rows on their way to the host."""

    samples: Tensor
    rows: Tensor
    arrived: torch.cuda.Event


def _restored(device: str, dtype: torch.dtype, state: Tensor) -> HostEstimator:
    """Build the copy of a `HostEstimator`."""
    estimator = HostEstimator(state.shape[0], device=device, dtype=dtype)
    estimator._state.copy_(state)
    return estimator


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
