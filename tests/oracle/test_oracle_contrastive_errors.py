"""The errors of bad input of the oracle's contrastive functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drrho_reference import (
    contrastive_objective,
    contrastive_step,
)

from helpers.oracle_contrastive import problem


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": np.ones((5, 3))}, ValueError, r"text_features must have the shape \(5, 3\), got \(5, 4\)"),
        ({"image": np.ones(5)}, ValueError, r"image_features must have two axes, neither of them empty, got .* \(5,\)"),
        ({"image": np.ones((5, 0))}, ValueError, "image_features must have two axes, neither of them empty"),
        ({"image": np.full((5, 4), np.nan)}, ValueError, "image_features must be finite, got nan"),
        ({"text": np.full((5, 4), np.inf)}, ValueError, "text_features must be finite, got inf"),
        ({"image": np.ones((5, 4), dtype=complex)}, TypeError, "image_features must be an array of real numbers"),
        ({"image": np.ones((1, 4)), "text": np.ones((1, 4))}, ValueError, "must have at least 2 rows, got 1"),
        ({"log_inner": np.zeros((2, 4))}, ValueError, r"log_inner_image must have the shape \(5,\), got \(4,\)"),
        ({"log_inner": (np.zeros(5), np.zeros((5, 1)))}, ValueError, r"log_inner_text must have the shape \(5,\)"),
        ({"log_inner": (np.zeros(5), np.full(5, np.nan))}, ValueError, "log_inner_text must be finite or -inf, got"),
        ({"log_inner": (np.full(5, np.inf), np.zeros(5))}, ValueError, "log_inner_image must be finite or -inf, got"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"temperature": np.nan}, ValueError, "temperature must be finite, got nan"),
        ({"temperature": "warm"}, TypeError, "temperature must be a real number, got 'warm'"),
        ({"temperature": np.ones(5)}, TypeError, "temperature must be a number or a pair of arrays, got ndarray"),
        ({"temperature": (np.ones(5),)}, ValueError, "temperature must be a number or a pair of arrays, got 1 entries"),
        ({"temperature": (np.ones(5), np.ones(4))}, ValueError, r"temperature\[1\] must have the shape \(5,\)"),
        ({"temperature": (np.ones(5), -np.ones(5))}, ValueError, "temperature must be positive, got -1.0"),
        ({"gamma": 0.0}, ValueError, r"gamma must lie in \(0, 1\], got 0.0"),
        ({"gamma": 1.1}, ValueError, r"gamma must lie in \(0, 1\], got 1.1"),
        ({"gamma": (np.ones(5), np.zeros(5))}, ValueError, r"gamma must lie in \(0, 1\], got 0.0"),
        ({"radius": -1.0}, ValueError, "radius must be at least 0, got -1.0"),
        ({"eps": -1e-9}, ValueError, "eps must be at least 0, got -1e-09"),
        ({"eps": np.inf}, ValueError, "eps must be finite, got inf"),
        ({"reference_features": np.ones((5, 4))}, TypeError, "must be a pair of arrays, got ndarray"),
        ({"reference_features": (np.ones((5, 4)),)}, TypeError, "reference_features must be a pair of arrays"),
        ({"reference_features": (np.ones((5, 2)), np.ones((5, 3)))}, ValueError, r"features\[1\] must have"),
        ({"reference_features": (np.ones((4, 2)), np.ones((4, 2)))}, ValueError, "must have 5 rows, got 4"),
        ({"reference_weight": -0.5}, ValueError, "reference_weight must be at least 0, got -0.5"),
        ({"pair_mask": np.ones((5, 5))}, TypeError, "pair_mask must be an array of bool, got dtype float64"),
        ({"pair_mask": np.ones(5, dtype=bool)}, ValueError, r"pair_mask must have the shape \(5, 5\), got \(5,\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(changes: dict[str, Any], error: Any, message: str) -> None:
    p = problem()
    image, text, log_inner = (changes.get(name, p[name]) for name in ("image", "text", "log_inner"))
    options = {"temperature": 0.5, **{k: v for k, v in changes.items() if k not in ("image", "text", "log_inner")}}
    with pytest.raises(error, match=message):
        contrastive_step(image, text, *log_inner, **options)


def test_the_objective_needs_two_pairs() -> None:
    with pytest.raises(ValueError, match="image_features must have at least 2 rows, got 1"):
        contrastive_objective([[1.0]], [[1.0]], temperature=0.5)
