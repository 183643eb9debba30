"""Encoding that several processes share: batch k of a data set is encoded by process k modulo W.

All processes get all features. The batches are those of a single process, so the features are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from drrho_clip.data.unreadable import UnreadableRows
from drrho_clip.encoders.protocol import EncoderInBatches, Floats
from drrho_clip.processes.protocol import Processes
from drrho_clip.processes.together import together, together_with_values

if TYPE_CHECKING:
    from drrho_clip.data import BatchSource, Dataset, Tokenizer
    from drrho_clip.data.protocol import ImageReading
    from drrho_clip.data.row_source import RowSource
    from drrho_clip.encode import Encoder
    from drrho_clip.encoders import PairEncoder

__all__ = ["SharedEncoder", "features_of_rows", "shared_encoder"]

# Batches of images or texts in memory after which a process gives a sign of progress.
_BATCHES_PER_SIGN = 64


def shared_encoder(encoder: PairEncoder, processes: Processes | None) -> PairEncoder:
    """Return an encoder whose work the processes share; a model that only reads stored features is read by each."""
    if processes is None or processes.size == 1 or not encoder.reads_new_pairs:
        return encoder
    return SharedEncoder(encoder, processes)


class SharedEncoder(EncoderInBatches):
    """An encoder whose methods all processes call at the same time; see `drrho_clip.encoders.PairEncoder`.

    Parameters
    ----------
    encoder : PairEncoder
        The model, the same on all processes.
    processes : Processes
        The processes.
    """

    reads_new_pairs = True

    def __init__(self, encoder: PairEncoder, processes: Processes) -> None:
        self._encoder, self._processes = encoder, processes

    @property
    def name(self) -> str:
        """The model as the user names it."""
        return self._encoder.name

    @property
    def image_size(self) -> int:
        """Side of the images that the model reads."""
        return self._encoder.image_size

    @property
    def resize_mode(self) -> ImageReading | str:
        """The way in which images become square."""
        return self._encoder.resize_mode

    @property
    def feature_dims(self) -> tuple[int, int]:
        """Sizes of the features of an image and of a caption."""
        return self._encoder.feature_dims

    @property
    def temperature(self) -> float:
        """Temperature with which the model was trained."""
        return self._encoder.temperature

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self._encoder.tokenizer

    def identity(self) -> dict[str, Any]:
        """Return the identity of the model."""
        return self._encoder.identity()

    def batches_of(
        self, dataset: Dataset, *, first_row: int = 0, batch_size: int = 256, rows: np.ndarray | None = None
    ) -> Iterator[tuple[Floats, Floats]]:
        """Yield image features and text features of the pairs from `first_row` on, or of `rows` in their order."""
        rows = np.arange(first_row, len(dataset), dtype=np.int64) if rows is None else rows
        flaws = UnreadableRows(dataset)
        of_dataset: dict[int, str] = getattr(dataset, "unreadable", {})
        # If there are fewer batches than processes, the last processes have no batch.
        own = _own_batches(rows, batch_size, self._processes)
        stream = self._encoder.batches_of(dataset, batch_size=batch_size, rows=own) if len(own) else iter(())

        def work() -> tuple[tuple[Floats, Floats] | None, dict[str, str]]:
            batch = next(stream, None)
            # Threads may add entries meanwhile, so the entries are read once.
            unknown = {row: reason for row, reason in list(of_dataset.items()) if row not in flaws.reasons}
            return batch, {str(row): reason for row, reason in unknown.items()}

        for _ in range(_rounds(len(rows), batch_size, self._processes)):
            batch, unreadable = together_with_values(self._processes, work)
            together(self._processes, partial(_note, flaws, unreadable))
            images, texts = (_every(None if batch is None else batch[side], self._processes) for side in (0, 1))
            yield from zip(images, texts, strict=True)

    def images_of(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        *,
        batch_size: int = 256,
        after_batch: Callable[[], None] | None = None,
    ) -> Floats:
        """Return image features of some rows of a data set."""

        def sign() -> None:
            self._processes.alive()
            if after_batch is not None:
                after_batch()

        def encode(own: np.ndarray) -> Floats:
            return self._encoder.images_of(dataset, own, batch_size=batch_size, after_batch=sign)

        return _shared_rows(encode, rows, batch_size, self._processes, dataset)

    def images(self, images: np.ndarray, *, batch_size: int = 256) -> Floats:
        """Return features of uint8 images of side `image_size`."""

        def encode(own: np.ndarray) -> Floats:
            return self._encoder.images(images[own], batch_size=batch_size)

        return self._in_parts(encode, len(images), batch_size)

    def texts(self, captions: Sequence[str], *, batch_size: int = 256) -> Floats:
        """Return features of captions."""

        def encode(own: np.ndarray) -> Floats:
            return self._encoder.texts([captions[row] for row in own], batch_size=batch_size)

        return self._in_parts(encode, len(captions), batch_size)

    def _in_parts(self, encode: Callable[[np.ndarray], Floats], num_rows: int, batch_size: int) -> Floats:
        """Return the features of images or texts; this process gives a sign of progress after each part."""

        def encode_parts(own: np.ndarray) -> Floats:
            # A model may look up all texts of a call at once, so a part has many batches.
            size, features = batch_size * _BATCHES_PER_SIGN, []
            for start in range(0, len(own), size):
                features.append(encode(own[start : start + size]))
                self._processes.alive()
            return np.concatenate(features)

        return _shared_rows(encode_parts, np.arange(num_rows), batch_size, self._processes)


def features_of_rows(
    encoder: Encoder,
    source: BatchSource | RowSource,
    rows: npt.NDArray[np.int64],
    processes: Processes,
    *,
    batch_size: int = 256,
) -> tuple[Floats, Floats]:
    """Return the features of rows of a source, which may keep decoded images; the processes share the work."""

    def encode(own: np.ndarray) -> tuple[Floats, Floats]:
        starts = range(0, len(own), batch_size)
        batches = (source.gather(own[start : start + batch_size]) for start in starts)
        return encoder.batches(batches, after_batch=processes.alive)

    own = _own_batches(rows, batch_size, processes)
    features = together(processes, lambda: encode(own) if len(own) else None)
    image, text = (None, None) if features is None else features
    images = _in_order(image, len(rows), batch_size, processes)
    return images, _in_order(text, len(rows), batch_size, processes)


def _shared_rows(
    encode: Callable[[np.ndarray], Floats],
    rows: np.ndarray,
    batch_size: int,
    processes: Processes,
    dataset: Dataset | None = None,
) -> Floats:
    """Return the features of all rows, of which each process encodes the own batches.

    If the rows are those of a data set, all processes note the unreadable rows that any of them has met.
    """
    own = _own_batches(rows, batch_size, processes)
    of_dataset: dict[int, str] = getattr(dataset, "unreadable", {})

    def work() -> tuple[Floats | None, dict[str, str]]:
        features = encode(own) if len(own) else None
        return features, {str(row): of_dataset[row] for row in own.tolist() if row in of_dataset}

    features, unreadable = together_with_values(processes, work)
    if dataset is not None:
        together(processes, partial(_note, UnreadableRows(dataset), unreadable))
    return _in_order(features, len(rows), batch_size, processes)


def _rounds(num_rows: int, batch_size: int, processes: Processes) -> int:
    """Return how many batches the process with the most batches has."""
    return -(-num_rows // (batch_size * processes.size))


def _owners(num_rows: int, batch_size: int, processes: Processes) -> np.ndarray:
    """Return the number of the process that encodes each row: batch k belongs to process k modulo W."""
    owners: np.ndarray = np.arange(num_rows) // batch_size % processes.size
    return owners


def _own_batches(rows: np.ndarray, batch_size: int, processes: Processes) -> np.ndarray:
    """Return the rows of the own batches."""
    own: np.ndarray = rows[_owners(len(rows), batch_size, processes) == processes.rank]
    return own


def _in_order(features: Floats | None, num_rows: int, batch_size: int, processes: Processes) -> Floats:
    """Return the features of the rows of all processes, in the order of the rows."""
    every = _every(features, processes)
    owners = _owners(num_rows, batch_size, processes)
    result = np.empty((num_rows, every[0].shape[1]), dtype=every[0].dtype)
    for rank, part in enumerate(every):
        result[owners == rank] = part
    return result


def _every(features: Floats | None, processes: Processes) -> list[Floats]:
    """Return the features of all processes that have any; the processes without features are the last ones."""
    own = np.zeros((0, 0)) if features is None else features
    return [part for part in processes.gather_arrays(own) if part.shape[1] > 0]


def _note(flaws: UnreadableRows, entries: list[dict[str, str]]) -> None:
    """Note the unreadable rows of all processes; too many of them are an error."""
    for of_process in entries:
        for row, reason in of_process.items():
            flaws.note(int(row), reason)
