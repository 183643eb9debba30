"""Claim 1: a weak reference model helps to train a better model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from drrho_clip.reproduce.claim import Claim, Figure, Group, Judgement, by_seed, groups
from drrho_clip.reproduce.pictures import draw_interval_panels
from drrho_clip.reproduce.plan import Plan, Reference
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.statistics import DOES_NOT_HOLD, HOLDS, NOT_SHOWN, not_all_above, paired, sides, verdict
from drrho_clip.reproduce.worlds import PICTURES, POOL_OF_PICTURES, RIGHT_VALIDATION, RULE_OF_REFERENCES

__all__ = ["WEAK_TO_STRONG"]

_NAME: Final = "weak-to-strong"
_WITHOUT: Final = ("clip", "sogclr", "fastclip-v3")
_FIGURE: Final = "retrieval_r1"
# Reference models whose figures do not count for the verdict.
_MORE: Final = ("middle", "strong")
# The pairs of the middle reference model divided by those of the weak one.
_MIDDLE: Final = 9 / 7


def _experiments(plan: Plan) -> None:
    for world in plan.worlds_of(PICTURES):
        # A reference model between the weak and the strong one: it differs from the weak one in the number of pairs.
        num_pairs = round(_MIDDLE * world.references["weak"]["train_size"])
        middle = Reference("middle", "weak", {"train_size": num_pairs})
        references: list[str | Reference] = [*world.references, middle]
        for reference in references:
            plan.add_reference(_NAME, world, reference)
            plan.add_target(_NAME, world, "drrho", reference)
        for method in _WITHOUT:
            plan.add_target(_NAME, world, method)


def _figures(rows: Sequence[Row], reference: str) -> dict[str, list[Figure]]:
    """Return by how much the target steered by a reference model beats the others in R@1, by world."""
    steered = Group("", "drrho", reference)
    words = f"drrho with the {reference} reference"
    others = {f"{words} minus that reference": Group("", "reference", reference)}
    others |= {f"{words} minus {method}": Group("", method) for method in _WITHOUT}
    return _differences(rows, {label: (steered, other) for label, other in others.items()})


def _premises(rows: Sequence[Row]) -> dict[str, list[Figure]]:
    """Return by how much each target without a reference beats the weak reference, which should be weaker, by world."""
    weak = Group("", "reference", "weak")
    return _differences(rows, {f"{method} minus the weak reference": (Group("", method), weak) for method in _WITHOUT})


def _differences(rows: Sequence[Row], pairs: Mapping[str, tuple[Group, Group]]) -> dict[str, list[Figure]]:
    """Return the differences of pairs of groups by world; the groups are named without the world."""
    by_group = groups(rows)
    figures: dict[str, list[Figure]] = {}
    for world in dict.fromkeys(row.dataset for row in rows):
        for label, pair in pairs.items():
            first, second = (by_seed(by_group.get(group._replace(dataset=world), []), _FIGURE) for group in pair)
            # One seed gives no interval, and a command that was interrupted may have left one.
            if len(first.keys() & second.keys()) > 1:
                figures.setdefault(world, []).append(Figure(label, paired(first, second)))
    return figures


def _all(by_world: Mapping[str, Sequence[Figure]]) -> list[Figure]:
    """Return the figures of all worlds, with the world in the label."""
    return [Figure(f"{world}: {label}", value) for world, figures in by_world.items() for label, value in figures]


def _judge(rows: Sequence[Row]) -> Judgement | None:
    by_world = _figures(rows, "weak")
    figures, premises = _all(by_world), _all(_premises(rows))
    if not figures:
        return None
    result = verdict([figure.interval for figure in figures])
    premise = verdict([figure.interval for figure in premises])
    sentence = {
        HOLDS: "The steered target beats its weak reference and every target without a reference, in every world.",
        DOES_NOT_HOLD: "In at least one world the steered target is below its weak reference or a target without one.",
        NOT_SHOWN: not_all_above(),
    }[result]
    sentence += f" {sides([figure.interval for figure in figures])}"
    # A reference that is stronger than the target would test another claim.
    if premise != HOLDS:
        sentence += " The intervals do not show that the weak reference is below every target without a reference."
    notes = [
        f"{world}: {sum(value.side == 1 for _, value in differences)} of {len(differences)} differences of the target "
        "steered by the weak reference lie above zero."
        for world, differences in by_world.items()
    ]
    more = [figure for reference in _MORE for figure in _all(_figures(rows, reference))]
    return Judgement(figures, result, sentence, notes, [*premises, *more])


def _draw(rows: Sequence[Row]) -> Mapping[str, bytes]:
    parts = (_figures(rows, "weak"), _premises(rows), *(_figures(rows, reference) for reference in _MORE))
    # All panels have the same labels, so that a reader can compare the worlds line by line.
    panels = {world: [figure for part in parts for figure in part.get(world, [])] for world in parts[0]}
    return {_NAME: draw_interval_panels(panels, axis="difference of R@1 on test pairs")}


WEAK_TO_STRONG: Final = Claim(
    name=_NAME,
    number=1,
    title="Weak to strong",
    statement="A target that is steered by a weaker reference model becomes better than that model, and better than "
    "the same target without a reference model (Model Steering, arXiv 2505.06699, main results: ImageNet accuracy "
    "68.84 with a reference model of 63.32, and 67.37 for FastCLIP without a reference model).",
    setup="The figure is R@1 on clean test pairs in galleries of 200 images: the share of images and captions whose "
    "right partner is the first answer. `drrho` is DRRho-CLIP; `clip`, `sogclr` and `fastclip-v3` train the same model "
    "on the same pairs without a reference model. A reference model is trained on more pairs than the target (see "
    "Worlds); no method without a reference model gets these pairs. The target sees few pairs often, so that it learns "
    "wrong captions by heart, which favours steering. The claim holds if the target steered by "
    "the weak reference beats the reference and these three methods in every world. The "
    "differences for two more reference models are shown too and do not count for the verdict: the strong reference, "
    "and the middle reference, which was added after the first results, when in scenes-30 the weak reference had "
    "turned out much weaker than a target without a reference. The middle reference sees 9/7 of the pairs of the weak "
    "reference, and the rest of the recipe is the same, the learning rate included. "
    f"{RIGHT_VALIDATION} {RULE_OF_REFERENCES} {POOL_OF_PICTURES} In the picture a figure is green if "
    "both intervals lie above zero, orange if they lie below, and grey otherwise.",
    experiments=_experiments,
    judge=_judge,
    draw=_draw,
)
"""Claim 1."""
