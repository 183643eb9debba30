"""A run is killed with SIGKILL and resumed: checkpoint and log equal those of a run without interruption."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.files.checkpoint import load_arrays, save_arrays
from drrho_clip.options import setting_of

# A training run that kills itself with SIGKILL at a chosen moment: no exit handler, no flush, as power loss would.
DRIVER = """
import os, signal, sys
from drrho_clip import trainer
from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.run import Run

moment, count, *arguments = sys.argv[1:]
left = [int(count)]

def die_on(call, *, before):
    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **kwargs)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

def half_a_line(run, record):
    left[0] -= 1
    if left[0] == 0:
        with run.metrics.open("a") as file:
            file.write('{"step": 9, "epo')
        os.kill(os.getpid(), signal.SIGKILL)
    return whole_line(run, record)

whole_line = Run.log
if moment == "before the new file is in place":
    os.replace = die_on(os.replace, before=True)
elif moment == "after the new file is in place":
    os.replace = die_on(os.replace, before=False)
elif moment == "before the file reached the disk":
    os.fsync = die_on(os.fsync, before=True)
elif moment == "after a step":
    trainer.Trainer.take_step = die_on(trainer.Trainer.take_step, before=False)
elif moment == "within a line of the log":
    Run.log = half_a_line
else:
    raise SystemExit(f"no such moment: {moment}")
main(arguments)
"""

# (moment, which occurrence). A run gives these files their final names: 1 config.json, 2 the digests of images, 3 the
# checkpoint of step 0, 4 the reference features, 5 the checkpoint of step 3, 6 that of step 5, where the first epoch
# ends, 7 the best state, 8 the checkpoint of step 6.
MOMENTS = [
    ("before the new file is in place", 1),  # nothing is there yet
    ("after the new file is in place", 1),  # no checkpoint
    ("before the new file is in place", 4),
    ("after a step", 1),
    ("after a step", 8),
    ("before the file reached the disk", 9),
    ("before the new file is in place", 7),
    ("after the new file is in place", 7),
    ("within a line of the log", 7),
]


def _arguments(backend: str, out: Path, reference: Path) -> list[str]:
    text = "train --data digits --method drrho --epochs 3 --width 4 --feature-dim 8 --checkpoint-every 3 --log-every 1"
    return [*text.split(), "--backend", backend, "--reference", str(reference), "--out", str(out)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "run"
    text = "train --data digits:reference --method clip --backend numpy --epochs 1 --width 4 --feature-dim 8 --out"
    assert main([*text.split(), str(out)]) == 0
    return out


@pytest.fixture(scope="module", params=["numpy", "torch"])
def untouched(request: pytest.FixtureRequest, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption; the name of the folder is the name of the backend."""
    out = tmp_path_factory.mktemp("untouched") / str(request.param)
    assert main(_arguments(out.name, out, reference)) == 0
    return out


def _kill(moment: str, count: int, arguments: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, moment, str(count), *arguments],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr.decode()


def _assert_same(out: Path, expected: Path) -> None:
    names = sorted(path.name for path in out.glob("checkpoint*.safetensors"))
    assert names == ["checkpoint-best.safetensors", "checkpoint.safetensors"]
    for file in names:
        arrays, state = load_arrays(out / file, "checkpoint")
        expected_arrays, expected_state = load_arrays(expected / file, "checkpoint")
        assert arrays.keys() == expected_arrays.keys()
        for name, array in expected_arrays.items():
            assert array.dtype == arrays[name].dtype
            assert array.tobytes() == arrays[name].tobytes(), name
        # The time in steps, `seconds`, differs from run to run.
        assert state | {"seconds": 0} == expected_state | {"seconds": 0}
    assert state["step"] == 15
    assert any(name.startswith("estimator/") for name in arrays)
    assert any(name.startswith("optimizer/") for name in arrays)
    assert (out / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    rows = [json.loads((folder / "results.json").read_text())[0] for folder in (out, expected)]
    assert rows[0]["metrics"] == rows[1]["metrics"]
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize(("moment", "count"), MOMENTS)
def test_a_killed_run_resumes_to_the_same_bits(
    moment: str, count: int, untouched: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = _arguments(untouched.name, out, reference)
    _kill(moment, count, arguments)
    if (out / "checkpoint.safetensors").exists():
        assert main(["train", "--resume", "--out", str(out)]) == 0
    else:
        # Before the first checkpoint no work is lost, so the run is started again.
        assert main(["train", "--resume", "--out", str(out)]) == 2
        shutil.rmtree(out)
        assert main(arguments) == 0
    _assert_same(out, untouched)


@pytest.mark.parametrize("home", ["host", "file"])
def test_every_home_of_the_estimates_resumes_to_the_bits_of_a_run_on_the_device(
    home: str, untouched: Path, reference: Path, tmp_path: Path
) -> None:
    """The run is killed two steps after a checkpoint, when the file of the estimates is ahead of the checkpoint."""
    out = tmp_path / "run"
    _kill("after a step", 8, [*_arguments(untouched.name, out, reference), "--estimator", home])
    assert (out / "estimator.bin").exists() is (home == "file")
    assert main(["train", "--resume", "--out", str(out)]) == 0
    _assert_same(out, untouched)


def test_a_run_killed_three_times_ends_with_the_same_bits(untouched: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _kill("after a step", 4, _arguments(untouched.name, out, reference))
    resume = ["train", "--resume", "--out", str(out)]
    for _ in range(2):
        _kill("after a step", 4, resume)
    assert main(resume) == 0
    _assert_same(out, untouched)


LEARNED = {"global": "--radius 1", "per_sample": "--radius 1 --temperature-learning-rate 0.01"}


@pytest.mark.parametrize("scheme", list(LEARNED))
def test_learned_temperatures_resume_to_the_same_bits(scheme: str, reference: Path, tmp_path: Path) -> None:
    """The run is killed two steps after a checkpoint, which holds the temperatures and their optimiser's state."""
    learned = ["--temperature-scheme", scheme, *LEARNED[scheme].split()]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main([*_arguments("torch", whole, reference), *learned]) == 0
    _kill("after a step", 8, [*_arguments("torch", out, reference), *learned])
    assert main(["train", "--resume", "--out", str(out)]) == 0
    _assert_same(out, whole)
    arrays, _ = load_arrays(out / "checkpoint.safetensors", "checkpoint")
    assert arrays["temperature/version"] == 1
    if scheme == "global":
        assert arrays["temperature/step"] == 15
        assert arrays["temperature/temperature"] != np.float32(0.07)
    else:
        assert np.sum(arrays["temperature/momentum_image"] != 0) > 600
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "loss" in record]
    if scheme == "global":
        assert records[-1]["temperature"] == arrays["temperature/temperature"]
    else:
        tables = np.concatenate([arrays["temperature/temperature_image"], arrays["temperature/temperature_text"]])
        assert records[-1]["smallest_temperature"] == tables.min()
        assert records[-1]["largest_temperature"] == tables.max()
        assert records[-1]["temperature"] == pytest.approx(tables.mean(), rel=1e-6)
    assert all(np.isfinite(record["temperature_gradient"]) for record in records)


def test_a_run_without_the_later_settings_resumes_with_their_defaults(
    untouched: Path, reference: Path, tmp_path: Path
) -> None:
    """config.json lacks the settings that later versions added; they take their defaults."""
    out = tmp_path / "run"
    _kill("after a step", 8, _arguments(untouched.name, out, reference))
    document = json.loads((out / "config.json").read_text())
    later = [option.name for option in fields(TrainConfig) if setting_of(option).later]
    assert {"radius", "estimator", "temperature_scheme"} <= set(later)
    for name in later:
        del document["config"][name]
    (out / "config.json").write_text(json.dumps(document))
    assert main(["train", "--resume", "--out", str(out)]) == 0
    _assert_same(out, untouched)


def test_a_checkpoint_of_another_scheme_or_version_is_refused(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    _kill("after a step", 8, [*_arguments("numpy", out, reference), "--temperature-scheme", "global", "--radius", "1"])
    checkpoint = out / "checkpoint.safetensors"
    arrays, state = load_arrays(checkpoint, "checkpoint")
    without = {name: array for name, array in arrays.items() if not name.startswith("temperature/")}
    for changed, message in (
        (without, "must hold the arrays of this run's model and data, got other arrays"),
        (
            arrays | {"temperature/version": np.asarray(2, dtype=np.int32)},
            "must hold this version's temperature: version must be 1, got 2",
        ),
    ):
        save_arrays(checkpoint, "checkpoint", changed, state)
        capsys.readouterr()
        assert main(["train", "--resume", "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"drrho: {checkpoint} {message}\n"


def test_resuming_with_other_settings_is_refused(
    untouched: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    _kill("after a step", 8, _arguments(untouched.name, out, reference))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(out), "--epochs", "4"]) == 2
    assert capsys.readouterr().err == "drrho: epochs must be that of the run to resume (3), got 4\n"
    assert main(["train", "--resume", "--out", str(tmp_path / "nothing")]) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_resuming_a_finished_run_changes_nothing(untouched: Path) -> None:
    before = (untouched / "checkpoint.safetensors").read_bytes()
    assert main(["train", "--resume", "--out", str(untouched), "--epochs", "3"]) == 0
    assert (untouched / "checkpoint.safetensors").read_bytes() == before


def test_the_estimator_is_part_of_the_checkpoint(untouched: Path) -> None:
    arrays, _ = load_arrays(untouched / "checkpoint.safetensors", "checkpoint")
    for side in ("image", "text"):
        log_inner = arrays[f"estimator/log_inner_{side}"]
        assert log_inner.shape == (699,)
        assert np.isfinite(log_inner).sum() > 600  # nearly everybody was visited in three epochs
