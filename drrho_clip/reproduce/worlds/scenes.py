"""Drawn scenes with swapped captions, at two shares of swapped captions.

Training and reference models see different scenes with the same share of swapped captions; validation and test captions
are right. Everything is drawn, so nothing has to be installed.
"""

from __future__ import annotations

from typing import Any, Final

from drrho_clip.reproduce.worlds.world import SCENES_LARGEST, World, fastclip_radius

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


def _scenes(percent: int) -> World:
    return World(
        name=f"scenes-{percent}",
        title=f"drawn scenes, {percent} % of the training captions swapped",
        data={"data": "scenes", "train_size": 5_000, "swapped_fraction": percent / 100},
        target=_TARGET,
        references=_REFERENCES,
        rates=(4e-3, 8e-3, 16e-3),
        by_method={"fastclip-v3": {"radius": fastclip_radius(_BATCH)}},
        reference_data={"data": "scenes:reference"},
        largest=SCENES_LARGEST,
    )


SCENES: Final = (_scenes(30), _scenes(60))
"""The drawn scenes with 30 % and with 60 % of the captions swapped."""
