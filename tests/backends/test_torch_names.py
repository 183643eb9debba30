"""The names of torch for several processes are as old as the oldest torch that the project accepts."""

from __future__ import annotations

import ast
import importlib
import tomllib
from pathlib import Path

import drrho_torch
import pytest

SINCE = {
    "torch.distributed": {
        "GroupMember": (1, 8),
        "ProcessGroup": (1, 8),
        "all_gather_into_tensor": (1, 13),
        "all_reduce": (1, 8),
        "all_to_all_single": (1, 8),
        "get_backend": (1, 8),
        "get_process_group_ranks": (2, 0),
        "get_rank": (1, 8),
        "get_world_size": (1, 8),
        "is_available": (1, 8),
        "is_initialized": (1, 8),
        "is_torchelastic_launched": (1, 10),
        "reduce_scatter_tensor": (1, 13),
    },
    "torch.distributed.device_mesh": {"DeviceMesh": (2, 2)},
    "torch.distributed.tensor": {"DTensor": (2, 5), "Shard": (2, 5)},
    "torch.library": {"custom_op": (2, 4)},
}
"""Modules, names and the version of torch in which each name appeared, from torch's release notes."""

NEWER = {"all_gather_single", "reduce_scatter_single"}
"""Names of torch 2.13, which are used if they exist; the older names replace them otherwise."""

FILES = ("ranks.py", "opaque_step.py", "sharded_state.py", "arguments.py")


def names_of(path: Path) -> set[str]:
    """Return the names that a file takes from torch's modules for several processes, imported or as attributes."""
    aliases: dict[str, str] = {}
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module) in SINCE:
            found |= {alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            module = ast.unparse(node.value)
            if aliases.get(module, module) in SINCE:
                found.add(node.attr)
        # ``getattr(dist, "name", None)``
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and ast.unparse(node.args[0]) == "dist":
            found.add(ast.literal_eval(node.args[1]))
    return found - {"device_mesh", "tensor"}


def test_the_names_for_several_processes_are_older_than_the_oldest_torch() -> None:
    folder = Path(drrho_torch.__file__).parent
    used = set().union(*(names_of(folder / file) for file in FILES))
    known = {name: version for names in SINCE.values() for name, version in names.items()}
    assert {"all_reduce", "custom_op", "DTensor"} <= used  # the search finds all three kinds of uses
    assert used - NEWER <= set(known), "a name without the version of torch in which it appeared"
    (extra,) = tomllib.loads((folder.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]["torch"]
    oldest = tuple(map(int, extra.removeprefix("torch>=").split(".")))
    assert max(known.values()) <= oldest


@pytest.mark.parametrize("module", SINCE)
def test_this_torch_has_the_names_for_several_processes(module: str) -> None:
    missing = [name for name in SINCE[module] if not hasattr(importlib.import_module(module), name)]
    assert not missing
