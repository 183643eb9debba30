"""`import drrho_core` loads no framework, and the core names no array library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import drrho_core

LIBRARIES = {"numpy", "torch", "jax", "jaxlib", "cupy", "scipy", "sklearn", "array_api_strict"}
FRAMEWORKS = LIBRARIES - {"numpy"}
HOME = Path(drrho_core.__file__).parent
CORE = sorted(path for path in HOME.rglob("*.py") if path.parent.name != "training")


def loaded_by(statement: str) -> set[str]:
    """Top-level names that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_core_loads_no_framework() -> None:
    loaded = loaded_by("import drrho_core, drrho_core.backend")
    assert "drrho_core" in loaded
    assert not loaded & FRAMEWORKS
    assert not {name for name in loaded if name.startswith("drrho_") and name != "drrho_core"}


def test_importing_the_core_does_not_load_its_harness() -> None:
    code = "import drrho_core, sys; assert not [n for n in sys.modules if n.startswith('drrho_clip')]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_step_on_one_library_loads_no_other() -> None:
    loaded = loaded_by(
        "import numpy as np, drrho_core\n"
        "drrho_core.contrastive_step(np.eye(3), np.eye(3), np.zeros(3), np.zeros(3), temperature=0.5)\n"
        "drrho_core.InnerEstimator(3, like=np.zeros(1)).gather(np.asarray([1]))"
    )
    assert not loaded & FRAMEWORKS


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(HOME)))
def test_the_core_names_no_array_library(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    # The fit of the scaling law is SciPy's, and files are written by safetensors.numpy; both are imported inside the
    # function.
    allowed = {"scaling_law.py": {"scipy"}, "shard_files.py": {"numpy"}}.get(path.name, set())
    # array_api_compat.numpy and its like would load the library, too.
    assert not {name for name in imported if set(name.split(".")) & (LIBRARIES - allowed)}


def test_all_public_names_are_there_and_documented() -> None:
    assert len(set(drrho_core.__all__)) == len(drrho_core.__all__)
    for name in drrho_core.__all__:
        assert getattr(drrho_core, name).__doc__, name


def test_help_of_the_command_line_loads_nothing_heavy() -> None:
    loaded = loaded_by(
        "import contextlib, io\n"
        "from drrho_clip.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        "assert 'demo' in shown.getvalue()"
    )
    assert "argparse" in loaded
    heavy = FRAMEWORKS | {"numpy", "safetensors", "PIL", "grain", "optax", "matplotlib", "drrho_reference"}
    assert not loaded & heavy
