"""Read the images of rows as arrays of one size, in this process or in other processes; failures are listed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from drrho_clip.data.augment import Augmentation
from drrho_clip.data.order import PartOfOrder
from drrho_clip.data.preprocess import resize, to_channels
from drrho_clip.data.protocol import ImageReading, Int64, Readable, UInt8, UnreadableImage
from drrho_clip.errors import MissingExtra

__all__ = ["ImageReader", "Images", "images_of_epoch"]


class Images(NamedTuple):
    """Images of some rows.

    Attributes
    ----------
    images : ndarray of uint8, shape (b, s, s, C)
        A row whose image cannot be read has zeros.
    failed : ndarray of int64, shape (k,)
        The positions, in 0 .. b - 1, of the images that cannot be read.
    reasons : tuple of str, length k
    """

    images: UInt8
    failed: Int64
    reasons: tuple[str, ...]


class ImageReader(NamedTuple):
    """Reads images and brings them to one size; other processes get a copy.

    Attributes
    ----------
    samples : Readable
        The data set, or the part of the data set that reads images.
    image_size, channels : int
        Side s and number C of channels.
    resize_mode : str or ImageReading
        See `resize`.
    augmentation : Augmentation, optional
        How the images of an epoch change.
    """

    samples: Readable
    image_size: int
    channels: int
    resize_mode: ImageReading | str
    augmentation: Augmentation | None = None

    def read(self, rows: Int64, epoch: int | None = None) -> Images:
        """Return the images of some rows, changed for a training epoch unless `epoch` is None."""
        images = np.zeros((len(rows), self.image_size, self.image_size, self.channels), dtype=np.uint8)
        failed, reasons = [], []
        # A damaged image must not cost the other images of the batch.
        for position, row in enumerate(rows.tolist()):
            try:
                images[position] = self._square(self.samples[row].image, row, epoch)
            except UnreadableImage as error:
                failed.append(position)
                reasons.append(str(error))
        return Images(images, np.array(failed, dtype=np.int64), tuple(reasons))

    def _square(self, image: UInt8, row: int, epoch: int | None) -> UInt8:
        if self.augmentation is not None and epoch is not None:
            return self.augmentation.square(image, self.image_size, self.channels, row=row, epoch=epoch)
        image = to_channels(image, self.channels)
        # For a small image the checks in `resize` would take a tenth of the time of decoding. A reading of a model may
        # change an image of the right size as well.
        if isinstance(self.resize_mode, str) and image.shape[:2] == (self.image_size, self.image_size):
            return image
        square: UInt8 = resize(image[None], self.image_size, self.resize_mode)[0]
        return square


class _Batches:
    """The images of the batches of an epoch, as a source with random access, which the library grain distributes."""

    def __init__(self, reader: ImageReader, order: PartOfOrder, first_batch: int) -> None:
        self._reader, self._order, self._first_batch = reader, order, first_batch

    def __len__(self) -> int:
        return self._order.num_batches - self._first_batch

    def __getitem__(self, index: int) -> tuple[UInt8, Int64, tuple[str, ...]]:
        return tuple(self._reader.read(self._order.batch(self._first_batch + index), self._order.epoch))  # type: ignore[return-value]


def images_of_epoch(reader: ImageReader, order: PartOfOrder, first_batch: int, num_workers: int) -> Iterator[Images]:
    """Yield the images of the batches of an epoch, which other processes read.

    Reader w of k reads batches w, w + k, ...; the batches come in their order, whatever the number of readers. If
    several processes train together, each has its own readers, which read the own part of each batch. The library grain
    only executes: its own shuffling and sharding are not used.

    Raises
    ------
    MissingExtra
        grain is not installed.
    """
    try:
        import grain
        from absl import flags
    except ImportError:
        raise MissingExtra("reading images in other processes", "grain") from None
    # The processes of grain refuse to start before the options of its command-line library are parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["drrho"], known_only=True)
    source = grain.MapDataset.source(_Batches(reader, order, first_batch))
    # One thread per process, because the processes share the processors already.
    stream = source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    batches = iter(stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)))
    try:
        for images, failed, reasons in batches:
            yield Images(images, failed, reasons)
    finally:
        # The processes end, also if the caller stops early.
        batches.close()
