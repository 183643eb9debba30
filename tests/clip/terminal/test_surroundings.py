"""Errors of the surroundings (disks, permissions, pipes, signals) end in one line; none of them loses a result."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drrho_clip.cli import main
from drrho_clip.errors import BadInput
from drrho_clip.files.outputs import check_file, check_folder
from drrho_clip.terminal import printing
from drrho_clip.terminal.guard import guarded, reason

TRAIN = ["train", "--data", "digits", "--method", "clip", "--backend", "numpy", "--epochs", "1", "--width", "4"]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command, expect exit code 2 and one line on standard error, and return that line."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("drrho: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.rstrip("\n")


# --- outputs that cannot be written -------------------------------------------------------------------------------


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file" / "new" / "x"


def with_a_long_name(folder: Path) -> Path:
    return folder / "new" / ("x" * 300)


def in_proc(_folder: Path) -> Path:
    if not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    return Path("/proc/new/x")


IMPOSSIBLE = [below_a_file, with_a_long_name, in_proc]


@pytest.mark.parametrize("place", IMPOSSIBLE)
@pytest.mark.parametrize("option", ["--out", "--json"])
def test_an_output_that_cannot_be_made_is_refused_before_the_data_are_read(
    option: str, place: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    # The table does not exist: had the data been read first, the message would name the table.
    arguments = {"--out": str(tmp_path / "run"), "--data": str(tmp_path / "none.csv"), option: str(target)}
    words = [word for pair in arguments.items() for word in pair]
    message = fails(capsys, "train", "--method", "clip", "--backend", "numpy", *words)
    assert message.startswith(f"drrho: {option[2:]} must be a fi" if option == "--json" else "drrho: out must be a fo")
    assert str(target) in message
    assert sorted(tmp_path.rglob("*")) == before


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, make_socket, lambda path: path.symlink_to("/dev/null")])
def test_a_folder_a_pipe_a_socket_and_a_device_are_no_json_file(make: Callable[[Path], Any], tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    make(target)
    mode = target.lstat().st_mode
    with pytest.raises(BadInput, match=r"json must be a file that can be written, got .*, which is a"):
        check_file(target, "json")
    assert target.lstat().st_mode == mode
    assert list(tmp_path.iterdir()) == [target]


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Give up the rights of the administrator, who may write everywhere, for a while; others keep their rights."""
    if os.geteuid() != 0 or not hasattr(os, "setresuid"):
        yield
        return
    try:
        # The check of a file asks for the rights of the real user, and the system for those of the effective user.
        os.setresuid(65_534, 65_534, 0)
    except OSError as error:
        pytest.skip(f"the administrator may write everywhere, and there is no other user here: {error}")
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_missing_permission_is_found_before_the_work() -> None:
    # An ordinary user may not enter pytest's own folder if the administrator runs the tests.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "locked").mkdir(mode=0o555)
        protected = folder / "protected.json"
        protected.touch(mode=0o444)
        with as_ordinary_user():
            with pytest.raises(BadInput, match=r"out must be a folder that can be written, got .*: Permission denied"):
                check_folder(folder / "locked" / "run", "out")
            with pytest.raises(BadInput, match=r"which is read-only"):
                check_file(protected, "json")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_every_refusal_of_the_disk_is_found_by_the_trial(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The administrator gets none of these errors by permissions, so the call of the system is replaced."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadInput, match=f"{os.strerror(code)}$"):
        check_folder(tmp_path / "run", "out")
    with pytest.raises(BadInput, match=f"{os.strerror(code)}$"):
        check_file(tmp_path / "new" / "figures.json", "json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_of_the_json_file_is_made(tmp_path: Path) -> None:
    figures = tmp_path / "new" / "folder" / "figures.json"
    assert main([*TRAIN, "--out", str(tmp_path / "run"), "--json", str(figures)]) == 0
    assert json.loads(figures.read_text()) == json.loads((tmp_path / "run" / "results.json").read_text())


def test_a_check_leaves_neither_folders_nor_files_behind(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / ".." / "b" / "c", "out")
    check_file(tmp_path / "a" / "b.json", "json")
    (tmp_path / "old.json").write_text("old")
    check_file(tmp_path / "old.json", "json")
    check_file(None, "json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_results_never_replace_a_table_or_a_file_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*TRAIN, "--out", str(run)]) == 0
    (tmp_path / "pairs.csv").write_text("image,caption\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "pairs.csv")
    before = {path: path.read_bytes() for path in [*run.iterdir(), tmp_path / "pairs.csv"]}
    new = ["--method", "clip", "--out", str(tmp_path / "new"), "--backend", "numpy"]
    for table, target in (("pairs.csv", "pairs.csv"), ("pairs.csv", "link.csv"), ("link.csv", "x/../pairs.csv")):
        data, figures = ["--data", str(tmp_path / table)], ["--json", str(tmp_path / target)]
        for command in (["train", *new], ["evaluate", str(run)], ["search", str(run), "one"]):
            assert "json must be a file of its own, got" in fails(capsys, *command, *data, *figures)
        suspects = ["suspects", str(run), *data, "--out", str(tmp_path / target)]
        assert "out must be a file of its own, got" in fails(capsys, *suspects)
    for name in ("config.json", "checkpoint.safetensors", "checkpoint-best.safetensors", "results.json"):
        message = fails(capsys, "evaluate", str(run), "--json", str(run / name))
        assert message.endswith("which is a file of a run")
        target = str(tmp_path / "new" / name)
        assert fails(capsys, "train", "--data", "digits", *new, "--json", target).endswith("which is a file of a run")
    assert {path: path.read_bytes() for path in before} == before


# --- the guard ----------------------------------------------------------------------------------------------------


class Stub:
    """A command that raises an error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def run(self) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "cannot use a/b: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", b"a"), "cannot use a: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("cannot identify image file"), "cannot identify image file"),
        (MemoryError(), "not enough memory"),
        (MemoryError("Unable to allocate 7 TiB"), "not enough memory: Unable to allocate 7 TiB"),
        (RecursionError(), "the input must not be nested so deeply"),
        (UnicodeError("odd"), "a text cannot be read or written: odd"),
        (RuntimeError("CUDA out of memory. Tried\n to"), "not enough memory: CUDA out of memory. Tried"),
        (BadInput("a\nb \x1b[31m"), "a\\nb \\x1b[31m"),
    ],
)
def test_an_error_of_the_surroundings_is_one_line_and_exit_code_two(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: Stub(error)) == 2
    assert capsys.readouterr().err == f"drrho: {line}\n"


@pytest.mark.parametrize("error", [TypeError("ours"), RuntimeError("ours"), ValueError("ours"), KeyError("ours")])
def test_an_error_of_our_own_keeps_the_traceback(error: Exception) -> None:
    assert reason(error) is None
    with pytest.raises(type(error), match="ours"):
        guarded(lambda: Stub(error))


def test_a_text_that_the_output_cannot_encode_is_printed_with_a_replacement_sign(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for encoding, sign in (("ascii", b"donn?es"), ("cp1252", b"donn\xe9es"), ("utf-8", b"donn\xc3\xa9es")):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        printing.say("donn\u00e9es")
        printing.print_cells(["data"], [["donn\u00e9es"]], left=1)
        assert raw.getvalue().count(sign) == 2
