"""Claim 1: a weak reference model helps to train a better model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from drrho_clip.reproduce.claim import Claim, Figure, Group, Judgement, by_seed, groups
from drrho_clip.reproduce.pictures import draw_intervals
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.statistics import DOES_NOT_HOLD, HOLDS, NOT_SHOWN, paired, verdict
from drrho_clip.reproduce.worlds import PICTURES

__all__ = ["WEAK_TO_STRONG"]

_NAME: Final = "weak-to-strong"
_WITHOUT: Final = ("clip", "sogclr", "fastclip-v3")
_FIGURE: Final = "retrieval_r1"


def _experiments(plan: Plan) -> None:
    for world in plan.worlds_of(PICTURES):
        for reference in world.references:
            plan.add_reference(_NAME, world, reference)
            plan.add_target(_NAME, world, "drrho", reference)
        for method in _WITHOUT:
            plan.add_target(_NAME, world, method)


def _figures(rows: Sequence[Row], reference: str) -> list[Figure]:
    """Return the differences of R@1 between the target steered by a reference model and the others."""
    by_group = groups(rows)
    figures = []
    for world in dict.fromkeys(row.dataset for row in rows):
        steered = by_seed(by_group.get(Group(world, "drrho", reference), []), _FIGURE)
        others = {f"the {reference} reference": by_group.get(Group(world, "reference", reference), [])}
        others |= {f"{method} without a reference": by_group.get(Group(world, method), []) for method in _WITHOUT}
        for name, other in others.items():
            values = by_seed(other, _FIGURE)
            if len(steered.keys() & values.keys()) > 1:
                label = f"{world}: drrho steered by the {reference} reference - {name}"
                figures.append(Figure(label, paired(steered, values)))
    return figures


def _premises(rows: Sequence[Row]) -> list[Figure]:
    """Return by how much the best target without a reference beats the weak reference, which should be weaker."""
    by_group = groups(rows)
    figures = []
    for world in dict.fromkeys(row.dataset for row in rows):
        weak = by_seed(by_group.get(Group(world, "reference", "weak"), []), _FIGURE)
        for method in _WITHOUT:
            values = by_seed(by_group.get(Group(world, method), []), _FIGURE)
            if len(weak.keys() & values.keys()) > 1:
                figures.append(
                    Figure(f"{world}: {method} without a reference - the weak reference", paired(values, weak))
                )
    return figures


def _judge(rows: Sequence[Row]) -> Judgement | None:
    figures, premises = _figures(rows, "weak"), _premises(rows)
    if not figures:
        return None
    result = verdict([figure.interval for figure in figures])
    premise = verdict([figure.interval for figure in premises])
    sentence = {
        HOLDS: "The steered target beats its weak reference and every target without a reference, in every world.",
        DOES_NOT_HOLD: "In at least one world the steered target is below its weak reference or a target without one.",
        NOT_SHOWN: "At least one of the differences has an interval that contains zero.",
    }[result]
    # A reference that is stronger than the target would test another claim.
    if premise != HOLDS:
        sentence += (
            " The weak reference is not below every target without a reference, so it is not weak in that sense."
        )
    return Judgement([*figures, *premises, *_figures(rows, "strong")], result, sentence)


def _draw(rows: Sequence[Row]) -> Mapping[str, bytes]:
    judgement = _judge(rows)
    assert judgement is not None
    return {_NAME: draw_intervals(judgement.figures, axis="difference of R@1 on test pairs")}


WEAK_TO_STRONG: Final = Claim(
    name=_NAME,
    number=1,
    title="Weak to strong",
    statement="A target that is steered by a weaker reference model becomes better than that model, and better than "
    "the same target without a reference model (Model Steering, arXiv 2505.06699, main results: ImageNet accuracy "
    "68.84 with a reference model of 63.32, and 67.37 for FastCLIP without a reference model).",
    setup="The figure is R@1 on clean test pairs in galleries of 200 images. The claim holds if the target steered by "
    "the weak reference beats the reference and the methods clip, sogclr and fastclip-v3 in every world. The "
    "differences for the strong reference are shown too and do not count for the verdict.",
    experiments=_experiments,
    judge=_judge,
    draw=_draw,
)
"""Claim 1."""
