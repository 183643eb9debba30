"""Settings from a file, and the dry run: the same rules as on the command line, and nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import drrho_clip
from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.config_file import PRESETS, read_preset, read_settings
from drrho_clip.errors import BadInput
from drrho_clip.run import open_run

SMALL = "data: digits\nmethod: clip\nbackend: numpy\nepochs: 1\nwidth: 4\nfeature-dim: 8\n"


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown setting 'epoch'; did you mean epochs?"),
        ("out: runs/a", "unknown setting 'out'"),
        ("epochs: 3\nepochs: 4", "must name epochs once, got it twice"),
        ("batch-size: 3\nbatch_size: 4", "must name batch_size once, got it twice"),
        ("- epochs", "must hold names and values of settings, got a list"),
        ("", "must hold names and values of settings, got nothing"),
        ("epochs: [3]", "epochs must be an integer of at least 1, got a list"),
        ("epochs: {a: 3}", "epochs must be an integer of at least 1, got a mapping"),
        ("epochs: -1", "epochs must be an integer of at least 1, got -1"),
        ("epochs: 2.5", "epochs must be an integer of at least 1, got '2.5'"),
        ("epochs: ''", "epochs must be an integer of at least 1, got ''"),
        ("temperature: .nan", "temperature must be > 0, got '.nan'"),
        ("method: dro", "method must be one of clip,"),
        ("as_reference: yes", "as_reference must be true or false, got 'yes'"),
        ("a: b: c", "must be YAML, got an error on line 1"),
        ("epochs: 3\n\twidth: 3", "must be YAML, got an error on line 2"),
        ("epochs: &a [*a]", "must be YAML, got an error on line 1"),
    ],
)
def test_a_bad_file_gives_one_line_with_file_setting_rule_and_value(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(BadInput, match=re.escape(message)) as error:
        read_settings(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_lists_of_aliases_that_would_fill_the_memory_are_refused_quickly(tmp_path: Path) -> None:
    levels = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    file = write(tmp_path, "a0: &a0 [x]\n" + "\n".join(levels) + "\n")
    with pytest.raises(BadInput, match="unknown setting 'a0'"):
        read_settings(file)
    file = write(tmp_path, "epochs: &a0 [x]\n" + "\n".join(levels) + "\n")
    with pytest.raises(BadInput, match="epochs must be an integer"):
        read_settings(file)


def test_values_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        'learning-rate: 1e-3\nas_reference: true\nvalidation: null\ninit: ~\ndata: "null"\nseed: 7\nmethod: clip\n',
    )
    expected = {"learning_rate": 1e-3, "as_reference": True, "data": "null", "seed": 7, "method": "clip"}
    assert read_settings(file) == expected


def test_the_command_line_wins_and_the_resolved_settings_repeat_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, SMALL + "seed: 5\n")
    out = tmp_path / "run"
    assert main(["train", "--config", str(file), "--out", str(out), "--seed", "6"]) == 0
    config = open_run(out).config
    assert (config.seed, config.width, config.method) == (6, 4, "clip")
    # config.json has all settings, so a second run from that file has the same settings.
    again = tmp_path / "again"
    assert main(["train", "--config", str(out / "config.json"), "--out", str(again)]) == 0
    assert open_run(again).config == config
    # The same file continues the run, and a file with another value is refused.
    assert main(["train", "--resume", "--config", str(out / "config.json"), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--config", str(file), "--out", str(out)]) == 2
    assert "seed must be that of the run to resume (6), got 5" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, SMALL)
    out = tmp_path / "run"
    words = ["train", "--config", str(file), "--out", str(out)]
    before = sorted(tmp_path.rglob("*"))
    assert main([*words, "--dry-run", "--epochs", "2"]) == 0
    planned = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    # The real run takes the steps of the plan.
    assert main([*words, "--epochs", "2", "--json", str(tmp_path / "row.json")]) == 0
    row = json.loads((tmp_path / "row.json").read_text())[0]
    assert f"steps: {row['samples_seen'] // 128} in 2 epochs" in planned
    assert f"pairs: {row['num_training_pairs']:,} for training" in planned
    for part in ("images", "parameters", "optimiser", "checkpoint", "library"):
        assert part in planned
    for option in (["--resume"], ["--json", str(tmp_path / "plan.json")]):
        assert main([*words, "--dry-run", *option]) == 2
        assert "must be left out with dry_run" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_valid_settings_and_names_the_source(name: str) -> None:
    settings = read_preset(name)
    config = TrainConfig(data="pairs.csv", reference="run" if settings["method"] == "drrho" else None, **settings)
    source = (Path(drrho_clip.__file__).parent / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "Source: " in source
    assert "arXiv" in source
    # The options of the authors' script stand in the file, so that the numbers can be compared with the settings.
    words = source.replace("#", " ").split()
    for option, value in (
        ("--epochs", config.epochs),
        ("--warmup", config.warmup_steps),
        ("--wd", config.weight_decay),
        ("--lr", config.learning_rate),
        ("--gamma", config.gamma_min),
    ):
        assert float(words[words.index(option) + 1].rstrip(".")) == value, option
    position = words.index("GPUs")
    assert config.batch_size == int(words[position - 1]) * int(words[position + 2])


def test_file_and_command_line_come_before_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, SMALL.replace("method: clip\n", "epochs: 9\n").replace("epochs: 1\n", ""))
    words = ["train", "--preset", "CC3M", "--config", str(file), "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*words, "--batch-size", "16"]) == 0
    planned = capsys.readouterr().out
    assert planned.startswith("fastclip-v3 on digits")
    assert "in 9 epochs of 43, with 16 pairs each" in planned
    # CLIP has neither the radius nor the gamma of the preset; a gamma that the user names is refused.
    clip = [*words, "--batch-size", "16", "--method", "clip"]
    assert main(clip) == 0
    assert capsys.readouterr().out.startswith("clip on digits")
    assert main([*clip, "--gamma-min", "0.3"]) == 2
    assert "gamma_min must be left out for method clip" in capsys.readouterr().err.replace("--gamma-min", "gamma_min")
