"""Worlds as a user's table has them: the held-out validation captions are as noisy as the training captions.

A user does not know which captions are wrong, so the pairs that are held out for validation have wrong captions too.
The rule that finds memorisation and the setting `drop_suspects` rely on that. Test captions are right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits, scenes
from drrho_clip.reproduce.worlds.heads import HEAD_WORLDS
from drrho_clip.reproduce.worlds.world import SCENES_LARGEST, TABLES, World

__all__ = ["TABLE_WORLDS", "SceneTable"]

_TARGET: Final = {
    "width": 16,
    "depth": 1,
    "feature_dim": 64,
    "epochs": 10,
    "batch_size": 64,
    "warmup_steps": 40,
    "temperature": 0.07,
}
# The base of the reference models of a claim, and the model with which learning rates are chosen.
_REFERENCES: Final[dict[str, dict[str, Any]]] = {"weak": {"epochs": 6}}


@dataclass(frozen=True)
class SceneTable(World):
    """Drawn scenes with swapped captions in training and validation."""

    def open(self, config: TrainConfig, runs: Path) -> DataSplits:
        """Swap captions of the validation pairs, too."""
        splits = super().open(config, runs)
        noisy = scenes(
            len(splits.validation),
            seed=config.data_seed,
            stream="validation",
            swapped_fraction=config.swapped_fraction,
        )
        return splits._replace(validation=noisy)


def _table(percent: int) -> World:
    return SceneTable(
        name=f"scenes-table-{percent}",
        title=f"drawn scenes, {percent} % of the training and validation captions swapped",
        data={"data": "scenes", "train_size": 2_000, "swapped_fraction": percent / 100},
        target=_TARGET,
        references=_REFERENCES,
        rates=(4e-3, 8e-3, 16e-3),
        reference_data={"data": "scenes:reference"},
        kind=TABLES,
        largest=SCENES_LARGEST,
    )


_HEADS: Final = tuple(
    replace(world, name=f"{world.name}-table", kind=TABLES, noisy_validation=True) for world in HEAD_WORLDS
)

TABLE_WORLDS: Final[tuple[World, ...]] = (*(_table(percent) for percent in (10, 30, 60)), *_HEADS)
"""The drawn scenes with 10, 30 and 60 % wrong captions, and the worlds of heads."""
