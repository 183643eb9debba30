"""The adapter between `drrho_torch.ContrastiveLoss` and estimator objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import array_api_compat.torch
import numpy as np
import torch
from torch import Tensor

from drrho_core.checks import values_visible

_XP = array_api_compat.torch


class EstimatorAdapter:
    """Converts between the tensors of `ContrastiveLoss` and the rows of an estimator object.

    The object keeps the inner estimates, as tensors on any device or as NumPy arrays, for example in a file.

    Parameters
    ----------
    estimator : object
        An object with the `num_samples`, `gather`, `scatter`, `grow`, `state_dict` and `load_state_dict` of
        `drrho_core.InnerEstimator`.

    Raises
    ------
    TypeError
        If the object lacks one of these members, or keeps arrays of another library.

    Attributes
    ----------
    reads_ids : bool
        True if the estimator takes the index on the host and so checks each id, even if the features lie on a device.
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
        # The device on which the estimator expects the index; None if it expects NumPy arrays.
        self._index_device = side.device if isinstance(side, Tensor) else None
        self.reads_ids = not isinstance(side, Tensor) or values_visible(side, _XP)
        # The estimators of this library keep their rows in a table, which ranks may share.
        table = getattr(estimator, "table", None)
        self.num_ranks, self.ranks = int(getattr(table, "num_ranks", 1)), getattr(table, "ranks", None)
        # The rows of an empty batch have the library, the dtype and the device of all rows. Ranks that share a table
        # would have to exchange them.
        try:
            if table is not None and self.num_ranks > 1:
                rows = table.row_like
            else:
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

    def together(self, check: Callable[[], None], facts: Mapping[str, str]) -> None:
        """Call `check`; if the rows are split among processes, an error of one process is raised on all of them."""
        table = getattr(self.estimator, "table", None)
        if table is None:
            check()
        else:
            table.together(check, facts, wait=True)

    def grow(self, num_samples: int) -> None:
        """Make room for more samples."""
        self.estimator = self.estimator.grow(num_samples)

    def state_dict(self, prefix: str) -> dict[str, Any]:
        """Return the estimator's state. Estimates are named as buffers; all other keys start with ``estimator.``."""
        # With these names a loss with buffers and a loss with an estimator object can both load the estimates.
        return {
            f"{prefix}{name if name in self.NAMES else f'estimator.{name}'}": (
                torch.as_tensor(value) if isinstance(value, np.ndarray) else value
            )
            for name, value in self.estimator.state_dict().items()
        }

    def keys(self, prefix: str, state_dict: Mapping[str, Any]) -> dict[str, str]:
        """Return the keys of a module's state that belong to the estimator, and their names in the object's state."""
        # The state of a loss with buffers holds the estimates only; a loss with an estimator object may add entries.
        tables = {f"{prefix}{name}": name for name in self.NAMES if f"{prefix}{name}" in state_dict}
        start = f"{prefix}estimator."
        return tables | {key: key.removeprefix(start) for key in state_dict if key.startswith(start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the entries whose keys `keys` returned, converted to the dtype and the device of the estimator."""
        self.estimator.load_state_dict(
            {
                name: self._rows(value.to(self._index_device or "cpu", self.dtype)) if name in self.NAMES else value
                for name, value in state.items()
            }
        )

    def _index(self, index: Tensor) -> Any:
        """Return the index as the estimator expects it: as a NumPy array, or as a tensor on the estimator's device."""
        return index.cpu().numpy() if self._index_device is None else index.to(self._index_device)

    def _rows(self, rows: Tensor) -> Any:
        """Return rows as the estimator expects them: as a NumPy array or as a tensor."""
        return rows.detach().cpu().numpy() if self._index_device is None else rows.detach()
