"""Heads over frozen features: clip, sogclr, drrho and a reference model, with the same budget, for several seeds.

A seed divides the pairs by concept, swaps captions if the data set asks for it, and starts parameters and batches.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from drrho_clip import ReferenceFeatures
from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits, PairsDataset, exchange_captions, read_pairs, same_text
from drrho_clip.encode import Encoder
from drrho_clip.encoders import CachedEncoder, FixedFeatures, PairEncoder
from drrho_clip.evaluate import retrieval, zero_shot_accuracy
from drrho_clip.features import encode_pairs
from drrho_clip.reproduce.packaged.concepts import Pair, Parts, divide
from drrho_clip.run import open_run
from drrho_clip.table_defaults import defaults_for
from drrho_clip.train import train
from drrho_core.backend import get_backend

METHODS: Final = ("reference", "clip", "sogclr", "drrho")
BACKEND: Final = "torch"
# Sizes of the heads; epochs, batch and learning rate are the defaults of `drrho train` for a table of this size.
SETTINGS: Final[Mapping[str, Any]] = {"feature_dim": 128, "width": 64, "depth": 1}


class Data(NamedTuple):
    """The pairs of a data set, as the library reads them, and the features of the towers."""

    name: str
    table: Path
    pairs: PairsDataset
    concepts: list[int]
    features: CachedEncoder


def prepare(
    name: str, pairs: Sequence[Pair], towers: PairEncoder, folder: Path, *, after_rows: Callable[[int], None]
) -> Data:
    """Write the table of the pairs, and encode all pairs; a finished cache stays, and an interrupted one goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "pairs.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        writer.writerows((pair.path, pair.caption) for pair in pairs)
    dataset = read_pairs(table)
    encode_pairs(towers, dataset, folder / "features", batch_size=32, after_rows=after_rows)
    features = CachedEncoder(ReferenceFeatures(folder / "features"))
    return Data(name, table, dataset, [pair.concept for pair in pairs], features)


def parts_of(data: Data, seed: int, num_test: int | None) -> Parts:
    """Divide the pairs by concept, or, if the data set has a test part at the end, leave that part as it is."""
    if num_test is None:
        return divide(data.concepts, seed)
    first_test = len(data.pairs) - num_test
    parts = divide(data.concepts[:first_test], seed)
    # The package's own test part replaces the test rows, which are used for training.
    train_rows = np.sort(np.concatenate([parts.train, parts.test]))
    return Parts(train_rows, parts.validation, np.arange(first_test, len(data.pairs)))


def swapped(data: Data, parts: Parts, fraction: float, seed: int) -> PairsDataset:
    """Swap a share of the captions within the training part and within the validation part; test stays right."""
    if fraction == 0:
        return data.pairs
    captions = list(data.pairs.captions)
    for number, rows in enumerate((parts.train, parts.validation)):
        rng = np.random.default_rng([seed, number])
        changed, _ = exchange_captions([captions[row] for row in rows.tolist()], fraction, rng)
        for row, caption in zip(rows.tolist(), changed, strict=True):
            captions[row] = caption
    return data.pairs.with_captions(captions)


def cache_of(data: Data, pairs: PairsDataset, folder: Path) -> Path:
    """Return a cache for pairs whose captions may be swapped; no picture and no text is encoded again."""
    if pairs is data.pairs:
        return data.table.parent / "features"
    image, text = data.features.images_of(pairs, np.arange(len(pairs))), data.features.texts(pairs.captions)
    encode_pairs(FixedFeatures(data.features.name, image, text), pairs, folder)
    return folder


def run_seed(
    data: Data,
    seed: int,
    folder: Path,
    *,
    swapped_fraction: float = 0.0,
    num_test: int | None = None,
    classes: Sequence[str] = (),
    settings: Mapping[str, Any] = SETTINGS,
    after_run: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train all methods with a seed, and return a row of figures for each; finished runs are not repeated."""
    parts = parts_of(data, seed, num_test)
    pairs = swapped(data, parts, swapped_fraction, seed)
    folder.mkdir(parents=True, exist_ok=True)
    cache = cache_of(data, pairs, folder / "features")
    splits = DataSplits(*(pairs.subset(rows) for rows in parts))
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        out = folder / method
        config = _config(data, method, seed, cache, folder, len(parts.train), settings)
        outcome = train(config, out, resume=(out / "config.json").exists(), splits=splits, device="cpu", quiet=True)
        # A reference model is measured in the state that steers the other model.
        state = "reference" if method == "reference" else "best"
        run = open_run(out)
        encoder = Encoder.load(run, get_backend(BACKEND, device="cpu"), state=state)
        metrics = {f"validation_{name}": value for name, value in measure(encoder, splits.validation).items()}
        metrics |= measure(encoder, splits.test, classes)
        sizes = {name: len(part) for name, part in zip(parts._fields, parts, strict=True)}
        seconds = round(float(outcome.row["seconds"]), 1)
        about = {name: getattr(config, name) for name in ("epochs", "batch_size", "learning_rate")}
        rows.append(
            {"data": data.name, "seed": seed, "method": method, "metrics": metrics, "pairs": sizes, **about}
            | {"samples_seen": outcome.row["samples_seen"], "seconds": seconds}
        )
        after_run(f"{data.name}, seed {seed}, {method}: test R@1 {metrics['r1']:.3f} ({seconds:.0f} s)")
    return rows


def _config(
    data: Data, method: str, seed: int, cache: Path, folder: Path, num_train: int, settings: Mapping[str, Any]
) -> TrainConfig:
    """Return the settings of a run."""
    changed: dict[str, Any] = {"method": method}
    if method == "reference":
        changed = {"method": "clip", "as_reference": True}
    elif method == "drrho":
        changed["reference"] = str(folder / "reference")
    # The defaults of `drrho train` for a table: all methods see as many samples, the reference model a third.
    defaults = defaults_for(num_train, as_reference=method == "reference")
    return TrainConfig(
        data=str(data.table),
        model=f"features:{cache}",
        backend=BACKEND,
        seed=seed,
        **{**defaults, **changed, **settings},
    )


def measure(encoder: PairEncoder, dataset: Any, classes: Sequence[str] = ()) -> dict[str, float]:
    """Return R@1 in galleries of 200, for both directions and their mean, and the zero-shot accuracy of classes.

    `classes` are captions of the data set, one for each class.
    """
    images, texts = encoder.pairs(dataset)
    result = retrieval(
        images, texts, dataset.captions, image_ids=dataset.image_ids, same_text=same_text(encoder.tokenizer)
    )
    metrics = {
        "r1": result.retrieval_r1,
        "image_to_text": result.image_to_text.r1,
        "text_to_image": result.text_to_image.r1,
    }
    if classes:
        number = {caption: label for label, caption in enumerate(classes)}
        labels = np.asarray([number[caption] for caption in dataset.captions])
        metrics["zero_shot"] = float(zero_shot_accuracy(images, encoder.texts(classes), labels))
    return {name: round(float(value), 6) for name, value in metrics.items()}
