"""Tables of inner estimates in checkpoints that other programs have saved with ``torch.save``."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["read_tables"]


def read_tables(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the tensors with certain names from a checkpoint, or from a mapping in the checkpoint.

    Parameters
    ----------
    path : Path
        A file that ``torch.save`` wrote: a mapping from names to tensors, numbers and further mappings.
    names : iterable of str
        The names to look for. The first mapping that holds any of the names is used.

    Returns
    -------
    dict of str to ndarray
        The tensors under the names that the mapping holds; float32 if a tensor has a half type.

    Raises
    ------
    ValueError
        If the file is no checkpoint or holds other objects than tensors, numbers, texts and collections of these. The
        file is read with ``weights_only=True``, so it cannot run code.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "epoch_1.pt"
    >>> torch.save({"epoch": 1, "loss": {"u1": torch.ones(2, 1)}}, file)
    >>> read_tables(file, ["u1", "u2"])
    {'u1': array([[1.],
           [1.]], dtype=float32)}
    """
    try:
        with warnings.catch_warnings():
            # torch warns about pickle protocols that it does not write itself; what it cannot read is an error anyway.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no checkpoint that can be read without running code: {reason}") from error
    tables = _first_with(content, frozenset(names))
    return {
        name: (table.float() if table.dtype in (torch.float16, torch.bfloat16) else table).detach().numpy().copy()
        for name, table in tables.items()
    }


def _first_with(content: Any, names: frozenset[str]) -> dict[str, torch.Tensor]:
    """Return the tensors under the names, from the first mapping that has one of them; outer mappings come first."""
    if not isinstance(content, Mapping):
        return {}
    named = {name: content[name] for name in sorted(names) if isinstance(content.get(name), torch.Tensor)}
    if named:
        return named
    inner = (_first_with(value, names) for value in content.values())
    return next((tables for tables in inner if tables), {})
