"""The command ``drrho suspects``."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from drrho_clip.commands.common import (
    allow_unfinished_option,
    check_new_file,
    device_option,
    max_unreadable_option,
    say_unreadable,
    write_json,
)
from drrho_clip.commands.model import MODEL_HELP, backend_option, find_model
from drrho_clip.config import BUILT_IN_DATA
from drrho_clip.errors import BadInput
from drrho_clip.options import PATH, TEXT, setting
from drrho_clip.terminal.printing import say

if TYPE_CHECKING:
    from drrho_clip.data import Dataset


@dataclass(frozen=True)
class Suspects:
    """List the pairs of a data set whose captions are probably wrong, worst first.

    The model should be a good reference model (drrho train --as-reference): a model that has learnt wrong captions by
    heart does not find them. The table has the columns row, image, caption, score and better_caption. The first pair
    is row 0, the score is the pair loss of the model, and better_caption is empty if no caption of another image fits
    better.

    For example:
      drrho suspects runs/reference --data pairs.csv --out suspects.csv
      drrho suspects hf:clip --data pairs.csv --out suspects.csv
    """

    model: str = setting(rule=TEXT, metavar="RUN|MODEL", positional=True, help=MODEL_HELP)
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
    max_unreadable: float | None = max_unreadable_option()
    backend: str | None = backend_option()
    allow_unfinished: bool = allow_unfinished_option("The run")
    device: str | None = device_option()
    json: Path | None = setting(None, rule=PATH, help="A file to which figures and ranking are written as well.")

    def run(self) -> int:
        """Rank the pairs and write the table."""
        from drrho_clip.data.splits import open_splits, open_table
        from drrho_clip.files.disk import write_atomic
        from drrho_clip.reference import recorded_shares
        from drrho_clip.report.suspects import write_suspects_page
        from drrho_clip.run.data import open_whole_table
        from drrho_clip.suspects import csv_of, judge_suspects, rank_suspects
        from drrho_clip.terminal.progress import Reporter

        # The page stands beside the table and has the same name.
        page = self.out.with_suffix(".html")
        if page == self.out:
            raise BadInput(f"out must be a CSV file, got {self.out}: the page of the suspects gets this name")
        model = find_model(
            self.model,
            self.data,
            backend=self.backend,
            device=self.device,
            allow_unfinished=self.allow_unfinished,
            max_unreadable=self.max_unreadable,
        )
        run, name = model.run, self.data or model.config.data
        check_new_file("out", self.out, name)
        check_new_file("out", page, name)
        check_new_file("json", self.json, name, self.out, page)
        encoder = model.encoder(state="reference")
        if name in BUILT_IN_DATA:
            dataset: Dataset = open_splits(replace(model.config, data=name)).train
        else:
            dataset = open_table(name, model.config) if run is None else open_whole_table(run, self.data)
        with Reporter(f"ranking {len(dataset):,} pairs of {name}", math.ceil(len(dataset) / 256)) as reporter:
            ranked = rank_suspects(encoder, dataset, temperature=encoder.temperature, after_batch=reporter.advance)
        say_unreadable(dataset)
        own = None if run is None else run.config.data
        own_data = own is not None and (name == own or is_same_file(name, own))
        verdict = judge_suspects(ranked, None if run is None else recorded_shares(run), own_data=own_data)
        write_atomic(self.out, csv_of(ranked).encode("utf-8", "surrogatepass"))
        write_suspects_page(
            page,
            ranked,
            dataset,
            num_wrong=verdict.num_suspects,
            data_name=name,
            run_name=self.model,
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
