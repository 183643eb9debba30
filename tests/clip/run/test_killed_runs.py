"""Runs that are killed at many moments, spread evenly over all that a run does, end with the same bits.

The environment variable DRRHO_KILLS sets the number of moments.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import killed_runs


@pytest.mark.slow
def test_runs_that_are_killed_anywhere_end_with_the_same_bits(tmp_path: Path) -> None:
    moments = os.environ.get("DRRHO_KILLS", "6")
    done = subprocess.run(
        [sys.executable, killed_runs.__file__, str(tmp_path), moments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed at moment") == int(moments)
