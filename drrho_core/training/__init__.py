"""The old name of the CLIP harness, the training program `drrho_clip`. Version 0.3 removes this alias.

For example, ``import drrho_core.training.loop`` imports the module `drrho_clip.train` and warns once.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

RENAMED = {
    "command_line": "cli",
    "loop": "train",
    "runs": "run",
    "evaluation": "evaluate",
    "architecture": "models.spec",
    "towers": "models.mlp",
    "checkpoint": "files.checkpoint",
    "progress": "terminal.progress",
}
"""Old and new names of modules directly in the package; all other modules have kept their names or were removed."""


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``drrho_core.training.<module>`` as the module of `drrho_clip` that replaced it."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        first, dot, rest = fullname.removeprefix(f"{__name__}.").partition(".")
        new = f"drrho_clip.{RENAMED.get(first, first)}{dot}{rest}"
        if importlib.util.find_spec(new) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, _Alias(), loader_state=new)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        self.own_spec = importlib.import_module(spec.loader_state).__spec__
        return importlib.import_module(spec.loader_state)

    def exec_module(self, module: ModuleType) -> None:
        # The import under the old name has replaced the module's spec. Restore the former spec, which has the new name.
        module.__spec__ = self.own_spec


warnings.warn("drrho_core.training has moved to drrho_clip; the old name goes in 0.3", FutureWarning, stacklevel=2)
sys.meta_path.insert(0, _Alias())
