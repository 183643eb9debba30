"""`drrho reproduce --scale K`: larger models and batches, for a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from drrho_clip.cli import main
from drrho_clip.reproduce.claims import CLAIMS
from drrho_clip.reproduce.engine import reproduce
from drrho_clip.reproduce.origin import machine
from drrho_clip.reproduce.pages import write_pages
from drrho_clip.reproduce.results import read_rows
from drrho_clip.reproduce.worlds import WORLDS, World
from helpers.claims import invented

COMMITTED = Path(__file__).parents[3] / "docs" / "claims"
SCALED = [claim.name for claim in CLAIMS.values() if claim.scales]


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_a_scaled_world_has_larger_models_and_batches_and_as_many_steps(world: World) -> None:
    scale = world.largest_scale or 8
    larger = world.scaled(scale)
    for name in ("width", "feature_dim", "batch_size"):
        assert larger.target[name] == scale * world.target[name]
    for model, settings in larger.references.items():
        assert settings.get("width") == (scale * world.references[model]["width"] if "width" in settings else None)
    steps = {
        each.scale: each.data["train_size"] * each.target["epochs"] / each.target["batch_size"]
        for each in (world, larger)
    }
    assert steps == {1: steps[1], scale: steps[1]}
    # FastCLIP's radius depends on the batch.
    if "fastclip-v3" in world.by_method:
        assert larger.by_method["fastclip-v3"]["radius"] > world.by_method["fastclip-v3"]["radius"]


@pytest.mark.parametrize("name", SCALED)
def test_every_training_set_has_a_batch_at_the_largest_scale(name: str, tmp_path: Path) -> None:
    scale = min(world.largest_scale for world in WORLDS.values() if world.largest_scale is not None)
    results = invented(name, tmp_path, 0.05, scale)
    # No world is left out.
    assert {row.dataset for row in results.of(name)} == {row.dataset for row in read_rows(COMMITTED / f"{name}.jsonl")}
    for row in results.rows.values():
        assert row.scale == scale
        target, reference = row.settings.get("target"), row.settings["reference"]
        if target is not None:
            # jest reads five batches per step.
            batches = 5 if row.method.startswith("jest") else 1
            assert row.settings["data"]["train_size"] >= batches * target["batch_size"], row.settings
        if reference is not None:
            assert reference["train_size"] >= reference["batch_size"], row.settings


def test_the_page_of_a_scaled_claim_says_the_scale(tmp_path: Path) -> None:
    write_pages([CLAIMS["table"]], invented("table", tmp_path, 0.05, 4))
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "    drrho reproduce table --scale 4\n" in page
    assert "Models and batches are 4 times as large" in page


def test_a_scaled_claim_is_measured_and_has_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = replace(WORLDS["scenes-30"].quick(), references={"weak": {}})
    monkeypatch.setattr("drrho_clip.reproduce.standing.WORLDS", {world.name: world})
    chosen = {name: CLAIMS[name] for name in ("variance", "estimator")}
    monkeypatch.setattr("drrho_clip.reproduce.claims.CLAIMS", chosen)
    # The data of this world are too few.
    few = replace(world, name="scenes-60", largest_scale=1)
    out = tmp_path / "out"
    results = reproduce(
        [CLAIMS["variance"]],
        out,
        tmp_path / "runs",
        seeds=range(2),
        jobs=0,
        worlds=[world, few],
        scale=2,
        quiet=True,
    )
    told = capsys.readouterr().out
    assert told == (
        "scenes-60 is left out: --scale must be at most 1 there, because there is one pool of pairs, got 2\n"
    )
    rows = results.of("variance")
    assert [(row.scale, row.settings["target"]["batch_size"]) for row in rows] == [(2, 128)] * 2
    assert main(["reproduce", "--scale", "2", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "variance" in told
    # Claims with models of their own have no scale.
    assert "estimator" not in told


def test_a_row_names_the_gpu() -> None:
    assert machine("cuda:0") == f"{machine()}, cuda:0"
