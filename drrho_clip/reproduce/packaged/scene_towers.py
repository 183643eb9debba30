"""Two frozen towers for drawn scenes, which are trained here, because no package has a model for such pictures.

The image tower and the text tower come from two runs on different scenes, so their features do not fit to each other:
heads have to learn which features belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data import Dataset
from drrho_clip.encode import Encoder
from drrho_clip.encoders.protocol import Floats
from drrho_clip.files.outputs import has_checkpoint
from drrho_clip.table_defaults import preferred_architecture
from drrho_clip.train import train
from drrho_core.backend import Backend

__all__ = ["SceneTowers", "scene_towers"]

# Captions are right here. The seeds differ from those of all experiments.
_SETTINGS: Final[dict[str, Any]] = {
    "data": "scenes",
    "method": "clip",
    "train_size": 10_000,
    "swapped_fraction": 0.0,
    "width": 24,
    "feature_dim": 128,
    "epochs": 8,
    "batch_size": 128,
    "learning_rate": 4e-3,
    "warmup_steps": 50,
}
_SEEDS: Final = {"image": 1_001, "text": 1_002}


class SceneTowers:
    """The image tower of a run and the text tower of another run.

    Parameters
    ----------
    image, text : Encoder
        The two models.
    """

    name = "towers of two runs on other scenes"

    def __init__(self, image: Encoder, text: Encoder) -> None:
        self._image, self._text = image, text

    def images_of(
        self, dataset: Dataset, rows: np.ndarray, *, batch_size: int, after_batch: Callable[[], None]
    ) -> Floats:
        """Return the image features of some rows."""
        return self._image.images_of(dataset, rows, batch_size=batch_size, after_batch=after_batch)

    def texts(self, captions: Sequence[str], /) -> Floats:
        """Return the text features of captions."""
        return self._text.texts(captions)


def scene_towers(folder: Path, backend: Backend, *, quiet: bool) -> SceneTowers:
    """Train the two runs, unless they are in the folder, and return their towers."""
    encoders = {}
    for side, seed in _SEEDS.items():
        config = TrainConfig(
            **_SETTINGS,
            seed=seed,
            data_seed=seed,
            backend=backend.name,
            architecture=preferred_architecture("conv", backend),
        )
        run = folder / side
        encoders[side] = train(config, run, resume=has_checkpoint(run), backend=backend, quiet=quiet).encoder
    return SceneTowers(encoders["image"], encoders["text"])
