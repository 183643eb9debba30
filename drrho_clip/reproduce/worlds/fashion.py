"""Photographs of clothes, Fashion-MNIST, with captions made from the classes, half of which are swapped in training.

The class and one of four templates make the caption of a training pair. Nothing in a photograph tells the template, so
all held-out captions have the first template. A swapped caption has another text, and not always another class: of the
39 other texts, three name the same class with another template. So about 7.7 % of the swapped captions still name the
right class. A seed divides the photographs anew, so a validation photograph of a seed may be a test photograph of
another seed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits, PairsDataset, exchange_captions, open_data
from drrho_clip.data.sources.idx import TEMPLATES
from drrho_clip.reproduce.experiment import Settings
from drrho_clip.reproduce.packaged.packages import FASHION_MNIST
from drrho_clip.reproduce.worlds.world import World, fastclip_radius

__all__ = ["FASHION", "Fashion"]

_DATA: Final = "fashion-mnist"
_REFERENCE: Final = f"{_DATA}:reference"
# A seed divides the photographs of the training part: first those of the reference models, then the held-out pairs,
# then those of the targets, so that a larger training set holds every smaller training set.
_OF_REFERENCES, _OF_VALIDATION, _OF_TEST = 15_000, 1_000, 2_000
# The stream of random numbers that divides the photographs and swaps the captions.
_STREAM: Final = 15


class Fashion(World):
    """Photographs of Fashion-MNIST with swapped captions."""

    def prepare(self, runs: Path, roots: Sequence[Path], *, quiet: bool = False) -> None:  # noqa: ARG002 (nothing takes long)
        """Leave a link to the installed files in the folder of the runs."""
        folder, link = FASHION_MNIST.folder(roots).resolve(), _link(runs)
        if link.is_symlink() and link.resolve() == folder:
            return
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(folder, target_is_directory=True)

    def open(self, config: TrainConfig, runs: Path) -> DataSplits:
        """Divide the photographs by the seed of the data, and swap captions of the training pairs."""
        photographs = _photographs(_link(runs))
        rng = np.random.default_rng([config.data_seed, _STREAM])
        order = rng.permutation(len(photographs))
        ends = np.cumsum([_OF_REFERENCES, _OF_VALIDATION, _OF_TEST])
        of_references, validation, test, of_target = np.split(order, ends)
        own = of_references if config.data == _REFERENCE else of_target
        train = photographs.subset(own[: config.train_size])
        # The random numbers go on behind those of the division, so each seed swaps other captions.
        captions, _ = exchange_captions(train.captions, config.swapped_fraction, rng)
        held_out = [_plain(photographs.subset(rows)) for rows in (validation, test)]
        return DataSplits(train.with_captions(captions), *held_out)


def _link(runs: Path) -> Path:
    return runs / "data" / _DATA


@functools.lru_cache(maxsize=1)
def _photographs(folder: Path) -> PairsDataset:
    """Return the photographs of the training part, which a process reads once."""
    pairs = open_data(str(folder))
    parts = pairs.source.parts
    assert parts is not None
    return pairs.subset(np.flatnonzero(parts[pairs.source.record_of] == 0))


def _plain(pairs: PairsDataset) -> PairsDataset:
    """Return pairs whose captions have the first template."""
    return pairs.with_captions([TEMPLATES[0].format(label) for label in pairs.labels])


_BATCH: Final = 128
# A target sees few photographs often, so that it learns swapped captions by heart without a reference model.
_TARGET: Final[Settings] = {
    "image_size": 28,
    "width": 16,
    "depth": 1,
    "feature_dim": 32,
    "epochs": 12,
    "batch_size": _BATCH,
    "warmup_steps": 20,
    "temperature": 0.07,
}
FASHION: Final = Fashion(
    name="fashion-50",
    title="Fashion-MNIST, 50 % of the training captions swapped, of which about 7.7 % still name the right class",
    data={"data": _DATA, "train_size": 2_000, "swapped_fraction": 0.5},
    target=_TARGET,
    references={
        "weak": {"as_reference": True, "width": 12, "epochs": 3, "train_size": 6_000},
        "strong": {"as_reference": True, "width": 16, "epochs": 5, "train_size": 10_000},
    },
    rates=(4e-3, 8e-3, 16e-3),
    by_method={"fastclip-v3": {"radius": fastclip_radius(_BATCH)}},
    reference_data={"data": _REFERENCE},
    longer="epochs",
    # A larger batch would leave out more pairs in every epoch, because a batch that is not full is not used.
    largest_scale=5,
)
"""Fashion-MNIST with 50 % of the training captions swapped."""
