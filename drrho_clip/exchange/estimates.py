"""Inner estimates that other programs have saved, as the first estimates of a run.

The conversions are in `drrho_core.migration`. Here a file is read, the program is recognised by the names of the
tables, and the rows of the tables are matched with the training pairs of the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data import Dataset
from drrho_clip.errors import BadInput
from drrho_core.backend import Backend
from drrho_core.migration import log_inner_from_libauc_v2, log_inner_from_sogclr_loss

__all__ = ["LIBAUC", "RELEASED", "read_estimates"]

LIBAUC = ("u1", "u2", "b1", "b2")
"""Names of the tables of LibAUC's GCLoss_v2: estimates and their bounds, of images (1) and texts (2)."""

RELEASED = ("u_im", "u_tt", "bound_im", "bound_tt")
"""Names in checkpoints of FastCLIP and DRRho-CLIP; the bounds are there if every sample has its own temperature."""

_OURS = ("log_inner_image", "log_inner_text")
# LibAUC's unimodal loss has one table, which cannot be converted without the similarities of the pairs.
_UNIMODAL = ("u",)


def read_estimates(path: str | Path, dataset: Dataset, config: TrainConfig, backend: Backend) -> dict[str, np.ndarray]:
    """Return the estimates of a file as ``log_inner_image`` and ``log_inner_text``, each (n,), for a run.

    Parameters
    ----------
    path : path
        A checkpoint of LibAUC (with the tables u1, b1, u2, b2 of the loss) or of the released code of FastCLIP and
        DRRho-CLIP, or an .npz file with tables of the same names, or with log_inner_image and log_inner_text.
    dataset : Dataset
        The n training pairs of the run.
    config : TrainConfig
        The settings of the run. The batch size and eps must be those of the other program if the file has one
        temperature for all samples.
    backend : Backend
        The backend of the run; checkpoints other than .npz need a backend with a function `read_tables`.

    Raises
    ------
    BadInput
        If the file cannot be read, holds no known tables, or has tables of another number of rows than the training
        pairs, or the whole data of which they are a part.
    """
    path = Path(path)
    tables = _tables(path, backend)
    sides = (("image", "u1", "b1", "u_im", "bound_im"), ("text", "u2", "b2", "u_tt", "bound_tt"))
    estimates: dict[str, Any] = {}
    try:
        for side, u, b, log_u, bound in sides:
            if f"log_inner_{side}" in tables:
                converted = tables[f"log_inner_{side}"].reshape(-1)
            elif u in tables and b in tables:
                converted = log_inner_from_libauc_v2(tables[u], tables[b], xp=np)
            elif log_u in tables and bound in tables:
                converted = log_inner_from_libauc_v2(tables[log_u], tables[bound], xp=np)
            elif log_u in tables:
                converted = log_inner_from_sogclr_loss(
                    tables[log_u], batch_size=config.batch_size, eps=config.eps, xp=np
                )
            else:
                raise BadInput(f"init_estimates must have the estimates of every {side}, got {_listed(path, tables)}")
            estimates[f"log_inner_{side}"] = converted
    except (TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"init_estimates must hold estimates of a known program, got {path}: {error}") from error
    return {name: _for_pairs(path, name, array, dataset, config.dtype) for name, array in estimates.items()}


def _for_pairs(path: Path, name: str, table: np.ndarray, dataset: Dataset, dtype: str) -> np.ndarray:
    """Return the rows of a table that belong to the training pairs."""
    rows = getattr(dataset, "source_rows", None)
    whole = getattr(dataset, "num_source_rows", None)
    if len(table) != len(dataset):
        if rows is None or whole != len(table):
            of_whole = "" if whole is None else f", or {whole:,}, those of the whole data"
            raise BadInput(
                f"init_estimates must have as many rows as there are training pairs, {len(dataset):,}{of_whole}, got "
                f"{path}, whose {name} has {len(table):,}"
            )
        table = table[rows]
    return np.ascontiguousarray(table, dtype=dtype)


def _tables(path: Path, backend: Backend) -> dict[str, np.ndarray]:
    """Read the tables with known names."""
    names = (*LIBAUC, *RELEASED, *_OURS, *_UNIMODAL)
    if not path.is_file():
        raise BadInput(f"init_estimates must be a file, got {path}")
    try:
        if path.suffix == ".npz":
            # Without pickled objects a file of arrays cannot run code.
            with np.load(path, allow_pickle=False) as arrays:
                tables = {name: arrays[name] for name in arrays.files if name in names}
        else:
            read = getattr(backend, "read_tables", None)
            if read is None:
                raise BadInput(f"init_estimates must be an .npz file for the {backend.name} backend, got {path}")
            tables = read(path, names)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"init_estimates must be a file of tables, got {path}: {error}") from error
    if set(tables) == set(_UNIMODAL):
        raise BadInput(
            "init_estimates must come from a loss of images and texts, got the table u of LibAUC's unimodal loss, "
            "which needs the similarities of the pairs: see drrho_core.log_inner_from_libauc_v1"
        )
    return tables


def _listed(path: Path, tables: dict[str, np.ndarray]) -> str:
    return f"{path} with {', '.join(sorted(tables)) or 'no table of a known name'}"
