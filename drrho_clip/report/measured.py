"""Runs measured on other data than their own, for the report of several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from drrho_clip.config import BUILT_IN_DATA
from drrho_clip.data.splits import open_splits, open_table
from drrho_clip.encode import Encoder
from drrho_clip.evaluate import evaluate
from drrho_clip.measure.held_out import unseen_pairs
from drrho_clip.report.runs import HeldOut, ShownRun

__all__ = ["measured_on"]


def measured_on(
    data: str, runs: Sequence[ShownRun], encoder_of: Callable[[ShownRun], Encoder]
) -> tuple[list[HeldOut], list[str]]:
    """Measure all finished runs on the same pairs of a table, or on the test pairs of built-in data.

    If one of the runs was trained on or validated with an image of the table, the pairs of that image are left out for
    all runs. So the figures of all runs come from the same pairs.

    Parameters
    ----------
    data : str
        A table or the name of a built-in data set.
    runs : sequence of ShownRun
        The runs; an unfinished run keeps its curves and gets no figures.
    encoder_of : callable
        Returns the model of a run.

    Returns
    -------
    tuple of list of HeldOut and list of str
        The runs with the new figures, in groups with equal pairs, and sentences about the pairs that are left out.
        There is a single group unless the settings of the runs name different columns or different seeds of the data.

    Raises
    ------
    BadInput
        If the data cannot be opened, or if fewer than 2 images are left.
    """
    groups: dict[str, HeldOut] = {}
    sentences = []
    for shown in runs:
        config = shown.run.config
        if data in BUILT_IN_DATA:
            pairs = open_splits(replace(config, data=data)).test
        else:
            unseen = unseen_pairs(open_table(data, config), *(other.run for other in runs))
            pairs = unseen.pairs
            sentences.append(f"{unseen.sentence}.")
        key = pairs.fingerprint()
        group = groups.setdefault(key, HeldOut(data, pairs, "", ()))
        metrics = evaluate(encoder_of(shown), pairs) if shown.finished else {}
        groups[key] = replace(group, runs=(*group.runs, replace(shown, metrics=metrics)))
    return list(groups.values()), list(dict.fromkeys(sentences))
