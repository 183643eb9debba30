"""The command ``drrho evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drrho_clip.commands.common import allow_unfinished_option, build_backend, check_new_file, device_option, write_json
from drrho_clip.commands.table import print_table
from drrho_clip.config import BUILT_IN_DATA
from drrho_clip.errors import BadInput
from drrho_clip.options import PATH, TEXT, Rule, choice, setting

if TYPE_CHECKING:
    from drrho_clip.data import Dataset
    from drrho_clip.measure.prompts import Prompts
    from drrho_clip.run import Run


def _read_gallery(word: str) -> int | str:
    return word if word == "all" else int(word)


def _is_gallery(value: Any) -> bool:
    is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 2
    return is_size or value == "all"


_GALLERY = Rule("an integer of at least 2 or 'all'", _read_gallery, _is_gallery, "N|all")


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on held-out pairs: retrieval in galleries, and zero-shot accuracy if the data have classes.

    With --data FILE, the pairs whose images the run was trained on or validated with are recognised by the content of
    their image files and left out. The lines below the table say how many pairs and queries the figures come from.

    For example:
      drrho evaluate runs/steered
      drrho evaluate runs/steered --split validation --json figures.json
      drrho evaluate runs/steered --data other.csv --gallery all
      drrho evaluate runs/steered --data other.csv --classes classes.txt --templates templates.txt
    """

    folder: Path = setting(rule=PATH, metavar="RUN", positional=True, help="Folder of the run.")
    data: str | None = setting(
        None,
        rule=TEXT,
        metavar="FILE|NAME",
        shown="the run's own",
        help="Another built-in data set, or another table. All pairs of that table are evaluated, except those whose "
        "images the run has seen.",
    )
    split: str | None = setting(
        None,
        rule=choice("test", "validation"),
        shown="test",
        help="Part of the data to evaluate; refused if --data names a table.",
    )
    gallery: int | str = setting(
        200, rule=_GALLERY, help="Number of images in a gallery, or 'all' for a single gallery of all images."
    )
    classes: Path | None = setting(
        None,
        rule=PATH,
        shown="the labels of the data",
        help="A text file with one class per line, for zero-shot accuracy: a label, or a label, a tab and the name in "
        "the prompts.",
    )
    templates: Path | None = setting(
        None,
        rule=PATH,
        shown="those of the data, such as 'a photo of a {}'",
        help="A text file with one template per line, in which {} stands for the name of a class. The feature of a "
        "class is the normalised mean over the templates.",
    )
    state: str = setting(
        "best",
        rule=choice("best", "last", "reference"),
        help="State of the run: the best by validation, the last, or the state that serves as a reference model.",
    )
    backend: str | None = setting(None, rule=TEXT, shown="the run's own", help="Array library.")
    allow_unfinished: bool = allow_unfinished_option("The run")
    device: str | None = device_option()
    json: Path | None = setting(None, rule=PATH, help="A file to which the results are written as well.")

    def run(self) -> int:
        """Evaluate, then print the table."""
        from drrho_clip.encode import Encoder
        from drrho_clip.evaluate import evaluate
        from drrho_clip.run.resume import open_finished_run

        run = open_finished_run(self.folder, "run", allow_unfinished=self.allow_unfinished)
        check_new_file("json", self.json, self.data or run.config.data)
        prompts = self._prompts()
        # Another backend may evaluate the run, because every backend reads the checkpoints of all others.
        backend = build_backend(self.backend or run.config.backend, self.device, run.config.dtype)
        dataset, about = self._held_out_pairs(run)
        encoder = Encoder.load(run, backend, state=self.state)
        size = max(2, len(dataset)) if isinstance(self.gallery, str) else self.gallery
        row = {
            "method": run.config.method,
            "dataset": self.data or run.config.data,
            "seed": run.config.seed,
            "metrics": evaluate(encoder, dataset, gallery_size=size, prompts=prompts),
            "state": run.chosen_state(self.state),
            **about,
        }
        # The file comes first, so that a closed pipe behind the table does not cost the results.
        write_json(self.json, [row])
        print_table([row])
        self._say_which_classes_are_equal(run, dataset, prompts)
        return 0

    def _prompts(self) -> Prompts | None:
        """Read the user's own classes and templates, or return None if the user names neither."""
        from drrho_clip.data import DEFAULT_PROMPT
        from drrho_clip.measure.prompts import Prompts, read_classes, read_templates

        if self.classes is None and self.templates is None:
            return None
        classes = None if self.classes is None else read_classes(self.classes)
        templates = (DEFAULT_PROMPT,) if self.templates is None else read_templates(self.templates)
        return Prompts(templates, classes, str(self.classes))

    def _say_which_classes_are_equal(self, run: Run, dataset: Dataset, prompts: Prompts | None) -> None:
        """Print the names of the classes whose prompts the run cannot distinguish: they tie, which counts as wrong."""
        from drrho_clip.measure.prompts import Prompts, indistinguishable
        from drrho_clip.terminal.printing import say

        labels = getattr(dataset, "class_names", ())
        if len(labels) < 2:
            return
        prompts = prompts or Prompts()
        names, length = prompts.names_of(labels), run.tokenizer.context_length
        for group in indistinguishable(prompts.texts_of(labels), run.tokenizer):
            listed = ", ".join(names[position] for position in group[:10])
            more = f" and {len(group) - 10} more" if len(group) > 10 else ""
            say(
                f"the run cannot tell the prompts of these classes apart, because it reads {length} words of a text "
                f"and takes all unknown words as the same word: {listed}{more}"
            )

    def _held_out_pairs(self, run: Run) -> tuple[Dataset, dict[str, int]]:
        """Open the pairs to measure; of another table, return also how many pairs were left out."""
        from drrho_clip.data.splits import open_splits, open_table
        from drrho_clip.measure.held_out import unseen_pairs
        from drrho_clip.run.data import open_run_data
        from drrho_clip.terminal.printing import say

        if self.data is None or self.data in BUILT_IN_DATA:
            # The run's own data must be those of the run's start; other built-in data have a fixed content.
            is_own = self.data in (None, run.config.data)
            splits = open_run_data(run) if is_own else open_splits(replace(run.config, data=str(self.data)))
            return (splits.validation if self.split == "validation" else splits.test), {}
        # Only the data of the run itself are split; of another table all pairs are evaluated.
        if self.split is not None:
            raise BadInput(f"split must be left out with --data FILE, which is measured whole, got {self.split}")
        unseen = unseen_pairs(open_table(self.data, run.config), run)
        say(unseen.sentence)
        return unseen.pairs, {"num_left_out": unseen.num_left_out}
