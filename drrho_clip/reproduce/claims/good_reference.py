"""Claim 8: a reference model steers well if it separates wrong captions from right captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from drrho_clip.reference.memorisation import Shares
from drrho_clip.reproduce.claim import Claim, Figure, Group, Judgement, by_seed, groups
from drrho_clip.reproduce.experiment import Settings
from drrho_clip.reproduce.measuring.training import REFUSED
from drrho_clip.reproduce.pictures import Points, draw_interval_panels, draw_points
from drrho_clip.reproduce.plan import Plan, Reference
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.statistics import (
    DOES_NOT_HOLD,
    HOLDS,
    NOT_SHOWN,
    interval,
    not_all_above,
    paired,
    rank_correlation,
    sides,
    verdict,
)
from drrho_clip.reproduce.worlds import POOL_OF_HEADS, TABLES, World

__all__ = ["GOOD_REFERENCE"]

_NAME: Final = "good-reference"
# R@1 means little where ten classes give ten kinds of captions.
_OF_CLASSES: Final = ("fashion-heads-table",)
_TASK: Final = "steering"
# drrho without a reference model is sogclr.
_PLAIN: Final = "sogclr"
# The reference model with which pairs are left out and weighted.
_JUDGE: Final = "short"
_MEMORISED: Final = "same pairs, long, last state"
_HALVES: Final = "same pairs, two halves"
# The tasks of the reference models that are no model in its best state.
_TASKS: Final[Mapping[str, str]] = {_MEMORISED: "steering-by-last-state", _HALVES: "steering-by-halves"}
# The worlds in which all reference models are compared, and those in which pairs are left out and weighted.
_COMPARED: Final = ("scenes-table-30", "scenes-heads-table", "fashion-heads-table", "openclipart-heads-table")
_CHOSEN: Final = (
    "scenes-table-10",
    "scenes-table-30",
    "scenes-table-60",
    "fashion-heads-table",
    "openclipart-heads-table",
)
_LEFT_OUT: Final = "worst pairs left out"
_WEIGHTED: Final = "weights per anchor"
_WAYS: Final[tuple[tuple[str, str, Settings], ...]] = (
    (_PLAIN, _LEFT_OUT, {"drop_suspects": "auto"}),
    (_PLAIN, _WEIGHTED, {"anchor_weights": "reference"}),
    ("drrho", "", {}),
    ("drrho", _WEIGHTED, {"anchor_weights": "reference"}),
)
_AUC: Final = "AUC of the pair loss"


def _figure(world: str) -> str:
    """Return the name of the figure of a world."""
    return "zero_shot_accuracy" if world in _OF_CLASSES else "retrieval_r1"


def _score(row: Row) -> float:
    """Return the figure of the target."""
    return row.figure(_figure(row.dataset))


def _own_score(row: Row) -> float:
    """Return the figure of the reference model."""
    return row.figure(f"reference_{_figure(row.dataset)}")


def _by_rule(row: Row) -> float:
    """Return validation R@1, which counts less if the model has memorised its pairs; see references.

    The factor is the quotient of the shares of hopeless pairs, at most 1; clean held-out pairs give no quotient.
    """
    shares = Shares(row.figure("hopeless_train"), row.figure("hopeless_validation"))
    factor = min(1.0, shares.train / shares.validation) if shares.applies else 1.0
    return row.figure("reference_validation_r1") * factor


_PREDICTORS: Final[Mapping[str, Callable[[Row], float]]] = {
    _AUC: lambda row: row.figure("reference_auc"),
    "the figure of the reference": _own_score,
    "validation R@1 x min(1, h_train / h_val)": _by_rule,
}


def _references(world: World) -> list[Reference]:
    """Return the reference models of a world, which differ from the target's size and length as their names say."""
    width, epochs = world.target["width"], world.target["epochs"]
    own = {"data": world.data["data"]}
    noise = world.data.get("swapped_fraction")

    def model(name: str, length: float, **settings: object) -> Reference:
        size = {"train_size": world.data["train_size"], "width": width, "epochs": max(1, round(length * epochs))}
        return Reference(name, next(iter(world.references)), {"as_reference": False, **size, **settings})

    models = [
        model("very short", 0.2),
        model(_JUDGE, 0.6),
        model("long", 2.0),
        model("narrow", 0.6, width=max(2, width // 4)),
        model("same pairs, as_reference", 0.6, **own, as_reference=True),
        model(_MEMORISED, 2.0, **own),
        model(_HALVES, 0.6, **own),
    ]
    # The noise of a table is part of the stored features of a world of heads.
    if noise is not None:
        models += [
            model("short, clean captions", 0.6, swapped_fraction=0.0),
            model("short, twice the wrong captions", 0.6, swapped_fraction=min(0.9, 2 * noise)),
        ]
    return models


def _experiments(plan: Plan) -> None:
    for world in plan.worlds_of(TABLES):
        is_first = world.name == _COMPARED[0]
        models = {model.name: model for model in _references(world)}
        if world.name in _COMPARED and (is_first or not plan.is_quick):
            plan.add_target(_NAME, world, _PLAIN)
            for model in models.values():
                plan.add_target(_NAME, world, "drrho", model, task=_TASKS.get(model.name, _TASK))
        if world.name in _CHOSEN and (is_first or not plan.is_quick):
            plan.add_target(_NAME, world, _PLAIN)
            for method, label, settings in _WAYS:
                plan.add_target(_NAME, world, method, models[_JUDGE], task=_TASK, label=label, settings=settings)


def _sound(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of trained targets; a diverged training tells nothing about a reference model."""
    return [row for row in rows if not row.diverged and REFUSED not in row.metrics]


def _steered(rows: Sequence[Row], world: str) -> dict[str, list[Row]]:
    """Return the rows of the targets that drrho steers, by reference model, without further changes."""
    return {
        key.reference: _sound(group)
        for key, group in groups(rows).items()
        if (key.dataset, key.method, key.label) == (world, "drrho", "") and key.reference is not None
    }


def _worlds(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.dataset for row in rows))


def _correlations(rows: Sequence[Row], world: str) -> dict[str, dict[int, float]]:
    """Return the rank correlations of the steered targets with each predictor over the reference models, by seed."""
    by_model = {name: {row.seed: row for row in group} for name, group in _steered(rows, world).items()}
    correlations: dict[str, dict[int, float]] = {}
    if len(by_model) < 3:
        return correlations
    for seed in sorted(set.intersection(*(set(by_seed_of) for by_seed_of in by_model.values()))):
        of_seed = [of_model[seed] for of_model in by_model.values()]
        steered = [_score(row) for row in of_seed]
        for name, predictor in _PREDICTORS.items():
            if name != _AUC or all("reference_auc" in row.metrics for row in of_seed):
                correlation = rank_correlation([predictor(row) for row in of_seed], steered)
                correlations.setdefault(name, {})[seed] = correlation
    return {name: values for name, values in correlations.items() if len(values) > 1}


def _correlation_figures(rows: Sequence[Row]) -> dict[str, list[Figure]]:
    """Return the rank correlations, by predictor; each has one figure per world."""
    figures: dict[str, list[Figure]] = {name: [] for name in _PREDICTORS}
    for world in _worlds(rows):
        for name, values in _correlations(rows, world).items():
            label = f"{world}: rank correlation with {name}"
            figures[name].append(Figure(label, interval(list(values.values()))))
    return figures


def _gains(rows: Sequence[Row]) -> list[Figure]:
    """Return by how much each reference model improves the target."""
    by_group = groups(_sound(rows))
    figures = []
    for world in _worlds(rows):
        plain = by_seed(by_group.get(Group(world, _PLAIN), []), _figure(world))
        for name, group in _steered(rows, world).items():
            values = by_seed(group, _figure(world))
            if len(values.keys() & plain.keys()) > 1:
                figures.append(Figure(f"{world}: drrho steered by '{name}' - {_PLAIN}", paired(values, plain)))
    return figures


def _choices(rows: Sequence[Row]) -> list[Figure]:
    """Return the differences between leaving out, weighting, steering, and none of them."""
    by_group = groups(_sound(rows))
    figures = []
    for world in (name for name in _worlds(rows) if name in _CHOSEN):
        values = {
            _in_words(method, label): by_seed(by_group.get(Group(world, method, _JUDGE, label), []), _figure(world))
            for method, label, _ in _WAYS
        }
        left_out, weighted, steered, weighted_too = values
        values[_PLAIN] = by_seed(by_group.get(Group(world, _PLAIN), []), _figure(world))
        # The differences between each way and no way come first.
        pairs = [(way, _PLAIN) for way in (left_out, weighted, steered, weighted_too)]
        pairs += [(left_out, weighted), (left_out, steered), (weighted_too, steered)]
        for first, second in pairs:
            if len(values[first].keys() & values[second].keys()) > 1:
                figures.append(Figure(f"{world}: {first} - {second}", paired(values[first], values[second])))
    return figures


def _in_words(method: str, label: str) -> str:
    return f"{method}, {label}" if label else method


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return a sentence about each reference model, and a sentence about refusals."""
    notes = []
    for world in _worlds(rows):
        for name, group in _steered(rows, world).items():
            if not group:
                continue
            mean = {
                name: math.fsum(row.figure(name) for row in group) / len(group)
                for name in ("hopeless_train", "hopeless_validation", "reference_auc")
                if all(name in row.metrics for row in group)
            }
            own, steered = (math.fsum(map(score, group)) / len(group) for score in (_own_score, _score))
            auc = f"AUC {mean['reference_auc']:.3f}, " if "reference_auc" in mean else ""
            notes.append(
                f"{world}, '{name}': {auc}{own:.3f} alone, and {steered:.3f} for the target that it steers; it finds "
                f"{mean['hopeless_train']:.1%} of the target's training pairs and {mean['hopeless_validation']:.1%} of "
                "the held-out pairs hopeless."
            )
    refused = [row for row in rows if REFUSED in row.metrics]
    for (world, method, reference, label), group in groups(refused).items():
        notes.append(
            f"{world}: the library refused '{reference}' for {_in_words(method, label)} with {len(group)} seeds."
        )
    return notes


def _judge(rows: Sequence[Row]) -> Judgement | None:
    correlations = _correlation_figures(rows)
    counted = correlations.pop(_AUC)
    if not counted:
        return None
    result = verdict([figure.interval for figure in counted])
    sentence = {
        HOLDS: "The better a reference model separates wrong captions from right ones, the better the target that it "
        "steers, in every world whose wrong captions are known.",
        DOES_NOT_HOLD: "In at least one world a reference model that separates wrong captions better steers worse.",
        NOT_SHOWN: not_all_above("rank correlation"),
    }[result]
    sentence += f" {sides([figure.interval for figure in counted], 'rank correlations')}"
    others = [figure for figures in correlations.values() for figure in figures]
    return Judgement(counted, result, sentence, _notes(rows), [*others, *_gains(rows), *_choices(rows)])


def _panels(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """Return the figures by world, with labels that do not name the world."""
    panels: dict[str, list[Figure]] = {}
    for figure in figures:
        world, _, label = figure.label.partition(": ")
        panels.setdefault(world, []).append(figure._replace(label=label))
    return panels


def _draw(rows: Sequence[Row]) -> Mapping[str, bytes]:
    panels: dict[str, dict[str, Points]] = {}
    for world in _worlds(rows):
        known = {
            name: [row for row in group if "reference_auc" in row.metrics]
            for name, group in _steered(rows, world).items()
        }
        for name, group in known.items():
            if len(known) > 2 and group:
                points = Points([row.figure("reference_auc") for row in group], [_score(row) for row in group])
                panels.setdefault(world, {})[name] = points
    figures = [figure for each in _correlation_figures(rows).values() for figure in each]
    pictures = {
        _NAME: draw_points(panels, x_name=_AUC, y_name="figure of the steered target"),
        f"{_NAME}-correlations": draw_interval_panels(
            _panels(figures), axis="rank correlation with the steered target"
        ),
    }
    for name, differences in (("gains", _gains(rows)), ("choices", _choices(rows))):
        if differences:
            pictures[f"{_NAME}-{name}"] = draw_interval_panels(
                _panels(differences), axis="difference of the figure on test pairs"
            )
    return pictures


GOOD_REFERENCE: Final = Claim(
    name=_NAME,
    number=8,
    title="A good reference",
    statement="The paper asks for a reference model with a small loss and a small variance of the excess loss (Model "
    "Steering, arXiv 2505.06699, generalisation bound), and does not say when steering fails. Our claim is that a "
    "reference model steers well if it separates wrong captions from right captions.",
    setup="The validation captions are as noisy as the training captions, as in a user's table; the test captions are "
    "right, except in OpenClipart, whose titles are taken as they are. The reference models differ in length, in "
    "width, in the noise of their captions, and in their pairs: pairs that the target does not see, or the pairs of "
    "the target. The lengths are 0.2 (very short), 0.6 (short, narrow and as_reference) and 2 (long) times the epochs "
    "of the target; a narrow model has a quarter of the target's width. With as_reference the training stops when the "
    "model learns wrong captions by heart. A model is used in its best state, unless the name mentions the last state. "
    '"Two halves" are two short models that were trained on a half of the target\'s own pairs each; the scores of an '
    "image with all captions come from the model that has not seen the image; it has seen the captions of the other "
    "half, with their images. The first model judges the held-out pairs, and the figure alone is that of this model. "
    "A reference model takes the learning rate that was chosen for the base `weak` of the world, unless the section on "
    f"learning rates shows a choice of its own. {POOL_OF_HEADS} "
    "A training pair is hopeless for a model if its pair loss is above 0; h_train and h_val are the shares of hopeless "
    "pairs among the target's training pairs and among the held-out pairs. AUC is the share of pairs of a wrong and a "
    "right training caption in which the wrong caption has the larger pair loss; every "
    "swapped caption counts as wrong, also the few of Fashion-MNIST that still name the right class. The rank "
    "correlation of Spearman is taken over the reference models of a seed. "
    "The figure is R@1 on the test pairs in galleries of 200 images, and "
    "zero-shot accuracy for Fashion-MNIST. The claim holds if the correlation of the steered targets with AUC is above "
    "zero in every world whose wrong captions are known. The other correlations, the gains of steering, and the "
    "comparison of leaving out the worst pairs (drop_suspects auto), weights per anchor (anchor_weights reference) and "
    "drrho do not count for the verdict; the reference model of that comparison is the short one.",
    experiments=_experiments,
    judge=_judge,
    draw=_draw,
)
"""Claim 8."""
