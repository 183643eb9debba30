"""From data at rest to a model for other programs, by commands alone: shards, reference features, training, export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.files.checkpoint import load_arrays
from helpers.hf_models import write_hf_directory
from helpers.shards import write_shards

# Kills the process when the run has taken its fifth step: in the middle of the second epoch.
_KILLED = """
import os, signal, sys
from drrho_clip.cli import main
from drrho_clip.trainer import Trainer
take_step = Trainer.take_step
def counted(self, batch, *, epoch):
    note = take_step(self, batch, epoch=epoch)
    if self.done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return note
Trainer.take_step = counted
main(sys.argv[1:])
"""


def _train(shards: str, folder: Path, out: str) -> list[str]:
    return [
        *("train", "--data", shards, "--model", f"hf:{folder / 'start'}", "--from-scratch", "--method", "drrho"),
        *("--reference", str(folder / "cache"), "--out", str(folder / out), "--backend", "torch", "--device", "cpu"),
        *("--epochs", "3", "--batch-size", "16", "--checkpoint-every", "1"),
    ]


def test_shards_and_a_reference_directory_become_a_directory_that_transformers_loads(tmp_path: Path) -> None:
    import torch
    from transformers import CLIPModel

    # Data and models as other programs leave them: tar shards, and two directories of Hugging Face.
    shards = write_shards(tmp_path / "shards", 80)
    reference = write_hf_directory(tmp_path / "reference", seed=1)
    write_hf_directory(tmp_path / "start", seed=2)

    # The commands: an index, reference features, and two runs, one of which is killed and continued.
    index = str(tmp_path / "index")
    assert main(["index", shards, "--out", index]) == 0
    encode = ["encode", "--model", f"hf:{tmp_path / 'reference'}", "--data", index, "--out", str(tmp_path / "cache")]
    assert main([*encode, "--device", "cpu"]) == 0
    assert main(_train(index, tmp_path, "whole")) == 0
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, *_train(shards, tmp_path, "killed")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert main(["train", "--resume", "--out", str(tmp_path / "killed")]) == 0

    # The killed run, which reads the shards without an index, ends with the same bits.
    ends = [load_arrays(tmp_path / run / "checkpoint.safetensors", "checkpoint")[0] for run in ("whole", "killed")]
    assert ends[0].keys() == ends[1].keys()
    for name, array in ends[0].items():
        np.testing.assert_array_equal(array, ends[1][name], err_msg=name)
    (row,) = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert row["method"] == "drrho"

    # The exported model is loaded by transformers and has the parameters of the run's best state.
    assert main(["export", str(tmp_path / "killed"), "--to", "hf", "--out", str(tmp_path / "model")]) == 0
    exported = CLIPModel.from_pretrained(tmp_path / "model")
    best = load_arrays(tmp_path / "whole" / f"checkpoint-{row['state']}.safetensors", "checkpoint")[0]
    weight = "visual_projection.weight"
    np.testing.assert_array_equal(exported.state_dict()[weight].numpy(), best[f"parameters/{weight}"])
    assert not torch.equal(exported.state_dict()[weight], reference.state_dict()[weight])


@pytest.mark.parametrize("command", ["encode", "suspects"])
def test_reference_of_other_data_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path / "shards", 40)
    write_hf_directory(tmp_path / "reference", seed=1)
    cache = str(tmp_path / "cache")
    encode = ["encode", "--model", f"hf:{tmp_path / 'reference'}", "--data", shards, "--out", cache, "--device", "cpu"]
    assert main(encode) == 0
    other = write_shards(tmp_path / "other", 48, 3)
    capsys.readouterr()
    words = {
        "encode": [*encode[:3], "--data", other, "--out", cache, "--device", "cpu"],
        "suspects": ["suspects", cache, "--data", other, "--out", str(tmp_path / "suspects.csv")],
    }
    assert main(words[command]) == 2
    # A line of progress may come first.
    *progress, error = capsys.readouterr().err.splitlines()
    assert len(progress) <= 1
    assert cache in error or Path(cache).name in error
    assert "Traceback" not in error
