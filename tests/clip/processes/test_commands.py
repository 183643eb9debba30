"""`drrho train`, `drrho encode` and `drrho evaluate` as a launcher starts them; all other commands need one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.commands import common
from drrho_clip.errors import BadInput
from drrho_clip.processes import opening
from drrho_clip.processes.place import Place, place_of_launcher
from helpers.clip_commands import start
from helpers.ports import free_port

_TRAIN = [
    "train",
    "--data",
    "digits",
    "--method",
    "sogclr",
    "--backend",
    "torch",
    "--dtype",
    "float64",
    "--epochs",
    "2",
]
_LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def _commands(out: Path) -> list[list[str]]:
    run, cache = str(out / "run"), str(out / "cache")
    return [
        [*_TRAIN, "--out", run],
        ["encode", "--model", run, "--data", "digits", "--out", cache],
        ["evaluate", run, "--probe", "--json", str(out / "figures.json")],
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of one process and of two processes."""
    folder = tmp_path_factory.mktemp("commands")
    for words in _commands(folder / "1"):
        assert main(words) == 0
    return folder


@pytest.fixture(scope="module")
def launched(folder: Path) -> list[tuple[int, str, str]]:
    """The exit code and the streams of two processes, whose last command line is refused."""
    refused = [*_TRAIN, "--batch-size", "33", "--out", str(folder / "2" / "refused")]
    return start([*_commands(folder / "2"), refused], 2, free_port(), folder)


def test_only_the_first_process_prints_and_all_end_with_two(folder: Path, launched: list[tuple[int, str, str]]) -> None:
    (first_code, first_out, first_errors), (code, out, errors) = launched
    assert first_code == code == 2
    assert out == "exit code 0\n" * 3
    assert errors == ""
    assert first_out.count("R@1") >= 2
    message = "drrho: batch_size must be a multiple of the number of processes (2), got 33"
    assert first_errors.splitlines().count(message) == 1
    assert "Warning" not in first_errors
    assert not (folder / "2" / "refused").exists()


def test_the_files_of_two_processes_are_those_of_one_process(
    folder: Path, launched: list[tuple[int, str, str]]
) -> None:
    assert len(launched) == 2

    def read(size: int) -> dict[str, Any]:
        (row,) = json.loads((folder / str(size) / "figures.json").read_text())
        (trained,) = json.loads((folder / str(size) / "run" / "results.json").read_text())
        return row["metrics"] | {f"trained {name}": value for name, value in trained["metrics"].items()}

    assert read(2) == pytest.approx(read(1), rel=1e-9)
    for name in ("image", "text", "ids"):
        parts = [np.load(folder / str(size) / "cache" / f"{name}.npy") for size in (1, 2)]
        np.testing.assert_allclose(parts[1], parts[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("words", [["report", "x", "--out", "y.html"], ["export", "x", "--out", "y"]])
def test_a_command_that_cannot_be_shared_is_refused_on_all_processes(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (_LAUNCHED | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert main(words) == 2
    assert capsys.readouterr().err == f"drrho: drrho {words[0]} must be started as one process, got 2 processes\n"


def test_the_place_of_a_process_comes_from_the_launcher() -> None:
    assert place_of_launcher(_LAUNCHED) == Place(1, 2, 1)
    for name in _LAUNCHED:
        assert place_of_launcher({key: value for key, value in _LAUNCHED.items() if key != name}) is None
    with pytest.raises(BadInput, match="RANK, WORLD_SIZE and LOCAL_RANK must be numbers"):
        place_of_launcher(_LAUNCHED | {"RANK": "one"})
    with pytest.raises(BadInput, match="RANK must be below WORLD_SIZE"):
        place_of_launcher(_LAUNCHED | {"RANK": "2"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "2"], "coordinator must be given with processes, got none"),
        (
            ["--coordinator", "host", "--processes", "2", "--process", "0"],
            "coordinator must be HOST:PORT with a port from 1 to 65535, got 'host'",
        ),
        (
            ["--coordinator", "host:1", "--processes", "2", "--process", "2"],
            "process must be below the number of processes (2), got 2",
        ),
    ],
)
def test_a_place_that_is_named_wrongly_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_TRAIN, "--out", str(tmp_path / "run"), *words]) == 2
    assert capsys.readouterr().err == f"drrho: {message}\n"


@pytest.mark.parametrize("launched_by", ["options", "launcher"])
@pytest.mark.parametrize("command", ["train", "resume", "encode", "evaluate"])
def test_a_library_connects_the_processes_before_its_devices_are_used(
    command: str, launched_by: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, order = str(folder / "1" / "run"), list[Any]()
    words = {
        "train": [*_TRAIN, "--out", str(tmp_path / "run")],
        "resume": ["train", "--resume", "--out", run],
        "encode": ["encode", "--model", run, "--data", "digits", "--out", str(tmp_path / "cache")],
        "evaluate": ["evaluate", run],
    }[command]
    place = Place(0, 2)
    if launched_by == "launcher":
        for name, value in (_LAUNCHED | {"RANK": "0", "LOCAL_RANK": "0"}).items():
            monkeypatch.setenv(name, value)
    else:
        place = Place(1, 2, 0, "localhost:1")
        words += ["--coordinator", "localhost:1", "--processes", "2", "--process", "1"]

    def build(*arguments: object, **options: object) -> None:
        order.append("built")
        raise ValueError("the test ends here")

    monkeypatch.setattr(opening, "connect", lambda name, place: order.append((name, place)))
    monkeypatch.setattr(common, "get_backend", build)
    assert main(words) == 2
    assert order == [("torch", place), "built"]


def test_a_backend_without_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (_LAUNCHED | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    words = ["train", "--data", "digits", "--method", "clip", "--backend", "numpy", "--out", str(tmp_path / "run")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("drrho: backend must be one of ")
    assert error.endswith(" for several processes, got 'numpy', started as 2 processes\n")
