"""The pages of search results and of suspects as a reader sees them: headless Chromium, as for the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.pages import HOSTILE, PAGES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", PAGES)
def test_page_with_hostile_texts_has_no_problem(kind: str, check_page: Callable[[Path], None], tmp_path: Path) -> None:
    check_page(PAGES[kind](tmp_path, HOSTILE))


@pytest.mark.parametrize("kind", PAGES)
def test_pictures_of_all_proportions_stay_in_their_frames(
    kind: str, chromium: Any, check_page: Callable[[Path], None], tmp_path: Path
) -> None:
    sizes = [(8, 8), (1, 64), (64, 1), (30, 2000), (2000, 30), (700, 500), (500, 700)]
    pictures = [np.full((height, width, 3), 120, dtype=np.uint8) for height, width in sizes]
    path = PAGES[kind](tmp_path, [f"{height} by {width}" for height, width in sizes], pictures)
    check_page(path)
    overflow = chromium.evaluate(
        "[...document.querySelectorAll('.frame')].filter(frame => {"
        " const [a, b] = [frame, frame.querySelector('img')].map(e => e.getBoundingClientRect());"
        " return Math.abs(a.width - a.height) > 1 || b.bottom > a.bottom || b.right > a.right; }).length"
    )
    assert overflow == 0
