"""The device that the harness uses when the user names none: the backend chooses it, and --device overrides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from drrho_numpy import NumpyBackend

from drrho_clip.cli import COMMANDS, main
from drrho_clip.options import setting_of
from drrho_core import backend as backend_module
from drrho_core.backend import get_backend

ASKED: list[str | None] = []


class StandIn(NumpyBackend):
    """NumPy under another name, which claims to have a GPU and to prefer it."""

    name = "standin"
    has_gpu = True

    def __init__(self, device: str | None = None, dtype: str = "float32") -> None:
        super().__init__(None, dtype)
        ASKED.append(device)
        self.device = "gpu:0" if device is None else device
        self.has_gpu = self.device.startswith("gpu")


class Point:
    name = "standin"

    def load(self) -> type[StandIn]:
        return StandIn


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = backend_module.entry_points

    def with_stand_in(**selection: Any) -> list[Any]:
        return [*registered(**selection), Point()]

    monkeypatch.setattr(backend_module, "entry_points", with_stand_in)
    ASKED.clear()


@pytest.mark.usefixtures("standin")
@pytest.mark.parametrize(
    ("option", "asked", "named"),
    [
        ([], None, ", gpu:0: "),
        (["--device", "gpu:1"], "gpu:1", ", gpu:1: "),
        (["--device", "cpu"], "cpu", None),
    ],
)
def test_training_runs_on_the_gpu_unless_the_user_names_another_device(
    option: list[str], asked: str | None, named: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--backend", "standin", "--epochs", "1", "--width", "4", "--feature-dim", "8"]
    assert main(["train", "--data", "digits", "--method", "clip", "--out", str(tmp_path / "run"), *small, *option]) == 0
    assert [asked] == ASKED
    told = capsys.readouterr().err
    assert (named in told) if named else ("gpu" not in told)
    # The other commands that open a run ask in the same way.
    assert main(["evaluate", str(tmp_path / "run"), *option]) == 0
    assert main(["search", str(tmp_path / "run"), "handwritten", *option]) == 0
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html"), *option]) == 0
    assert [asked] * 4 == ASKED


@pytest.mark.usefixtures("standin")
def test_a_backend_chooses_its_device() -> None:
    assert get_backend("standin").has_gpu
    assert not get_backend("standin", device="cpu").has_gpu


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if hasattr(command, "device")])
def test_help_says_that_the_gpu_is_the_default(name: str) -> None:
    described = setting_of(COMMANDS[name].__dataclass_fields__["device"])
    assert described.shown == "a GPU if the array library can use one, otherwise the CPU"
