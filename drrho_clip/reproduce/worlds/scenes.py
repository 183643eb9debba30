"""Drawn scenes with swapped captions, at two shares of swapped captions.

Training and reference models see different scenes with the same share of swapped captions; validation and test captions
are right. Everything is drawn, so nothing has to be installed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

from drrho_clip.reproduce.worlds.world import World

__all__ = ["SCENES", "Scenes"]

_BATCH: Final = 128
_TARGET: Final = {"width": 16, "epochs": 8, "batch_size": _BATCH, "warmup_steps": 40, "temperature": 0.07}
# A reference model has the recipe of the demo: plain CLIP on pairs that the target does not see. The weak reference
# is narrower and sees fewer samples than the target; the strong reference is wider and sees more.
_REFERENCES: Final[dict[str, dict[str, Any]]] = {
    "weak": {"width": 8, "epochs": 6, "train_size": 5_000},
    "strong": {"width": 24, "epochs": 8, "train_size": 12_000},
}
# The radius of FastCLIP (v3) is 6.5 for batches of 1,024, which is 94 % of the largest divergence log(1,023).
_RADIUS: Final = round(6.5 / math.log(1023) * math.log(_BATCH - 1), 2)


class Scenes(World):
    """Drawn scenes."""

    def quick(self) -> World:
        """Return the scenes with few pairs, tiny models and one learning rate."""
        tiny = {"width": 4, "feature_dim": 8, "epochs": 1, "batch_size": 64, "warmup_steps": 1}
        references = {
            name: tiny | {"train_size": 128, "width": width}
            for name, width in zip(self.references, (2, 6), strict=False)
        }
        return replace(
            self,
            data={**self.data, "train_size": 128},
            target={**self.target, **tiny},
            references=references,
            rates=self.rates[:1],
        )


def _scenes(percent: int) -> World:
    return Scenes(
        name=f"scenes-{percent}",
        title=f"drawn scenes, {percent} % of the training captions swapped",
        data={"data": "scenes", "train_size": 5_000, "swapped_fraction": percent / 100},
        target=_TARGET,
        references=_REFERENCES,
        rates=(2e-3, 4e-3, 8e-3),
        by_method={"fastclip-v3": {"radius": _RADIUS}},
        reference_data={"data": "scenes:reference"},
    )


SCENES: Final = (_scenes(30), _scenes(60))
"""The drawn scenes with 30 % and with 60 % of the captions swapped."""
