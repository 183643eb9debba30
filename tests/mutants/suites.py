"""The test files that run against the mutants of each room (a module or a package of the core), in NumPy alone."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "drrho_core"

# Tests of compilers and of other libraries are left out: they are slow and detect no more wrong numbers than NumPy's.
CHOOSE = "not (torch or jax or jit or compile or tracing or unrolled or librarys_own_loop or b_by_b)"

SUITES: dict[str, tuple[str, ...]] = {
    "numerics": ("test_numerics.py",),
    "contrastive": (
        "test_contrastive.py",
        "test_contrastive_gradients.py",
        "test_tiles.py",
        "test_scaling.py",
        "test_exponentials.py",
        "test_anchor_weight.py",
        "test_unimodal.py",
        "test_unimodal_*.py",
        "test_contrastive_errors.py",
        "test_fused.py",
        "test_ranks.py",
        "test_ranks_*.py",
        "test_contrastive_*.py",
        "test_losses.py",
        "test_loss_family.py",
        "test_loss_*.py",
    ),
    "ambiguity": ("test_ambiguity_answers.py", "test_ambiguity_facts.py", "test_ambiguity_*.py", "test_risk.py"),
}
"""The rooms of `mutate.py`: modules or packages of the core, with the patterns of their test files in tests/core.

A test that fails kills a mutant and ends its run, so files that kill many mutants come first.
"""

LATER: dict[str, tuple[str, ...]] = {
    "contrastive": ("test_facts.py", "test_extreme_values.py", "test_precision.py", "test_float32_range.py"),
    "ambiguity": ("test_extreme_values.py", "test_ambiguity_proof.py"),
}
"""Files that run only against mutants that survive the first pass, because these tests take longer than all others."""


def files(room: str, *, later: bool = False) -> list[str]:
    """Return the test files of a room, each once; if ``later`` is true, the files of the second pass are included.

    Raises
    ------
    LookupError
        If no test file matches the room's patterns, so that the table above is out of date.
    """
    folder = ROOT / "tests" / "core"
    paths = [path for pattern in SUITES[room] for path in sorted(folder.glob(pattern))]
    slow = [folder / name for name in LATER.get(room, ())]
    paths = [path for path in paths if path not in slow] + (slow if later else [])
    if not paths:
        raise LookupError(f"tests/core must hold the suite of {room}, got no file of {SUITES[room]}")
    return list(dict.fromkeys(str(path.relative_to(ROOT)) for path in paths))


def modules_of(room: str) -> list[str]:
    """Return the modules of a room: all files of a package, or one module."""
    path = ROOT / PACKAGE / room
    if not path.is_dir():
        return [room]
    # An __init__ holds names, not mathematics.
    return [f"{room}.{file.stem}" for file in sorted(path.glob("*.py")) if file.stem != "__init__"]


def path_of(module: str) -> Path:
    """Return the file of a module below the package, such as ``contrastive.step``; a package is its ``__init__``."""
    path = ROOT / PACKAGE / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def source_of(module: str) -> str:
    """Return the text of a module below the package."""
    return path_of(module).read_text(encoding="utf-8")
