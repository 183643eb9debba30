"""From the start of the processes to the first step, an error on one machine is one line on all processes."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from drrho_clip.cli import read_command
from drrho_clip.commands import evaluate
from drrho_clip.config import TrainConfig
from drrho_clip.errors import AgreedError, BadInput, MissingExtra
from drrho_clip.processes import opening
from drrho_clip.run import watchers
from drrho_clip.train import train
from drrho_core.backend import get_backend
from helpers.ports import free_port
from helpers.shards import numbered_shard
from helpers.thread_processes import ThreadProcesses

SIZES: dict[str, Any] = {"architecture": "mlp", "image_size": 4, "width": 4}
OF_ONE_PROCESS = threading.local()
"""The number of the process that a thread stands for."""


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_shard(tmp_path_factory.mktemp("data") / "s.tar", 40, set())


def _messages(shard: Path, out: Path, **options: Any) -> list[str]:
    """Return the errors of two processes that start a run."""
    config = TrainConfig(str(shard), method="sogclr", backend="numpy", epochs=1, batch_size=8, **SIZES, **options)

    def message(processes: ThreadProcesses) -> str:
        OF_ONE_PROCESS.rank = processes.rank
        with pytest.raises(AgreedError) as caught:
            train(config, out, backend=get_backend("numpy"), quiet=True, processes=processes)
        return str(caught.value)

    return ThreadProcesses.run(2, message)


PLACES = (
    "train.facts_of_data",
    "train.facts_of_state",
    "trainer.BatchSource",
    "trainer.StepInputs",
    "trainer.build_model",
    "trainer.initial_state",
    "trainer.build_step",
    "trainer.Encoder",
    "trainer.SampleNumbers",
    "sample_numbers.make_estimator",
)
"""Calls of the harness before the first step; each of them reads files or takes memory."""


@pytest.mark.parametrize(
    ("place", "estimates"),
    [*((place, None) for place in PLACES), ("sample_numbers.make_estimator", np.zeros(40))],
    ids=[*PLACES, "the estimator for the estimates of a file"],
)
def test_an_error_of_one_process_before_the_first_step_is_the_error_of_all(
    place: str, estimates: np.ndarray | None, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {}
    if estimates is not None:
        options["init_estimates"] = str(tmp_path / "estimates.npz")
        np.savez(options["init_estimates"], log_inner_image=estimates, log_inner_text=estimates)
    name, function = place.split(".")
    module = importlib.import_module(f"drrho_clip.{name}")
    call = getattr(module, function)

    def failing(*arguments: Any, **options: Any) -> Any:
        if OF_ONE_PROCESS.rank == 1:
            raise OSError(5, "Input/output error", "pairs.csv")
        return call(*arguments, **options)

    monkeypatch.setattr(module, function, failing)
    messages = _messages(shard, tmp_path / "run", **options)
    assert messages == ["process 1: cannot use pairs.csv: Input/output error"] * 2


def _refuse(*_: object) -> None:
    raise BadInput("the libraries are there")


def test_only_the_first_process_needs_the_libraries_that_show_figures(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_module, missing = importlib.import_module, [1]

    def fail_on_machine(name: str, package: str | None = None) -> Any:
        if name.startswith("tensorboard") and OF_ONE_PROCESS.rank in missing:
            raise ImportError(name)
        return import_module(name, package)

    monkeypatch.setattr(watchers.importlib, "import_module", fail_on_machine)
    with monkeypatch.context() as patch:
        patch.setattr("drrho_clip.trainer.build_step", _refuse)
        assert _messages(shard, tmp_path / "run", tensorboard=True) == ["the libraries are there"] * 2
    missing[:] = [0]
    words = str(MissingExtra("the setting tensorboard", "TensorBoard", "tensorboard"))
    assert _messages(shard, tmp_path / "run", tensorboard=True) == [words] * 2


COMMANDS = {
    "train": ["train", "--data", "digits", "--method", "clip", "--backend", "torch", "--config", "FILE", "--out", "o"],
    "resume": ["train", "--resume", "--out", "FILE"],
    "encode": ["encode", "--model", "FILE", "--data", "digits", "--out", "o"],
    "evaluate": ["evaluate", "FILE"],
    "a device": ["evaluate", "run", "--device", "FILE"],
}
"""Commands in which the name FILE is right on all machines but one, and is read before the processes connect."""


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_one_machine_lacks_before_the_processes_are_connected_is_told_to_the_others(
    name: str, failing: int, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(str(shard), method="clip", backend="torch", epochs=1, batch_size=8, **SIZES)
    train(config, "run", backend=get_backend("torch", device="cpu"), quiet=True)
    (tmp_path / "settings.yaml").write_text("epochs: 1\n")
    right = {"train": "settings.yaml", "a device": "cpu"}.get(name, "run")
    address = f"localhost:{free_port()}"

    def message(rank: int) -> str:
        words = [("missing" if rank == failing else right) if word == "FILE" else word for word in COMMANDS[name]]
        words += ["--coordinator", address, "--processes", "2", "--process", str(rank)]
        with pytest.raises(BadInput) as caught:
            read_command(words).run()
        return str(caught.value)

    with ThreadPoolExecutor(2) as threads:
        messages = list(threads.map(message, range(2)))
    assert "missing" in messages[failing]
    prefix = "process 1: " if failing else ""
    assert messages[1 - failing] == f"{prefix}{messages[failing]}"


def test_classes_that_one_machine_lacks_are_one_line_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "classes.txt").write_text("red\nblue\n")
    opened = threading.local()

    @contextlib.contextmanager
    def open_processes(*_: object, **__: object) -> Iterator[ThreadProcesses]:
        yield opened.processes

    monkeypatch.setattr(opening, "opened_processes", open_processes)
    model = SimpleNamespace(backend=get_backend("numpy"), config=SimpleNamespace(data="digits"))
    monkeypatch.setattr(evaluate, "find_model", lambda *_, **__: model)

    def message(processes: ThreadProcesses) -> str:
        opened.processes = processes
        classes = tmp_path / ("classes.txt" if processes.is_first else "missing.txt")
        with pytest.raises(AgreedError) as caught:
            evaluate.Evaluate("run", classes=classes).run()
        return str(caught.value)

    messages = ThreadProcesses.run(2, message)
    assert messages[0] == messages[1]
    assert messages[0].startswith("process 1: ")
    assert "missing.txt" in messages[0]
