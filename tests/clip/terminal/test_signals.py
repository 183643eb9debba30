"""Ctrl-C and SIGTERM: a short message, the exit code of a shell, a hint only if it is true, and no torn file."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drrho_clip.cli import main
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.run import open_run, read_metrics
from drrho_clip.terminal.guard import guarded

TRAIN = ["train", "--data", "digits", "--method", "clip", "--backend", "numpy", "--epochs", "2", "--width", "4"]
HINT = "; --resume continues from the last checkpoint"


class Stub:
    """A command that sends a signal to its own process, and another one while it cleans up."""

    def __init__(self, first: int, second: int | None = None) -> None:
        self.first, self.second = first, second
        self.cleaned = False

    def run(self) -> int:
        try:
            signal.raise_signal(self.first)
        finally:
            self.cleaned = True
            if self.second is not None:
                signal.raise_signal(self.second)
        return 0


@pytest.mark.parametrize(
    ("first", "second", "code", "word"),
    [
        (signal.SIGINT, None, 130, "interrupted"),
        (signal.SIGTERM, None, 143, "terminated"),
        (signal.SIGINT, signal.SIGINT, 130, "interrupted"),
        (signal.SIGINT, signal.SIGTERM, 143, "terminated"),
    ],
)
def test_a_signal_ends_a_command_with_its_code_and_one_line(
    first: int, second: int | None, code: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stub = Stub(first, second)
    assert guarded(lambda: stub) == code
    assert stub.cleaned
    assert capsys.readouterr().err == f"drrho: {word}\n"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_stays_ignored_if_the_shell_ignores_it_for_the_process() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert guarded(lambda: Stub(signal.SIGINT)) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_in_another_thread_leaves_the_handlers_alone() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["sing"])))
    thread.start()
    thread.join()
    assert codes == [2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_an_import_ends_the_process_at_once(number: int, tmp_path: Path) -> None:
    """The import swallows every exception, as some libraries do; then the command would go on."""
    (tmp_path / "greedy.py").write_text(
        f"import signal\ntry:\n    signal.raise_signal({int(number)})\nexcept BaseException:\n    pass\n"
    )
    code = (
        "import sys\nfrom pathlib import Path\nfrom drrho_clip.commands.train import Train\n"
        "from drrho_clip.terminal.guard import guarded\n"
        # The import of NumPy may be what the signal has interrupted, so the message must not need NumPy.
        "sys.modules['numpy'] = None\n"
        "class Greedy(Train):\n    def run(self):\n        import greedy\n        print('went on')\n        return 0\n"
        "sys.exit(guarded(lambda: Greedy(Path('run')), ends_process=True))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == f"drrho: {'interrupted' if number == signal.SIGINT else 'terminated'}\n"


def interrupting(at_call: int) -> Callable[..., Any]:
    """Return a replacement of os.fsync that raises Ctrl-C at a call, when the temporary file is written."""
    calls = iter(range(1, 10**6))
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == at_call:
            signal.raise_signal(signal.SIGINT)
        original(descriptor)

    return fsync


def test_ctrl_c_during_saving_leaves_whole_files_and_the_hint_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hinted = 0
    for call in range(1, 40, 3):
        out = tmp_path / str(call)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", interrupting(call))
            code = main([*TRAIN, "--out", str(out)])
        message = capsys.readouterr().err.splitlines()[-1]
        if code == 0:
            break
        assert code == 130
        resumable = (out / "checkpoint.safetensors").exists()
        assert message == f"drrho: interrupted{HINT if resumable else ''}"
        assert list(out.glob(".*.tmp")) == []
        if resumable:
            hinted += 1
            load_arrays(out / "checkpoint.safetensors", "checkpoint")
    assert hinted > 1
    # The last interrupted run goes on to the end.
    assert main(["train", "--resume", "--out", str(tmp_path / str(call - 3))]) == 0


@pytest.mark.parametrize("command", ["evaluate", "verify", "vectors", "search"])
def test_commands_that_cannot_continue_never_promise_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*TRAIN[:-4], "--epochs", "1", "--out", str(out)]) == 0
    word = open_run(out).tokenizer.vocabulary[0]
    capsys.readouterr()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("drrho_clip.run.Run.load_parameters", interrupt)
    monkeypatch.setattr("drrho_reference.conformance.check", interrupt)
    monkeypatch.setattr("drrho_reference.vectors.files", interrupt)
    words = {"verify": ["--backend", "numpy"], "vectors": ["--out", str(tmp_path / "v")], "search": [str(out), word]}
    assert main([command, *words.get(command, [str(out)])]) == 130
    assert capsys.readouterr().err == "drrho: interrupted\n"


# --- a full disk ---------------------------------------------------------------------------------------------------


def full(at_call: int) -> Callable[..., Any]:
    """Return a replacement of os.fsync that finds the disk full from a call on."""
    calls = iter(range(1, 10**6))
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) >= at_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    return fsync


def test_a_disk_that_fills_up_while_files_are_written_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = set()
    for call in range(1, 40):
        out = tmp_path / str(call)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full(call))
            code = main([*TRAIN, "--out", str(out), "--json", str(tmp_path / "figures.json")])
        message = capsys.readouterr().err.splitlines()[-1]
        if code == 0:
            break
        assert code == 2
        path = Path(message.removeprefix("drrho: cannot use ").removesuffix(": No space left on device"))
        assert path.parent in (out, tmp_path), message
        named.add(path.name)
        assert list(out.glob(".*.tmp")) == []
        for checkpoint in out.glob("checkpoint*.safetensors"):
            load_arrays(checkpoint, "checkpoint")
        read_metrics(out / "metrics.jsonl")
    assert {"config.json", "checkpoint.safetensors", "results.json", "figures.json"} <= named
    # With space on the disk, the run that has failed in the middle goes on to the end.
    assert main(["train", "--resume", "--out", str(tmp_path / "9")]) == 0
