"""Worlds of heads: pools of features, their division by seed, and runs on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.config import TrainConfig
from drrho_clip.data import Dataset, scenes
from drrho_clip.errors import BadInput
from drrho_clip.reproduce.claims import CLAIMS
from drrho_clip.reproduce.claims.data_efficiency import share_needed
from drrho_clip.reproduce.engine import reproduce
from drrho_clip.reproduce.packaged.pool import Recipe, Source, StoredPairs, is_ready, make_pool, open_pool
from drrho_clip.reproduce.pool import prepare
from drrho_clip.reproduce.worlds import HEAD_WORLDS, WORLDS
from drrho_clip.reproduce.worlds.heads import Heads

RECIPE = Recipe("scenes", num_pairs=240, side=None, swapped_fraction=0.3)


def test_rows_of_stored_pairs_keep_captions_labels_and_swaps() -> None:
    digests = np.arange(48, dtype=np.uint8).reshape(3, 16)
    pairs = StoredPairs("three", ["a", "b", "c"], digests, np.arange(3), np.asarray([True, False, True]))
    some = pairs.subset(np.asarray([2, 1]))
    assert (some.captions, some.labels.tolist(), some.is_swapped.tolist()) == (("c", "b"), [2, 1], [True, False])


class RandomTowers:
    """Features that depend on the content, without a model."""

    name = "random"

    def images_of(
        self, dataset: Dataset, rows: np.ndarray, *, batch_size: int, after_batch: Callable[[], None]
    ) -> np.ndarray:
        for _ in range(0, len(rows), batch_size):
            after_batch()
        return dataset.image_digests()[rows].astype(np.float32) - 128

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        return np.asarray([[len(text), text.count("a"), text.count("e"), 1.0] for text in captions], np.float32)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Heads:
    """A tiny world under the name of a real one, with its pool below tmp_path."""
    pairs = scenes(240, seed=3, swapped_fraction=0.0)
    labels = [row % 3 for row in range(240)]
    # Pairs of four make a concept, and the last 16 pairs are a further test set.
    source = Source(
        pairs, [row // 4 for row in range(240)], labels, ["one", "two", "three"], {"stamps": list(range(224, 240))}
    )
    make_pool(tmp_path / "features" / RECIPE.name, source, RandomTowers(), RECIPE, title="features", quiet=True)
    real = next(each for each in HEAD_WORLDS if isinstance(each, Heads))
    small = replace(
        real,
        recipe=RECIPE,
        data={"data": RECIPE.name, "train_size": 60},
        reference_data={"data": f"{RECIPE.name}:reference"},
        target={**real.target, "batch_size": 10, "epochs": 1, "feature_dim": 4, "width": 4},
        references={"weak": {"epochs": 1, "train_size": 40}},
        by_method={},
        rates=(1e-3,),
    )
    monkeypatch.setitem(WORLDS, real.name, small)
    return small


def config_of(world: Heads, runs: Path, **changes: object) -> TrainConfig:
    values = {**world.data, "method": "clip", "data_seed": 5, **world.places(runs), **changes}
    return TrainConfig(**values)  # type: ignore[arg-type]


def test_parts_share_no_concept_and_a_share_of_the_data_is_the_start_of_more(world: Heads, tmp_path: Path) -> None:
    pool = open_pool(tmp_path / "features" / RECIPE.name)
    concept_of = dict(zip(pool.digests, pool.concepts, strict=True))
    splits = world.open(config_of(world, tmp_path), tmp_path)
    reference = world.open(config_of(world, tmp_path, data=f"{RECIPE.name}:reference", train_size=1_000), tmp_path)
    parts = [*splits, reference.train]
    concepts = [{concept_of[digest.tobytes().hex()] for digest in part.image_digests()} for part in parts]
    further = {concept_of[pool.digests[row]] for row in pool.tests["stamps"]}
    assert sum(len(part) for part in concepts) == len(set.union(*concepts)) == 56
    assert not further & set.union(*concepts)
    assert len(splits.train) == 60
    quarter = world.open(config_of(world, tmp_path, train_size=15), tmp_path)
    assert quarter.train.image_digests().tolist() == splits.train.image_digests()[:15].tolist()
    other = world.open(config_of(world, tmp_path, data_seed=6), tmp_path)
    assert other.test.fingerprint() != splits.test.fingerprint()


def test_wrong_captions_are_in_training_parts_only(world: Heads, tmp_path: Path) -> None:
    pool = open_pool(tmp_path / "features" / RECIPE.name)
    right = dict(zip(pool.digests, pool.captions, strict=True))

    def share(part: Dataset) -> float:
        pairs = zip(part.image_digests(), part.captions, strict=True)  # type: ignore[attr-defined]
        return float(np.mean([right[digest.tobytes().hex()] != caption for digest, caption in pairs]))

    splits = world.open(config_of(world, tmp_path), tmp_path)
    assert share(splits.validation) == share(splits.test) == 0.0
    whole = [old != new for old, new in zip(pool.captions, pool.wrong_captions, strict=True)]
    assert np.mean(whole[:224]) == pytest.approx(0.3, abs=0.01)
    assert not any(whole[224:])
    assert 0.1 < share(splits.train) < 0.5
    # In a table the held-out pairs are noisy too, and the pairs know which captions are wrong.
    table = replace(world, noisy_validation=True).open(config_of(world, tmp_path), tmp_path)
    assert 0.1 < share(table.validation) < 0.5
    assert share(table.test) == 0.0
    for part in table:
        assert np.mean(part.is_swapped) == share(part)  # type: ignore[attr-defined]


def test_claims_run_on_heads_and_a_world_without_packages_is_left_out(
    world: Heads, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fashion = next(each for each in HEAD_WORLDS if each.name == "fashion-heads")
    results = reproduce(
        [CLAIMS["data-efficiency"]],
        tmp_path / "out",
        tmp_path,
        seeds=range(2),
        jobs=0,
        worlds=[world, fashion],
        roots=[tmp_path / "nothing"],
        quiet=True,
    )
    assert "fashion-heads is left out: " in capsys.readouterr().out
    rows = results.of("data-efficiency")
    # Two methods, four shares, two seeds; one reference model.
    assert len(rows) == 16
    assert {row.dataset for row in rows} == {world.name}
    assert all({"zero_shot_accuracy", "stamps_r1", "retrieval_r1"} <= row.metrics.keys() for row in rows)
    seen = {(row.settings["data"]["train_size"], row.settings["target"]["epochs"]) for row in rows}
    assert seen == {(15, 4), (30, 2), (45, 1), (60, 1)}
    judgement = CLAIMS["data-efficiency"].judge(rows)
    assert judgement is not None
    assert "drrho reaches the figure of fastclip-v3" in judgement.notes[0]


def test_a_pool_is_finished_and_another_recipe_has_another_folder(world: Heads, tmp_path: Path) -> None:
    assert is_ready(tmp_path / "features" / RECIPE.name)
    assert len({RECIPE.name, replace(RECIPE, num_pairs=241).name, replace(RECIPE, swapped_fraction=0.2).name}) == 3
    assert not is_ready(tmp_path / "features" / "nothing")
    with pytest.raises(BadInput, match="must hold the pairs of a world"):
        open_pool(tmp_path / "features" / "nothing")


def test_the_needed_share_is_read_from_straight_lines() -> None:
    assert share_needed([0.2, 0.4, 0.5, 0.6], 0.3) == pytest.approx(0.375)
    assert share_needed([0.2, 0.4, 0.3, 0.6], 0.6) == 1.0
    assert share_needed([0.2, 0.4, 0.3, 0.5], 0.6) == float("inf")


def test_a_world_is_prepared_in_a_process_with_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str | None] = []

    class Noting(ProcessPoolExecutor):
        def submit(self, *arguments: Any, **options: Any) -> Any:
            # Processes are started by the first task, and take over the environment.
            threads.append(os.environ.get("OMP_NUM_THREADS"))
            return super().submit(*arguments, **options)

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("drrho_clip.reproduce.pool.ProcessPoolExecutor", Noting)
    missing = prepare("fashion-heads", tmp_path, [tmp_path], jobs=2, quiet=True)
    # The line about a missing package comes from the other process.
    assert missing is not None
    assert "is not installed" in missing
    assert threads == ["1"]
    assert os.environ["OMP_NUM_THREADS"] == "2"
