"""A claim of the paper: the experiments that it needs, and the verdict and the pictures that the rows give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.statistics import Interval

__all__ = ["Claim", "Figure", "Group", "Judgement", "Table", "by_seed", "groups", "score_by_seed"]


class Group(NamedTuple):
    """The world, method, reference model and label that rows of several seeds have in common."""

    dataset: str
    method: str
    reference: str | None = None
    label: str = ""


class Figure(NamedTuple):
    """A measured figure of a claim with intervals; `label` names the difference and the unit."""

    label: str
    interval: Interval


class Judgement(NamedTuple):
    """The outcome of a claim.

    Attributes
    ----------
    counted : sequence of Figure
        The differences of the verdict.
    verdict : str
        A verdict of `statistics`.
    sentence : str
        The verdict in a sentence.
    notes : sequence of str
        Further sentences about figures that are no differences.
    others : sequence of Figure
        Differences that are shown and do not count for the verdict.
    """

    counted: Sequence[Figure]
    verdict: str
    sentence: str
    notes: Sequence[str] = ()
    others: Sequence[Figure] = ()

    @property
    def figures(self) -> list[Figure]:
        """All differences, those of the verdict first."""
        return [*self.counted, *self.others]


class Table(NamedTuple):
    """A table of a claim's page: title, a sentence, the heading and the lines."""

    title: str
    sentence: str
    heading: Sequence[str]
    lines: Sequence[Sequence[str]]


def _nothing() -> Sequence[str]:
    return ()


def _no_tables(rows: Sequence[Row]) -> Sequence[Table]:
    del rows
    return ()


@dataclass(frozen=True)
class Claim:
    """A claim.

    Parameters
    ----------
    name : str
        The word of the command line.
    number : int
        The place in the table of claims.
    title : str
    statement : str
        The statement of the paper, with the place in the paper.
    setup : str
        The measurement of the claim by this library, and the differences that make the verdict.
    experiments : callable
        ``experiments(plan)`` adds the experiments to a `Plan`, as far as the rows determine them.
    judge : callable
        ``judge(rows)`` returns the judgement of the rows of this claim, or None if two seeds are not there yet.
    draw : callable
        ``draw(rows)`` returns the pictures as SVG, by the name of the file without ``.svg``.
    tables : callable
        ``tables(rows)`` returns more tables for the page.
    scales : bool
        The claim is measured in worlds, whose models and batches can be larger; see `World.scaled`.
    missing : callable
        ``missing()`` returns a line for each part of the claim whose data are not installed.
    """

    name: str
    number: int
    title: str
    statement: str
    setup: str
    experiments: Callable[[Plan], None]
    judge: Callable[[Sequence[Row]], Judgement | None]
    draw: Callable[[Sequence[Row]], Mapping[str, bytes]]
    tables: Callable[[Sequence[Row]], Sequence[Table]] = _no_tables
    scales: bool = True
    missing: Callable[[], Sequence[str]] = _nothing


def groups(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """Return the rows of each world, method, reference model and label, in the order of the rows."""
    members: dict[Group, list[Row]] = {}
    for row in rows:
        members.setdefault(Group(row.dataset, row.method, row.reference, row.label), []).append(row)
    return members


def by_seed(rows: Sequence[Row], figure: str) -> dict[int, float]:
    """Return a figure of the rows of one group, by seed."""
    return {row.seed: row.figure(figure) for row in rows}


def score_by_seed(rows: Sequence[Row]) -> dict[int, float]:
    """Return, by seed, the zero-shot accuracy of rows of one world if the world has classes, and R@1 otherwise."""
    return {
        row.seed: row.figure("zero_shot_accuracy" if "zero_shot_accuracy" in row.metrics else "retrieval_r1")
        for row in rows
    }
