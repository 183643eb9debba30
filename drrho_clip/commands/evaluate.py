"""The command ``drrho evaluate``."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from drrho_clip.commands.common import (
    allow_unfinished_option,
    check_new_file,
    device_option,
    max_unreadable_option,
    say_unreadable,
    train_setting,
    write_json,
)
from drrho_clip.commands.model import MODEL_HELP, CommandModel, backend_option, find_model
from drrho_clip.commands.place import coordinator_option, place_among, process_option, processes_option
from drrho_clip.commands.table import print_table
from drrho_clip.config import BUILT_IN_DATA
from drrho_clip.errors import BadInput
from drrho_clip.options import FLAG, PATH, TEXT, Rule, at_least, choice, setting

if TYPE_CHECKING:
    from drrho_clip.data import Dataset, Tokenizer
    from drrho_clip.measure.prompts import Prompts
    from drrho_clip.processes.protocol import Processes


def _read_gallery(word: str) -> int | str:
    return word if word == "all" else int(word)


def _is_gallery(value: Any) -> bool:
    is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 2
    return is_size or value == "all"


_GALLERY = Rule("an integer of at least 2 or 'all'", _read_gallery, _is_gallery, "N|all")


@dataclass(frozen=True)
class Evaluate:
    """Measure a run or another model on held-out pairs: retrieval, and zero-shot accuracy if the data have classes.

    With --data FILE, the pairs whose images the run was trained on or validated with are recognised by the content of
    their image files and left out. The lines below the table say how many pairs and queries the figures come from.

    For example:
      drrho evaluate runs/steered
      drrho evaluate runs/steered --split validation --json figures.json
      drrho evaluate runs/steered --data other.csv --gallery all
      drrho evaluate features:caches/clip --data large --gallery all --queries 10000
      drrho evaluate hf:clip --data other.csv --probe
      drrho evaluate runs/steered --data other.csv --classes classes.txt --templates templates.txt
    """

    takes_processes: ClassVar[bool] = True

    model: str = setting(rule=TEXT, metavar="RUN|MODEL", positional=True, help=MODEL_HELP)
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
    queries: int | None = setting(
        None,
        rule=at_least(1),
        shown="all",
        help="Number of images and of captions that are queries, drawn at random, the same ones each time; for "
        "--gallery all and large data.",
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
    probe: bool = setting(
        False,
        rule=FLAG,
        help="Measure a linear probe too: the accuracy of a linear classifier on the image features. The training "
        "images of the run train it; of another table, the table's own training part, or four fifths of each class.",
    )
    state: str = setting(
        "best",
        rule=choice("best", "last", "reference"),
        help="State of the run: the best by validation, the last, or the state that serves as a reference model.",
    )
    max_unreadable: float | None = max_unreadable_option()
    backend: str | None = backend_option()
    allow_unfinished: bool = allow_unfinished_option("The run")
    device: str | None = device_option()
    coordinator: str | None = coordinator_option()
    processes: int | None = processes_option()
    process: int | None = process_option()
    rank_timeout: float = train_setting("rank_timeout")
    json: Path | None = setting(None, rule=PATH, help="A file to which the results are written as well.")

    def run(self) -> int:
        """Evaluate, then print the table."""
        from drrho_clip.processes.fingerprint import require_equal
        from drrho_clip.processes.opening import opened_processes, telling_others
        from drrho_clip.processes.together import of_first, together

        if self.queries is not None and self.gallery != "all":
            raise BadInput(f"queries must be left out without --gallery all, got {self.queries}")
        place = place_among(self.coordinator, self.processes, self.process)
        with telling_others(place):
            model = find_model(
                self.model,
                self.data,
                backend=self.backend,
                device=self.device,
                allow_unfinished=self.allow_unfinished,
                max_unreadable=self.max_unreadable,
                place=place,
            )
            backend = model.backend
        facts = {"gallery": self.gallery, "queries": self.queries, "split": self.split, "probe": self.probe}
        with opened_processes(backend, place, facts=facts, rank_timeout=self.rank_timeout) as processes:
            of_first(processes, partial(check_new_file, "json", self.json, self.data or model.config.data))
            # Each machine may have own copies of the files of the classes and of the templates.
            prompts = together(processes, self._prompts)
            classes = None if prompts is None or prompts.classes is None else list(map(astuple, prompts.classes))
            templates = None if prompts is None else prompts.templates
            require_equal(processes, {"classes": classes, "templates": templates})
            self._measure(model, prompts, processes)
        return 0

    def _measure(self, model: CommandModel, prompts: Prompts | None, processes: Processes) -> None:
        """Measure the model together with other processes, and print the table."""
        from drrho_clip.evaluate import evaluate
        from drrho_clip.measure.probing import check_probe, probe_figures
        from drrho_clip.processes.encoding import shared_encoder
        from drrho_clip.processes.facts import require_same_model
        from drrho_clip.processes.together import agreed_figures, together, written_by_first

        run = model.run
        dataset, about, training = together(processes, partial(self._held_out_pairs, model))
        encoder = together(processes, partial(model.encoder, state=self.state))
        # The measurement may take hours, so a probe that cannot be measured is refused before.
        if self.probe:
            together(processes, partial(check_probe, encoder, dataset, training))
        parts = {"data": dataset} if training is None else {"data": dataset, "training_data": training}
        require_same_model(processes, encoder, parts, model.backend)
        encoder = shared_encoder(encoder, processes)
        size = max(2, len(dataset)) if isinstance(self.gallery, str) else self.gallery
        metrics = evaluate(encoder, dataset, gallery_size=size, num_queries=self.queries, prompts=prompts)
        if self.probe:
            metrics |= probe_figures(encoder, dataset, training)
        metrics = agreed_figures(metrics, processes)
        say_unreadable(dataset)
        if training is not None:
            say_unreadable(training)
        row = {
            "method": self.model if run is None else run.config.method,
            "dataset": self.data or model.config.data,
            "seed": "" if run is None else run.config.seed,
            "metrics": metrics,
            "state": "" if run is None else run.chosen_state(self.state),
            **about,
        }
        # The file comes first, so that a closed pipe behind the table does not cost the results.
        written_by_first(processes, partial(write_json, self.json, [row]))
        print_table([row])
        if encoder.reads_new_pairs:
            self._say_which_classes_are_equal(encoder.tokenizer, dataset, prompts)

    def _prompts(self) -> Prompts | None:
        """Read the user's own classes and templates, or return None if the user names neither."""
        from drrho_clip.data import DEFAULT_PROMPT
        from drrho_clip.measure.prompts import Prompts, read_classes, read_templates

        if self.classes is None and self.templates is None:
            return None
        classes = None if self.classes is None else read_classes(self.classes)
        templates = (DEFAULT_PROMPT,) if self.templates is None else read_templates(self.templates)
        return Prompts(templates, classes, str(self.classes))

    def _say_which_classes_are_equal(self, tokenizer: Tokenizer, dataset: Dataset, prompts: Prompts | None) -> None:
        """Print the names of the classes that the model cannot tell apart by their prompts: ties count as wrong."""
        from drrho_clip.measure.prompts import Prompts, indistinguishable
        from drrho_clip.terminal.printing import say

        labels = getattr(dataset, "class_names", ())
        if len(labels) < 2:
            return
        prompts = prompts or Prompts()
        names, length = prompts.names_of(labels), tokenizer.context_length
        for group in indistinguishable(prompts.texts_of(labels), tokenizer):
            listed = ", ".join(names[position] for position in group[:10])
            more = f" and {len(group) - 10} more" if len(group) > 10 else ""
            say(
                f"the model cannot tell the prompts of these classes apart, because it reads {length} words of a text "
                f"and takes all unknown words as the same word: {listed}{more}"
            )

    def _held_out_pairs(self, model: CommandModel) -> tuple[Dataset, dict[str, int], Dataset | None]:
        """Return the pairs to measure, how many pairs of a table were left out, and the pairs that train the probe."""
        from drrho_clip.data import PairsDataset
        from drrho_clip.data.splits import open_splits, open_table
        from drrho_clip.measure.held_out import unseen_pairs
        from drrho_clip.run.data import open_run_data
        from drrho_clip.terminal.printing import say

        run, config = model.run, model.config
        if self.data is None or self.data in BUILT_IN_DATA:
            # The run's own data must be those of the run's start; other built-in data have a fixed content.
            own = run if self.data in (None, config.data) else None
            splits = open_splits(replace(config, data=str(self.data))) if own is None else open_run_data(own)
            # Built-in data have no labels of single pairs, so the probe divides their classification task.
            training = splits.train if isinstance(splits.train, PairsDataset) else None
            return (splits.validation if self.split == "validation" else splits.test), {}, training
        # Only the data of the run itself are split; of another table all pairs are evaluated.
        if self.split is not None:
            raise BadInput(f"split must be left out with --data FILE, which is measured whole, got {self.split}")
        table = open_table(self.data, config)
        if run is None:
            say(f"no pair is left out, because the training images of {self.model} are not known")
            return table, {}, None
        unseen = unseen_pairs(table, run)
        say(unseen.sentence)
        return unseen.pairs, {"num_left_out": unseen.num_left_out}, None
