"""Every room of the harness can be the first that a program imports: no cycle of imports depends on the order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import drrho_clip

FOLDER = Path(drrho_clip.__file__).parent
# Another process imports the modules, because modules that are imported anew would differ from those of other tests.
PROGRAM = """
import importlib, json, sys
failed = []
for name in json.loads(sys.argv[1]):
    for module in [module for module in sys.modules if module.startswith("drrho_clip")]:
        del sys.modules[module]
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed.append(f"{name}: {error}")
print(json.dumps(failed))
"""


def test_every_room_can_be_imported_first() -> None:
    # A module of a room is imported after the room itself, so the rooms and the modules beside them are enough.
    names = [f"drrho_clip.{path.parent.name}" for path in sorted(FOLDER.glob("*/__init__.py"))]
    names += [f"drrho_clip.{path.stem}" for path in sorted(FOLDER.glob("*.py")) if not path.stem.startswith("__")]
    assert len(names) > 20
    command = [sys.executable, "-c", PROGRAM, json.dumps(names)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
