"""Claim 5: the excess loss varies less than the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Final

import numpy as np

from drrho_clip.reproduce.claim import Claim, Figure, Judgement, groups
from drrho_clip.reproduce.measuring.variances import ANCHORS, SPREADS
from drrho_clip.reproduce.pictures import draw_curves, draw_interval_panels
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.statistics import DOES_NOT_HOLD, HOLDS, NOT_SHOWN, interval, not_all_above, verdict
from drrho_clip.reproduce.worlds import PICTURES

__all__ = ["VARIANCE"]

_NAME: Final = "variance"


def _experiments(plan: Plan) -> None:
    for world in plan.worlds_of(PICTURES):
        for reference in world.references:
            plan.add_target(_NAME, world, "drrho", reference, task="variances")


def _trained(rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose training did not diverge, because a diverged training has no variances."""
    return [row for row in rows if not row.diverged]


def _panels(rows: Sequence[Row]) -> dict[str, list[Figure]]:
    """Return the logarithm (base 10) of the variance of the loss over that of the excess, by world and reference model.

    The variances of a row are averaged over the epochs first.
    """
    panels: dict[str, list[Figure]] = {}
    for (world, _, reference, _), group in groups(_trained(rows)).items():
        for anchor, (spread, words) in product(ANCHORS, SPREADS.items()):
            # A ratio of variances has no unit, and on the scale of the logarithm twice and half are equally far from 1.
            ratios = [
                math.log10(
                    np.mean(row.curve(f"loss_{anchor}_{spread}")) / np.mean(row.curve(f"excess_{anchor}_{spread}"))
                )
                for row in group
            ]
            # One seed gives no interval.
            if len(ratios) > 1:
                figure = Figure(f"{anchor} anchors, variance over {words}", interval(ratios))
                panels.setdefault(f"{world}, {reference} reference", []).append(figure)
    return panels


def _figures(rows: Sequence[Row]) -> list[Figure]:
    """Return the figures of all worlds and reference models, with these names in the label."""
    return [Figure(f"{name}: {label}", value) for name, panel in _panels(rows).items() for label, value in panel]


def _judge(rows: Sequence[Row]) -> Judgement | None:
    figures = _figures(rows)
    if not figures:
        return None
    result = verdict([figure.interval for figure in figures])
    smaller = sum(figure.interval.side == 1 for figure in figures)
    larger = sum(figure.interval.side == -1 for figure in figures)
    sentence = {
        HOLDS: "Every variance of the excess loss is smaller than the same variance of the loss.",
        DOES_NOT_HOLD: "The excess loss has a larger variance than the loss in at least one case.",
        NOT_SHOWN: not_all_above("logarithm of a ratio"),
    }[result]
    counts = f" Of {len(figures)} variances, that of the excess loss is smaller in {smaller} and larger in {larger}."
    return Judgement(figures, result, sentence + counts)


def _draw(rows: Sequence[Row]) -> Mapping[str, bytes]:
    panels: dict[str, dict[str, list[float]]] = {}
    for (world, _, reference, _), group in groups(_trained(rows)).items():
        panels[f"{world}, {reference} reference"] = {
            words: np.mean([row.curve(f"{kind}_image_over_pairs") for row in group], axis=0).tolist()
            for kind, words in (("loss", "loss"), ("excess", "excess loss"))
        }
    return {
        _NAME: draw_interval_panels(_panels(rows), axis="log10 of variance of the loss / variance of the excess loss"),
        f"{_NAME}-epochs": draw_curves(panels, x_name="epoch", y_name="variance over all pairs"),
    }


VARIANCE: Final = Claim(
    name=_NAME,
    number=5,
    title="Variance",
    statement="The excess loss has a smaller variance than the loss, and a smaller variance tightens the bound of the "
    "generalisation error (Model Steering, arXiv 2505.06699: over image anchors 4.49e-3 for the excess loss against "
    "7.26e-3 for the loss).",
    setup="The loss of a pair is the similarity of an image with another caption less that with its own caption, or "
    "the same with the roles of images and captions exchanged; the image, or the caption, is the *anchor*. The excess "
    "loss is this loss less the same loss of the reference model. Three variances are measured: that over all pairs, "
    "the mean variance over the pairs of an anchor, and the variance of the anchors' means. After each epoch of a "
    "target that drrho steers, the losses of all pairs of 512 training images and captions are measured; the "
    "variances are averaged over the epochs. A figure is the logarithm to base 10 of the variance of the loss divided "
    "by that of the excess loss: above 0 the excess loss varies less, and at 0.3 half as much. The claim holds if all "
    "figures lie above 0. The bound itself is not measured, nor is a target without a reference model. In the picture "
    "a figure is green if both intervals lie above zero, orange if they lie below, and grey otherwise.",
    experiments=_experiments,
    judge=_judge,
    draw=_draw,
)
"""Claim 5."""
