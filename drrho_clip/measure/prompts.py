"""The user's own classes and prompts for zero-shot classification: two text files, and the features of the classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from drrho_clip.data import DEFAULT_PROMPT, label_key
from drrho_clip.errors import BadInput

if TYPE_CHECKING:
    from drrho_clip.data import Tokenizer
    from drrho_clip.encoders import PairEncoder

__all__ = ["ClassName", "Prompts", "indistinguishable", "read_classes", "read_templates"]

_PLACE = "{}"
_LARGEST = 16 * 2**20


@dataclass(frozen=True)
class ClassName:
    """A class of the data and the name that stands for this class in the prompts.

    Attributes
    ----------
    line : int
        The line of the file, from 1.
    label : str
        The label as the data write it, apart from capitals and spaces.
    name : str
        The name in the prompts.
    """

    line: int
    label: str
    name: str


@dataclass(frozen=True)
class Prompts:
    """The prompts of the classes of a data set.

    Attributes
    ----------
    templates : tuple of str
        Texts in which ``{}`` stands for the name of a class; at least one.
    classes : tuple of ClassName or None
        The classes; None if the labels of the data are the names.
    source : str
        The file of the classes, for messages.
    """

    templates: tuple[str, ...] = (DEFAULT_PROMPT,)
    classes: tuple[ClassName, ...] | None = None
    source: str = ""

    def names_of(self, labels: Sequence[str]) -> list[str]:
        """Return the name of each label of the data.

        Raises
        ------
        BadInput
            If a label has no class, or a class has no images.
        """
        if self.classes is None:
            return list(labels)
        by_key = {label_key(entry.label): entry for entry in self.classes}
        keys = [label_key(label) for label in labels]
        missing = [label for label, key in zip(labels, keys, strict=True) if key not in by_key]
        if missing:
            raise BadInput(
                f"{self.source} must name every label of the data, got no class {missing[0]!r}{_more(missing)}"
            )
        unused = [entry for entry in self.classes if label_key(entry.label) not in set(keys)]
        if unused:
            raise BadInput(
                f"{self.source}, line {unused[0].line}: the class must be a label of the data, "
                f"got {unused[0].label!r}, which no image has{_more(unused)}"
            )
        return [by_key[key].name for key in keys]

    def texts_of(self, labels: Sequence[str]) -> list[list[str]]:
        """Return the prompts of each label: one text per template."""
        return [[template.replace(_PLACE, name) for template in self.templates] for name in self.names_of(labels)]

    def features(self, encoder: PairEncoder, labels: Sequence[str]) -> NDArray[np.float64]:
        """Return one feature per class, shape (k, d), of norm 1: the normalised mean over the templates.

        Source: prompt ensembling in feature space, Radford et al., "Learning transferable visual models from natural
        language supervision" (2021).

        Parameters
        ----------
        encoder : PairEncoder
            The model.
        labels : sequence of str, length k
            The labels of the data.

        Raises
        ------
        BadInput
            As in `names_of`.
        """
        texts = self.texts_of(labels)
        each = encoder.texts([text for prompts in texts for text in prompts]).astype(np.float64)
        mean = each.reshape(len(texts), len(self.templates), -1).mean(axis=1)
        # Features that cancel each other have a mean of norm 0, which stays 0.
        norms = np.linalg.norm(mean, axis=1, keepdims=True)
        return np.asarray(mean / np.where(norms > 0, norms, 1.0), dtype=np.float64)


def read_classes(path: Path) -> tuple[ClassName, ...]:
    r"""Read the classes from a text file with one class per line.

    A line holds the label, which is also the name in the prompts, or the label, a tab and the name. Empty lines are
    skipped, and white space around label and name is dropped.

    Parameters
    ----------
    path : Path
        The file, in UTF-8.

    Raises
    ------
    BadInput
        If the file cannot be read or has fewer than two classes, or if a line lacks a label or a name, or repeats the
        label or the name of an earlier line.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "classes.txt"
    >>> _ = file.write_text("cat\nn02084071\tdog\n")
    >>> [(entry.label, entry.name) for entry in read_classes(file)]
    [('cat', 'cat'), ('n02084071', 'dog')]
    """
    classes: list[ClassName] = []
    lines_of_labels: dict[str, int] = {}
    lines_of_names: dict[str, int] = {}
    for line, text in _lines(path, "a text file with one class per line"):
        parts = [part.strip() for part in text.split("\t")]
        if len(parts) > 2 or not all(parts):
            raise BadInput(f"{path}, line {line}: must be a label, or a label, a tab and a name, got {text!r}")
        entry = ClassName(line, parts[0], parts[-1])
        # Two classes with one name would have equal features, and every image of them would count as wrong.
        for kind, value, seen in (("label", entry.label, lines_of_labels), ("name", entry.name, lines_of_names)):
            first = seen.setdefault(label_key(value), line)
            if first != line:
                raise BadInput(f"{path}, line {line}: the {kind} must differ from that of line {first}, got {value!r}")
        classes.append(entry)
    if len(classes) < 2:
        raise BadInput(f"{path} must have at least two classes, got {len(classes)}")
    return tuple(classes)


def read_templates(path: Path) -> tuple[str, ...]:
    r"""Read the templates of prompts from a text file with one template per line; empty lines are skipped.

    Parameters
    ----------
    path : Path
        The file, in UTF-8.

    Raises
    ------
    BadInput
        If the file cannot be read or has no template, or if a template lacks ``{}`` or repeats an earlier line.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "templates.txt"
    >>> _ = file.write_text("a photo of a {}\n\na drawing of a {}\n")
    >>> read_templates(file)
    ('a photo of a {}', 'a drawing of a {}')
    """
    lines_of_templates: dict[str, int] = {}
    for line, text in _lines(path, "a text file with one template per line"):
        template = text.strip()
        if _PLACE not in template:
            raise BadInput(f"{path}, line {line}: a template must contain {_PLACE} for the name, got {template!r}")
        first = lines_of_templates.setdefault(template, line)
        if first != line:
            raise BadInput(f"{path}, line {line}: the template must differ from that of line {first}, got {template!r}")
    if not lines_of_templates:
        raise BadInput(f"{path} must have at least one template, got none")
    return tuple(lines_of_templates)


def indistinguishable(texts: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[list[int]]:
    """Return groups of classes whose prompts have equal tokens, so that the encoder gives them equal features.

    Such classes always tie, and ties count as wrong. The usual cause is a name whose words the run does not know.

    Parameters
    ----------
    texts : sequence of sequences of str
        The prompts of each class.
    tokenizer : Tokenizer
        The tokenizer of the run.

    Returns
    -------
    list of lists of int
        Positions in `texts`; every list has at least two.
    """
    rows = [tuple(map(tuple, tokenizer.encode(prompts).tolist())) for prompts in texts]
    groups: dict[object, list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault(row, []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def _lines(path: Path, kind: str) -> list[tuple[int, str]]:
    """Return the numbers and texts of the lines that are not empty."""
    # A pipe or a device could be read for ever.
    if not path.is_file():
        raise BadInput(f"{path} must be {kind}, got {'no plain file' if path.exists() else 'no such file'}")
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise BadInput(f"{path} must be {kind} of at most {_LARGEST:,} bytes, got {size:,}")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path} must be {kind}, got: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} must be UTF-8, got the byte 0x{error.object[error.start]:02x}") from None
    if "\0" in text:
        raise BadInput(f"{path} must be {kind}, got a file with zero bytes")
    # `splitlines` would also divide a line at characters that look like spaces.
    return [(number, line) for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1) if line.strip()]


def _more(rest: Sequence[object]) -> str:
    return f" (and {len(rest) - 1} more)" if len(rest) > 1 else ""
