"""The data of a run are known by their content: a table may move, and another table under the old name is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drrho_clip.cli import main
from drrho_clip.errors import BadInput
from drrho_clip.run import open_run
from drrho_clip.run.data import open_run_data, place_of
from drrho_clip.train import train

TRAIN = "train --method clip --backend numpy --architecture mlp --epochs 1 --image-size 8 --width 4 --feature-dim 4"


def write_project(folder: Path, seed: int) -> Path:
    """Write a table of 40 pairs with its images; return the table."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    lines = ["image,caption"]
    for k in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{k}.png")
        lines.append(f"{k}.png,thing {k} of {seed}")
    table = folder / "pairs.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose run was started inside it, with a relative path of the table."""
    folder = tmp_path_factory.mktemp("trained") / "project"
    write_project(folder, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*TRAIN.split(), "--data", "pairs.csv", "--out", "run"]) == 0
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A copy of the project at the recorded place; the original is out of the way while a test runs."""
    return Path(shutil.copytree(trained, tmp_path / "project", symlinks=True))


def _recorded_at(project: Path) -> None:
    """Let the run in a copied project record the places of the copy."""
    file = project / "run" / "config.json"
    document = json.loads(file.read_text())
    document["places"]["data"]["path"] = str(project / "pairs.csv")
    file.write_text(json.dumps(document))


def test_a_relative_table_is_found_from_every_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    splits = open_run_data(open_run(trained / "run"))
    assert splits.train.fingerprint() == open_run(trained / "run").fingerprint
    assert main(["evaluate", str(trained / "run")]) == 0


def test_a_project_that_moves_as_a_whole_keeps_its_data(project: Path) -> None:
    _recorded_at(project)
    moved = project.rename(project.with_name("moved"))
    run = open_run(moved / "run")
    assert Path(place_of(run, "data")) == moved / "pairs.csv"
    assert main(["evaluate", str(run.folder)]) == 0


def test_another_table_of_that_name_in_the_current_folder_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    write_project(tmp_path / "other", 1)
    monkeypatch.chdir(tmp_path / "other")
    message = fails("evaluate", str(trained / "run"))
    assert "data must name one file, got 'pairs.csv'" in message
    assert str(trained / "pairs.csv") in message
    # A copy of the same table cannot be mistaken for another one.
    shutil.copy(trained / "pairs.csv", "pairs.csv")
    assert main(["evaluate", str(trained / "run")]) == 0


def test_a_moved_table_is_accepted_and_remembered(project: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    _recorded_at(project)
    run = str(project / "run")
    for place in (project, tmp_path / "elsewhere"):
        place.mkdir(exist_ok=True)
    for file in [*project.glob("*.png"), project / "pairs.csv"]:
        shutil.move(file, tmp_path / "elsewhere" / file.name)
    assert "data must be where" in fails("evaluate", run)
    other = write_project(tmp_path / "other", 1)
    assert "got other content" in fails("train", "--resume", "--out", run, "--data", str(other))
    assert "data must be where" in fails("evaluate", run)
    moved = str(tmp_path / "elsewhere" / "pairs.csv")
    assert main(["train", "--resume", "--out", run, "--data", moved]) == 0
    assert main(["evaluate", run]) == 0
    assert open_run(run).config.data == "pairs.csv"


def _held_out_row(project: Path, part: str) -> int:
    """Return the number of the first line of the table that is in a part of the data."""
    splits = open_run_data(open_run(project / "run"))
    caption = getattr(splits, part)[0].caption
    lines = (project / "pairs.csv").read_text().splitlines()
    return next(number for number, line in enumerate(lines) if line.endswith(caption))


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("change", ["caption", "image", "row"])
def test_a_change_in_any_part_of_the_table_is_noticed(
    part: str, change: str, project: Path, fails: Callable[..., str]
) -> None:
    _recorded_at(project)
    number = _held_out_row(project, part)
    table = project / "pairs.csv"
    lines = table.read_text().splitlines()
    image, _, caption = lines[number].partition(",")
    if change == "caption":
        lines[number] = f"{image},{caption[::-1]}"
    elif change == "row":
        del lines[number]
    else:
        # The new image has the size of the old file, which an uncompressed format makes easy to get.
        old = Image.open(project / image)
        Image.fromarray(255 - np.asarray(old)).save(project / image)
    table.write_text("\n".join(lines) + "\n")
    for command in (["evaluate", str(project / "run")], ["train", "--resume", "--out", str(project / "run")]):
        assert "data must be what" in fails(*command)
    with pytest.raises(BadInput, match=r"data must be what .* was trained on, got other content under .* pairs"):
        open_run_data(open_run(project / "run"))


def test_a_table_run_of_version_01_has_to_be_trained_again(trained: Path, tmp_path: Path) -> None:
    """Such a run has recorded the fingerprint of the training pairs only, by another rule."""
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    document = json.loads((run / "config.json").read_text())
    for name in ("held_out_fingerprints", "places", "earlier_ends"):
        del document[name]
    document["config"]["data"] = str(trained / "pairs.csv")
    (run / "config.json").write_text(json.dumps(document))
    # With the right fingerprint the run is like any other.
    assert open_run_data(open_run(run)).train.fingerprint() == document["data_fingerprint"]
    (run / "config.json").write_text(json.dumps(document | {"data_fingerprint": "0" * 64}))
    with pytest.raises(BadInput, match=r"or a run of version 0\.1, which has to be trained again$"):
        open_run_data(open_run(run))


def test_built_in_data_cannot_be_exchanged(trained: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    out = str(tmp_path / "run")
    small = "--method clip --backend numpy --epochs 1 --width 4 --feature-dim 4"
    assert main(["train", "--data", "digits", *small.split(), "--out", out]) == 0
    for other in ("scenes", str(trained / "pairs.csv")):
        message = fails("train", "--resume", "--out", out, "--data", other)
        assert message.startswith("drrho: data must be that of the run to resume ('digits')")
        with pytest.raises(BadInput, match=r"data must be that of the run to resume \('digits'\)"):
            open_run_data(open_run(out), data=other)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("held_out_fingerprints", []),
        ("held_out_fingerprints", {"test": 3}),
        ("held_out_fingerprints", {"train": "0" * 64}),
        ("places", []),
        ("places", {"data": "pairs.csv"}),
        ("places", {"data": {"path": "pairs.csv"}}),
        ("places", {"data": {"path": 3, "from_run": "../pairs.csv"}}),
        ("earlier_ends", 3),
        ("earlier_ends", ["1"]),
        ("earlier_ends", [True]),
        ("earlier_ends", [0]),
        ("earlier_ends", [1]),
        ("earlier_ends", {"1": 2}),
        ("earlier_ends", None),
    ],
)
def test_a_damaged_record_of_data_or_epochs_is_refused(
    entry: str, value: object, trained: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    document = json.loads((run / "config.json").read_text())
    assert entry in document
    (run / "config.json").write_text(json.dumps(document | {entry: value}))
    assert str(run / "config.json") in fails("evaluate", str(run))


def test_reference_and_table_are_found_from_every_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A steered run is stopped before the reference features are written, and is resumed in another folder."""
    folder = Path(shutil.copytree(trained, tmp_path / "project"))
    monkeypatch.chdir(folder)
    config = replace(open_run("run").config, method="drrho", reference="run")

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("drrho_clip.train.keep_guidance", die)
        with pytest.raises(KeyboardInterrupt):
            train(config, "steered", quiet=True)
    # Relative paths of the settings now lead to nothing, and the folder of the run is given in another way.
    monkeypatch.chdir(tmp_path)
    assert train(config, "project/steered", resume=True, quiet=True).run.progress().finished


def test_search_and_suspects_read_the_table_of_the_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    write_project(tmp_path / "other", 1)
    run = str(trained / "run")
    commands = [["search", run, "thing"], ["suspects", run, "--out", str(tmp_path / "suspects.csv")]]
    for command in commands:
        monkeypatch.chdir(tmp_path / "other")
        assert "data must name one file" in fails(*command)
        monkeypatch.chdir(tmp_path)
        assert main(command) == 0
