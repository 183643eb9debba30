"""Between the start of the processes and the first step, an error on one machine is one line on all processes."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

import pytest

from drrho_clip.config import TrainConfig
from drrho_clip.errors import AgreedError, BadInput, MissingExtra
from drrho_clip.run import watchers
from drrho_clip.train import train
from drrho_core.backend import get_backend
from helpers.shards import numbered_shard
from helpers.thread_processes import ThreadProcesses

OF_ONE_PROCESS = threading.local()
"""The number of the process that a thread stands for."""


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_shard(tmp_path_factory.mktemp("data") / "s.tar", 40, set())


def _messages(shard: Path, out: Path, **options: Any) -> list[str]:
    """Return the errors of two processes that start a run."""
    sizes = {"architecture": "mlp", "image_size": 4, "width": 4, "epochs": 1, "batch_size": 8}
    config = TrainConfig(str(shard), method="sogclr", backend="numpy", **sizes, **options)

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


@pytest.mark.parametrize("place", PLACES)
def test_an_error_of_one_process_before_the_first_step_is_the_error_of_all(
    place: str, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, function = place.split(".")
    module = importlib.import_module(f"drrho_clip.{name}")
    call = getattr(module, function)

    def failing(*arguments: Any, **options: Any) -> Any:
        if OF_ONE_PROCESS.rank == 1:
            raise OSError(5, "Input/output error", "pairs.csv")
        return call(*arguments, **options)

    monkeypatch.setattr(module, function, failing)
    assert _messages(shard, tmp_path / "run") == ["process 1: cannot use pairs.csv: Input/output error"] * 2


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
