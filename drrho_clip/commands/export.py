"""The command ``drrho export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from drrho_clip.commands.common import allow_unfinished_option
from drrho_clip.options import PATH, choice, setting
from drrho_clip.terminal.printing import say

FORMATS = ("hf",)
"""The kinds of directories that the command writes."""


@dataclass(frozen=True)
class Export:
    """Write the model of a run for other programs.

    With --to hf the model becomes a directory that the library transformers reads: configuration, weights, tokenizer
    and the settings of the images. The run must have the encoders of a Hugging Face model (drrho train --model). The
    best state by validation is written.

    For example:
      drrho export runs/steered --to hf --out models/steered
    """

    folder: Path = setting(rule=PATH, metavar="RUN", positional=True, help="Folder of the run.")
    out: Path = setting(rule=PATH, help="The directory to write, which must be new or empty.")
    to: str = setting("hf", rule=choice(*FORMATS), help="Kind of the directory.")
    allow_unfinished: bool = allow_unfinished_option("The run")

    def run(self) -> int:
        """Write the directory."""
        from drrho_clip.exchange.hf_export import check_export, export_to_hugging_face
        from drrho_clip.run.resume import open_finished_run

        run = open_finished_run(self.folder, "run", allow_unfinished=self.allow_unfinished)
        check_export(run, self.out)
        export_to_hugging_face(run, self.out)
        say(f"wrote {self.out}")
        return 0
