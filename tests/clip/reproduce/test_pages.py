"""Every figure on a page comes from the rows: the committed pages are those of the committed rows, number by number."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.reproduce.claim import Judgement
from drrho_clip.reproduce.claims import CLAIMS
from drrho_clip.reproduce.estimator.rules import RULES
from drrho_clip.reproduce.estimator.training import CLIP
from drrho_clip.reproduce.experiment import LEARNING_RATES
from drrho_clip.reproduce.measuring.variances import variances
from drrho_clip.reproduce.pages import claim_page, write_pages
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Results
from drrho_clip.reproduce.statistics import HOLDS, NOT_SHOWN
from drrho_clip.reproduce.worlds import SCENES, WORLDS
from helpers.claims import invented, row_of

COMMITTED = Path(__file__).parents[3] / "docs" / "claims"


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
        # Every rule has a curve.
        for picture in ("batch", "visits"):
            drawn = (tmp_path / f"estimator-{picture}.svg").read_text(encoding="utf-8")
            assert all(f">gamma {rule}<" in drawn for rule in RULES)
        recall = (tmp_path / "estimator-recall.svg").read_text(encoding="utf-8")
        rules = {row.settings["rule"] for row in results.of(name) if row.task == "linear-heads"} - {CLIP}
        assert all(f">gamma {rule}<" in recall for rule in rules)
    if name == "table":
        assert f"| fastclip-v3: radius {WORLDS['scenes-heads'].by_method['fastclip-v3']['radius']:g}; " in page
    assert results.of(LEARNING_RATES) or name not in ("weak-to-strong", "variance")
    # Each picture of the page is there, and the same rows give the same files.
    pictures = re.findall(r"\]\((.*\.svg)\)", page)
    assert {path.name for path in written} == {"README.md", f"{name}.md", *pictures}
    if not lead:
        return
    # Once is enough for what follows: pictures take seconds.
    before = {path: path.read_bytes() for path in written}
    assert write_pages(CLAIMS.values(), Results(tmp_path, quick=False)) == written
    assert {path: path.read_bytes() for path in written} == before
    if name in ("generic", "estimator"):
        # The order in which the experiments ended does not matter.
        file = tmp_path / f"{name}.jsonl"
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[::-1]))
        write_pages(CLAIMS.values(), Results(tmp_path, quick=False))
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == page


def test_a_claim_without_a_complete_world_loses_the_page_and_keeps_the_rows(tmp_path: Path) -> None:
    results = invented("variance", tmp_path, 0.2)
    pages = [path.name for path in write_pages(CLAIMS.values(), results)]
    pictures = [name for name in pages if name.endswith(".svg")]
    kept = ["generic.md", "notes-variance.svg", "variance.jsonl"]
    for name in kept[:2]:
        (tmp_path / name).write_text("", encoding="utf-8")
    # The trials of the learning rates are gone, so nobody knows which rows count.
    (tmp_path / f"{LEARNING_RATES}.jsonl").unlink()
    assert write_pages([CLAIMS["variance"]], Results(tmp_path, quick=False)) == []
    assert pictures
    assert not any((tmp_path / name).exists() for name in ("variance.md", *pictures))
    assert all((tmp_path / name).exists() for name in kept)


@pytest.mark.parametrize(("best", "cell"), [(1, "0.008"), (0, "0.004 (end)"), (2, "0.016 (end)")])
def test_a_best_rate_at_an_end_of_all_that_was_tried_is_marked(best: int, cell: str) -> None:
    world = WORLDS["scenes-30"]
    plan = Plan({}, [world], seeds=(0, 1), quick=False)
    plan.add_target("weak-to-strong", world, "clip")
    rates = [each.settings["target"]["learning_rate"] for each in plan.missing()]
    trials = [
        row_of(each, 0.5 + 0.1 * (rates.index(rate) == best)) for each, rate in zip(plan.missing(), rates, strict=True)
    ]
    rows = [row_of(replace(row.experiment, claim="weak-to-strong", seed=0), retrieval_r1=0.5) for row in trials[:1]]
    page = claim_page(CLAIMS["weak-to-strong"], rows, trials, Judgement([], HOLDS, ""), [])
    assert f"0.016: 0.{6 if best == 2 else 5}00 | {cell} |" in page


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
