"""The number of Python function calls in one step on NumPy: small tasks should not drown in interpretation."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

import drrho_core
from drrho_clip.config import TrainConfig
from drrho_clip.models import ModelSpec, initial_parameters
from drrho_clip.step import StepBatch, build_step
from drrho_clip.update import initial_state
from drrho_core import contrastive_step, cosine_gamma
from drrho_core.backend import get_backend
from drrho_core.state import make_estimator

ROOT = Path(drrho_core.__file__).parents[1]
OURS = ("drrho_core", "drrho_clip", "backends/drrho_numpy", "drrho_numpy")
CHECKS = ("_validate.py", "_array_api.py")
B, N, D = 128, 500, 16


def calls(function: Callable[[], Any]) -> tuple[int, int]:
    """Count the calls of functions of our packages, and those in the two files of checks.

    Comprehensions are no functions: since Python 3.12 most of them have no frame of their own.
    """
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_name
        if event == "call" and (not name.startswith("<") or name == "<lambda>"):
            counted[frame.f_code.co_filename] += 1

    function()  # the first call fills tables of types and of registered routines
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    ours = {
        file: number
        for file, number in counted.items()
        if any(Path(file).is_relative_to(ROOT / package) for package in OURS)
    }
    return sum(ours.values()), sum(number for file, number in ours.items() if file.endswith(CHECKS))


def unit_rows(rng: np.random.Generator, rows: int = B) -> np.ndarray:
    x = rng.normal(size=(rows, D)).astype("float32")
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_a_contrastive_step_makes_at_most_140_calls() -> None:
    rng = np.random.default_rng(0)
    images, texts, *references = (unit_rows(rng) for _ in range(4))
    unseen = np.full(B, -np.inf, dtype="float32")
    every, checks = calls(
        lambda: contrastive_step(
            images,
            texts,
            unseen,
            unseen,
            temperature=0.07,
            gamma=0.5,
            reference_features=(references[0], references[1]),
            xp=xp,
        )
    )
    assert every <= 140
    assert 10 < checks <= 60


def test_a_training_step_makes_at_most_200_calls() -> None:
    """The batch's rows of the estimator, the step of the harness with AdamW, and the rows' way back."""
    rng = np.random.default_rng(0)
    backend = get_backend("numpy")
    config = TrainConfig(data="digits", method="drrho", backend="numpy", reference="reference", batch_size=B)
    spec = ModelSpec("mlp", image_size=8, channels=1, vocabulary_size=20, context_length=6, feature_dim=D)
    optimizer = backend.adamw(weight_decay=config.weight_decay)
    state = initial_state(backend, optimizer, config, initial_parameters(spec, seed=0))
    step = build_step(backend, backend.model(spec), optimizer, config)
    estimator = make_estimator("device", N, backend=backend)
    images, texts, sample_index = rng.random((B, 8, 8, 1)), rng.random((B, 20)), rng.permutation(N)[:B]
    references = unit_rows(rng, N), unit_rows(rng, N)

    def take_step() -> None:
        log_inner_image, log_inner_text = estimator.gather(sample_index)
        batch = StepBatch(
            images=backend.asarray(images),
            texts=backend.asarray(texts),
            log_inner_image=log_inner_image,
            log_inner_text=log_inner_text,
            reference_features=(
                backend.asarray(references[0][sample_index]),
                backend.asarray(references[1][sample_index]),
            ),
            learning_rate=1e-3,
            gamma=cosine_gamma(1, num_epochs=8, gamma_min=0.5),
            temperature=None,
        )
        result = step(state, batch)
        estimator.scatter(sample_index, result.log_inner_image, result.log_inner_text)

    every, checks = calls(take_step)
    assert every <= 200
    assert 10 < checks <= 60
