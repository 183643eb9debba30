"""The command ``drrho index``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drrho_clip.commands.common import check_new_file, write_json
from drrho_clip.options import PATH, TEXT, number, setting
from drrho_clip.terminal.printing import say


@dataclass(frozen=True)
class Index:
    """Read data once, check them, print what is in them, and write an index that every other command opens at once.

    The data are a table, a folder of images with text files beside them, or tar shards. The index holds captions, sizes
    and places; the images stay where they are. An index is given to --data in place of the data.

    For example:
      drrho index pairs.csv --out pairs.index
      drrho index shards-{000..099}.tar --out shards.index
      drrho train --data shards.index --method clip --out runs/reference
    """

    data: tuple[str, ...] = setting(
        rule=TEXT, metavar="DATA", several="+", positional=True, help="The data; several tar shards are one data set."
    )
    out: Path = setting(rule=PATH, help="Folder of the index; it must be new or empty.")
    image_column: str | None = setting(
        None, rule=TEXT, shown="the usual names", help="Column of a table that holds the paths of the images."
    )
    caption_column: str | None = setting(
        None, rule=TEXT, shown="the usual names", help="Column of a table, or field of a .json file, with the captions."
    )
    label_column: str | None = setting(
        None, rule=TEXT, shown='"label" if there is one', help="Column of a table, or field, that holds the classes."
    )
    max_unreadable: float = setting(
        0.001,
        rule=number("in [0, 1]", lambda value: 0 <= value <= 1),
        help="Largest share of the images that may be unreadable; these images are left out.",
    )
    json: Path | None = setting(None, rule=PATH, help="A file to which the counts are written as well.")

    def run(self) -> int:
        """Read the data, write the index and print the counts."""
        from drrho_clip.data.columns import ColumnNames
        from drrho_clip.data.index import require_new, write_index
        from drrho_clip.data.pair_source import require_readable
        from drrho_clip.data.sources import read_source, read_together

        # Reading may take minutes, so everything that can be refused is refused before.
        require_new(self.out)
        check_new_file("json", self.json, *self.data)
        names = ColumnNames(self.image_column, self.caption_column, self.label_column)
        source = read_source(self.data[0], names) if len(self.data) == 1 else read_together(self.data, names)
        require_readable(source, self.max_unreadable)
        described = write_index(source, self.out)
        write_json(self.json, {"data": list(self.data), "fingerprint": described["fingerprint"], **described["counts"]})
        say(*lines_of(described["counts"], len(described["class_names"])))
        say(*(f"left out: {unreadable}" for unreadable in source.unreadable))
        say(f"wrote {self.out}")
        return 0


def lines_of(counts: Mapping[str, Any], num_classes: int = 0) -> list[str]:
    r"""Return the counts of an index in words, one line each.

    Examples
    --------
    >>> counts = {"pairs": 5, "images": 4, "captions_per_image": {"1": 3, "2": 1}, "duplicate_images": 0}
    >>> print(*lines_of(counts | {"duplicate_pairs": 0, "unreadable": 1}), sep="\n")
    pairs               5
    images              4
    captions per image  1 to 2 (3 images have 1, 1 has 2)
    duplicates          0 images, 0 pairs
    unreadable          1 image
    """
    per_image = {int(captions): images for captions, images in counts["captions_per_image"].items()}
    fewest, most = min(per_image, default=0), max(per_image, default=0)
    # With many different numbers of captions the ends of the range say enough.
    spread = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    if 1 < len(per_image) <= 5:
        (first, images), *others = sorted(per_image.items())
        parts = [f"{images:,} image{_s(images)} {_has(images)} {first}"]
        parts += [f"{images:,} {_has(images)} {captions}" for captions, images in others]
        spread += f" ({', '.join(parts)})"
    duplicates = f"{_plural(counts['duplicate_images'], 'image')}, {_plural(counts['duplicate_pairs'], 'pair')}"
    lines = [
        f"pairs               {counts['pairs']:,}",
        f"images              {counts['images']:,}",
        f"captions per image  {spread}",
        f"duplicates          {duplicates}",
        f"unreadable          {_plural(counts['unreadable'], 'image')}",
    ]
    return lines + ([f"classes             {num_classes:,}"] if num_classes else [])


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{_s(number)}"


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def _has(number: int) -> str:
    return "has" if number == 1 else "have"
