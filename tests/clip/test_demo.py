"""The whole path of ``drrho demo --quick``, from the command line to the page in a browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.data.splits import open_splits
from drrho_clip.demo import (
    LEARNING_RATES,
    ROLES,
    chosen_learning_rates,
    demo_configs,
    learning_rate_record,
    load_outcomes,
    swapped_caption_weights,
)
from drrho_core.backend import get_backend


def _quick(out: Path, backend: str, *more: str) -> None:
    command = [sys.executable, "-m", "drrho_clip.cli", "demo", "--quick", "--out", str(out)]
    # The runs of a demo compile the same programs: with a cache, JAX compiles each of them once.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = os.environ | cache
    done = subprocess.run(
        [*command, "--backend", backend, *more], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "drrho" in done.stdout
    assert "\x1b" not in done.stderr  # plain lines where there is no terminal


@pytest.fixture(scope="module", params=["numpy", "torch", "jax"])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick demo; the name of the folder is the name of the backend."""
    out = tmp_path_factory.mktemp("demo") / str(request.param)
    _quick(out, out.name)
    return out


def test_results_have_the_published_form(demo: Path) -> None:
    rows = json.loads((demo / "results.json").read_text())
    assert [row["method"] for row in rows] == list(ROLES)
    for row in rows:
        about_the_run = {"state", "step", "num_training_pairs", "samples_seen", "seconds"}
        assert set(row) == {"method", "dataset", "seed", "metrics"} | about_the_run
        assert row["dataset"] == ("digits" if demo.name == "numpy" else "scenes")
        names = {"retrieval_r1", "retrieval_r5", "retrieval_r10", "zero_shot_accuracy"}
        assert names | {"retrieval_r1_full", "num_pairs", "num_queries", "gallery_size"} <= set(row["metrics"])
        assert all(isinstance(row["metrics"][name], float) and 0.0 <= row["metrics"][name] <= 1.0 for name in names)
    assert len({row["samples_seen"] for row in rows[1:]}) == 1  # the three methods saw as many


def test_the_report_opens_in_a_browser(demo: Path, check_report: Callable[[Path], None]) -> None:
    check_report(demo / "report.html")


def test_a_second_run_gives_the_same_figures(demo: Path) -> None:
    if demo.name == "jax":
        pytest.skip("two runs of the torch and of the numpy demo are compared: compiling twice more shows nothing new")
    again = demo.parent / "again" / demo.name
    _quick(again, demo.name)
    both = [json.loads((folder / "results.json").read_text()) for folder in (demo, again)]
    for first, second in zip(*both, strict=True):
        assert first["metrics"] == second["metrics"]


def test_an_interrupted_demo_continues(demo: Path) -> None:
    if demo.name != "numpy":
        pytest.skip("resuming single runs is tested for every backend elsewhere")
    assert main(["demo", "--quick", "--out", str(demo), "--backend", demo.name]) == 2
    before = json.loads((demo / "results.json").read_text())
    (demo / "results.json").unlink()
    assert main(["demo", "--quick", "--out", str(demo), "--backend", demo.name, "--resume"]) == 0
    after = json.loads((demo / "results.json").read_text())
    assert [row["metrics"] for row in after] == [row["metrics"] for row in before]


@pytest.mark.parametrize("data", ["scenes", "digits"])
def test_the_three_methods_share_all_settings_but_the_learning_rate(data: str, tmp_path: Path) -> None:
    backend = "torch" if data == "scenes" else "numpy"
    configs = demo_configs(data, backend, seed=3, quick=False, runs=tmp_path)
    learners = [configs[method].to_json() for method in ("clip", "sogclr", "drrho")]
    for config in learners:
        assert config.pop("learning_rate") in LEARNING_RATES
        del config["method"], config["reference"]
    assert learners[0] == learners[1] == learners[2]
    assert configs["reference"].data == f"{data}:reference"
    assert configs["reference"].swapped_fraction == configs["drrho"].swapped_fraction == 0.3


@pytest.mark.parametrize("data", ["scenes", "digits"])
def test_learning_rates_are_the_best_of_the_recorded_trials(data: str) -> None:
    trials = learning_rate_record()["validation_r1"][data]
    assert set(trials) == set(ROLES)
    for role, rate in chosen_learning_rates(data).items():
        assert {float(tried) for tried in trials[role]} == set(LEARNING_RATES)
        assert trials[role][f"{rate:g}"] == max(trials[role].values())


def test_pair_weights_match_a_loop_over_the_negatives(demo: Path) -> None:
    """The weights of one anchor, computed by a loop over the negatives."""
    if demo.name != "numpy":
        pytest.skip("one backend is enough for arithmetic on features")
    runs = demo / "runs" / "seed0"
    outcomes = load_outcomes(runs, get_backend("numpy"))
    config = outcomes["drrho"].run.config
    splits = open_splits(config)
    found = swapped_caption_weights(splits, outcomes, num_images=1, num_others=4, seed=5)
    data = splits.train
    rng = np.random.default_rng([5, 1])
    anchor = int(rng.permutation(np.flatnonzero(data.is_swapped))[0])
    others = rng.integers(0, len(data), size=(1, 4))[0].tolist()
    captions = [data.own_captions[anchor]] + [data.captions[row] for row in others]
    for method in ("sogclr", "drrho"):
        terms = []
        for caption in captions:
            z = 0.0
            for model, weight in ((outcomes["sogclr"], 1.0), (outcomes["reference"], -1.0 * (method == "drrho"))):
                image = model.encoder.pairs(data)[0][anchor].astype(np.float64)
                z += weight * float(image @ model.encoder.texts([caption])[0].astype(np.float64))
            terms.append(np.exp(z / config.temperature))
        weights = np.asarray(terms) / np.mean(terms)
        np.testing.assert_allclose(found[method]["swapped"], weights[:1], rtol=1e-4)
        np.testing.assert_allclose(found[method]["clean"], weights[1:], rtol=1e-4)
