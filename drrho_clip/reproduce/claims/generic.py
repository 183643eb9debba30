"""Claim 6: DRRho risk minimisation generalises better, also without images and captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Final

from drrho_clip.reproduce.claim import Claim, Figure, Judgement, Table
from drrho_clip.reproduce.experiment import CHOICE_SEED, Experiment
from drrho_clip.reproduce.generic.measuring import ALL, REFERENCE
from drrho_clip.reproduce.generic.objectives import ERM, OBJECTIVES, RHO, SETS
from drrho_clip.reproduce.generic.problems import PROBLEMS, missing
from drrho_clip.reproduce.grid import add_seeds, best_place, chosen_trial, tried
from drrho_clip.reproduce.pictures import draw_interval_panels
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.statistics import (
    DOES_NOT_HOLD,
    HOLDS,
    NOT_SHOWN,
    mean_and_deviation,
    not_all_above,
    paired,
    verdict,
)

__all__ = ["GENERIC"]

_NAME: Final = "generic"
_WEAK, _STRONG = "weak", "strong"
_CONDITIONS: Final = {"few": "few samples", "noise": "noise", "both": "few samples and noise"}
# The grid of every method: these rates times the three options of the objective.
_RATES: Final = (1e-3, 3e-3, 1e-2, 3e-2)
_HIDDEN: Final = {"target": 64, _WEAK: 16, _STRONG: 128}
_STEPS: Final = 200
_BATCH: Final = 64
_REPEATS: Final = 2


def _experiments(plan: Plan) -> None:
    absent = missing()
    for name, problem in PROBLEMS.items():
        if name in absent:
            continue
        for condition, data in problem.conditions().items():
            _add(plan, f"{name}-{condition}", {**data, "pool": problem.pool}, problem.classes)


def _add(plan: Plan, dataset: str, data: Mapping[str, Any], classes: int) -> None:
    """Add the methods on one problem in one condition, as far as the choices are made."""
    weak = data["num_samples"] // 2
    sizes = {_WEAK: weak, _STRONG: data["pool"]}
    steps = 5 if plan.is_quick else _STEPS
    common = {"classes": classes, "steps": steps, "batch": _BATCH}
    models = {name: {**common, "hidden": _HIDDEN[name], "num_samples": size} for name, size in sizes.items()}
    target = {**common, "hidden": _HIDDEN["target"]}

    def chosen(method: str, reference: str | None, model: Mapping[str, Any], steering: Any) -> Any | None:
        """Add the choice of a method, then the seeds with the chosen trial, and return this trial."""
        settings = {"data": data, "repeats": 1 if plan.is_quick else _REPEATS, "model": model, "steering": steering}
        experiment = Experiment(
            _NAME, _NAME, dataset, method, reference, CHOICE_SEED, settings, plan.is_quick, backend="numpy"
        )
        options = OBJECTIVES.get(method, OBJECTIVES[ERM]).options
        trials = [[rate, option] for option, rate in product(options, _RATES)]
        trial = chosen_trial(plan, experiment, trials[:2] if plan.is_quick else trials)
        if trial is not None:
            add_seeds(plan, experiment, trial)
        return trial

    chosen(ALL, None, {**target, "num_samples": weak}, None)
    trial = chosen(ERM, None, target, None)
    if trial is None:
        return
    # All methods have the weight decay that is best for ERM, so that they differ by the objective alone.
    target = {**target, "decay": trial[1]}
    for method, objective in OBJECTIVES.items():
        if not objective.steered and method != ERM:
            chosen(method, None, target, None)
    for reference, model in models.items():
        trial = chosen(REFERENCE, reference, model, None)
        for method, objective in OBJECTIVES.items():
            if objective.steered and trial is not None:
                chosen(method, reference, target, {"model": model, "trials": [trial]})


class _Cell:
    """The rows of one problem in one condition."""

    def __init__(self, dataset: str, rows: Sequence[Row]) -> None:
        self.problem, self.condition = dataset.split("-")
        self.figure = PROBLEMS[self.problem].figure
        self.rows: dict[tuple[str, str | None], list[Row]] = {}
        self.choices: dict[tuple[str, str | None], Row] = {}
        for row in rows:
            if row.dataset == dataset and row.seed == CHOICE_SEED:
                self.choices[row.method, row.reference] = row
            # A training that diverged has no figures.
            elif row.dataset == dataset and not row.diverged:
                self.rows.setdefault((row.method, row.reference), []).append(row)

    def scores(self, method: str, reference: str | None) -> dict[int, float]:
        """Return, by seed, the accuracy or the negative loss on test samples."""
        sign = -1.0 if self.figure == "loss" else 1.0
        return {row.seed: sign * row.figure(self.figure) for row in self.rows.get((method, reference), [])}

    def best(self, family: str, reference: str | None) -> str | None:
        """Return the method of a family, "dro" or "drrho", whose set was best on validation samples."""
        names = [f"{family}-{name}" for name in SETS if (f"{family}-{name}", reference) in self.choices]
        return max(names, key=lambda name: max(tried(self.choices[name, reference])), default=None)

    def lead(self, words: str, first: tuple[str, str | None], second: tuple[str, str | None]) -> list[Figure]:
        """Return the difference of two methods as a list of one figure, or no figure without two seeds."""
        scores = self.scores(*first), self.scores(*second)
        unit = "negative loss in nats" if self.figure == "loss" else "accuracy"
        label = f"{self.problem}, {_CONDITIONS[self.condition]}: {words} ({unit})"
        return [Figure(label, paired(*scores))] if len(scores[0].keys() & scores[1].keys()) > 1 else []


def _cells(rows: Sequence[Row]) -> list[_Cell]:
    # Rows stand in the order in which the experiments ended, which differs from machine to machine.
    there = {row.dataset for row in rows}
    names = [f"{problem}-{condition}" for problem, condition in product(PROBLEMS, _CONDITIONS)]
    return [_Cell(name, rows) for name in names if name in there]


def _figures(rows: Sequence[Row], reference: str) -> list[Figure]:
    """Return the leads of DRRho over ERM and over DRO, each with the set that was best on validation samples."""
    figures = []
    for cell in _cells(rows):
        steered, robust = cell.best("drrho", reference), cell.best("dro", None)
        if steered is not None and robust is not None:
            for other, method in (("ERM", ERM), ("DRO", robust)):
                words = f"DRRho, {reference} reference - {other}"
                figures += cell.lead(words, (steered, reference), (method, None))
    return figures


def _against(rows: Sequence[Row], reference: str, words: str, other: tuple[str, str | None]) -> list[Figure]:
    """Return the leads of DRRho with a reference model over another method."""
    figures = []
    for cell in _cells(rows):
        steered = cell.best("drrho", reference)
        if steered is not None:
            figures += cell.lead(f"DRRho, {reference} reference - {words}", (steered, reference), other)
    return figures


def _judge(rows: Sequence[Row]) -> Judgement | None:
    figures = _figures(rows, _WEAK)
    if not figures:
        return None
    result = verdict([figure.interval for figure in figures])
    sides = [figure.interval.side for figure in figures]
    sentence = {
        HOLDS: "DRRho with a weak reference model is better than ERM and DRO on every problem, in every condition.",
        DOES_NOT_HOLD: "On at least one problem DRRho with a weak reference model is worse than ERM or DRO.",
        NOT_SHOWN: not_all_above(),
    }[result]
    strong = _figures(rows, _STRONG)
    counts = (
        f" Of {len(figures)} differences, DRRho with the weak reference model is better in {sides.count(1)} and worse "
        f"in {sides.count(-1)}; with the strong one it is better in {sum(each.interval.side == 1 for each in strong)} "
        f"and worse in {sum(each.interval.side == -1 for each in strong)} of {len(strong)}."
    )
    notes = [
        f"{words.capitalize()}: DRRho with the {reference} reference model is better in {sides.count(1)} and worse in "
        f"{sides.count(-1)} of {len(sides)} differences."
        for words in _CONDITIONS.values()
        for reference, group in ((_WEAK, figures), (_STRONG, strong))
        if (sides := [each.interval.side for each in group if f", {words}: " in each.label])
    ]
    control = _against(rows, _WEAK, "erm-all", (ALL, None))
    sides = [each.interval.side for each in control]
    counts += (
        f" ERM that trains on the samples of the weak reference model, too, is better than DRRho in {sides.count(-1)} "
        f"and worse in {sides.count(1)} of {len(sides)} cases."
    )
    alone = _against(rows, _STRONG, "that reference", (REFERENCE, _STRONG))
    sides = [each.interval.side for each in alone]
    counts += (
        " The strong reference model itself is better than the target that it steers in "
        f"{sides.count(-1)} and worse in {sides.count(1)} of {len(sides)} cases."
    )
    return Judgement(figures, result, sentence + counts, notes, [*strong, *control, *alone])


def _draw(rows: Sequence[Row]) -> Mapping[str, bytes]:
    """Draw, for each problem, the leads of all methods over ERM in the three conditions."""
    pictures = {}
    for problem in dict.fromkeys(cell.problem for cell in _cells(rows)):
        panels: dict[str, list[Figure]] = {}
        for cell in _cells(rows):
            if cell.problem != problem:
                continue
            panel = panels.setdefault(_CONDITIONS[cell.condition], [])
            for method, reference in _methods():
                words = method if reference is None else f"{method}, {reference}"
                lead = cell.lead(words, (method, reference), (ERM, None))
                panel += [Figure(words, figure.interval) for figure in lead]
        unit = "test accuracy" if PROBLEMS[problem].figure == "accuracy" else "the test loss in nats"
        pictures[f"{_NAME}-{problem}"] = draw_interval_panels(panels, axis=f"lead over ERM in {unit}")
    return pictures


def _methods() -> list[tuple[str, str | None]]:
    plain = [method for method, objective in OBJECTIVES.items() if not objective.steered and method != ERM]
    steered = [RHO, *(f"drrho-{name}" for name in SETS)]
    return [
        *((method, None) for method in (ALL, *plain)),
        *((method, reference) for reference in (_WEAK, _STRONG) for method in (REFERENCE, *steered)),
    ]


def _tables(rows: Sequence[Row]) -> Sequence[Table]:
    means, choices = [], []
    for cell in _cells(rows):
        for key in ((ERM, None), *_methods()):
            group = cell.rows.get(key)
            if group is None:
                continue
            place = (cell.problem, _CONDITIONS[cell.condition], key[0], key[1] or "none")
            figures = [mean_and_deviation([row.figure(name) for row in group]) for name in ("accuracy", "loss")]
            means.append((*place, *(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in figures)))
            choice = cell.choices[key]
            rate, option = choice.settings["trials"][best_place(choice)]
            figures_of_trials = tried(choice)
            ends = (f"{end(figures_of_trials):.3f}" for end in (max, min))
            choices.append((*place, f"{rate:g}", f"{option:g}", *ends))
    names = ("problem", "condition", "method", "reference")
    return [
        Table("All methods", "Means and standard deviations over the seeds, on test samples.",
              (*names, "accuracy", "loss (nats)"), means),
        Table("Chosen settings",
              f"The validation figure of seed {CHOICE_SEED}, accuracy or negative loss, is that of the best and of the "
              "worst trial.", (*names, "learning rate", "option", "best", "worst"), choices),
    ]  # fmt: skip


GENERIC: Final = Claim(
    name=_NAME,
    number=6,
    title="Generic DRRho",
    statement="DRRho risk minimisation is not bound to CLIP. To minimise the worst case of the excess loss over a set "
    "of weights generalises better, with the same data, than to minimise the mean loss (ERM) or the worst "
    "case of the loss (DRO): the bound of the generalisation error has the variance of the excess loss in "
    "place of that of the loss (Model Steering, arXiv 2505.06699, theory of DRRho risk minimisation).",
    setup="There are three problems: scikit-learn's digits, drawn clusters in 20 dimensions, and the next token of a "
    "drawn language. There are three conditions: few samples, wrong labels (40 %; in the language 30 % of the "
    "tokens), and both. The target is a network with 64 hidden units. The weak reference model has 16 hidden units "
    "and half as many samples. The strong reference model has 128 hidden units and all samples of the pool for "
    "reference models. Both have other samples than the target, with the same share of noise. The methods are ERM "
    "(option: weight decay; the decay that is best for ERM serves DRO, RHO-LOSS and DRRho), DRO, RHO-LOSS (option: "
    "the share of the samples that is kept) and DRRho. DRO and DRRho are measured with the sets CVaR, KL penalty, "
    "chi-square ball and capped KL penalty (option: the size of the set). The control `erm-all` is ERM on the samples "
    "of the target and of the weak reference model together. Every method and set tries the same four learning rates "
    "times three options. So the choice of a set and its options for DRO and DRRho is a choice of 48 trials, and that "
    "for ERM of 12. A row is the mean of two trainings on two draws. The figure is the accuracy on clean test "
    "samples; in the language it is the loss. The claim holds if DRRho with the weak reference model is better than "
    "ERM and than DRO on every problem in every condition; their sets, too, are chosen on validation samples. "
    "Differences with the strong reference model and with the control are shown and do not count for the verdict.",
    experiments=_experiments,
    judge=_judge,
    draw=_draw,
    tables=_tables,
    scales=False,
    missing=lambda: list(missing().values()),
)
"""Claim 6."""
