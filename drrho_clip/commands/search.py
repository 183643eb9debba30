"""The command ``drrho search``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from drrho_clip.commands.common import (
    allow_unfinished_option,
    check_new_file,
    check_page,
    device_option,
    max_unreadable_option,
    say_unreadable,
    write_json,
)
from drrho_clip.commands.model import MODEL_HELP, CommandModel, backend_option, find_model
from drrho_clip.config import BUILT_IN_DATA
from drrho_clip.errors import BadInput
from drrho_clip.options import PATH, TEXT, at_least, setting
from drrho_clip.terminal.printing import say

if TYPE_CHECKING:
    from drrho_clip.data import Dataset
    from drrho_clip.search import Answer


@dataclass(frozen=True)
class Search:
    """Print the images of a data set that fit the given words best, according to the encoders of a model.

    Each line has the place, the score (the cosine of the features of words and image), the path of the image as the
    table writes it, and the caption. Several queries may be given; quote each of them.

    For example:
      drrho search runs/steered --data pairs.csv "a brown dog"
      drrho search runs/steered --data other.csv "a brown dog" "two cups" --top 5 --out found.html
    """

    model: str = setting(rule=TEXT, metavar="RUN|MODEL", positional=True, help=MODEL_HELP)
    words: tuple[str, ...] = setting(
        rule=TEXT, metavar="WORDS", several="+", positional=True, help="A query; several queries may be given."
    )
    data: str | None = setting(
        None,
        rule=TEXT,
        metavar="FILE|NAME",
        shown="the run's own",
        help="A table whose images are searched, or a built-in data set, of which the test part is searched.",
    )
    top: int = setting(10, rule=at_least(1), help="Number of images per query.")
    out: Path | None = setting(None, rule=PATH, help="A file .html to which a page with the pictures is written.")
    json: Path | None = setting(None, rule=PATH, help="A file to which the matches are written as well.")
    max_unreadable: float | None = max_unreadable_option()
    backend: str | None = backend_option()
    allow_unfinished: bool = allow_unfinished_option("The run")
    device: str | None = device_option()

    def run(self) -> int:
        """Search, then print the matches and write the files."""
        from drrho_clip.search import check_queries, search

        check_page("out", self.out)
        check_new_file("json", self.json, self.data, self.out)
        # The queries are checked before the images are read, because reading the images may take long.
        model = find_model(
            self.model,
            self.data,
            backend=self.backend,
            device=self.device,
            allow_unfinished=self.allow_unfinished,
            max_unreadable=self.max_unreadable,
        )
        encoder = model.encoder()
        if not encoder.reads_new_pairs:
            raise BadInput(f"model must be able to encode words, got {self.model}, a cache of features: name the model")
        check_queries(self.words, encoder.tokenizer)
        name, dataset = _opened(self.data, model)
        answers = search(encoder, encoder.tokenizer, dataset, self.words, top=self.top)
        say_unreadable(dataset)
        # The files come first, so that a closed pipe behind the lines does not cost the results.
        write_json(self.json, [_as_json(answer) for answer in answers])
        if self.out is not None:
            from drrho_clip.report.search import write_search_page

            write_search_page(self.out, answers, dataset, data_name=name, run_name=self.model)
        for answer in answers:
            _print(answer)
        if self.out is not None:
            say(f"wrote {self.out}")
        return 0


def _opened(data: str | None, model: CommandModel) -> tuple[str, Dataset]:
    """Return name and data: all pairs of a table, or the test part of a built-in data set."""
    from drrho_clip.data.splits import open_splits, open_table
    from drrho_clip.run.data import open_whole_table

    name = data or model.config.data
    if name in BUILT_IN_DATA:
        return name, open_splits(replace(model.config, data=name)).test
    return name, open_table(name, model.config) if model.run is None else open_whole_table(model.run, data)


def _print(answer: Answer) -> None:
    say(answer.query)
    if answer.unknown_words:
        say(f"  words that the model does not know: {', '.join(answer.unknown_words)}")
    width = max(len(match.image) for match in answer.matches)
    for place, match in enumerate(answer.matches, start=1):
        say(f"{place:4d}  {match.score:6.3f}  {match.image:<{width}}  {match.caption}")


def _as_json(answer: Answer) -> dict[str, object]:
    return answer._asdict() | {"matches": [match._asdict() for match in answer.matches]}
