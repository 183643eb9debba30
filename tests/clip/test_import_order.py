"""Every module of the harness can be the first that a program imports: no cycle of imports depends on the order."""

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


def test_every_module_can_be_imported_first() -> None:
    files = [path.relative_to(FOLDER.parent).with_suffix("") for path in sorted(FOLDER.rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in files if path.name != "__main__"]
    assert len(names) > 100
    command = [sys.executable, "-c", PROGRAM, json.dumps(names)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
