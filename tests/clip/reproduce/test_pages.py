"""Every figure on a page comes from the rows: the committed pages are those of the committed rows, number by number."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.reproduce.claims import CLAIMS
from drrho_clip.reproduce.estimator.errors import ERRORS
from drrho_clip.reproduce.estimator.rules import COSINE, NO_MEMORY, RULES
from drrho_clip.reproduce.experiment import CHOICE_SEED, LEARNING_RATES, Experiment
from drrho_clip.reproduce.pages import write_pages
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Metrics, Results, Row
from drrho_clip.reproduce.statistics import HOLDS, NOT_SHOWN
from drrho_clip.reproduce.variances import ANCHORS, SPREADS, variances
from drrho_clip.reproduce.worlds import SCENES, WORLDS
from helpers.claims import row_with

# Without a lead about one draw in twenty shows a difference by chance; this draw shows none in any claim.
_DRAW = 1
COMMITTED = Path(__file__).parents[3] / "docs" / "claims"


def saved(folder: Path, rows: Iterable[Row]) -> Results:
    """Write rows without waiting for the disk after each row, as `Results.append` does."""
    for row in rows:
        with (folder / f"{row.claim}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    return Results(folder, quick=False)


def invented(name: str, folder: Path, lead: float) -> Results:
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
        plan = Plan(rows, list(WORLDS.values()), seeds=range(5), quick=False)
        CLAIMS[name].experiments(plan)
        if not plan.missing():
            return saved(folder, rows.values())
        rows |= {each.config_hash(): row_with(each, metrics(each)) for each in plan.missing()}


@pytest.mark.parametrize("lead", [0.2, 0.0])
@pytest.mark.parametrize("name", list(CLAIMS))
def test_a_page_has_the_figures_of_the_rows_and_the_verdict_follows_the_lead(
    name: str, lead: float, tmp_path: Path
) -> None:
    results = invented(name, tmp_path, lead)
    written = write_pages(CLAIMS.values(), results)
    page = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert f"**Verdict: {HOLDS if lead else NOT_SHOWN}.**" in page
    judgement = CLAIMS[name].judge(results.of(name))
    assert judgement is not None
    for figure in judgement.figures:
        assert f"| {figure.label} | {figure.interval.mean:+.3f} |" in page
    # The means, without the code of the page.
    for world in SCENES if name == "weak-to-strong" else ():
        values = [
            row.metrics["retrieval_r1"] for row in results.of(name) if (row.dataset, row.method) == (world.name, "clip")
        ]
        assert f"| {world.name} | clip | none | 5 | {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} |" in page
    if name == "generic":
        accuracies = [
            row.metrics["accuracy"]
            for row in results.of(name)
            if (row.dataset, row.method) == ("clusters-noise", "dro-kl") and row.seed < 5
        ]
        spread = f"{np.mean(accuracies):.3f} ± {np.std(accuracies, ddof=1):.3f}"
        assert f"| clusters | noise | dro-kl | none | {spread} |" in page
    if name == "estimator":
        recalls = [
            row.metrics["retrieval_r1"]
            for row in results.of(name)
            if (row.dataset, row.method, row.label, row.seed < 5) == ("pairs-512", "sogclr", "B = 64, gamma 0.5", True)
        ]
        spread = f"{np.mean(recalls):.3f} ± {np.std(recalls, ddof=1):.3f}"
        assert f"| pairs-512 | sogclr | 0.5 | 64 | 8 | {spread} |" in page
    # Each picture of the page is there, and the same rows give the same files.
    pictures = re.findall(r"\]\((.*\.svg)\)", page)
    assert {path.name for path in written} == {"README.md", f"{name}.md", *pictures}
    before = {path: path.read_bytes() for path in written}
    assert write_pages(CLAIMS.values(), Results(tmp_path, quick=False)) == written
    assert {path: path.read_bytes() for path in written} == before
    if name in ("generic", "estimator"):
        # The order in which the experiments ended does not matter.
        file = tmp_path / f"{name}.jsonl"
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[::-1]))
        write_pages(CLAIMS.values(), Results(tmp_path, quick=False))
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == page
    assert results.of(LEARNING_RATES) or name not in ("weak-to-strong", "variance")


def test_a_claim_about_the_estimator_that_is_half_finished_has_a_page(tmp_path: Path) -> None:
    rows = list(invented("estimator", tmp_path, 0.2).rows.values())
    small = [row.seed in (0, CHOICE_SEED) or row.settings["model"]["batch"] == 16 for row in rows]
    errors = [row.task == "estimator" for row in rows]
    # The other batch sizes have one seed or none; so have the errors, the figures of R@1, or both.
    for kept in (
        small,
        [is_small or is_error for is_small, is_error in zip(small, errors, strict=True)],
        [is_small or not is_error for is_small, is_error in zip(small, errors, strict=True)],
    ):
        (tmp_path / "estimator.jsonl").unlink()
        results = saved(tmp_path, (row for row, is_kept in zip(rows, kept, strict=True) if is_kept))
        assert tmp_path / "estimator.md" in write_pages(CLAIMS.values(), results)


def test_committed_pages_are_those_of_the_committed_rows(tmp_path: Path) -> None:
    for path in COMMITTED.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    copy = Results(tmp_path, quick=False)
    pages = {
        path.name: path.read_text(encoding="utf-8")
        for path in write_pages(CLAIMS.values(), copy)
        if path.suffix == ".md"
    }
    assert {path.name: path.read_text(encoding="utf-8") for path in COMMITTED.glob("*.md")} == pages
    # A picture may differ in bytes between versions of Matplotlib, so only the names are compared.
    assert {path.name for path in COMMITTED.glob("*.svg")} == {path.name for path in tmp_path.glob("*.svg")}


def test_readme_shows_the_table_of_the_committed_claims() -> None:
    def table(path: Path) -> list[str]:
        return re.findall(r"^\| \d+ \| \[.*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)

    of_claims = table(COMMITTED / "README.md")
    assert of_claims
    assert table(COMMITTED.parents[1] / "README.md") == [line.replace("](", "](docs/claims/") for line in of_claims]


def test_figures_of_how_to_choose_stand_on_the_pages_of_the_claims_that_a_paragraph_names() -> None:
    text = (COMMITTED.parent / "how-to-choose.md").read_text(encoding="utf-8")
    checked = 0
    for paragraph in re.split(r"\n\s*\n", text):
        pages = re.findall(r"\(claims/([\w-]+\.md)\)", paragraph)
        figures = re.findall(r"[+-]?\d\.\d{3}\b", paragraph) if pages else []
        written = "".join((COMMITTED / page).read_text(encoding="utf-8") for page in pages)
        missing = [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", written)]
        assert not missing, paragraph
        checked += len(figures)
    assert checked > 0


def test_variances_are_those_of_numpy() -> None:
    rng = np.random.default_rng(3)
    target, reference = rng.normal(size=(2, 6, 6))
    figures = variances(target, reference)
    for anchor, turned in (("image", (target, reference)), ("text", (target.T, reference.T))):
        losses = [np.asarray([[S[i, j] - S[i, i] for j in range(6) if j != i] for i in range(6)]) for S in turned]
        for kind, values in (("loss", losses[0]), ("excess", losses[0] - losses[1])):
            assert figures[f"{kind}_{anchor}_over_pairs"] == pytest.approx(values.var())
            assert figures[f"{kind}_{anchor}_within_anchors"] == pytest.approx(values.var(axis=1).mean())
            assert figures[f"{kind}_{anchor}_between_anchors"] == pytest.approx(values.mean(axis=1).var())
