"""The command ``drrho vectors``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from drrho_clip.errors import BadInput
from drrho_clip.options import PATH, choice, setting
from drrho_clip.terminal.printing import say


@dataclass(frozen=True)
class Vectors:
    """Write test vectors: inputs and the oracle's results in files that a program in any language can read.

    The oracle is a slow NumPy implementation of the same functions. The folder gets a .safetensors file per function,
    an index vectors.json with the rules of comparison, and the JSON Schema of the index. Repeating the command writes
    the same bytes.

    For example:
      drrho vectors --out vectors
      drrho vectors --out vectors --dtype float32
    """

    out: Path = setting(rule=PATH, help="A new or an empty folder.")
    dtype: tuple[str, ...] = setting(
        (),
        rule=choice("float64", "float32"),
        several="append",
        shown="float64 and float32",
        help="Dtype of the inputs; may be repeated.",
    )

    def run(self) -> int:
        """Write the files; the index comes last, so a folder that has an index is complete."""
        import drrho_reference

        import drrho_core
        from drrho_clip.files.disk import write_atomic
        from drrho_clip.files.outputs import check_folder

        # The folder must be empty, so that every file in it belongs to the index.
        if self.out.exists() and not self.out.is_dir():
            raise BadInput(f"out must be a folder, got the file {self.out}")
        present = sorted(path.name for path in self.out.iterdir()) if self.out.exists() else []
        if present:
            raise BadInput(f"out must be a new or an empty folder, got {self.out} with {', '.join(present[:3])}")
        check_folder(self.out, "out")
        dtypes = self.dtype or ("float64", "float32")
        content = drrho_reference.vectors.files(library_version=drrho_core.__version__, dtypes=dtypes)
        self.out.mkdir(parents=True, exist_ok=True)
        for name, data in content.items():
            write_atomic(self.out / name, data)
        count = len(json.loads(content[drrho_reference.vectors.INDEX])["cases"])
        size = sum(map(len, content.values())) / 1e6
        say(f"wrote {count} cases, {len(content)} files, {size:.1f} MB: {self.out}")
        return 0
