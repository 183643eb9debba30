"""A reference model chooses pairs for another run, and ranks pairs: from the command line, on a small noisy table."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from drrho_clip.cli import main
from drrho_clip.data.splits import open_splits
from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.reference import ask_reference
from drrho_clip.reference.memorisation import PairFeatures, pair_losses
from drrho_clip.reference.pair_choice import load_pair_choice
from drrho_clip.run import open_run, read_metrics
from drrho_clip.run.temperature_figures import temperature_of
from drrho_core.backend import get_backend
from helpers.small_pairs import write_two_colours

SIZES = ["--backend", "numpy", "--image-size", "8", "--width", "32", "--feature-dim", "16", "--batch-size", "32"]
FAST = [*SIZES, "--learning-rate", "0.01"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 400 pairs, 30 % of them with the caption of another picture; truth.npy says which."""
    folder = tmp_path_factory.mktemp("pairs")
    np.save(folder / "truth.npy", write_two_colours(folder, 400, swapped_fraction=0.3))
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def reference(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference model that was stopped before it has memorised."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    train(table, out, "--method", "clip", "--as-reference", "--epochs", "40")
    return out


@pytest.fixture
def memorised(reference: Path, tmp_path: Path) -> Path:
    """The same run with only its last state, which has learnt wrong captions by heart."""
    out = tmp_path / "memorised"
    shutil.copytree(reference, out)
    for state in ("best", "reference"):
        (out / f"checkpoint-{state}.safetensors").unlink()
    return out


def train(table: Path, out: Path, *options: str) -> None:
    assert main(["train", "--data", str(table), "--out", str(out), *FAST, *options]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused before training, and return the line on standard error."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def swapped_rows(table: Path, run: Path) -> npt.NDArray[np.bool_]:
    """Return which training rows of a run have swapped captions."""
    truth = np.load(table.parent / "truth.npy")
    files = open_splits(open_run(run).config).train.files  # type: ignore[attr-defined]
    return np.asarray([truth[int(file.stem)] for file in files])


def parameters(run: Path) -> dict[str, npt.NDArray[np.floating]]:
    arrays, _ = load_arrays(run / "checkpoint.safetensors", "checkpoint")
    return {name: array for name, array in arrays.items() if name.startswith("parameters/")}


def test_a_reference_run_stops_and_keeps_the_state_before_memorisation(reference: Path) -> None:
    records = [record for record in read_metrics(reference / "metrics.jsonl") if "hopeless_train" in record]
    ratios = [record["hopeless_train"] / record["hopeless_validation"] for record in records]
    assert len(records) < 40
    assert min(ratios[:-1]) >= 0.25 > ratios[-1]
    _, state = load_arrays(reference / "checkpoint-reference.safetensors", "checkpoint")
    assert state["hopeless_train"] >= 0.5 * state["hopeless_validation"]
    assert json.loads((reference / "results.json").read_text())[0]["samples_seen"] == records[-1]["samples_seen"]


def test_a_stopped_run_stays_stopped(reference: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(reference, again)
    before = (again / "checkpoint.safetensors").read_bytes()
    assert main(["train", "--resume", "--out", str(again)]) == 0
    assert (again / "checkpoint.safetensors").read_bytes() == before


def test_both_shares_are_printed_and_a_memorised_reference_is_named(
    table: Path, reference: Path, memorised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, has_memorised in ((reference, False), (memorised, True)):
        out = tmp_path / f"by-{folder.name}"
        train(table, out, "--method", "drrho", "--reference", str(folder), "--epochs", "1")
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reference ")]
        assert "of the held-out pairs and" in line
        assert ("learnt wrong captions by heart" in line) is has_memorised


@pytest.mark.parametrize(
    "options", [("--drop-suspects", "auto"), ("--drop-suspects", "0.3"), ("--anchor-weights", "reference")]
)
@pytest.mark.parametrize("method", ["clip", "sogclr", "drrho"])
def test_a_memorised_reference_must_not_choose_pairs(
    method: str,
    options: tuple[str, str],
    table: Path,
    memorised: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(table), "--method", method, "--reference", str(memorised), "--out", str(out)]
    line = refusal(capsys, "train", *arguments, *options, *FAST)
    assert options[0][2:].replace("-", "_") in line
    assert "by heart" in line
    assert not out.exists()


def test_a_reference_near_chance_must_not_choose_pairs(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained, out = tmp_path / "untrained", tmp_path / "out"
    start = ["--method", "clip", "--epochs", "1", "--learning-rate", "1e-7", "--out", str(untrained)]
    assert main(["train", "--data", str(table), *SIZES, *start]) == 0
    arguments = ["--data", str(table), "--method", "sogclr", "--reference", str(untrained), "--out", str(out)]
    assert "too little trained" in refusal(capsys, "train", *arguments, "--drop-suspects", "auto", *FAST)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "sogclr", "--drop-suspects", "auto"), "reference must be the folder of a reference run"),
        (("--method", "clip", "--anchor-weights", "reference"), "reference must be the folder of a reference run"),
        (("--method", "clip", "--reference", "runs/reference"), "reference must be left out"),
        (("--method", "drrho", "--reference", "runs/reference", "--as-reference"), "as_reference must be off"),
        (
            ("--method", "siglip", "--reference", "runs/reference", "--anchor-weights", "reference"),
            "anchor_weights must be left out for method siglip, which does not use it",
        ),
        (("--drop-suspects", "1.5"), "must be auto or in (0, 1)"),
        (("--drop-suspects", "much"), "must be auto or in (0, 1)"),
        (("--anchor-weights", "mine"), "must be one of reference"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    options: tuple[str, ...], words: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, "train", "--data", str(table), "--out", str(tmp_path / "out"), *options)


@pytest.mark.parametrize("method", ["clip", "sogclr", "drrho"])
def test_suspects_are_left_out_and_are_mostly_wrong(method: str, table: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--method", method, "--reference", str(reference), "--epochs", "2", "--drop-suspects", "0.2"]
    train(table, out, *options)
    wrong = swapped_rows(table, out)
    run = open_run(out)
    rows = load_pair_choice(run.pair_choice, run.fingerprint).rows
    dropped = np.setdiff1d(np.arange(len(wrong)), rows)
    assert len(dropped) == round(0.2 * len(wrong))
    assert np.mean(wrong[dropped]) > 0.9
    # An epoch has fewer batches, and the pairs that are left out never get an inner estimate.
    arrays, state = load_arrays(run.checkpoint, "checkpoint")
    assert state["step"] == 2 * (len(rows) // 32)
    if method != "clip":
        assert np.isneginf(arrays["estimator/log_inner_image"][dropped]).all()
        assert np.isfinite(arrays["estimator/log_inner_image"]).sum() > 0.9 * len(rows)


def test_auto_leaves_out_a_quarter_more_than_the_hopeless_held_out_pairs(
    table: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--method", "sogclr", "--reference", str(reference), "--epochs", "1", "--drop-suspects", "auto"]
    train(table, out, *options)
    _, state = load_arrays(reference / "checkpoint-reference.safetensors", "checkpoint")
    size = len(swapped_rows(table, out))
    run = open_run(out)
    left_out = size - len(load_pair_choice(run.pair_choice, run.fingerprint).rows)
    assert left_out == round(1.25 * state["hopeless_validation"] * size)
    assert f"left out: {left_out} of {size} training pairs" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["auto", "0.25"])
def test_a_run_that_leaves_out_pairs_gets_the_epochs_of_the_pairs_that_remain(
    share: str, table: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def stop(num_pairs: int, *, used_share: float, as_reference: bool, super_batch: int) -> dict[str, object]:
        asked.append(used_share)
        raise BadInput("enough is known")

    monkeypatch.setattr("drrho_clip.commands.train.defaults_for", stop)
    arguments = ["--data", str(table), "--method", "clip", "--reference", str(reference), "--drop-suspects", share]
    assert main(["train", *arguments, "--out", str(tmp_path / "out")]) == 2
    _, state = load_arrays(reference / "checkpoint-reference.safetensors", "checkpoint")
    assert asked == [pytest.approx(1.0 - (1.25 * state["hopeless_validation"] if share == "auto" else 0.25), abs=1e-5)]


def test_too_large_a_share_is_refused(
    table: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--data",
        str(table),
        "--method",
        "clip",
        "--reference",
        str(reference),
        "--out",
        str(tmp_path / "out"),
    ]
    line = refusal(capsys, "train", *arguments, "--drop-suspects", "0.95", *FAST)
    assert "drop_suspects must leave at least batch_size (32)" in line


def test_posterior_weights_estimate_the_share_of_wrong_captions(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The reference model has not seen the pairs, so no wrong caption is known to it.
    out, half, reference = tmp_path / "weighted", tmp_path / "half", tmp_path / "reference"
    write_two_colours(tmp_path / "others", 400, swapped_fraction=0.3, seed=1)
    train(tmp_path / "others" / "pairs.csv", reference, "--method", "clip", "--as-reference", "--epochs", "40")
    options = ["--method", "drrho", "--reference", str(reference), "--epochs", "1", "--anchor-weights", "posterior"]
    train(table, out, *options)
    wrong = swapped_rows(table, out)
    estimates = [line for line in capsys.readouterr().err.splitlines() if line.startswith("estimate: ")]
    percent = round(100 * float(np.mean(wrong)))
    # The table has few captions, and captions of another image that are right as well do not count as wrong.
    assert len(estimates) == 1
    assert abs(int(estimates[0].split()[1].rstrip("%")) - percent) <= 15
    run = open_run(out)
    weights = load_pair_choice(run.pair_choice, run.fingerprint).anchor_weight
    assert weights is not None
    assert float(np.mean(weights)) == pytest.approx(1.0, abs=1e-6)
    assert np.mean(weights[wrong]) < 0.5 * np.mean(weights[~wrong])
    # If pairs are left out, the weights of the others keep their ratios.
    train(table, half, *options, "--drop-suspects", "0.5")
    choice = load_pair_choice(open_run(half).pair_choice, open_run(half).fingerprint)
    kept = weights[choice.rows]
    assert choice.anchor_weight is not None
    assert np.allclose(choice.anchor_weight[choice.rows], kept / np.mean(kept), rtol=1e-5)


@pytest.mark.parametrize("method", ["clip", "sogclr", "drrho"])
def test_anchor_weights_are_small_for_wrong_pairs_and_change_the_training(
    method: str, table: Path, reference: Path, tmp_path: Path
) -> None:
    weighted, plain = tmp_path / "weighted", tmp_path / "plain"
    options = ["--method", method, "--reference", str(reference), "--epochs", "1", "--anchor-weights", "reference"]
    train(table, weighted, *options)
    run = open_run(weighted)
    weights = load_pair_choice(run.pair_choice, run.fingerprint).anchor_weight
    wrong = swapped_rows(table, weighted)
    assert weights is not None
    assert float(np.mean(weights)) == pytest.approx(1.0, abs=1e-6)
    assert np.mean(weights[wrong]) < 0.5 * np.mean(weights[~wrong])
    if method == "drrho":
        train(table, plain, "--method", method, "--reference", str(reference), "--epochs", "1")
    else:
        train(table, plain, "--method", method, "--epochs", "1")
    before, after = parameters(plain), parameters(weighted)
    assert any(
        not np.array_equal(before[name], array) for name, array in after.items() if name.startswith("parameters/")
    )


@pytest.mark.parametrize("method", ["clip", "drrho"])
def test_a_run_with_chosen_pairs_resumes_bit_for_bit_without_its_reference(
    method: str, table: Path, reference: Path, tmp_path: Path
) -> None:
    from drrho_clip.config import TrainConfig
    from drrho_clip.train import train as train_run

    moved = tmp_path / "reference"
    shutil.copytree(reference, moved)
    config = TrainConfig(
        data=str(table),
        method=method,
        reference=str(moved),
        drop_suspects="auto",
        anchor_weights="reference",
        backend="numpy",
        architecture="mlp",
        image_size=8,
        width=8,
        feature_dim=8,
        batch_size=32,
        epochs=3,
    )
    train_run(config, tmp_path / "whole", quiet=True)
    train_run(config, tmp_path / "parts", quiet=True, stop_after=8)
    shutil.rmtree(moved)
    train_run(config, tmp_path / "parts", quiet=True, resume=True)
    whole, parts = (
        load_arrays(tmp_path / name / "checkpoint.safetensors", "checkpoint")[0] for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(parts[name], array) for name, array in whole.items())
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "parts" / "metrics.jsonl").read_text()


def test_suspects_rank_swapped_captions_first(
    table: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figures = tmp_path / "suspects.csv", tmp_path / "suspects.json"
    capsys.readouterr()
    arguments = [str(reference), "--data", str(table), "--out", str(out), "--json", str(figures)]
    assert main(["suspects", *arguments]) == 0
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["row", "image", "caption", "score", "better_caption"]
    assert sorted(int(row["row"]) for row in rows) == list(range(400))
    assert [row["image"] for row in rows] == [f"{row['row']}.png" for row in rows]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    truth = np.load(table.parent / "truth.npy")
    wrong = np.asarray([truth[int(row["row"])] for row in rows])
    # The area under the curve: how often a wrong caption comes before a right caption.
    right_after = [np.sum(~wrong[position:]) for position in np.flatnonzero(wrong)]
    area = np.mean(right_after) / np.sum(~wrong)
    assert area > 0.95
    assert np.mean(wrong[:60]) >= 0.9
    document = json.loads(figures.read_text())
    estimate = document["probably_wrong"]
    assert f"{estimate} of 400 captions are probably wrong" in capsys.readouterr().out
    assert document["suspects"][0]["caption"] == rows[0]["caption"]
    # 120 captions are swapped; the estimate comes from 35 held-out pairs.
    assert 60 < estimate < 180


def test_better_captions_are_mostly_the_right_ones(table: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "suspects.csv"
    assert main(["suspects", str(reference), "--data", str(table), "--out", str(out)]) == 0
    clean = tmp_path / "clean"
    write_two_colours(clean, 400, swapped_fraction=0.0)
    with (clean / "pairs.csv").open(encoding="utf-8", newline="") as file:
        right = [row["caption"] for row in csv.DictReader(file)]
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    worst = rows[:60]
    assert all(row["better_caption"] not in ("", row["caption"]) for row in worst)
    assert np.mean([row["better_caption"] == right[int(row["row"])] for row in worst]) > 0.3


def test_suspects_of_a_memorised_model_carry_a_caveat(
    table: Path, memorised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["suspects", str(memorised), "--data", str(table), "--out", str(tmp_path / "suspects.csv")]) == 0
    assert "caveat: the model has learnt wrong captions by heart" in capsys.readouterr().out


def test_suspects_of_a_clean_table_carry_a_caveat(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_two_colours(tmp_path / "clean", 200, swapped_fraction=0.0, seed=1)
    capsys.readouterr()
    clean = str(tmp_path / "clean" / "pairs.csv")
    assert main(["suspects", str(reference), "--data", clean, "--out", str(tmp_path / "suspects.csv")]) == 0
    assert "of the pairs hopeless, so probably few captions are wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("global", ("--method", "clip")), ("per_sample", ("--method", "sogclr", "--radius", "1"))],
)
def test_pair_losses_use_the_learned_temperature_of_the_state(
    table: Path, scheme: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "learned"
    learned = ("--temperature-scheme", scheme, "--temperature-learning-rate", "0.01", "--log-every", "1")
    train(table, out, *options, *learned, "--epochs", "3")
    run = open_run(out)
    logged = {record["step"]: record["temperature"] for record in read_metrics(run.metrics) if "temperature" in record}
    assert len(set(logged.values())) > 3
    for state in ("best", "last", "reference"):
        _, saved = load_arrays(run.state_file(run.chosen_state(state)), "checkpoint")
        assert temperature_of(run, state) == logged[saved["step"]] != run.config.temperature
    # A reference model's judgement of other pairs uses this temperature.
    judgement = ask_reference(str(out), get_backend("numpy", dtype="float32"), open_splits(run.config))
    pairs = PairFeatures(*judgement.features[np.arange(len(judgement.features))])
    expected = pair_losses(pairs, temperature=temperature_of(run, "reference"))
    assert judgement.losses is not None
    assert judgement.losses.tolist() == expected.tolist()


def test_a_fixed_temperature_is_that_of_the_pair_losses(reference: Path) -> None:
    assert temperature_of(open_run(reference), "reference") == open_run(reference).config.temperature
