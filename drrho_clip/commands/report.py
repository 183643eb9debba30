"""The command ``drrho report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drrho_clip.commands.common import build_backend, check_page, device_option
from drrho_clip.options import PATH, TEXT, as_typed, setting
from drrho_clip.terminal.printing import say

if TYPE_CHECKING:
    from drrho_clip.report.data import GalleryRow
    from drrho_clip.report.runs import HeldOut


@dataclass(frozen=True)
class Report:
    """Write a page about one or more runs: figures, curves, examples of retrieval, and the settings that differ.

    Figures stand side by side only if the runs were measured on the same held-out pairs; otherwise the page says so.
    An unfinished run is shown with its curves, and the page says how far the run is.

    For example:
      drrho report runs/reference runs/steered --out report.html
    """

    folders: tuple[Path, ...] = setting(
        rule=PATH, metavar="RUN", several="+", positional=True, help="Folders of runs; several may be given."
    )
    out: Path = setting(rule=PATH, help="The page, a file that ends in .html.")
    backend: str | None = setting(None, rule=TEXT, shown="that of each run", help="Array library of the retrievals.")
    device: str | None = device_option()

    def run(self) -> int:
        """Read the runs, search with them, and write the page."""
        from drrho_clip.report.comparison import notes_of, write_comparison
        from drrho_clip.report.runs import grouped, open_runs

        check_page("out", self.out)
        groups = grouped(open_runs(self.folders))
        galleries = [self._gallery(group) for group in groups]
        notes = notes_of(groups)
        write_comparison(self.out, groups, galleries, notes=notes, command=as_typed("drrho report", self))
        for note in notes:
            say(note)
        say(f"wrote {self.out}")
        return 0

    def _gallery(self, group: HeldOut) -> list[GalleryRow]:
        """Return the examples of retrieval of all runs of a group that have a checkpoint."""
        from drrho_clip.encode import Encoder
        from drrho_clip.report.gallery import retrieval_examples

        if group.dataset is None:
            return []
        encoders = {}
        for shown in group.runs:
            config = shown.run.config
            if shown.run.checkpoint.is_file():
                backend = build_backend(self.backend or config.backend, self.device, config.dtype)
                encoders[shown.name] = Encoder.load(shown.run, backend)
        return retrieval_examples(group.dataset, encoders) if encoders else []
