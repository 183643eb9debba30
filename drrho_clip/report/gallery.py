"""Examples of retrieval for a report: a few captions, and the images that every model ranks nearest to them."""

from __future__ import annotations

from collections.abc import Mapping

from drrho_clip.data import Dataset, captions_of, first_rows
from drrho_clip.encode import Encoder
from drrho_clip.evaluate import nearest
from drrho_clip.report.data import GalleryRow, RetrievedImage

__all__ = ["retrieval_examples"]


def retrieval_examples(
    dataset: Dataset, encoders: Mapping[str, Encoder], *, num_queries: int = 6, k: int = 5, size: int = 200
) -> list[GalleryRow]:
    """Search the first images of a data set for a few captions, with every model.

    Parameters
    ----------
    dataset : Dataset
        Held-out pairs.
    encoders : mapping of str to Encoder
        The models by name.
    num_queries : int, default 6
        Number of captions, spread evenly over the gallery.
    k : int, default 5
        Number of images that each model shows.
    size : int, default 200
        Number of images in the gallery; an image with several captions counts once, with the first of its captions.

    Returns
    -------
    list of GalleryRow
        A row per caption. An image is correct if one of the captions of this image equals the query.
    """
    captions = captions_of(dataset)
    rows = first_rows(dataset)[:size]
    numbers = dataset.image_ids.tolist()
    captions_by_image: dict[int, set[str]] = {}
    for number, caption in zip(numbers, captions, strict=True):
        captions_by_image.setdefault(number, set()).add(caption)

    def answer(row: int, query: str) -> RetrievedImage:
        return RetrievedImage(dataset[row].image, captions[row], query in captions_by_image[numbers[row]])

    # The queries are spread evenly over the gallery, so that they show all kinds of captions.
    places = dict.fromkeys(round(step * (len(rows) - 1) / max(1, num_queries - 1)) for step in range(num_queries))
    queries = [int(rows[place]) for place in places]
    retrieved: list[dict[str, list[RetrievedImage]]] = [{} for _ in queries]
    for name, encoder in encoders.items():
        # Every model encodes the gallery at its own resolution.
        texts = encoder.texts([captions[query] for query in queries])
        ranked = rows[nearest(texts, encoder.images_of(dataset, rows), k=min(k, len(rows)))]
        for answers, query, best in zip(retrieved, queries, ranked.tolist(), strict=True):
            answers[name] = [answer(row, captions[query]) for row in best]
    return [
        GalleryRow(captions[query], by_name, dataset[query].image)
        for query, by_name in zip(queries, retrieved, strict=True)
    ]
