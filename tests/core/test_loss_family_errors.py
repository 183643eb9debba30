"""The errors of bad input of SigLIP, distillation and hinge."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import drrho_core as dc
from helpers.loss_family import CASES, B, D, R, draw

NAN = np.where(np.eye(B, D) == 1, np.nan, 1.0)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("sigmoid", {"scale": 0.0}, ValueError, r"scale must be > 0, got 0\.0"),
        ("sigmoid", {"scale": "1"}, TypeError, "scale must be a real number, got '1'"),
        ("sigmoid", {"scale": np.ones(2)}, ValueError, "scale must be a scalar, got ndarray of shape"),
        ("sigmoid", {"bias": math.inf}, ValueError, "bias must be finite, got inf"),
        ("sigmoid", {"bias": np.asarray(np.nan)}, ValueError, "bias must be finite, got nan"),
        ("sigmoid", {"tile_size": 0}, ValueError, "tile_size must be at least 1, got 0"),
        ("hinge", {"margin": -0.1}, ValueError, r"margin must be >= 0, got -0\.1"),
        ("hinge", {"memory_budget": -1}, ValueError, "memory_budget must be at least 0, got -1"),
        ("distillation", {"temperature": -1.0}, ValueError, r"temperature must be > 0, got -1\.0"),
        ("distillation", {"reference_temperature": 0.0}, ValueError, r"reference_temperature must be > 0, got 0\.0"),
        ("hinge", {0: np.ones(3)}, ValueError, r"image_features must have 2 axes \(batch_size, feature_dim\)"),
        ("hinge", {0: NAN}, ValueError, r"image_features must be finite, got nan at position \(0, 0\)"),
        ("sigmoid", {1: NAN}, ValueError, "text_features must be finite, got nan"),
        ("sigmoid", {1: np.ones((B + 1, D))}, ValueError, "text_features must have shape"),
        ("sigmoid", {0: np.ones((1, D)), 1: np.ones((1, D))}, ValueError, "image_features must hold at least 2 pairs"),
        ("distillation", {2: np.ones(B)}, ValueError, r"reference_image must have 2 axes \(batch_size, ref"),
        ("distillation", {2: np.ones((B + 1, R))}, ValueError, r"reference_image must have shape .* got \(5, 2\)"),
        ("distillation", {3: np.ones((B, R + 1))}, ValueError, r"reference_text must have shape .* got \(4, 3\)"),
        ("distillation", {2: np.full((B, R), np.inf)}, ValueError, "reference_image must be finite, got inf"),
        ("distillation", {3: np.ones((B, R), dtype=np.float32)}, TypeError, "reference_text must have the dtype"),
        ("distillation", {3: np.ones((B, R), dtype=int)}, TypeError, "reference_text must have a real floating dtype"),
        ("distillation", {2: [[1.0]]}, TypeError, "reference_image must be an array, got list"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(name: str, change: dict[Any, Any], error: Any, message: str) -> None:
    case = CASES[name]
    arrays, options = draw()[: case.arrays], dict(case.scalars)
    for key, value in change.items():
        if isinstance(key, int):
            arrays[key] = value
        else:
            options[key] = value
    with pytest.raises(error, match=message):
        case.function(*arrays, **options)


def test_what_asks_for_autograd_is_refused() -> None:
    import torch

    arrays = [torch.asarray(x) for x in draw()]
    arrays[2].requires_grad_(True)
    with pytest.raises(ValueError, match="reference_image must not require gradients"):
        dc.distillation_loss(*arrays, temperature=1.0, reference_temperature=1.0)
