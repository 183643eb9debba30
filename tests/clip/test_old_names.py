"""The old names `drrho_core.training.*` lead to `drrho_clip`, with one warning."""

from __future__ import annotations

import subprocess
import sys

import pytest

OLD_AND_NEW = {
    "command_line": "cli",
    "loop": "train",
    "runs": "run",
    "evaluation": "evaluate",
    "architecture": "models.spec",
    "towers": "models.mlp",
    "checkpoint": "files.checkpoint",
    "progress": "terminal.progress",
    "config": "config",
    "data.pairs": "data.pairs",
    "report.page": "report.page",
}


def python(code: str) -> str:
    """Return the output of a fresh interpreter in which a warning is an error."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_old_modules_are_the_new_ones() -> None:
    code = "import importlib, warnings\nwith warnings.catch_warnings(record=True) as seen:\n"
    code += "    warnings.simplefilter('always')\n"
    code += f"    for old, new in {OLD_AND_NEW!r}.items():\n"
    code += "        a = importlib.import_module('drrho_core.training.' + old)\n"
    code += "        b = importlib.import_module('drrho_clip.' + new)\n"
    code += "        assert a is b and a.__spec__.name == b.__name__ == 'drrho_clip.' + new, old\n"
    code += "print(len(seen), seen[0].category.__name__, seen[0].message)"
    assert python(code) == "1 FutureWarning drrho_core.training has moved to drrho_clip; the old name goes in 0.3\n"


@pytest.mark.parametrize("name", ["nothing", "data.nothing"])
def test_an_unknown_old_module_is_not_found(name: str) -> None:
    code = f"import warnings; warnings.simplefilter('ignore'); import drrho_core.training.{name}"
    assert f"ModuleNotFoundError: No module named 'drrho_core.training.{name}'" in python(code)
