"""The example of token selection tells the story that its first lines promise."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "token_selection.py"


def test_excess_loss_selection_learns_from_clean_tokens_and_beats_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    results = runpy.run_path(str(EXAMPLE))["main"](seed=0)
    loss, share = ({name: result[part] for name, result in results.items()} for part in (0, 1))
    assert loss["high excess"] < loss["all tokens"] - 0.05 < loss["high loss"] - 0.3
    assert loss["high excess"] < loss["reference model"]
    assert share["high excess"] < 0.5 * share["all tokens"] < 0.4 * share["high loss"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed[1:]] == list(results)
    assert f"{loss['high excess']:.4f}" in printed[-1]
