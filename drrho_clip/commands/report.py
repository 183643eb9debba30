"""The command ``drrho report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drrho_clip.commands.common import build_backend, check_new_file, check_page, device_option, write_json
from drrho_clip.options import PATH, TEXT, as_typed, setting
from drrho_clip.terminal.printing import say

if TYPE_CHECKING:
    from drrho_clip.encode import Encoder
    from drrho_clip.report.data import GalleryRow
    from drrho_clip.report.runs import HeldOut, ShownRun


@dataclass(frozen=True)
class Report:
    """Write a page about one or more runs: figures, curves, examples of retrieval, and the settings that differ.

    Figures stand side by side only if the runs were measured on the same held-out pairs; otherwise the page says so.
    An unfinished run is shown with its curves, and the page says how far the run is. With --data FILE, all runs are
    measured on that table, without the pairs whose images one of the runs was trained on or validated with.

    For example:
      drrho report runs/reference runs/steered --out report.html
      drrho report runs/reference runs/steered --data other.csv --out report.html --json figures.json
    """

    folders: tuple[Path, ...] = setting(
        rule=PATH, metavar="RUN", several="+", positional=True, help="Folders of runs; several may be given."
    )
    out: Path = setting(rule=PATH, help="The page, a file that ends in .html.")
    data: str | None = setting(
        None,
        rule=TEXT,
        metavar="FILE|NAME",
        shown="the test pairs of each run",
        help="Another table, or a built-in data set, on which all runs are measured and from which the examples come.",
    )
    backend: str | None = setting(None, rule=TEXT, shown="that of each run", help="Array library of the retrievals.")
    device: str | None = device_option()
    json: Path | None = setting(
        None, rule=PATH, help="A file to which the results are written as well: one row per run, as by drrho evaluate."
    )

    def run(self) -> int:
        """Read the runs, search with them, and write the page."""
        from drrho_clip.report.comparison import notes_of, write_comparison
        from drrho_clip.report.measured import measured_on
        from drrho_clip.report.runs import grouped, open_runs

        check_page("out", self.out)
        check_new_file("out", self.out, self.data)
        check_new_file("json", self.json, self.data, self.out)
        runs = open_runs(self.folders)
        sentences: list[str] = []
        if self.data is None:
            groups = grouped(runs)
        else:
            groups, sentences = measured_on(self.data, runs, self._encoder)
        galleries = [self._gallery(group) for group in groups]
        notes = [*sentences, *notes_of(groups)]
        write_json(self.json, [self._row(shown) for group in groups for shown in group.runs])
        write_comparison(self.out, groups, galleries, notes=notes, command=as_typed("drrho report", self))
        for note in notes:
            say(note)
        say(f"wrote {self.out}")
        return 0

    def _gallery(self, group: HeldOut) -> list[GalleryRow]:
        """Return the examples of retrieval of all runs of a group that have a checkpoint."""
        from drrho_clip.report.gallery import retrieval_examples

        if group.dataset is None:
            return []
        encoders = {shown.name: self._encoder(shown) for shown in group.runs if shown.run.checkpoint.is_file()}
        return retrieval_examples(group.dataset, encoders) if encoders else []

    def _encoder(self, shown: ShownRun) -> Encoder:
        """Return the model of a run: the best state by validation."""
        from drrho_clip.encode import Encoder

        config = shown.run.config
        backend = build_backend(self.backend or config.backend, self.device, config.dtype)
        return Encoder.load(shown.run, backend)

    def _row(self, shown: ShownRun) -> dict[str, Any]:
        """Return the row of a run in the JSON file; the metrics of an unfinished run are empty."""
        config = shown.run.config
        return {
            "method": config.method,
            "dataset": self.data or config.data,
            "seed": config.seed,
            "metrics": dict(shown.metrics),
            "state": shown.run.chosen_state("best"),
            "run": str(shown.run.folder),
            "status": shown.status,
        }
