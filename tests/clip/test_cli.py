"""The command line: every mistake of the user gives one clear line and exit code 2, and no file is overwritten."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import load_arrays
from drrho_core.backend import get_backend

TINY = ["--backend", "numpy", "--epochs", "1", "--width", "4", "--feature-dim", "8"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "run"
    assert main(["train", "--data", "digits:reference", "--method", "clip", "--out", str(out), *TINY]) == 0
    return out


def write_pairs(folder: Path, count: int, *, columns: tuple[str, ...] = ("image", "caption", "label")) -> Path:
    """Write `count` small pictures, red or blue, and a table of them."""
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "pairs.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in range(count):
            colour = row % 2
            pixels = rng.integers(0, 80, (12, 16, 3), dtype=np.uint8)
            pixels[:, :, 2 * colour] += 150
            Image.fromarray(pixels).save(folder / f"{row}.png")
            name = ("red", "blue")[colour]
            writer.writerow([f"{row}.png", f"a {name} picture number {row % 7}", name][: len(columns)])
    return table


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command, expect exit code 2 and one line on standard error without a traceback, and return that line."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("drrho: ")
    assert captured.out == ""
    return lines[0]


# --- what works ---------------------------------------------------------------------------------------------------


def test_a_table_of_pairs_leads_from_a_reference_run_to_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_pairs(tmp_path / "mine", 120)
    small = ["--epochs", "3", "--image-size", "16", "--width", "4", "--backend", "torch"]
    reference, steered = tmp_path / "reference", tmp_path / "steered"
    train = ["train", "--data", str(table)]
    assert main([*train, "--method", "clip", "--out", str(reference), *small, "--image-size", "8"]) == 0
    figures = tmp_path / "figures.json"
    steer = ["--method", "drrho", "--reference", str(reference), "--out", str(steered), "--json", str(figures)]
    assert main([*train, *steer, *small]) == 0
    row = json.loads(figures.read_text())[0]
    assert row == json.loads((steered / "results.json").read_text())[0]
    assert row["method"] == "drrho"
    assert {"retrieval_r1", "retrieval_r5", "retrieval_r10", "zero_shot_accuracy"} <= set(row["metrics"])
    # Every figure says how many pairs, queries and classes it comes from.
    assert {"num_pairs", "num_queries", "gallery_size", "retrieval_r1_full", "num_classes"} <= set(row["metrics"])
    again = tmp_path / "again.json"
    assert main(["evaluate", str(steered), "--json", str(again)]) == 0
    assert json.loads(again.read_text())[0]["metrics"] == row["metrics"]
    assert main(["evaluate", str(steered), "--split", "validation", "--backend", "jax"]) == 0
    assert main(["evaluate", str(steered), "--data", str(table)]) == 0
    shown = capsys.readouterr().out
    assert "R@1" in shown
    # Of the run's own table, only the test pairs are measured.
    assert " of 120 pairs show images that the run was trained on or validated with; they are left out\n" in shown
    assert f"R@1, R@5, R@10: {row['metrics']['num_pairs']} pairs" in shown


def test_objective_estimate_and_surrogate_are_logged_apart(reference: Path) -> None:
    out = reference.parent / "logged"
    command = ["train", "--data", "digits", "--method", "sogclr", "--log-every", "2", "--out", str(out), *TINY]
    assert main(command) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [2, 4, 5]  # every second one, and the last
    assert all(record["surrogate"] > record["loss"] for record in steps)  # by the mean of tau g / (eps + u)
    last = [record for record in records if "validation_retrieval_r1" in record][-1]
    assert last["step"] == 5
    # Validation says how many pairs the figures come from, and measures the gallery of all images too.
    assert {"validation_retrieval_r1_full", "validation_num_pairs", "validation_num_queries"} <= set(last)


def test_help_has_examples_and_every_command() -> None:
    for arguments, expected in (([], "demo"), (["train"], "drrho train --data pairs.csv"), (["evaluate"], "--split")):
        command = [sys.executable, "-m", "drrho_clip.cli", *arguments, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert expected in done.stdout


def test_help_loads_no_framework() -> None:
    code = "import sys\nfrom drrho_clip.cli import main\ntry:\n main(['--help'])\nfinally:\n"
    code += " print(sorted(set(sys.modules) & {'torch', 'jax', 'cupy', 'sklearn', 'PIL'}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


# --- bad usage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "--out", "x", "--colour", "3"], ["--colour"]),
        (["sing"], ["sing"]),
        ([], ["demo", "train", "evaluate"]),
        (["train"], ["--out"]),
        (["train", "--out", "x", "--epochs", "many"], ["--epochs must be an integer of at least 1, got 'many'"]),
        (["train", "--out", "x"], ["data", "scenes", "none"]),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "magic"],
            ["method", "clip, sogclr, drrho", "'magic'"],
        ),
        (["train", "--out", "x", "--data", "digits"], ["reference", "drrho", "none"]),
        (["train", "--out", "x", "--data", "digits", "--method", "clip", "--reference", "y"], ["reference", "'y'"]),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "clip", "--temperature", "0"],
            ["--temperature must be > 0, got 0.0"],
        ),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "clip", "--gamma-min", "0"],
            ["--gamma-min must be > 0 and at most 1, got 0.0"],
        ),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "clip", "--gamma-min", "1.5"],
            ["--gamma-min must be > 0 and at most 1, got 1.5"],
        ),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "clip", "--batch-size", "1"],
            ["--batch-size must be an integer of at least 2, got 1"],
        ),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "clip", "--batch-size", "9999"],
            ["batch_size", "699"],
        ),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "clip", "--learning-rate", "nan"],
            ["--learning-rate must be auto or > 0, got nan"],
        ),
        (["train", "--out", "x", "--data", "digits", "--method", "clip", "--backend", "tf"], ["backend", "'tf'"]),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "clip", "--dtype", "float16"],
            ["--dtype must be one of float32, float64, got 'float16'"],
        ),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "clip", "--architecture", "rnn"],
            ["--architecture must be one of mlp, conv, got 'rnn'"],
        ),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "clip", *TINY, "--architecture", "conv"],
            ["architecture", "'mlp'", "'conv'"],
        ),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "clip", "--backend", "torch", "--device", "moon"],
            ["device", "moon"],
        ),
        (
            ["train", "--out", "x", "--data", "digits", "--method", "clip", "--estimator", "moon"],
            ["--estimator must be one of device, host, file, split, got 'moon'"],
        ),
        (["train", "--out", "x", "--data", "scenes:test", "--method", "clip"], ["scenes:test"]),
        (["train", "--out", "x", "--resume"], ["x", "config.json"]),
        (["evaluate", "nowhere"], ["model must be the folder of a run", "nowhere", "does not exist"]),
        (["demo", "--out", "x", "--backend", "tf"], ["backend", "'tf'"]),
    ],
)
def test_bad_usage_gives_one_line_and_writes_nothing(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, *arguments)
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("sogclr", "--temperature-scheme warm", "--temperature-scheme must be one of fixed, global, per_sample, log_s"),
        ("clip", "--temperature-scheme per_sample", "temperature_scheme must be fixed, global or log_scale for"),
        ("clip", "--temperature-scheme global --radius 1", "radius must be 0 for method clip, whose loss has no"),
        ("sogclr", "--radius 1", "radius must be 0 if the temperature is fixed, got 1.0"),
        (
            "sogclr",
            "--temperature-scheme global",
            "radius must be > 0 if sogclr learns the temperature, because at 0 the temperature only rises, got 0.0",
        ),
        ("sogclr", "--temperature-scheme per_sample --radius -1", "--radius must be >= 0, got -1.0"),
        ("clip", "--temperature-min 0", "--temperature-min must be > 0, got 0.0"),
        ("clip", "--temperature-max inf", "--temperature-max must be > 0, got inf"),
        ("clip", "--temperature-max 0.001", "temperature_max must be at least temperature_min (0.01), got 0.001"),
        ("clip", "--temperature-learning-rate -1", "--temperature-learning-rate must be >= 0, got -1.0"),
        (
            "clip",
            "--temperature-scheme global --temperature 2",
            "temperature must be in [0.01, 1.0] if it is learned, got 2.0",
        ),
    ],
)  # fmt: skip
def test_temperature_settings_that_do_not_fit_give_one_line(
    method: str, options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train = ["train", "--data", "digits", "--method", method, "--out", str(out), *TINY]
    assert fails(capsys, *train, *options.split()).startswith(f"drrho: {message}")
    assert not out.exists()


def test_missing_later_settings_take_defaults_and_unknown_settings_are_refused() -> None:
    now = TrainConfig(data="digits", method="clip")
    later = {
        "temperature_scheme", "temperature_learning_rate", "temperature_min", "temperature_max", "radius", "estimator"
    }  # fmt: skip
    before = {name: value for name, value in now.to_json().items() if name not in later}
    assert TrainConfig.from_json(before) == TrainConfig.from_json(now.to_json()) == now
    assert now.temperature_scheme == "fixed"
    for odd in (before | {"colour": 3}, {name: value for name, value in before.items() if name != "eps"}):
        with pytest.raises(BadInput, match="the settings of a run must be those of this version, got a difference in"):
            TrainConfig.from_json(odd)


@pytest.mark.parametrize(
    ("method", "scheme", "radius", "names"),
    [
        ("clip", "fixed", "0", set()),
        ("clip", "global", "0", {"temperature", "temperature_gradient"}),
        (
            "sogclr",
            "per_sample",
            "1",
            {"temperature", "smallest_temperature", "largest_temperature", "temperature_gradient"},
        ),
    ],
)
def test_learned_temperatures_are_logged(
    method: str, scheme: str, radius: str, names: set[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["--method", method, "--temperature-scheme", scheme, "--radius", radius, "--log-every", "1"]
    assert main(["train", "--data", "digits", "--out", str(out), *options, *TINY]) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert len(steps) > 2
    for record in steps:
        assert {name for name in record if "temperature" in name} == names
        if names:
            assert 0.01 <= record["temperature"] <= 1.0
            assert record["temperature_gradient"] != 0.0
        if "smallest_temperature" in names:
            assert record["smallest_temperature"] < record["temperature"] < record["largest_temperature"]
    if scheme == "global":  # Adam's first step: the learning rate, against the gradient
        moved = steps[0]["temperature"] - 0.07
        assert moved == pytest.approx(-1e-4 * np.sign(steps[0]["temperature_gradient"]), abs=1e-7)


@pytest.mark.parametrize("scheme", ["global", "per_sample"])
def test_the_radius_reaches_the_objective(scheme: str, tmp_path: Path) -> None:
    """At the first step only the radius differs, which adds 0.5 to the gradient and 0.5 tau to the loss."""
    first = []
    for radius in ("1", "1.5"):
        out = tmp_path / radius
        options = ["--method", "sogclr", "--temperature-scheme", scheme, "--radius", radius, "--log-every", "1"]
        assert main(["train", "--data", "digits", "--out", str(out), "--dtype", "float64", *options, *TINY]) == 0
        first.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0]))
    small, large = first
    assert large["temperature_gradient"] - small["temperature_gradient"] == pytest.approx(0.5, abs=1e-12)
    assert large["loss"] - small["loss"] == pytest.approx(0.5 * 0.07, abs=1e-12)


@pytest.mark.parametrize("scheme", ["global", "per_sample"])
@pytest.mark.parametrize(("radius", "bound"), [("1e-9", 0.08), ("5", 0.06)])  # the logarithm of 127 negatives is 4.8
def test_the_bounds_reach_the_temperature(scheme: str, radius: str, bound: float, tmp_path: Path) -> None:
    """With a very large learning rate the first visit ends at a bound, which depends on the radius."""
    out = tmp_path / "run"
    options = f"--method sogclr --radius {radius} --temperature-scheme {scheme} --temperature-learning-rate 1000"
    bounds = "--temperature-min 0.06 --temperature-max 0.08 --dtype float64"
    assert main(["train", "--data", "digits", "--out", str(out), *TINY, *options.split(), *bounds.split()]) == 0
    arrays, _ = load_arrays(out / "checkpoint.safetensors", "checkpoint")
    tables = [np.ravel(array) for name, array in arrays.items() if name.startswith("temperature/temperature")]
    never_visited = set() if scheme == "global" else {0.07}
    assert set(np.concatenate(tables).tolist()) == {bound} | never_visited


def test_the_process_exits_with_code_two(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "drrho_clip.cli", "evaluate", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("drrho: ")


# --- bad files ----------------------------------------------------------------------------------------------------


def test_a_bad_table_is_refused_with_the_place_of_the_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_pairs(tmp_path / "good", 8)
    text = table.read_text(encoding="utf-8")
    out = tmp_path / "run"

    def refused(name: str, content: str) -> str:
        bad = table.with_name(name)
        bad.write_text(content, encoding="utf-8")
        return fails(capsys, "train", "--data", str(bad), "--method", "clip", "--out", str(out))

    assert "caption" in refused("no_column.csv", text.replace("caption", "words", 1))
    assert "99.png" in refused("missing_image.csv", text.replace("3.png", "99.png"))
    (table.parent / "broken.png").write_bytes(b"no picture")
    assert "broken.png" in refused("unreadable.csv", text.replace("3.png", "broken.png"))
    assert "empty.csv" in refused("empty.csv", "")
    missing = fails(capsys, "train", "--data", str(tmp_path / "no.csv"), "--method", "clip", "--out", str(out))
    assert "no.csv" in missing
    assert not out.exists()


def test_a_folder_with_a_run_is_refused(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in reference.iterdir()}
    message = fails(capsys, "train", "--data", "digits", "--method", "clip", "--out", str(reference), *TINY)
    assert str(reference) in message
    assert "--resume" in message
    assert {path.name: path.read_bytes() for path in reference.iterdir()} == before


def test_a_file_as_output_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    message = fails(capsys, "train", "--data", "digits", "--method", "clip", "--out", str(tmp_path / "file"), *TINY)
    assert "file" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_a_demo_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text("[]")
    assert "results.json" in fails(capsys, "demo", "--out", str(tmp_path), "--quick", "--backend", "numpy")
    assert (tmp_path / "results.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda content: content[: len(content) // 2], "undamaged"),
        (lambda content: content[:-8] + bytes(255 - byte for byte in content[-8:]), "checksum"),
        (lambda content: b"PK\x03\x04 a torch file", "undamaged"),
        (lambda content: safetensors.numpy.save({"weight": np.zeros(3)}), "another kind"),
        (lambda content: safetensors.numpy.save({"w": np.zeros(3)}, {"format": "drrho-checkpoint"}), "version"),
    ],
)
@pytest.mark.parametrize("file", ["checkpoint.safetensors", "checkpoint-best.safetensors"])
def test_a_corrupt_or_foreign_checkpoint_is_refused(
    file: str, damage: object, part: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(damage)
    folder = tmp_path / "run"
    folder.mkdir()
    for path in reference.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    checkpoint = folder / file
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    (folder / "checkpoint-reference.safetensors").unlink()  # then the best state steers
    if file == "checkpoint.safetensors":
        (folder / "checkpoint-best.safetensors").unlink()  # then the last state is evaluated and steers
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for arguments in (["evaluate", str(folder)], ["train", "--resume", "--out", str(folder)]):
        message = fails(capsys, *arguments)
        assert file in message
        assert part in message
    steer = ["train", "--data", "digits", "--reference", str(folder), "--out", str(tmp_path / "new"), *TINY]
    assert file in fails(capsys, *steer)
    assert not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_of_another_model_is_refused(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    wide = ["--backend", "numpy", "--epochs", "1", "--width", "8", "--feature-dim", "8"]
    assert main(["train", "--data", "digits:reference", "--method", "clip", "--out", str(other), *wide]) == 0
    for file in ("checkpoint.safetensors", "checkpoint-best.safetensors"):
        (other / file).write_bytes((reference / file).read_bytes())
    assert "got other parameters" in fails(capsys, "evaluate", str(other))
    assert "got other parameters" in fails(capsys, "train", "--resume", "--out", str(other))
    # The parameters of an unfinished run are not used before the optimiser and the estimates have been looked at.
    (other / "results.json").unlink()
    assert "got other arrays" in fails(capsys, "train", "--resume", "--out", str(other))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "JSON"),
        ('{"format": "another"}', "another program"),
        ('{"format": "drrho-run", "version": 99}', "99"),
        ('{"format": "drrho-run", "version": 1, "config": {}}', "settings"),
        ('{"format": "drrho-run", "version": 1}', "damaged"),
    ],
)
def test_a_foreign_config_is_refused(
    content: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(content)
    assert part in fails(capsys, "evaluate", str(tmp_path))


def test_other_data_under_the_same_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_pairs(tmp_path / "mine", 40, columns=("image", "caption"))
    out = tmp_path / "run"
    small = ["--backend", "numpy", "--epochs", "1", "--image-size", "8", "--width", "4"]
    assert main(["train", "--data", str(table), "--method", "sogclr", "--out", str(out), *small]) == 0
    table.write_text(table.read_text().replace("red", "green"))
    assert "other content" in fails(capsys, "train", "--resume", "--out", str(out))


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['sklearn'] = None; sys.modules['sklearn.datasets'] = None\n"
    code = hide + "from drrho_clip.cli import main\nsys.exit(main(sys.argv[1:]))"
    out = tmp_path / "x"
    command = ["train", "--data", "digits", "--method", "clip", "--out", str(out), *TINY]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "drrho: the digits data set needs scikit-learn: pip install 'drrho-core[train]'\n"
    assert not out.exists()


def test_a_missing_library_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        get_backend("cupy")
    except ImportError:
        message = fails(
            capsys, "train", "--data", "digits", "--method", "clip", "--backend", "cupy", "--out", str(tmp_path / "x")
        )
        assert "drrho-core[cupy]" in message
    else:
        pytest.skip("cupy is installed here")
