"""Claim 3: with a reference model less data are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from drrho_clip.reproduce.claim import Claim, Figure, Group, Judgement, groups, score_by_seed
from drrho_clip.reproduce.pictures import Curve, draw_bands
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.statistics import (
    DOES_NOT_HOLD,
    HOLDS,
    NOT_SHOWN,
    interval,
    not_all_above,
    paired,
    resampled,
    sides,
    verdict,
)
from drrho_clip.reproduce.worlds import HEADS, POOL_OF_HEADS, RIGHT_VALIDATION_OF_HEADS

__all__ = ["DATA_EFFICIENCY", "share_needed"]

_NAME: Final = "data-efficiency"
_SHARES: Final = (0.25, 0.5, 0.75, 1.0)
_JUDGED: Final = 0.5
_REFERENCES: Final = ("weak", "strong")
_PLAIN: Final = "fastclip-v3"


def _label(share: float) -> str:
    return f"{share:.0%} of the data"


def _experiments(plan: Plan) -> None:
    for world in plan.worlds_of(HEADS):
        for share in _SHARES:
            # With a quarter of the data a model sees each pair four times as often.
            data = {"train_size": round(share * world.data["train_size"])}
            settings = {"epochs": round(world.target["epochs"] / share)}
            for method, reference in ((_PLAIN, None), *(("drrho", name) for name in world.references)):
                plan.add_target(_NAME, world, method, reference, label=_label(share), settings=settings, data=data)


def _figures(rows: Sequence[Row], steered_share: float, plain_share: float) -> list[Figure]:
    """Return the differences between drrho with a share of the data and fastclip-v3 with a share of the data."""
    by_group = groups(rows)
    figures = []
    for world in dict.fromkeys(row.dataset for row in rows):
        plain = score_by_seed(by_group.get(Group(world, _PLAIN, None, _label(plain_share)), []))
        for reference in _REFERENCES:
            steered = score_by_seed(by_group.get(Group(world, "drrho", reference, _label(steered_share)), []))
            if len(steered.keys() & plain.keys()) > 1:
                words = f"drrho on {_label(steered_share)} - {_PLAIN} on {_label(plain_share)}"
                figures.append(Figure(f"{world}, {reference} reference: {words}", paired(steered, plain)))
    return figures


def share_needed(curve: Sequence[float], goal: float) -> float:
    """Return the share of the data with which a curve reaches a goal.

    Parameters
    ----------
    curve : sequence of float
        The figure with 25, 50, 75 and 100 % of the data; in between it is interpolated.
    goal : float

    Returns
    -------
    float
        The smallest such share; 0.25 if the first point is not below the goal, and infinity if no point reaches it.

    Examples
    --------
    >>> share_needed([0.1, 0.3, 0.5, 0.6], 0.4), share_needed([0.5, 0.6, 0.7, 0.8], 0.4)
    (0.625, 0.25)
    >>> share_needed([0.1, 0.2, 0.3, 0.35], 0.4)
    inf
    """
    if curve[0] >= goal:
        return _SHARES[0]
    for place in range(1, len(_SHARES)):
        low, high = curve[place - 1], curve[place]
        if high >= goal:
            step = _SHARES[place] - _SHARES[place - 1]
            return _SHARES[place - 1] + step * (goal - low) / (high - low)
    return float("inf")


def _curve(rows: Sequence[Row], world: str, method: str, reference: str | None) -> npt.NDArray[np.float64] | None:
    """Return the figure by seed and share, shape (s, 4), for the seeds that have all shares."""
    by_group = groups(rows)
    of_share = [score_by_seed(by_group.get(Group(world, method, reference, _label(share)), [])) for share in _SHARES]
    seeds = sorted(set.intersection(*(set(values) for values in of_share)))
    return np.asarray([[values[seed] for values in of_share] for seed in seeds]) if len(seeds) > 1 else None


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return a sentence about the data that drrho needs, for each world and reference model."""
    notes = []
    for world in dict.fromkeys(row.dataset for row in rows):
        plain = _curve(rows, world, _PLAIN, None)
        for reference in _REFERENCES:
            steered = _curve(rows, world, "drrho", reference)
            if plain is None or steered is None or len(plain) != len(steered):
                continue
            goals = np.concatenate([steered, plain[:, -1:]], axis=1)
            means = [goals.mean(axis=0), *resampled(goals)]
            needed = [share_needed(mean[:-1].tolist(), float(mean[-1])) for mean in means]
            low, high = np.quantile(needed[1:], [0.025, 0.975], method="nearest").tolist()
            notes.append(
                f"{world}, {reference} reference: drrho reaches the figure of {_PLAIN} on all data with "
                f"{_in_words(needed[0])} of the data (bootstrap interval: from {_in_words(low)} to {_in_words(high)})."
            )
    return notes


def _in_words(share: float) -> str:
    if share == _SHARES[0]:
        return f"{share:.0%} or less"
    return "more than 100%" if share == float("inf") else f"{share:.0%}"


def _judge(rows: Sequence[Row]) -> Judgement | None:
    figures = _figures(rows, _JUDGED, 1.0)
    if not figures:
        return None
    result = verdict([figure.interval for figure in figures])
    sentence = {
        HOLDS: f"drrho with half of the data beats {_PLAIN} with all data, in every world.",
        DOES_NOT_HOLD: f"In at least one world drrho with half of the data is below {_PLAIN} with all data.",
        NOT_SHOWN: not_all_above(),
    }[result]
    sentence += f" {sides([figure.interval for figure in figures])}"
    same = [figure for share in _SHARES for figure in _figures(rows, share, share)]
    return Judgement(figures, result, sentence, _notes(rows), same)


def _draw(rows: Sequence[Row]) -> Mapping[str, bytes]:
    panels: dict[str, dict[str, Curve]] = {}
    for world in dict.fromkeys(row.dataset for row in rows):
        lines: dict[str, tuple[str, str | None]] = {_PLAIN: (_PLAIN, None)}
        lines |= {f"drrho, {reference} reference": ("drrho", reference) for reference in _REFERENCES}
        panels[world] = {}
        for name, (method, reference) in lines.items():
            values = _curve(rows, world, method, reference)
            if values is not None:
                intervals = [interval(column.tolist()) for column in values.T]
                panels[world][name] = Curve(
                    [100 * share for share in _SHARES],
                    [each.mean for each in intervals],
                    [each.low for each in intervals],
                    [each.high for each in intervals],
                )
    return {_NAME: draw_bands(panels, x_name="% of the training data", y_name="accuracy or R@1 on test pairs")}


DATA_EFFICIENCY: Final = Claim(
    name=_NAME,
    number=3,
    title="Data efficiency",
    statement="DRRho-CLIP with half of the data is often as good as FastCLIP with all data, at the same number of "
    "samples seen (Model Steering, arXiv 2505.06699, data efficiency).",
    setup="The models are heads over the features of two frozen towers. The target is trained on 25, 50, 75 and 100 % "
    "of its training pairs, with so many epochs that it sees as many samples each time; the reference models always "
    "have all of their pairs, which are other pairs and are not counted (see Worlds). The learning rate is the one "
    f"chosen with all data. {RIGHT_VALIDATION_OF_HEADS} {POOL_OF_HEADS} The figure is zero-shot accuracy if the pairs "
    "have classes, and R@1 in galleries of 200 images otherwise. The claim holds if drrho with half of the data is "
    "above fastclip-v3 with all data, with both reference models and in every world. The differences at equal shares "
    "are shown too and do not count. The share that drrho needs is read from the mean curve, with straight lines "
    "between the shares, and the interval comes from resampled seeds.",
    experiments=_experiments,
    judge=_judge,
    draw=_draw,
)
"""Claim 3."""
