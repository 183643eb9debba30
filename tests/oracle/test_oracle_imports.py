"""The oracle stays independent: NumPy and the standard library, nothing else."""

from __future__ import annotations

import subprocess
import sys

LIST_MODULES = """
import sys
import numpy
before = set(sys.modules)
import drrho_reference
print(" ".join(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_the_oracle_loads_numpy_and_the_standard_library_only() -> None:
    run = subprocess.run([sys.executable, "-c", LIST_MODULES], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "drrho_reference" in loaded
    assert loaded - set(sys.stdlib_module_names) - {"drrho_reference", "numpy"} == set()
