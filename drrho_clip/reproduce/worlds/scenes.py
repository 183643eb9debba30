"""Drawn scenes with swapped captions, at two shares of swapped captions.

Training and reference models see different scenes with the same share of swapped captions; validation and test captions
are right. Everything is drawn, so nothing has to be installed.
"""

from __future__ import annotations

import math
from typing import Any, Final

from drrho_clip.reproduce.worlds.world import World

__all__ = ["SCENES"]

_BATCH: Final = 128
# A target sees few scenes eight times, so that it learns swapped captions by heart without a reference model.
_TARGET: Final = {
    "image_size": 16,
    "width": 16,
    "depth": 1,
    "feature_dim": 64,
    "epochs": 8,
    "batch_size": _BATCH,
    "warmup_steps": 40,
    "temperature": 0.07,
}
# A reference model has the recipe of the README: plain CLIP on pairs that the target does not see, and fewer epochs.
# `as_reference` does little here, because the rule needs validation captions as noisy as the training captions.
# The weak reference is narrower than the target and sees half as many samples; the strong reference is as wide as the
# target and sees more.
_REFERENCES: Final[dict[str, dict[str, Any]]] = {
    "weak": {"as_reference": True, "width": 12, "epochs": 3, "train_size": 7_000},
    "strong": {"as_reference": True, "width": 16, "epochs": 5, "train_size": 12_000},
}
# The radius of FastCLIP (v3) is 6.5 for batches of 1,024, which is 94 % of the largest divergence log(1,023).
_RADIUS: Final = round(6.5 / math.log(1023) * math.log(_BATCH - 1), 2)

# The sizes of --quick.
_LARGEST: Final = {"width": 4, "feature_dim": 8, "epochs": 1, "batch_size": 64, "warmup_steps": 1, "train_size": 320}


def _scenes(percent: int) -> World:
    return World(
        name=f"scenes-{percent}",
        title=f"drawn scenes, {percent} % of the training captions swapped",
        data={"data": "scenes", "train_size": 5_000, "swapped_fraction": percent / 100},
        target=_TARGET,
        references=_REFERENCES,
        rates=(4e-3, 8e-3, 16e-3),
        by_method={"fastclip-v3": {"radius": _RADIUS}},
        reference_data={"data": "scenes:reference"},
        largest=_LARGEST,
    )


SCENES: Final = (_scenes(30), _scenes(60))
"""The drawn scenes with 30 % and with 60 % of the captions swapped."""
