"""Which tests meet a mutant: the files of each room, in NumPy alone."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Tests of compilers and of other libraries cannot see more of a wrong number than NumPy's, and they are slow.
CHOOSE = "not (torch or jax or jit or compile or tracing or unrolled or librarys_own_loop or b_by_b)"

SUITES: dict[str, tuple[str, ...]] = {
    "numerics": ("test_numerics.py",),
    "ambiguity": ("test_ambiguity*.py", "test_risk.py"),
    "contrastive": (
        "test_tiles.py",
        "test_contrastive.py",
        "test_contrastive_gradients.py",
        "test_contrastive_errors.py",
        "test_anchor_weight.py",
        "test_unimodal.py",
        "test_loss_family.py",
        "test_losses.py",
    ),
}
"""The rooms of `mutate.py`, and the patterns of their test files in tests/core."""


def files(room: str) -> list[str]:
    """Return the test files of a room.

    Raises
    ------
    LookupError
        If a pattern matches no file: the table above is out of date.
    """
    found = []
    for pattern in SUITES[room]:
        matches = sorted((ROOT / "tests" / "core").glob(pattern))
        if not matches:
            raise LookupError(f"tests/core must hold {pattern}, which the suite of {room} names")
        found += [str(path.relative_to(ROOT)) for path in matches if "proof" not in path.name]
    return found
