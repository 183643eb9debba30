"""Files of a run that are damaged, foreign or made to do harm end in one line, or do not matter."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import load_arrays, save_arrays
from drrho_clip.files.json_files import parse_json, read_json
from drrho_clip.models import ModelSpec
from drrho_clip.run import open_run, read_metrics
from drrho_clip.train import train

DEEP = "[" * 100_000 + "]" * 100_000
ODD: list[Any] = [
    None, True, 0, -1, 10**12, 10**30, 10**400, -0.5, 1e308, "", "a\0b", "\ud800", "../..", [], [[1]], {}, {"width": 1},
]  # fmt: skip
CONFIG_FIELDS = [field.name for field in fields(TrainConfig)]
MODEL_FIELDS = [field.name for field in fields(ModelSpec)]
TOKENIZER_FIELDS = ["format", "version", "context_length", "vocabulary"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("odd") / "run"
    words = ["--backend", "numpy", "--epochs", "1", "--width", "4", "--feature-dim", "8", "--log-every", "1"]
    assert main(["train", "--data", "digits", "--method", "sogclr", "--out", str(out), *words]) == 0
    return out


@pytest.fixture
def copied(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def ends_well(capsys: pytest.CaptureFixture[str], *arguments: str) -> bool:
    """Run a command; it must work, or end with exit code 2 and one line; return whether it worked."""
    capsys.readouterr()
    code = main(list(arguments))
    captured = capsys.readouterr()
    if code == 0:
        return True
    assert code == 2
    # Lines of the progress may come before the message.
    *before, message = captured.err.splitlines()
    assert message.startswith("drrho: ")
    assert len(message) < 1000
    assert [line for line in before if line.startswith("drrho: ")] == []
    return False


def with_value(document: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return a copy of a JSON object in which a value is replaced."""
    changed: dict[str, Any] = json.loads(json.dumps(document))
    inner = changed
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return changed


def places() -> Iterator[tuple[str, ...]]:
    """Return the place of every entry of config.json."""
    yield from (("format",), ("version",), ("config",), ("model",), ("tokenizer",), ("data_fingerprint",))
    yield from (("config", name) for name in CONFIG_FIELDS)
    yield from (("model", name) for name in MODEL_FIELDS)
    yield from (("tokenizer", name) for name in TOKENIZER_FIELDS)
    yield ("tokenizer", "vocabulary", "0")


@pytest.mark.parametrize("place", list(places()), ids=".".join)
def test_every_odd_value_in_a_description_is_refused_or_harmless(place: tuple[str, ...], copied: Path) -> None:
    file = copied / "config.json"
    document = json.loads(file.read_text())
    for value in ODD:
        if place[-1] == "0":
            changed = with_value(document, place[:-1], [value, *document["tokenizer"]["vocabulary"][1:]])
        else:
            changed = with_value(document, place, value)
        file.write_text(json.dumps(changed))
        # A description that can be read must describe encoders whose parameters fit the checkpoint.
        with contextlib.suppress(BadInput):
            assert open_run(copied).load_parameters()


@pytest.mark.parametrize("place", [place for place in places() if place[-1] != "0"], ids=".".join)
def test_an_evaluation_ends_well_whatever_the_description_says(
    place: tuple[str, ...], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied / "config.json"
    document = json.loads(file.read_text())
    for value in (None, 10**12, "a\0b", [[1]]):
        file.write_text(json.dumps(with_value(document, place, value)))
        ends_well(capsys, "evaluate", str(copied))
        ends_well(capsys, "train", "--resume", "--out", str(copied))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (DEEP, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("", "Expecting value"),
        ("[1, NaN]", "NaN, which is no number"),
        ("[-Infinity]", "-Infinity, which is no number"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (f"[{'9' * 5000}]", "4300"),
        ("[1] [2]", "Extra data"),
        ("PK\x03\x04", "Expecting value"),
        (b"\xff\xfe[\x001\x00]\x00", "utf-8"),
        (b'["\xe9"]', "utf-8"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_text_that_is_no_json_is_refused(
    content: str | bytes, reason: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(content)
    file = copied / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for arguments in (["evaluate", str(copied)], ["train", "--resume", "--out", str(copied)]):
        assert not ends_well(capsys, *arguments)
    with pytest.raises(BadInput, match="must be JSON, got: "):
        read_json(file, "a description")


def test_json_of_the_standard_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, -2.5e3, "\\ud83d\\ude00", null, true]}') == {
        "a": [1, -2500.0, "\N{GRINNING FACE}", None, True]
    }


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize(
    "name", ["config.json", "checkpoint.safetensors", "metrics.jsonl", "results.json", "reference_features.safetensors"]
)
def test_pipes_folders_and_devices_in_place_of_a_file_are_not_read_for_ever(
    name: str, make: Callable[[Path], Any], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / name).unlink(missing_ok=True)
    make(copied / name)
    ends_well(capsys, "evaluate", str(copied))
    ends_well(capsys, "train", "--resume", "--out", str(copied))
    new = copied.parent / "new"
    steer = ["--data", "digits", "--reference", str(copied), "--out", str(new), "--epochs", "1", "--backend", "numpy"]
    ends_well(capsys, "train", *steer)


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_flipped_bits_or_a_lost_end_is_refused(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for file in sorted(copied.glob("checkpoint*.safetensors")):
        whole = file.read_bytes()
        for length in rng.integers(0, len(whole), 12).tolist():
            file.write_bytes(whole[:length])
            with pytest.raises(BadInput, match=file.name):
                load_arrays(file, "checkpoint")
        # The header, with names, shapes and state, is hit as often as the numbers.
        header = int.from_bytes(whole[:8], "little")
        positions = [*rng.integers(0, header + 8, 40), *rng.integers(header + 8, len(whole), 40)]
        for position in positions:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            # A flipped bit in the white space at the end of the header changes nothing.
            with contextlib.suppress(BadInput):
                found = load_arrays(file, "checkpoint")
                file.write_bytes(whole)
                expected = load_arrays(file, "checkpoint")
                assert found[1] == expected[1]
                np.testing.assert_equal(found[0], expected[0])
        file.write_bytes(whole)
    assert ends_well(capsys, "evaluate", str(copied))


@pytest.mark.parametrize("name", ["step", "seconds", "total", "finished", "kept", "epochs"])
def test_every_odd_value_in_the_state_of_a_checkpoint_is_refused_or_harmless(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = tmp_path / "started"
    config = TrainConfig(data="digits", method="sogclr", backend="numpy", epochs=1, width=4, feature_dim=8)
    train(replace(config, architecture="mlp", image_size=8), started, stop_after=3, quiet=True)
    file = started / "checkpoint.safetensors"
    arrays, state = load_arrays(file, "checkpoint")
    run = open_run(started)
    for value in [*ODD, {"../best": {"step": 1}}, {"best": {"step": "1"}}, {"best": 3}]:
        save_arrays(file, "checkpoint", arrays, state | {name: value})
        # A state that is not refused has numbers that a run can have.
        with contextlib.suppress(BadInput):
            progress = run.progress()
            assert 0 <= progress.done <= (progress.total or progress.done)
            copy = shutil.copytree(started, tmp_path / "copy")
            ends_well(capsys, "train", "--resume", "--out", str(copy))
            shutil.rmtree(copy)
    for whole in ([], "text", None, 3, {}):
        save_arrays(file, "checkpoint", arrays, whole)  # type: ignore[arg-type]
        with pytest.raises(BadInput, match=r"checkpoint\.safetensors"):
            run.progress()


# --- results ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["method", "dataset", "seed", "metrics", "samples_seen", "seconds", "state", "step"])
def test_every_odd_value_in_the_results_of_a_run_is_refused_or_harmless(
    name: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((copied / "results.json").read_text())
    for value in [*ODD, {"retrieval_r1": "0.5"}, {"retrieval_r1": None}]:
        (copied / "results.json").write_text(json.dumps([rows[0] | {name: value}]))
        ends_well(capsys, "train", "--resume", "--out", str(copied))
    for content in (DEEP, "{}", "[]", "[[]]", "3", "", "[{}]", "\xff"):
        (copied / "results.json").write_text(content)
        assert not ends_well(capsys, "train", "--resume", "--out", str(copied))
        assert not ends_well(capsys, "report", str(copied), "--out", str(copied.parent / "page.html"))


# --- the log ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["{", DEEP, "[]", "3", '{"step": "3"}', "{}", "\xff", '{"step": null}'], ids=lambda x: x[:9]
)
def test_a_damaged_line_inside_the_log_is_refused_and_a_torn_last_line_is_left_out(line: str, copied: Path) -> None:
    file = copied / "metrics.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) > 3
    file.write_text("\n".join([*lines, line]))
    assert len(read_metrics(file)) == len(lines)
    file.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(BadInput, match="got something else on line 2"):
        read_metrics(file)
