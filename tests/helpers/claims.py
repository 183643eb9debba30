"""Invented rows of experiments."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from drrho_clip.reproduce.claims import CLAIMS
from drrho_clip.reproduce.estimator.errors import ERRORS
from drrho_clip.reproduce.estimator.rules import COSINE, NO_MEMORY, RULES
from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.measuring.variances import ANCHORS, SPREADS
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Metrics, Results, Row
from drrho_clip.reproduce.worlds import WORLDS, scaled_worlds

# Without a lead about one draw in twenty shows a difference by chance; this draw shows none in any claim.
_DRAW = 1


def row_with(experiment: Experiment, metrics: Metrics) -> Row:
    """Return a row of an experiment with these metrics."""
    return Row(
        **asdict(experiment),
        config_hash=experiment.config_hash(),
        metrics=metrics,
        seconds=60.0,
        machine="invented",
        versions={"numpy": "2"},
        commit="c0ffee",
    )


def row_of(experiment: Experiment, value: float = 0.5, **more: float) -> Row:
    """Return a row of an experiment with this validation R@1, and with more figures."""
    return row_with(experiment, {"validation_r1": value, **more})


def saved(folder: Path, rows: Iterable[Row], scale: int = 1) -> Results:
    """Write rows without waiting for the disk after each row, as `Results.append` does."""
    for row in rows:
        with (folder / f"{row.claim}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    return Results(folder, quick=False, scale=scale)


def invented(name: str, folder: Path, lead: float, scale: int = 1) -> Results:
    """Fill a folder with invented rows of a claim: everything that is steered is better by `lead`."""
    rows: dict[str, Row] = {}

    def metrics(experiment: Experiment) -> Metrics:
        # The noise of an experiment does not depend on how many other experiments there are, nor on their settings.
        names = (experiment.claim, experiment.dataset, experiment.method, experiment.reference, experiment.label)
        rng = np.random.default_rng([zlib.crc32(repr(names).encode()), experiment.seed, _DRAW])
        if experiment.task == "variances":
            names = [(kind, f"{kind}_{a}_{s}") for kind in ("loss", "excess") for a in ANCHORS for s in SPREADS]
            return {
                name: (np.exp(rng.normal(0, 0.01, 3)) * (1 + lead * (kind == "loss"))).tolist() for kind, name in names
            }
        if experiment.task == "estimator":
            return {
                f"{error} {rule}": (np.exp(rng.normal(0, 0.01, 5)) * (1 + lead * (rule == NO_MEMORY))).tolist()
                for error in ERRORS
                for rule in RULES
            }
        if experiment.task == "linear-heads" and len(experiment.settings["trials"]) == 1:
            return {"retrieval_r1": 0.5 + lead * (experiment.settings["rule"] == COSINE) + rng.normal(0, 0.01)}
        if experiment.task in ("generic", "linear-heads"):
            if len(experiment.settings["trials"]) > 1:
                return {"validation": rng.normal(0, 0.01, len(experiment.settings["trials"])).tolist()}
            accuracy = 0.5 + lead * experiment.method.startswith("drrho") + rng.normal(0, 0.01)
            return {"accuracy": accuracy, "loss": 1 - accuracy}
        level = dict.fromkeys(("drrho", "distill:drrho"), 0.3 + lead)
        level["reference"] = 0.2 if experiment.reference == "weak" else 0.4
        r1 = level.get(experiment.method, 0.3) + rng.normal(0, 0.005)
        # In claim 9 a setting has the lead, and drrho without this setting has none.
        r1 += lead * (experiment.claim == "beyond" and "posterior" in experiment.label)
        figures = {"retrieval_r1": r1, "zero_shot_accuracy": r1 / 2, "validation_r1": r1, "validation_r10": r1}
        if experiment.claim == "scaling-law":
            size, length = experiment.settings["target"]["width"], experiment.settings["data"]["train_size"] // 100
            # The error falls with the exponent 0.05 + lead for everything that is steered, and with 0.05 otherwise.
            exponent = 0.05 + lead * (experiment.method == "drrho")
            error = float((1e4 * size * length) ** -exponent * np.exp(rng.normal(0, 0.005)))
            return figures | {
                "retrieval_r1": 1 - error,
                "zero_shot_accuracy": 1 - error,
                "parameters": 100.0 * size,
                "samples_seen": 100.0 * length,
            }
        if experiment.task.startswith("steering"):
            # A better judge steers better, if there is a lead; otherwise all judges are equal.
            auc = float(rng.random()) if lead else 0.7
            steered = {name: figures[name] + lead * auc for name in ("retrieval_r1", "zero_shot_accuracy")}
            own = {f"reference_{name}": float(rng.random()) for name in (*steered, "validation_r1")}
            shares = {"hopeless_train": 0.2, "hopeless_validation": 0.3}
            return figures | steered | own | shares | {"reference_auc": auc}
        return figures

    while True:
        plan = Plan(rows, scaled_worlds(WORLDS.values(), scale), seeds=range(5), quick=False)
        CLAIMS[name].experiments(plan)
        if not plan.missing():
            return saved(folder, rows.values(), scale)
        rows |= {each.config_hash(): row_with(each, metrics(each)) for each in plan.missing()}
