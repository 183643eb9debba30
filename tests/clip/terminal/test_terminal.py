"""What reaches a terminal: one line per message, no raw text of a user, any encoding, closed pipes and full disks."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import drrho_clip
from drrho_clip.cli import COMMANDS, main
from drrho_clip.terminal import printing
from drrho_clip.terminal.progress import Reporter
from drrho_clip.terminal.safe_text import brief, shown

PACKAGE = Path(drrho_clip.__file__).parent
ODD_NAMES = {
    "brackets": "[bold]a[/bold][/]",
    "emoji code": ":smile: :warning:",
    "quotes": "a'b\"c`d",
    "line breaks": "a\nb\r\nc\x85d\u2028e",
    "escape codes": "\x1b[31mred\x1b]0;title\x07\x9b2J",
    "bidirectional override": "\u202egpj.exe\u2066",
    "lone surrogate": "caf\udce9",
    "backspaces": "good\b\b\b\bevil",
    "invisible": "a\u200bb\ufeffc\U000e0041",
    "percent and braces": "100%s {0} %(name)d",
}


def is_raw(text: str) -> bool:
    """Return whether a text holds a character that could change a terminal, except line feeds."""
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return any(unicodedata.category(character) in hidden for character in text.replace("\n", ""))


@contextlib.contextmanager
def broken_pipe() -> Iterator[io.TextIOBase]:
    """Yield a stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):
            stream.close()


# --- the text of users --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=list(ODD_NAMES))
def test_odd_text_is_shown_on_one_line_and_visible_characters_stay(name: str) -> None:
    line = shown(name)
    assert not is_raw(line)
    assert "\n" not in line
    assert "".join(c for c in name if c.isascii() and c.isprintable()) in line.replace("\\n", "") or is_raw(name)


@given(st.text(st.characters()))
def test_every_text_is_shown_on_one_line_that_utf_8_can_encode(text: str) -> None:
    line = shown(text)
    assert len(line.splitlines()) <= 1
    assert line.encode("utf-8").decode("utf-8") == line
    assert shown(line) == line


def test_joiners_inside_words_and_all_visible_characters_stay() -> None:
    for text in (
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\U0001f469\u200d\U0001f680",
        "caf\u00e9 \u4e2d \u0e01",
    ):
        assert shown(text) == text


def test_a_value_in_a_message_is_short() -> None:
    assert brief("a") == "'a'"
    for value in ("x" * 10**6, 10**5000, list(range(10**5))):
        assert len(brief(value)) < 120


def test_only_one_module_prints() -> None:
    """Every other module would have to remember that names of users are raw text."""
    prints = {"print", "Console"}
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name == "printing.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id in prints:
                found.append(f"{file.relative_to(PACKAGE)}:{called.lineno}")
            if isinstance(called, ast.Attribute) and ast.unparse(called) in {"sys.stdout.write", "sys.stderr.write"}:
                found.append(f"{file.relative_to(PACKAGE)}:{called.lineno}")
    assert found == []


class Screen(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=list(ODD_NAMES))
def test_a_bar_shows_titles_and_notes_as_they_are_and_not_as_markup(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for stream in (Screen(), io.StringIO()):
        with Reporter(name, 2, stream=stream) as reporter:
            reporter.advance(name)
            reporter.advance(name)
        assert shown(name) in stream.getvalue()
        # The bar's own escape codes are of another kind than those of the name.
        assert not is_raw(name) or name not in stream.getvalue()


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=list(ODD_NAMES))
def test_tables_and_lines_show_names_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    printing.say(name)
    printing.print_cells(["method", name], [[name, printing.Bold(name)]], left=1)
    captured = capsys.readouterr().out
    assert captured.count(shown(name)) == 4
    assert not is_raw(captured)


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=list(ODD_NAMES))
def test_messages_about_odd_names_are_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ["train", "--method", "clip", "--out", "run", "--backend"]
    for arguments in (
        ["evaluate", name],
        [*train, "numpy", "--data", name],
        [*train, name, "--data", "digits"],
        ["train", "--out", name, "--resume"],
        ["vectors", "--out", f"{name}/\0"[:-2], "--dtype", name],
        [name],
        ["train", f"--{name}", "3"],
    ):
        with contextlib.suppress(SystemExit):
            assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("drrho: ")
        assert captured.err.count("\n") == 1
        assert not is_raw(captured.err)


def test_a_run_in_a_folder_with_an_odd_name_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--method", "clip", "--backend", "numpy", "--epochs", "1", "--width", "4", "--feature-dim", "8"]
    out = tmp_path / os.fsdecode(b"[bold]\x1b[31m\n caf\xe9")
    assert main(["train", "--data", "digits", "--out", str(out), *small, "--json", str(out / "a.json")]) == 0
    assert main(["evaluate", str(out)]) == 0
    assert main(["train", "--resume", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert not is_raw(captured.out + captured.err)
    assert shown(out) in captured.out


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_closed_pipe_behind_the_help_of_a_command_is_a_quiet_end(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with broken_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main([name, "--help"]) == 141
    assert capsys.readouterr().err == ""


def test_a_closed_pipe_behind_the_results_does_not_cost_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, figures = tmp_path / "run", tmp_path / "figures.json"
    small = ["--method", "clip", "--backend", "numpy", "--epochs", "1", "--width", "4", "--feature-dim", "8"]
    with broken_pipe() as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert main(["train", "--data", "digits", "--out", str(out), *small, "--json", str(figures)]) == 141
    assert figures.read_text() == (out / "results.json").read_text()
    assert "Error" not in capsys.readouterr().err
    with broken_pipe() as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        assert main(["train", "--data", "digits", "--out", str(tmp_path / "other"), *small]) == 141
        assert main(["evaluate", str(tmp_path / "nowhere")]) == 2  # a message that nobody reads is no second error


def test_a_full_disk_behind_the_output_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    for arguments in (["train", "--help"], ["--help"]):
        with Path("/dev/full").open("w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert main(arguments) == 2
        assert capsys.readouterr().err == "drrho: cannot use standard output: No space left on device\n"


def drrho(*arguments: str, **environment: str) -> list[str]:
    """Return a shell command that runs the command line in a process of its own, with closed standard input."""
    words = " ".join(arguments)
    settings = " ".join(f"{name}={value}" for name, value in environment.items())
    return ["bash", "-c", f"{settings} exec {sys.executable} -m drrho_clip {words} <&-"]


def test_closed_output_streams_neither_fail_nor_get_into_the_files(tmp_path: Path) -> None:
    small = ["--method", "clip", "--backend", "numpy", "--epochs", "1", "--width", "4", "--feature-dim", "8"]
    command = drrho("train", "--data", "digits", "--out", str(tmp_path / "run"), *small, ">&-", "2>&-")
    assert subprocess.run(command, check=False).returncode == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    "settings", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_names_that_the_encoding_of_the_output_lacks_get_a_replacement_sign(
    settings: dict[str, str], tmp_path: Path
) -> None:
    small = ["--method", "clip", "--backend", "numpy", "--epochs", "1", "--width", "4", "--feature-dim", "8"]
    folder, figures = tmp_path / "donn\u00e9es", tmp_path / "figures.json"
    command = drrho("train", "--data", "digits", "--out", f"'{folder}'", *small, "--json", str(figures), **settings)
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"donn" in done.stdout
    assert done.stdout.isascii()
    assert figures.exists()
