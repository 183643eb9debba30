"""The settings of a run that concern tables: columns with other names, a separate table for validation, a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.data import PairsDataset
from drrho_clip.data.splits import open_splits
from drrho_clip.errors import BadInput

_SMALL = [
    "--method",
    "clip",
    "--backend",
    "numpy",
    "--epochs",
    "1",
    "--width",
    "4",
    "--depth",
    "1",
    "--image-size",
    "4",
]


def _table(folder: Path, name: str, first: int, count: int, header: str = "image,caption") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.new("RGB", (4, 4), (number, 0, 255 - number)).save(folder / f"{number}.png")
    rows = "".join(f"{number}.png,picture number {number}\n" for number in range(first, first + count))
    (folder / name).write_text(f"{header}\n{rows}")
    return folder / name


def _stems(data: object) -> set[int]:
    assert isinstance(data, PairsDataset)
    return {int(file.stem) for file in data.files}


def test_validation_table_leaves_a_training_and_a_test_part_of_the_data(tmp_path: Path) -> None:
    data, validation = _table(tmp_path, "pairs.csv", 0, 40), _table(tmp_path / "other", "held.csv", 40, 6)
    splits = open_splits(TrainConfig(data=str(data), method="clip", backend="numpy", validation=str(validation)))
    assert _stems(splits.validation) == set(range(40, 46))
    assert _stems(splits.train) | _stems(splits.test) == set(range(40))
    assert not _stems(splits.train) & _stems(splits.test)
    # The test part is that of a split without the table, so that figures stay comparable.
    assert len(splits.test) >= 2


def test_validation_images_that_are_training_images_are_counted_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, validation = _table(tmp_path, "pairs.csv", 0, 40), _table(tmp_path / "other", "held.csv", 37, 6)
    # The files have other paths, and their content is equal.
    out = tmp_path / "run"
    assert main(["train", "--data", str(data), "--validation", str(validation), "--out", str(out), *_SMALL]) == 2
    message = capsys.readouterr().err
    assert "held.csv, row 2: image" in message
    assert "is in another split too" in message
    assert "training, validation and test must not share images, got 3 shared images" in message
    assert not out.exists()


@pytest.mark.parametrize("data", ["scenes", "digits:reference"])
def test_validation_table_is_refused_for_built_in_data(data: str) -> None:
    with pytest.raises(BadInput, match=r"validation must be left out for built-in data, got 'held.csv'"):
        TrainConfig(data=data, method="clip", backend="numpy", validation="held.csv")


def test_run_uses_the_named_columns_for_all_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = "picture,words"
    data, validation = _table(tmp_path, "pairs.csv", 0, 24, header), _table(tmp_path, "held.csv", 24, 6, header)
    columns = ["--image-column", "picture", "--caption-column", "words"]
    out = str(tmp_path / "run")
    started = ["train", "--data", str(data), "--validation", str(validation), *columns, "--out", out, *_SMALL]
    assert main(started) == 0
    assert main(["train", "--resume", "--out", out]) == 0
    other = _table(tmp_path / "other", "more.csv", 40, 5, header)
    assert main(["evaluate", out, "--data", str(other)]) == 0
    capsys.readouterr()
    # Without the settings the columns are not found, and the message lists them.
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "second"), *_SMALL]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--image-column: got the columns picture, words" in message


def test_run_is_trained_on_a_folder(tmp_path: Path) -> None:
    _table(tmp_path / "set", "pairs.csv", 0, 24).unlink()
    for number in range(24):
        (tmp_path / "set" / f"{number}.txt").write_text(f"picture {number}\nanother line of {number}\n")
    splits = open_splits(TrainConfig(data=str(tmp_path / "set"), method="clip", backend="numpy"))
    assert sum(map(len, splits)) == 48
    assert main(["train", "--data", str(tmp_path / "set"), "--out", str(tmp_path / "run"), *_SMALL]) == 0
