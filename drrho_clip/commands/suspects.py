"""The command ``drrho suspects``."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from drrho_clip.commands.common import allow_unfinished_option, build_backend, check_new_file, device_option, write_json
from drrho_clip.config import BUILT_IN_DATA
from drrho_clip.errors import BadInput
from drrho_clip.options import PATH, TEXT, setting
from drrho_clip.terminal.printing import say

if TYPE_CHECKING:
    from drrho_clip.data import Dataset


@dataclass(frozen=True)
class Suspects:
    """List the pairs of a data set whose captions are probably wrong, worst first.

    The run should be a reference model (drrho train --as-reference): a model that has learnt wrong captions by heart
    does not find them. The table has the columns row, image, caption, score and better_caption. The first pair is row
    0, the score is the pair loss of the model, and better_caption is empty if no caption of another image fits better.

    For example:
      drrho suspects runs/reference --data pairs.csv --out suspects.csv
    """

    folder: Path = setting(rule=PATH, metavar="RUN", positional=True, help="Folder of the run.")
    out: Path = setting(
        rule=PATH,
        help="The CSV file to write; a page with the pictures of the worst pairs, FILE.html, is written beside it.",
    )
    data: str | None = setting(
        None,
        rule=TEXT,
        metavar="FILE|NAME",
        shown="the run's own training pairs",
        help="A table, all pairs of which are ranked, or a built-in data set, the training pairs of which are ranked.",
    )
    backend: str | None = setting(None, rule=TEXT, shown="the run's own", help="Array library.")
    allow_unfinished: bool = allow_unfinished_option("The run")
    device: str | None = device_option()
    json: Path | None = setting(None, rule=PATH, help="A file to which figures and ranking are written as well.")

    def run(self) -> int:
        """Rank the pairs and write the table."""
        from drrho_clip.data.splits import open_splits
        from drrho_clip.encode import Encoder
        from drrho_clip.files.disk import write_atomic
        from drrho_clip.reference import recorded_shares
        from drrho_clip.report.suspects import write_suspects_page
        from drrho_clip.run.data import open_whole_table
        from drrho_clip.run.resume import open_finished_run
        from drrho_clip.run.temperature_figures import temperature_of
        from drrho_clip.suspects import csv_of, judge_suspects, rank_suspects
        from drrho_clip.terminal.progress import Reporter

        # The page stands beside the table and has the same name.
        page = self.out.with_suffix(".html")
        if page == self.out:
            raise BadInput(f"out must be a CSV file, got {self.out}: the page of the suspects gets this name")
        run = open_finished_run(self.folder, "run", allow_unfinished=self.allow_unfinished)
        name = self.data or run.config.data
        check_new_file("out", self.out, name)
        check_new_file("out", page, name)
        check_new_file("json", self.json, name, self.out, page)
        backend = build_backend(self.backend or run.config.backend, self.device, run.config.dtype)
        encoder = Encoder.load(run, backend, state="reference")
        if name in BUILT_IN_DATA:
            dataset: Dataset = open_splits(replace(run.config, data=name)).train
        else:
            dataset = open_whole_table(run, self.data)
        with Reporter(f"ranking {len(dataset):,} pairs of {name}", math.ceil(len(dataset) / 256)) as reporter:
            temperature = temperature_of(run, "reference")
            ranked = rank_suspects(encoder, dataset, temperature=temperature, after_batch=reporter.advance)
        own_data = self.data is None or name == run.config.data or is_same_file(name, run.config.data)
        verdict = judge_suspects(ranked, recorded_shares(run), own_data=own_data)
        write_atomic(self.out, csv_of(ranked).encode("utf-8", "surrogatepass"))
        write_suspects_page(
            page,
            ranked,
            dataset,
            num_wrong=verdict.num_suspects,
            data_name=name,
            run_name=str(self.folder),
            table_name=self.out.name,
            caveat=verdict.caveat,
        )
        figures = {"pairs": verdict.num_pairs, "probably_wrong": verdict.num_suspects, "caveat": verdict.caveat}
        write_json(self.json, {"data": name, **figures, "suspects": [suspect._asdict() for suspect in ranked]})
        say(verdict.in_words())
        say(f"wrote {self.out} and {page}")
        return 0


def is_same_file(first: str, second: str) -> bool:
    """Return whether two paths name one file that exists."""
    return os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)
