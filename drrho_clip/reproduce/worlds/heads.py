"""Worlds of heads: small perceptrons over the features of frozen towers, which train in seconds.

A run divides the pairs of a pool by concept and by seed. Target and reference models are trained on different pairs.
Test captions are right; the titles of OpenClipart are taken as they are. All seeds share the pool, the towers and the
draw of the wrong captions, so a validation pair of a seed may be a training or test pair of another seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits
from drrho_clip.data.protocol import Int64
from drrho_clip.encoders import PairEncoder
from drrho_clip.encoders.opening import open_foreign
from drrho_clip.evaluate import evaluate, zero_shot_accuracy
from drrho_clip.reproduce.experiment import Settings
from drrho_clip.reproduce.packaged.concepts import divide
from drrho_clip.reproduce.packaged.packages import Missing
from drrho_clip.reproduce.packaged.pool import Recipe, Towers, features_of, is_ready, make_pool, open_pool
from drrho_clip.reproduce.packaged.scene_towers import scene_towers
from drrho_clip.reproduce.worlds.world import HEADS, World, fastclip_radius
from drrho_core.backend import default_backend, get_backend

__all__ = ["FURTHER_TESTS", "HEAD_WORLDS", "Heads"]

# The training pairs of a target give 20 batches, and a quarter of them gives 5.
_NUM_BATCHES: Final = 20
# Held-out pairs are measured in every epoch, so more of them would take longer than the training.
_VALIDATION, _TEST = 400, 1_200
FURTHER_TESTS: Final = ("openmoji", "stamps")
"""Test sets besides the test part of a world; their R@1 in a row has the name of the set and ``_r1``."""

# The stream of random numbers that divides training pairs between target and reference models.
_SHARES: Final = 14
_REFERENCE: Final = "reference"
_SCENES: Final = Recipe("scenes", side=None, swapped_fraction=0.3)


@dataclass(frozen=True)
class Heads(World):
    """Heads over the features of a pool.

    Parameters
    ----------
    recipe : Recipe
        The pool: its pairs, and the way in which they are encoded.
    noisy_validation : bool
        Validation pairs have the captions of training pairs, wrong captions included.
    """

    recipe: Recipe = _SCENES
    noisy_validation: bool = False

    def prepare(self, runs: Path, roots: Sequence[Path], *, quiet: bool = False) -> None:
        """Encode the pairs, unless finished features are there; raise Missing if a package is not installed."""
        folder = self._folder(runs)
        if self.is_prepared(runs):
            return
        # Reading the pictures needs libraries that other worlds can do without.
        from drrho_clip.reproduce.packaged.sources import SOURCES

        towers = self._towers(runs, quiet=quiet)
        folder.mkdir(parents=True, exist_ok=True)
        source = SOURCES[self.recipe.source](roots, folder, self.recipe.num_pairs)
        make_pool(folder, source, towers, self.recipe, title=f"{self.name}: features", quiet=quiet)

    def is_prepared(self, runs: Path) -> bool:
        """Return whether the features of the pool are there."""
        return is_ready(self._folder(runs))

    def _towers(self, runs: Path, *, quiet: bool) -> Towers:
        backend = get_backend(default_backend())
        if self.recipe.side is None:
            return scene_towers(runs / "towers", backend, quiet=quiet)
        towers = open_foreign("packaged", str(self.recipe.side), backend)
        if towers is None:
            raise Missing("the packaged towers need a backend that can run them, such as that of the extra hf")
        return towers

    def places(self, runs: Path) -> Settings:
        """Return the model: heads over the features of the pool."""
        return {"model": features_of(self._folder(runs))}

    def open(self, config: TrainConfig, runs: Path) -> DataSplits:
        """Divide the pool by the seed of the data; the setting `data` says whose training pairs are wanted."""
        pool = open_pool(self._folder(runs))
        name, _, part = config.data.partition(":")
        extra = {row for rows in pool.tests.values() for row in rows}
        rows = np.asarray([row for row in range(len(pool.captions)) if row not in extra], dtype=np.int64)
        concepts = np.asarray(pool.concepts)[rows]
        parts = divide(concepts.tolist(), config.data_seed)
        own = self._training_rows(concepts, parts.train, config.data_seed, of_reference=part == _REFERENCE)
        # A smaller part of the data is the start of a larger part.
        train = rows[own[: config.train_size]]
        return DataSplits(
            pool.pairs(f"{name}-train", train, in_training=True),
            pool.pairs(
                f"{name}-validation",
                rows[_some(parts.validation, _VALIDATION)],
                in_training=self.noisy_validation,
            ),
            pool.pairs(f"{name}-test", rows[_some(parts.test, _TEST)]),
        )

    def _training_rows(self, concepts: Int64, rows: Int64, seed: int, *, of_reference: bool) -> Int64:
        """Return the training rows of the target or of the reference models, in random order; they share no concept."""
        numbers, sizes = np.unique(concepts[rows], return_counts=True)
        order = np.random.default_rng([seed, _SHARES]).permutation(len(numbers))
        # The target gets concepts until it has all pairs that it needs; the reference models get the rest.
        before = np.cumsum(sizes[order]) - sizes[order]
        of_target = np.isin(concepts[rows], numbers[order[before < self.data["train_size"]]])
        own = rows[of_target != of_reference]
        return np.random.default_rng([seed, _SHARES, 1]).permutation(own)

    def more_figures(self, encoder: PairEncoder, splits: DataSplits, runs: Path) -> Mapping[str, float]:
        """Return the zero-shot accuracy if the pairs have classes, and R@1 on further test sets."""
        pool = open_pool(self._folder(runs))
        figures: dict[str, float] = {}
        if pool.prompts:
            test: Any = splits.test
            images = encoder.images_of(test, np.arange(len(test)))
            figures["zero_shot_accuracy"] = float(zero_shot_accuracy(images, encoder.texts(pool.prompts), test.labels))
        for name, rows in pool.tests.items():
            pairs = pool.pairs(name, np.asarray(rows, dtype=np.int64))
            figures[f"{name}_r1"] = float(evaluate(encoder, pairs, zero_shot=False)["retrieval_r1"])
        return figures

    def quick(self) -> World:
        """Raise NotImplementedError: the quick forms need drawn scenes only."""
        raise NotImplementedError

    def _folder(self, runs: Path) -> Path:
        return runs / "features" / self.recipe.name


def _some(rows: Int64, size: int) -> Int64:
    """Return at most `size` rows, evenly spread: sorted rows of a part are neighbours if their pictures are alike."""
    return rows[np.linspace(0, len(rows) - 1, min(size, len(rows))).astype(np.int64)]


def _world(
    name: str,
    title: str,
    recipe: Recipe,
    target: Settings,
    references: Mapping[str, Mapping[str, Any]],
    *,
    batch_size: int = 96,
) -> Heads:
    radius = fastclip_radius(batch_size)
    # jest reads five batches per step, so it needs five times the epochs to train on as many pairs.
    selects = {"epochs": 5 * target["epochs"]}
    return Heads(
        name=name,
        title=title,
        data={"data": recipe.name, "train_size": _NUM_BATCHES * batch_size},
        target={"batch_size": batch_size, "temperature": 0.07, **target},
        references={key: {"as_reference": True, **settings} for key, settings in references.items()},
        rates=(2.5e-4, 1e-3, 4e-3, 1.6e-2),
        by_method={
            "fastclip-v3": {"radius": radius},
            "distill:fastclip-v3": {"radius": radius},
            "jest": selects,
            "jest-topk": selects,
        },
        reference_data={"data": f"{recipe.name}:{_REFERENCE}"},
        kind=HEADS,
        longer="epochs",
        # A quarter of the data has five batches, and jest reads five batches per step.
        largest_scale=_NUM_BATCHES // 5,
        recipe=recipe,
    )


# The features of the two towers of drawn scenes have 128 numbers, those of the packaged towers 1,280 and 384.
_ON_SCENES: Final = {"feature_dim": 64, "width": 128, "depth": 1, "epochs": 12}
_ON_PACKAGES: Final = {"feature_dim": 64, "width": 32, "depth": 1, "epochs": 12}

HEAD_WORLDS: Final[tuple[Heads, ...]] = (
    _world(
        "scenes-heads",
        "drawn scenes, 30 % of the training captions swapped",
        _SCENES,
        _ON_SCENES,
        {
            "weak": {"width": 16, "epochs": 4, "train_size": 960},
            "strong": {"width": 128, "epochs": 12, "train_size": 5_000},
        },
    ),
    _world(
        "fashion-heads",
        # Another template with the same class is another text.
        "Fashion-MNIST, 30 % of the training captions swapped, of which about 7.7 % still name the right class",
        Recipe("fashion", num_pairs=8_000, side=64, swapped_fraction=0.3),
        _ON_PACKAGES,
        {
            "weak": {"width": 8, "epochs": 4, "train_size": 480},
            "strong": {"width": 64, "epochs": 20, "train_size": 2_880},
        },
    ),
    _world(
        "openclipart-heads",
        "OpenClipart with its own titles",
        Recipe("openclipart", side=112),
        _ON_PACKAGES,
        {
            # The rule that stops a reference model would leave both near chance: titles say little about drawings.
            "weak": {"width": 8, "epochs": 8, "train_size": 480, "as_reference": False},
            "strong": {"width": 64, "epochs": 12, "train_size": 3_000, "as_reference": False},
        },
        batch_size=48,
    ),
)
"""All worlds of heads."""
