"""The command ``drrho evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from drrho_clip.commands.common import build_backend, device_option, write_json
from drrho_clip.commands.table import print_table
from drrho_clip.config import BUILT_IN_DATA
from drrho_clip.options import PATH, TEXT, choice, setting


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on held-out pairs: retrieval among 200 pairs, and zero-shot accuracy if the data have classes.

    For example:
      drrho evaluate runs/steered
      drrho evaluate runs/steered --split validation --json figures.json
      drrho evaluate runs/steered --data other.csv
    """

    folder: Path = setting(rule=PATH, metavar="RUN", positional=True, help="Folder of the run.")
    data: str | None = setting(
        None,
        rule=TEXT,
        metavar="FILE|NAME",
        shown="the run's own",
        help="Another built-in data set, or another table. All pairs of that table are evaluated.",
    )
    split: str = setting(
        "test", rule=choice("test", "validation"), help="Part of the data to evaluate; ignored if --data names a table."
    )
    backend: str | None = setting(None, rule=TEXT, shown="the run's own", help="Array library.")
    device: str | None = device_option()
    json: Path | None = setting(None, rule=PATH, help="A file to which the results are written as well.")

    def run(self) -> int:
        """Evaluate, then print the table."""
        from drrho_clip.data import read_pairs
        from drrho_clip.encode import Encoder
        from drrho_clip.evaluate import evaluate
        from drrho_clip.outputs import check_file
        from drrho_clip.run import open_run
        from drrho_clip.splits import open_splits

        # Another backend may evaluate the run, because every backend reads the checkpoints of all others.
        run = open_run(self.folder)
        check_file(self.json, "json")
        backend = build_backend(self.backend or run.config.backend, self.device, run.config.dtype)
        if self.data is None or self.data in BUILT_IN_DATA:
            name = self.data or run.config.data
            splits = open_splits(replace(run.config, data=name))
            dataset = splits.test if self.split == "test" else splits.validation
        else:
            # Only the data of the run itself are split; of another table all pairs are evaluated.
            name, dataset = self.data, read_pairs(self.data)
        row = {
            "method": run.config.method,
            "dataset": name,
            "seed": run.config.seed,
            "metrics": evaluate(Encoder.load(run, backend), dataset),
        }
        # The file comes first, so that a closed pipe behind the table does not cost the results.
        write_json(self.json, [row])
        print_table([row])
        return 0
