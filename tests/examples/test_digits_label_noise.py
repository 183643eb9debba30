"""The example of digits with wrong labels: what each part holds, what objectives weigh, and the published figures."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "digits_label_noise.py"
METHODS = ("reference", "ERM", "ERM+", "DRO", "RHO", "DRRho")


@pytest.fixture(scope="module")
def example() -> Any:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder, standard output and standard error of a quick run."""
    out = tmp_path_factory.mktemp("digits") / "deep" / "run"
    command = [sys.executable, str(EXAMPLE), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


@pytest.fixture(scope="module")
def found(quick: tuple[Path, str, str]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((quick[0] / "results.json").read_text(encoding="utf-8"))
    return read


def _check_schema(found: dict[str, Any], seeds: int, trials: int) -> None:
    """Everything a reader of results.json relies on."""
    assert set(found) == {"settings", "trials", "results", "summary"}
    assert found["settings"]["seeds"] == seeds
    assert [(row["method"], row["seed"]) for row in found["results"]] == [(m, s) for m in METHODS for s in range(seeds)]
    rates = {"test_accuracy", "validation_accuracy", "wrong_label_weight", "effective_sample_share"}
    rates |= {f"{group}_labels_believed" for group in ("right", "wrong")}
    positive = {"loss_variance", "excess_loss_variance"}
    positive |= {f"{group}_labels_{kind}" for group in ("right", "wrong") for kind in ("loss", "reference_loss")}
    for row in found["results"]:
        assert set(row["metrics"]) == rates | positive
        assert all(0 <= row["metrics"][name] <= 1 for name in rates)
        assert all(row["metrics"][name] >= 0 for name in positive)
    for method in METHODS:
        tried = [trial for trial in found["trials"] if trial["method"] == method]
        assert len(tried) == trials  # the same number of attempts for every method
        (chosen,) = [trial for trial in tried if trial["chosen"]]
        assert chosen["validation_accuracy"] == max(trial["validation_accuracy"] for trial in tried)
        values = [row["metrics"]["test_accuracy"] for row in found["results"] if row["method"] == method]
        told = found["summary"][method]["test_accuracy"]
        assert told["mean"] == pytest.approx(sum(values) / seeds)
        assert told["deviation"] == pytest.approx(np.std(values, ddof=1))


@pytest.mark.parametrize("seed", [0, 3])
def test_only_training_labels_are_wrong_and_no_image_has_two_parts(example: Any, seed: int) -> None:
    digits = example.load_digits()
    parts, rows = example.split(seed, 0.4, 100)
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(1797))
    assert {name: len(chosen) for name, chosen in rows.items()} == {
        "validation": 200,
        "reference": 100,
        "train": 997,
        "test": 500,
    }
    for name, samples in parts.items():
        np.testing.assert_array_equal(samples.images, digits.data[rows[name]].astype(np.float32) / 16)
        np.testing.assert_array_equal(samples.wrong, samples.labels != digits.target[rows[name]])
        assert samples.wrong.sum() == (round(0.4 * 997) if name == "train" else 0)
    given = parts["train"].labels
    assert given.min() == 0
    assert given.max() == 9
    # Symmetric: wrong labels miss the truth by 1 .. 9 about equally often.
    misses = np.bincount((given - digits.target[rows["train"]])[parts["train"].wrong] % 10, minlength=10)
    assert misses[0] == 0
    assert misses[1:].min() > 399 / 9 / 2


def test_the_test_part_is_the_same_for_every_seed_and_the_others_are_not(example: Any) -> None:
    first, second = (example.split(seed, 0.4, 100).rows for seed in (0, 1))
    np.testing.assert_array_equal(first["test"], second["test"])
    for name in ("validation", "reference", "train"):
        assert set(first[name].tolist()) != set(second[name].tolist())


def test_what_each_method_trains_on(example: Any) -> None:
    parts, rows = example.split(0, 0.4, 100)
    reference = example.initial_parameters(5)
    for method in METHODS:
        samples, reference_loss = example.material(method, parts, None if method == "reference" else reference)
        expected = {"reference": ["reference"], "ERM+": ["train", "reference"]}.get(method, ["train"])
        images = np.concatenate([parts[name].images for name in expected])
        np.testing.assert_array_equal(samples.images, images)
        assert reference_loss.dtype == np.float32
        expected_loss = np.zeros(len(images)) if method == "reference" else example.losses(reference, samples)
        np.testing.assert_array_equal(reference_loss, expected_loss.astype(np.float32))
    assert not set(rows["reference"].tolist()) & set(rows["train"].tolist())


def test_the_best_mean_over_the_seeds_is_chosen_and_the_first_of_equals(example: Any) -> None:
    assert example.choose({(1.0, "a"): [0.5, 0.6], (2.0, "b"): [0.9, 0.1], (3.0, "c"): [0.6, 0.5]}) == (1.0, "a")


def test_the_file_of_results_is_whole(found: dict[str, Any]) -> None:
    _check_schema(found, seeds=2, trials=2)


def test_the_same_command_writes_the_same_files(
    example: Any, quick: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(["--quick", "--out", str(tmp_path)]) == 0
    for name in ("results.json", "picture.svg"):
        assert (tmp_path / name).read_bytes() == (quick[0] / name).read_bytes()
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:-1] == quick[1].splitlines()[:-1]
    # Elsewhere than on a terminal, progress is plain lines on standard error.
    assert quick[2].splitlines()[0] == "training: 0/24"
    assert "\x1b" not in quick[2]


def test_wrong_labels_gain_weight_under_dro_and_lose_it_under_excess_losses(found: dict[str, Any]) -> None:
    def values(method: str, figure: str) -> np.ndarray:
        return np.asarray([row["metrics"][figure] for row in found["results"] if row["method"] == method])

    weight = {method: values(method, "wrong_label_weight") for method in METHODS}
    assert np.abs(weight["ERM"] - 0.4).max() < 0.01
    assert np.abs(weight["ERM+"] - 0.4 * 997 / 1097).max() < 0.01
    assert weight["reference"].max() == 0
    assert weight["DRO"].min() > 0.5
    assert weight["DRRho"].max() < 0.3
    assert weight["RHO"].max() < 0.3
    # Why: the reference model is as surprised by a wrong label as the learner, and more.
    assert np.all(values("ERM", "wrong_labels_loss") > 2 * values("ERM", "right_labels_loss"))
    assert np.all(values("ERM", "wrong_labels_reference_loss") > values("ERM", "wrong_labels_loss"))
    for method in ("ERM", "DRO"):
        assert np.all(values("DRRho", "test_accuracy") > values(method, "test_accuracy"))


@pytest.mark.parametrize("method", ["ERM", "DRO", "RHO", "DRRho"])
def test_torch_and_jax_walk_the_same_way(example: Any, method: str) -> None:
    pytest.importorskip("jax")
    parts, _ = example.split(0, 0.4, 100)
    train = parts["train"]
    reference_loss = example.losses(example.initial_parameters(9), train).astype(np.float32)
    knob = {"ERM": 1e-2, "RHO": 0.5}.get(method, example.ChiSquareBall(0.3))
    start = example.initial_parameters(0)
    learners = [learner(method, knob, start, 0.1) for learner in (example.torch_learner, example.jax_learner)]
    for number in range(4):
        batch = np.arange(64) + 64 * number
        given = (train.images[batch], train.labels[batch], reference_loss[batch])
        one, other = (step(*given) for step, _ in learners)
        assert one.sum() == pytest.approx(1.0, abs=1e-5)
        np.testing.assert_allclose(one, other, atol=1e-4 * one.max())
    for one, other, begin in zip(learners[0][1](), learners[1][1](), start, strict=True):
        assert np.abs(one - begin).max() > 1e-3
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_selection_is_the_excess_risk_over_cvar(example: Any) -> None:
    parts, _ = example.split(0, 0.4, 100)
    train, batch = parts["train"], np.arange(64)
    reference_loss = example.losses(example.initial_parameters(9), train).astype(np.float32)
    given = (train.images[batch], train.labels[batch], reference_loss[batch])
    start = example.initial_parameters(0)
    selected, weighted = (
        example.torch_learner(*method, start, 0.1)[0](*given)
        for method in (("RHO", 0.25), ("DRRho", example.CVaR(0.25)))
    )
    assert np.count_nonzero(selected) == 16
    np.testing.assert_allclose(selected, weighted, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--noise", "0.9"], "--noise must be from 0 to 0.8, got 0.9", id="noise"),
        pytest.param(["--noise", "nan"], "--noise must be from 0 to 0.8, got nan", id="nan"),
        pytest.param(["--clean", "5"], "--clean must be from 20 to 500, got 5", id="clean"),
        pytest.param(["--seeds", "1"], "--seeds must be from 2 to 50, got 1", id="seeds"),
        pytest.param(["--backend", "abacus"], "abacus", id="backend"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        example.main([*arguments, "--quick", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(SystemExit):
        example.main(["--quick", "--out", str(tmp_path / "run")])
    assert "--out must be a folder to write to" in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "mine"


def _check_picture(text: str, found: dict[str, Any]) -> None:
    """Every seed is a dot, every mean is written, and nothing lies outside of the card."""
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    dots = [path for path in root.iter(f"{space}path") if path.get("class", "").startswith("dot ")]
    assert len(dots) == found["settings"]["seeds"] * (2 * len(METHODS) - 1)
    places = [float(re.findall(r"[0-9.]+", dot.attrib["transform"])[0]) for dot in dots]
    assert all(130 <= place <= 408 for place in places)
    assert all(dot.attrib["class"].split()[1] in text.partition("<style>")[2] for dot in dots)
    words = [element.text for element in root.findall(f".//{space}text")]
    for method in METHODS:
        accuracy = found["summary"][method]["test_accuracy"]["mean"]
        assert f"{100 * accuracy:.1f}\N{NO-BREAK SPACE}%" in words
    height = float(root.attrib["viewBox"].split()[3])
    assert max(float(element.attrib["y"]) for element in root.findall(f".//{space}text")) + 72 < height


def test_the_picture_shows_every_seed(quick: tuple[Path, str, str], found: dict[str, Any]) -> None:
    _check_picture((quick[0] / "picture.svg").read_text(encoding="utf-8"), found)


def test_the_published_table_and_picture_are_those_of_the_published_figures(example: Any) -> None:
    published = json.loads((ROOT / "docs/benchmarks/digits.json").read_text(encoding="utf-8"))
    _check_schema(published, seeds=5, trials=16)
    text = example.picture(published, published["settings"]["noise"])
    drawn = (ROOT / "docs/pictures/digits.svg").read_text(encoding="utf-8")
    assert drawn == text, "run the example and copy its picture.svg and results.json to where the page has them"
    _check_picture(text, published)
    page = (ROOT / "docs/examples/digits.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (.*) \|$", page, flags=re.MULTILINE)
    shown = [tuple(cell.strip().replace("`", "") for cell in f" {line} ".split(" | ")) for line in lines]
    for row in example.table(published)[1:]:
        assert row in shown
    more = json.loads((ROOT / "docs/benchmarks/digits-more.json").read_text(encoding="utf-8"))
    for method, figures in more["--noise 0"]["summary"].items():
        assert (example.METHODS[method][1], f"{example.spread(figures['test_accuracy'])} %") in shown
    for method in ("ERM+", "RHO"):
        steered, other = (np.asarray(more["--seeds 20"]["test_accuracy"][name]) for name in ("DRRho", method))
        told = f"{100 * np.mean(steered - other):.1f} ± {100 * np.std(steered - other, ddof=1):.1f}"
        assert re.search(rf"{told}( points)?,\spositive in\s{np.sum(steered > other)}", page)
    tested = more["--ball cvar"]["test_accuracy"]
    assert tested["RHO"] == tested["DRRho"]
