"""How many exponentials a step takes: one per pair if one temperature serves all anchors and no tile is cold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from drrho_core import contrastive_step
from helpers.features import unit_rows

B, D = 12, 5
NEVER = np.full(B, -np.inf)


@pytest.fixture
def exponentials(register_routines: Any) -> Callable[..., int]:
    """Return a function that takes a step and counts the entries of all tiles that are exponentiated."""
    sizes: list[int] = []

    def exp(x: np.ndarray, _overwrite: bool) -> np.ndarray:
        sizes.append(x.size)
        return np.exp(x)

    register_routines("numpy", exp=exp)

    def count(images: np.ndarray, texts: np.ndarray, **options: Any) -> int:
        sizes.clear()
        contrastive_step(images, texts, NEVER, NEVER, **options)
        return sum(sizes)

    return count


def features() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return unit_rows(rng, B, D), unit_rows(rng, B, D)


def test_one_exponential_per_pair_serves_both_directions_and_both_passes(exponentials: Callable[..., int]) -> None:
    assert exponentials(*features(), temperature=0.05) == B * B


def test_tiles_that_are_not_kept_take_a_second_exponential(exponentials: Callable[..., int]) -> None:
    assert exponentials(*features(), temperature=0.05, tile_size=5) == 2 * B * B


def test_a_temperature_per_anchor_takes_an_exponential_per_direction_and_pass(exponentials: Callable[..., int]) -> None:
    pair = np.full(B, 0.05), np.full(B, 0.06)
    assert exponentials(*features(), temperature=pair) == 4 * B * B


@pytest.mark.parametrize(("gap", "shared"), [(450.0, True), (470.0, False)])
def test_a_tile_is_cold_if_peaks_are_far_apart(gap: float, shared: bool, exponentials: Callable[..., int]) -> None:
    # Peaks of rows and columns that differ by 0.65 log(1 / smallest normal number) = 460 temperatures share nothing.
    images, texts = np.zeros((B, 2)), np.zeros((B, 2))
    images[:, 0] = texts[:, 0] = 1.0
    images[0, 0] = 1.0 - gap / 1000.0  # the peak of this row is lower by the gap, in units of the temperature
    assert exponentials(images, texts, temperature=1e-3) == (1 if shared else 4) * B * B


def test_rows_without_negatives_make_no_tile_cold(exponentials: Callable[..., int]) -> None:
    mask = np.ones((B, B), dtype=bool)
    mask[2, :] = mask[:, 7] = False
    assert exponentials(*features(), temperature=0.05, pair_mask=mask) == B * B


def test_a_batch_without_negatives_takes_no_shared_exponential(exponentials: Callable[..., int]) -> None:
    none = np.zeros((B, B), dtype=bool)
    assert exponentials(*features(), temperature=0.05, pair_mask=none) == 4 * B * B
