"""Claim 7: a moving average of the inner estimates takes the place of a large batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Final

from drrho_clip.reproduce.claim import Claim, Figure, Judgement, Table
from drrho_clip.reproduce.estimator.errors import ERRORS
from drrho_clip.reproduce.estimator.rules import COSINE, HALF, NO_MEMORY, RELEASED, RULES
from drrho_clip.reproduce.estimator.training import CLIP
from drrho_clip.reproduce.experiment import CHOICE_SEED, Experiment
from drrho_clip.reproduce.grid import add_seeds, chosen_rate
from drrho_clip.reproduce.pictures import Curve, draw_bands
from drrho_clip.reproduce.plan import Plan, marked_rate
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.statistics import (
    DOES_NOT_HOLD,
    HOLDS,
    NOT_SHOWN,
    interval,
    mean_and_deviation,
    not_all_above,
    verdict,
)
from drrho_clip.reproduce.statistics import paired as paired_by_seed
from drrho_core import recommended_gamma_min

__all__ = ["ESTIMATOR"]

_NAME: Final = "estimator"
_WEAK: Final = "weak"
_METHODS: Final[Mapping[str, str | None]] = {"sogclr": None, "drrho": _WEAK}
_BATCHES: Final = (16, 64, 256)
_SIZES: Final = (512, 2048)
_SAMPLES: Final = 16_384
_RATES: Final = (1e-3, 3e-3, 1e-2)
# The rates that are tried if the best rate is the lowest or the highest.
_LOWER: Final = (1e-4, 3e-4)
_HIGHER: Final = (3e-2, 1e-1)
# The rules whose models are trained to the end; the errors are measured for all rules.
_TRAINED: Final = (NO_MEMORY, "0.5", COSINE, HALF, RELEASED)
# The rules that are compared with gamma = 1; the first one makes the verdict.
_COMPARED: Final = (COSINE, HALF, RELEASED)
# The errors are measured after these visits of each pair; those after the last visit count.
_MEASURED: Final = (1, 4, 16)
_TARGET: Final = {"width": 16, "temperature": 0.07}
_REFERENCE: Final = {"width": 12, "temperature": 0.07, "batch": 128, "epochs": 8, "rate": 1e-2}
_IN_WORDS: Final = {
    "u_error": "error of log u",
    "gradient_bias": "bias of the gradient",
    "gradient_error": "error of the gradient of a batch",
}


def _experiments(plan: Plan) -> None:
    batches, sizes, rates = (_BATCHES[:2], (128,), _RATES[:2]) if plan.is_quick else (_BATCHES, _SIZES, _RATES)
    lower, higher = ((), ()) if plan.is_quick else (_LOWER, _HIGHER)
    combinations = [(CLIP, CLIP), *product(_METHODS, _TRAINED)]
    for size, batch, (method, rule) in product(sizes, batches, combinations):
        epochs = 2 if plan.is_quick else _SAMPLES // size
        experiment = _experiment(plan, "linear-heads", method, size, batch, epochs, rule)
        rate = chosen_rate(plan, experiment, rates, lower, higher)
        if rate is None:
            continue
        add_seeds(plan, experiment, rate)
        # The errors are measured on the smaller set, along a training at the rate that was chosen for the cosine rule.
        if size == sizes[0] and rule == COSINE:
            measured = _MEASURED[:2] if plan.is_quick else _MEASURED
            along = _experiment(plan, _NAME, method, size, batch, measured[-1], rule, measured)
            add_seeds(plan, along, rate)


def _experiment(
    plan: Plan, task: str, method: str, size: int, batch: int, epochs: int, rule: str, measured: Sequence[int] = ()
) -> Experiment:
    reference = _METHODS.get(method)
    num_reference = 256 if plan.is_quick else 2048
    settings: dict[str, Any] = {
        "data": {"num": size, "num_reference": num_reference, "swapped": 0.3},
        "model": {**_TARGET, "batch": batch, "epochs": epochs},
        "rule": rule,
        "steering": None if reference is None else dict(_REFERENCE),
    }
    if measured:
        # Another list of rules gives other errors, so the rules belong to the hash.
        settings |= {"measured": list(measured), "rules": list(RULES)}
    label = f"B = {batch}" if task == _NAME or method == CLIP else f"B = {batch}, gamma {rule}"
    world = f"pairs-{size}"
    return Experiment(
        _NAME, task, world, method, reference, CHOICE_SEED, settings, plan.is_quick, label=label, backend="numpy"
    )


def _runs(rows: Sequence[Row], task: str) -> dict[tuple[str, str, str, int], list[Row]]:
    """Return the rows of the seeds by world, method, rule and batch size, in the order of these."""
    runs: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        # A training that diverged has no errors; in place of R@1 it has 0.
        if row.task == task and row.seed != CHOICE_SEED and not (row.diverged and task == _NAME):
            key = row.dataset, row.method, row.settings["rule"], row.settings["model"]["batch"]
            runs.setdefault(key, []).append(row)
    methods, rules = [CLIP, *_METHODS], [CLIP, *RULES]

    def place(key: tuple[str, str, str, int]) -> tuple[int, int, int, int]:
        world, method, rule, batch = key
        return int(world.removeprefix("pairs-")), methods.index(method), rules.index(rule), batch

    # Rows stand in the order in which the experiments ended, which differs from machine to machine.
    return {key: sorted(runs[key], key=lambda row: row.seed) for key in sorted(runs, key=place)}


def _last(row: Row, error: str, rule: str) -> float:
    """Return an error after the last visit."""
    return row.curve(f"{error} {rule}")[-1]


def _error_figures(rows: Sequence[Row], rule: str) -> list[Figure]:
    """Return by how much the errors without memory are larger than those with a rule."""
    figures = []
    for (_, method, _, batch), group in _runs(rows, _NAME).items():
        for error in ("u_error", "gradient_bias"):
            differences = [_last(row, error, NO_MEMORY) - _last(row, error, rule) for row in group]
            if len(differences) > 1:
                label = f"{method}, B = {batch}: {_IN_WORDS[error]} with gamma 1, less that with {rule}"
                figures.append(Figure(label, interval(differences)))
    return figures


def _recall_figures(rows: Sequence[Row], rule: str, *, smallest: bool) -> list[Figure]:
    """Return the differences of R@1 between a rule and gamma = 1, at the smallest batch or at the others."""
    runs = _runs(rows, "linear-heads")
    small = min((batch for *_, batch in runs), default=0)
    figures = []
    for (world, method, each, batch), group in runs.items():
        if each == rule and (batch == small) is smallest:
            other = runs.get((world, method, NO_MEMORY, batch), [])
            label = f"{world}, {method}, B = {batch}: R@1 with {rule}, less that with gamma 1"
            figures += _difference(label, group, other)
    return figures


def _batch_figures(rows: Sequence[Row]) -> list[Figure]:
    """Return by how much R@1 grows from the smallest to the largest batch."""
    runs = _runs(rows, "linear-heads")
    batches = sorted({batch for *_, batch in runs})
    figures = []
    for (world, method, rule, batch), group in runs.items():
        if batch == batches[-1]:
            words = method if method == CLIP else f"{method}, gamma {rule}"
            small = runs.get((world, method, rule, batches[0]), [])
            figures += _difference(
                f"{world}, {words}: R@1 with B = {batch}, less that with B = {batches[0]}", group, small
            )
    return figures


def _difference(label: str, first: Sequence[Row], second: Sequence[Row]) -> list[Figure]:
    values = [{row.seed: row.figure("retrieval_r1") for row in group} for group in (first, second)]
    return [Figure(label, paired_by_seed(*values))] if len(values[0].keys() & values[1].keys()) > 1 else []


def _judge(rows: Sequence[Row]) -> Judgement | None:
    errors = {rule: _error_figures(rows, rule) for rule in _COMPARED}
    recalls = {rule: _recall_figures(rows, rule, smallest=True) for rule in _COMPARED}
    if not errors[COSINE] or not recalls[COSINE]:
        return None
    figures = [*errors[COSINE], *recalls[COSINE]]
    result = verdict([figure.interval for figure in figures])
    sentence = {
        HOLDS: "The moving average with a gamma that falls to 0.2 has smaller errors at every batch size, and a better "
        "model at the smallest batch.",
        DOES_NOT_HOLD: "In at least one case the moving average with a gamma that falls to 0.2 is worse than "
        "gamma = 1, which has no memory.",
        NOT_SHOWN: not_all_above(),
    }[result]
    sentence += f" Compared with gamma = 1, {_counts(errors[COSINE], recalls[COSINE])}."
    further = [rule for rule in _COMPARED if rule != COSINE and errors[rule] and recalls[rule]]
    for rule in further:
        sentence += f' With the rule "{rule}", which does not count, {_counts(errors[rule], recalls[rule])}.'
    shown = [figure for rule in further for figure in (*errors[rule], *recalls[rule])]
    others = [figure for rule in _COMPARED for figure in _recall_figures(rows, rule, smallest=False)]
    return Judgement(figures, result, sentence, others=[*shown, *others, *_batch_figures(rows)])


def _counts(errors: Sequence[Figure], recalls: Sequence[Figure]) -> str:
    """Return in words how often a rule is better and worse than gamma = 1."""
    parts = []
    for words, group in (("errors", errors), ("figures of R@1 at the smallest batch", recalls)):
        sides = [figure.interval.side for figure in group]
        better, worse = sides.count(1), sides.count(-1)
        parts.append(f"of {len(group)} {words} the moving average is better in {better} and worse in {worse}")
    return "; ".join(parts)


def _draw(rows: Sequence[Row]) -> Mapping[str, bytes]:
    runs = _runs(rows, _NAME)
    batches = sorted({batch for *_, batch in runs})
    by_batch: dict[str, dict[str, Curve]] = {}
    by_visit: dict[str, dict[str, Curve]] = {}
    for method, error in product(_METHODS, ("u_error", "gradient_bias")):
        groups = {batch: group for (_, name, _, batch), group in runs.items() if name == method}
        if len(groups) < len(batches):
            continue
        title = f"{method}: {_IN_WORDS[error]}"
        small = groups[batches[0]]
        visits = small[0].settings["measured"]
        for rule in RULES:
            late = [[_last(row, error, rule) for row in groups[batch]] for batch in batches]
            _add_curve(by_batch, title, f"gamma {rule}", batches, late)
            values = [[row.curve(f"{error} {rule}")[place] for row in small] for place in range(len(visits))]
            _add_curve(by_visit, title, f"gamma {rule}", visits, values)
    recalls: dict[str, dict[str, Curve]] = {}
    trained = _runs(rows, "linear-heads")
    for (world, method, rule), panel in product(dict.fromkeys(key[:3] for key in trained), _METHODS):
        # The curve of clip stands in the panels of both methods.
        if method not in (CLIP, panel):
            continue
        sizes = sorted(batch for *key, batch in trained if key == [world, method, rule])
        values = [[row.figure("retrieval_r1") for row in trained[world, method, rule, batch]] for batch in sizes]
        words = method if method == CLIP else f"gamma {rule}"
        _add_curve(recalls, f"{panel}, {world.removeprefix('pairs-')} training pairs", words, sizes, values)
    # A claim that is half finished may have no curve for a picture.
    pictures = {
        "batch": (by_batch, "batch size", "error after 16 visits"),
        "visits": (by_visit, "visits of each pair", f"error, batch size {batches[0]}"),
        "recall": (recalls, "batch size", "R@1 on test pairs"),
    }
    return {
        f"{_NAME}-{name}": draw_bands(panels, x_name=x_name, y_name=y_name, log_x=True)
        for name, (panels, x_name, y_name) in pictures.items()
        if panels
    }


def _add_curve(
    panels: dict[str, dict[str, Curve]], title: str, name: str, x: Sequence[float], values: Sequence[Sequence[float]]
) -> None:
    """Add a curve to the panel with a title, unless a point has fewer than two seeds yet."""
    if any(len(group) < 2 for group in values):
        return
    points = [interval(group) for group in values]
    low, high = [each.low for each in points], [each.high for each in points]
    panels.setdefault(title, {})[name] = Curve(list(x), [each.mean for each in points], low, high)


def _tables(rows: Sequence[Row]) -> Sequence[Table]:
    errors, recalls = [], []
    for (_, method, _, batch), group in _runs(rows, _NAME).items():
        for rule in RULES:
            values = [mean_and_deviation([_last(row, error, rule) for row in group]) for error in ERRORS]
            errors.append((method, str(batch), rule, *(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in values)))
    trials: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.seed == CHOICE_SEED:
            trials.setdefault((row.dataset, row.method, row.label), []).extend(row.settings["trials"])
    for (world, method, rule, batch), group in _runs(rows, "linear-heads").items():
        mean, deviation = mean_and_deviation([row.figure("retrieval_r1") for row in group])
        rate = group[0].settings["trials"][0]
        chosen = marked_rate(rate, trials[group[0].dataset, method, group[0].label])
        gamma = "none" if method == CLIP else rule
        num = group[0].settings["data"]["num"]
        recalls.append((world, method, gamma, str(batch), f"{num / batch:g}", f"{mean:.3f} ± {deviation:.3f}", chosen))
    return [
        Table(
            "Errors",
            "Means and standard deviations over the seeds, after 16 visits of each pair. The error of log u is a root "
            "mean square over the anchors; bias and error of the gradient are relative to the norm of the gradient of "
            "all pairs.",
            ("method", "B", "gamma", *_IN_WORDS.values()),
            errors,
        ),
        Table(
            "R@1 of the trained heads",
            f"Means and standard deviations over the seeds, at {_SAMPLES:,} samples seen. The learning rate was chosen "
            f"by R@1 on the validation pairs of seed {CHOICE_SEED}, from {_listed(_RATES)}. If the best rate was the "
            f"lowest or the highest, {_listed(_LOWER)} or {_listed(_HIGHER)} were tried too; a rate at the end of all "
            "that was tried is marked.",
            ("pairs", "method", "gamma", "B", "n / B", "R@1", "learning rate"),
            recalls,
        ),
    ]


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _recommended() -> str:
    """Return the last values of gamma by the rule of the released code, for the lengths of the trainings here."""
    lengths = sorted({_MEASURED[-1], *(_SAMPLES // size for size in _SIZES)})
    return ", ".join(f"{recommended_gamma_min(epochs):.2f} for {epochs} epochs" for epochs in lengths)


ESTIMATOR: Final = Claim(
    name=_NAME,
    number=7,
    title="Estimator",
    statement="SogCLR keeps a moving average u of the inner estimate of each anchor, so that its gradient needs no "
    "large batch (arXiv 2202.12387). DRRho-CLIP takes over this estimator (Model Steering, arXiv "
    "2505.06699), with FastCLIP's cosine rule for gamma, the weight of the new estimate (arXiv 2407.01445). "
    "But the run of the main results, with seven epochs, has gamma = 1 to the end, which means no memory: "
    "the rule of the released code for the last value of gamma gives 1 up to seven epochs.",
    setup="The data are drawn: two frozen towers see the same hidden vector, with noise, and 30 % of the training "
    "captions are swapped. The models are two linear heads. The reference model is narrower and was trained with CLIP "
    'on 2,048 other pairs. The rules for gamma are: a constant (1, 0.8, 0.5, 0.2); "cosine by epoch", which falls '
    'from 1 to 0.2 over all epochs of a training, and "cosine by step", the same in every step; "cosine over half", '
    "the rule of FastCLIP's code, which lets gamma fall to 0.2 over half of the epochs and keeps it from then on; "
    '"DRRho\'s code", the rule of the code released with DRRho-CLIP, which falls over all epochs to a last value that '
    f"depends on their number: {_recommended()}; and SCENT's rule, which computes a gamma for each anchor (arXiv "
    f'2602.02877). Errors are measured along a training with 512 pairs, {_MEASURED[-1]} epochs and the rule "cosine by '
    'epoch". On the same batches every rule keeps estimates of its own, so all rules are compared at the same '
    "parameters; the truth is `contrastive_step` on all pairs with gamma = 1. R@1 is measured on held-out pairs in "
    "galleries of 200, after trainings with 512 and 2,048 pairs that see 16,384 samples each, thus with 32 and 8 "
    'visits of each pair. The claim holds if "cosine by epoch" has a smaller error of log u and a smaller bias of the '
    "gradient than gamma = 1 at every batch size B, without and with a reference model, and a higher R@1 at the "
    'smallest batch. Neither released code uses this rule, so "cosine over half" and "DRRho\'s code" were added after '
    "the first results; their differences, and all others, are shown and do not count for the verdict.",
    experiments=_experiments,
    judge=_judge,
    draw=_draw,
    tables=_tables,
    scales=False,
)
"""Claim 7."""
