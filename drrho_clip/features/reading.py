"""Read the features of a cache: all rows are mapped into memory, and only the rows that are asked for are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from drrho_clip.data.content import DIGEST_SIZE
from drrho_clip.data.pair_ids import find_ids, pair_ids
from drrho_clip.data.protocol import Dataset, Int64, UInt8, captions_of, image_names
from drrho_clip.errors import BadInput
from drrho_clip.features.manifest import SIDES, Manifest, block_checksum
from drrho_clip.terminal.safe_text import brief, shown

__all__ = ["ReferenceFeatures"]

Float32 = npt.NDArray[np.float32]


class ReferenceFeatures:
    """The features of a reference model for every pair of a data set, as ``drrho encode`` has written them.

    The features stay on the disk, mapped into memory, so the object is small. Row i belongs to pair i of the encoded
    data.

    Parameters
    ----------
    path : path
        The folder of the cache.
    verify : bool, default True
        Read all blocks once and compare their checksums, so that a damaged file is found now and not in training.

    Attributes
    ----------
    manifest : Manifest
        Model, data and sizes.
    ids : ndarray of uint8, shape (n, 32)
        Ids of the pairs by their content; see `drrho_clip.data.pair_ids`.

    Raises
    ------
    BadInput
        If the folder holds no cache, an unfinished cache, or a truncated or damaged file.

    Examples
    --------
    A cache of 5 pairs, read by the numbers of the samples of a batch:

    >>> import tempfile
    >>> import numpy as np
    >>> from drrho_clip import ReferenceFeatures
    >>> from drrho_clip.data import scenes
    >>> from drrho_clip.encoders import FixedFeatures
    >>> from drrho_clip.features import encode_pairs
    >>> folder, data = tempfile.mkdtemp(), scenes(5, seed=0)
    >>> model = FixedFeatures("example", np.eye(5), np.eye(5)[::-1])
    >>> _ = encode_pairs(model, data, folder)
    >>> features = ReferenceFeatures(folder)
    >>> image, text = features[[3, 0]]
    >>> image.shape, text.argmax(axis=1).tolist(), len(features)
    ((2, 5), [1, 4], 5)
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.folder = Path(path)
        self.manifest = Manifest.read(self.folder)
        total = self.manifest.num_pairs
        if not self.manifest.finished:
            raise BadInput(
                f"{self.folder} must be a finished cache, got a cache that is still being written: the same drrho "
                f"encode command continues it"
            )
        if len(self.manifest.checksums) != len(self.manifest.blocks()):
            raise BadInput(f"{self.folder / 'manifest.json'} must have a checksum for every block, got too few")
        widths = dict(zip(SIDES, self.manifest.feature_dims, strict=True))
        self._sides = {side: self._mapped(side, (total, widths[side]), self.manifest.dtype) for side in SIDES}
        self.ids: UInt8 = self._mapped("ids", (total, 32), "uint8")
        if verify:
            self._verify()

    def __len__(self) -> int:
        """Return the number n of pairs."""
        return self.manifest.num_pairs

    def __repr__(self) -> str:
        """Return folder, model and size."""
        return f"<features of {len(self)} pairs by {self.manifest.model.get('name')}, in {self.folder}>"

    def __getitem__(self, sample_index: int | Sequence[int] | npt.NDArray[np.integer]) -> tuple[Float32, Float32]:
        """Return the features of some pairs, in the order of `sample_index`.

        Parameters
        ----------
        sample_index : int, or sequence or ndarray of int, shape (b,)
            Rows of the encoded data, 0 .. n - 1; repeats are permitted.

        Returns
        -------
        image, text : ndarray of float32, shapes (b, d) and (b, e)
            Rows of norm 1; for a single row, shapes (d,) and (e,).

        Raises
        ------
        IndexError
            If a row lies outside 0 .. n - 1.
        TypeError
            If the rows are not whole numbers.
        """
        # Negative numbers would silently mean rows from the end.
        rows = np.asarray(sample_index)
        if rows.dtype.kind not in "iu" and rows.size:
            raise TypeError(f"sample_index must hold whole numbers, got {rows.dtype}")
        rows = rows.astype(np.int64)
        if rows.ndim > 1:
            raise IndexError(f"sample_index must have shape (b,), got {rows.shape}")
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"sample_index must lie in 0 .. {len(self) - 1}, got {rows.min()} .. {rows.max()}")
        return self.rows_of_side("image", rows), self.rows_of_side("text", rows)

    def rows_of_side(self, side: str, rows: Int64) -> Float32:
        """Return the features (b, d) of one side, "image" or "text"."""
        features: Float32 = np.asarray(self._sides[side][rows], dtype=np.float32)
        if self.manifest.dtype == "float32":
            return features
        # Rounding to float16 has changed the norms by up to one part in a thousand.
        norms = np.linalg.norm(features, axis=-1, keepdims=True)
        return (features / np.where(norms > 0, norms, 1.0)).astype(np.float32)

    @property
    def temperature(self) -> float:
        """Temperature of the model."""
        return float(self.manifest.model["temperature"])

    def rows_of(self, dataset: Dataset) -> Int64:
        """Return the row of each pair of a data set, shape (m,); pairs are recognised by the content of their parts.

        Raises
        ------
        BadInput
            If the cache lacks a pair of the data set.
        """
        # Both parts of a pair must agree: a caption that was corrected since is another pair.
        rows = find_ids(pair_ids(dataset), self.ids)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            first = int(missing[0])
            pair = f"{image_names(dataset)[first]} with {brief(captions_of(dataset)[first])}"
            raise BadInput(
                shown(
                    f"{self.folder} must hold the features of these data ({dataset.name}), got a cache of "
                    f"{self.manifest.data.get('name')}, which lacks {len(missing):,} of {len(rows):,} pairs, such as "
                    f"{pair}"
                )
            )
        return rows

    def unreadable_rows(self, dataset: Dataset) -> dict[int, str]:
        """Return the rows of a data set whose image could not be read when the cache was written, with the reason.

        The features of such an image are those of a black image. An image is recognised by its content.
        """
        reasons = self.manifest.unreadable
        rows = np.array(sorted(map(int, reasons)), dtype=np.int64)
        if not len(rows):
            return {}
        places = find_ids(dataset.image_digests(), self.ids[rows, :DIGEST_SIZE])
        return {int(row): reasons[str(rows[places[row]])] for row in np.flatnonzero(places >= 0)}

    def _mapped(self, name: str, shape: tuple[int, int], dtype: str) -> npt.NDArray[Any]:
        """Map a file into memory, and check shape, dtype and length."""
        file = self.folder / f"{name}.npy"
        if not file.is_file():
            raise BadInput(f"{file} must be a file of features, got no such file")
        try:
            array: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
        # NumPy refuses a header that is damaged, and a file that is shorter than the header says.
        except (ValueError, OSError, EOFError, SyntaxError) as error:
            raise BadInput(f"{file} must be an undamaged file of features, got: {error}") from None
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise BadInput(f"{file} must have {dtype} numbers of shape {shape}, got {array.dtype} {array.shape}")
        return array

    def _verify(self) -> None:
        # Block by block, so that the memory holds one block at a time.
        columns = {**self._sides, "ids": self.ids}
        for (start, stop), checksums in zip(self.manifest.blocks(), self.manifest.checksums, strict=True):
            for name, column in columns.items():
                if block_checksum(np.ascontiguousarray(column[start:stop]).data) != checksums[name]:
                    raise BadInput(
                        f"{self.folder / name}.npy must be undamaged, got other content than the manifest says in the "
                        f"rows {start} to {stop - 1}"
                    )
