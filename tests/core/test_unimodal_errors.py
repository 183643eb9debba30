"""The errors of bad input of the unimodal step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drrho_core import unimodal_contrastive_step

F, S = np.eye(3), np.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([[1.0], F, S, S], {}, TypeError, "view1_features must be an array, got list"),
        ([F[0], F, S, S], {}, ValueError, r"view1_features must have 2 axes \(batch_size, feature_dim\), got shape"),
        ([F, F[:, :2], S, S], {}, ValueError, r"view2_features must have shape .* = \(3, 3\), got \(3, 2\)"),
        ([F, F.astype("f4"), S, S], {}, TypeError, "view2_features must have the dtype of view1_features"),
        ([F.astype(int), F, S, S], {}, TypeError, "view1_features must have a real floating dtype, got int64"),
        ([F[:1], F[:1], S[:1], S[:1]], {}, ValueError, "view1_features must hold at least 2 pairs, .*, got 1"),
        ([F, np.where(F > 0, np.inf, 0.5), S, S], {}, ValueError, r"view2_features must be finite, got inf at"),
        ([F, F, S[:2], S], {}, ValueError, r"log_inner_view1 must have shape \(batch_size,\) = \(3,\), got \(2,\)"),
        ([F, F, S, S.astype("f2")], {}, TypeError, "log_inner_view2 must be float32 or wider, got float16"),
        ([F, F, S, S + np.nan], {}, ValueError, "log_inner_view2 must be finite, or -inf for a sample .*, got nan"),
        ([F, F, S, S], {"temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
        ([F, F, S, S], {"temperature": (S + 1,)}, ValueError,
         r"temperature must be a scalar or a pair \(view1, view2 anchors\), got 1 entries"),
        ([F, F, S, S], {"temperature": (S + 1, S)}, ValueError, r"temperature\[1\] must be > 0, got 0\.0 at"),
        ([F, F, S, S], {"gamma": 0.0}, ValueError, r"gamma must be in \(0, 1\], got 0\.0"),
        ([F, F, S, S], {"gamma": (S + 1, S + 2)}, ValueError, r"gamma\[1\] must be in \(0, 1\], got 2\.0 at"),
        ([F, F, S, S], {"reference_weight": -1}, ValueError, "reference_weight must be >= 0, got -1"),
        ([F, F, S, S], {"radius": -0.5}, ValueError, r"radius must be >= 0, got -0\.5"),
        ([F, F, S, S], {"eps": -0.5}, ValueError, r"eps must be >= 0, got -0\.5"),
        ([F, F, S, S], {"reference_features": F}, TypeError,
         r"reference_features must be a pair \(view1, view2\) of arrays, got ndarray of shape"),
        ([F, F, S, S], {"reference_features": (F, F[:, :2])}, ValueError,
         r"reference_features\[1\] must have shape \(batch_size, reference_dim\) = \(3, 3\), got \(3, 2\)"),
        ([F, F, S, S], {"sample_index": np.asarray([4, 0, 4])}, ValueError,
         "sample_index must not repeat an index within a batch, got 4 twice$"),
        ([F, F, S, S], {"sample_index": S}, TypeError, "sample_index must have an integer dtype, got float64"),
        ([F, F, S, S], {"tile_size": 0}, ValueError, "tile_size must be at least 1, got 0"),
        ([F, F, S, S], {"memory_budget": -1}, ValueError, "memory_budget must be at least 0, got -1"),
        ([F, F, S, S], {"xp": "numpy"}, TypeError, "xp must be an Array API namespace"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        unimodal_contrastive_step(*arguments, **{"temperature": 0.5, **options})


def test_autograd_another_library_and_a_pair_mask_are_refused() -> None:
    import torch

    features, state = torch.eye(3), torch.zeros(3)
    with pytest.raises(ValueError, match="view2_features must not require gradients"):
        unimodal_contrastive_step(features, features.clone().requires_grad_(), state, state, temperature=0.5)
    with pytest.raises(TypeError, match=r"log_inner_view1 must come from the library of view1_features \(torch\)"):
        unimodal_contrastive_step(features, features, S, state, temperature=0.5)
    with pytest.raises(TypeError, match="pair_mask"):
        unimodal_contrastive_step(F, F, S, S, temperature=0.5, pair_mask=F > 0)  # type: ignore[call-arg]


def test_devices_must_agree() -> None:
    import array_api_strict as xp

    here, there = (
        [xp.ones((3, 2), device=xp.Device(d)), xp.zeros(3, device=xp.Device(d))] for d in ("CPU_DEVICE", "device1")
    )
    with pytest.raises(ValueError, match="log_inner_view2 must be on the device of view1_features"):
        unimodal_contrastive_step(here[0], here[0], here[1], there[1], temperature=0.5)
