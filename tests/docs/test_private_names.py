"""Tests meet the packages as their users do: no test imports, patches or reads a private name of ours."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PACKAGES = ("drrho_core", "drrho_clip", "drrho_torch", "drrho_jax", "drrho_cupy", "drrho_numpy", "drrho_reference")

# Names with an underscore that Python itself gives to every NamedTuple.
NAMED_TUPLE = {"_replace", "_fields", "_asdict", "_make", "_field_defaults"}

# Private modules that are the subject of a test file. Their functions have no underscore: other modules of the core use
# them. `_routines` chooses among the routines that a backend registers with `drrho_core.extend`.
ALLOWED = {
    "core/test_arrays.py": {"_array_api"},
    "core/test_checks_of_arrays.py": {"_array_api", "_validate"},
    "core/test_checks_of_numbers.py": {"_array_api", "_validate"},
    "core/test_ranks_kernels.py": {"_array_api", "_validate"},
    "core/test_ranks_unread.py": {"_array_api", "_validate"},
    "helpers/checks.py": {"_validate"},
    "core/test_ambiguity_compiled.py": {"_array_api", "_routines"},
    "core/test_fused.py": {"_routines"},
    "backends/test_fused_jax.py": {"_routines"},
    "backends/test_fused_torch.py": {"_routines"},
    "backends/test_torch_exponential.py": {"_routines"},
    "backends/test_torch_products.py": {"_routines"},
    "backends/test_torch_sorting.py": {"_routines"},
}


def private_uses(source: str) -> Iterator[tuple[int, str]]:
    """Return the line and the name of every private name of our packages that a source touches."""
    tree = ast.parse(source)
    # Names that are imported from our packages, and the private parts of these imports.
    ours: set[str] = set()
    for node in ast.walk(tree):
        paths = []
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names if _is_ours(alias.name)]
            ours |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names if _is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            ours |= {alias.asname or alias.name for alias in node.names}
        yield from ((node.lineno, part) for path in paths for part in path.split(".") if _is_private(part))
    # Attributes of these names, and names that are patched: monkeypatch.setattr(module, "_name", value).
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and _root(node) in ours:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1 and _called(node) in PATCHES:
            target, name = node.args[:2]
            if _root(target) in ours and isinstance(name, ast.Constant) and _is_private(str(name.value)):
                yield node.lineno, str(name.value)


PATCHES = ("setattr", "delattr", "setitem", "getattr", "hasattr")


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def _root(node: ast.AST) -> str | None:
    """Return the name at the start of ``name.attribute[0].other``."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


FILES = sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_no_test_touches_a_private_name_of_our_packages(file: str) -> None:
    source = (TESTS / file).read_text(encoding="utf-8")
    allowed = ALLOWED.get(file, set())
    assert [f"line {line}: {name}" for line, name in private_uses(source) if name not in allowed] == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from drrho_core import _validate", "_validate"),
        ("from drrho_core._routines import exp_for", "_routines"),
        ("from drrho_core.numerics import _log_gammas", "_log_gammas"),
        ("import drrho_core._validate", "_validate"),
        ("import drrho_core.numerics as n\nn._log_gammas(0.5)", "_log_gammas"),
        ("from drrho_core import numerics\nmonkeypatch.setattr(numerics, '_log_gammas', None)", "_log_gammas"),
        ("from drrho_core import Space\nSpace(1)._state", "_state"),
    ],
)
def test_a_private_name_is_found(source: str, name: str) -> None:
    assert name in [found for _, found in private_uses(source)]


def test_names_of_others_and_of_named_tuples_are_free() -> None:
    source = "import torch\nfrom drrho_core import step\ntorch._dynamo.reset()\nstep._replace(x=1)\nself._own = 2\n"
    assert list(private_uses(source)) == []
