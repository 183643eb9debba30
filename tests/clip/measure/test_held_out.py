"""`drrho evaluate --data FILE` measures unseen pairs only, and unreadable held-out images are found before training."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.data import Dataset, DataSplits, Sample, pair_splits, read_pairs
from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import load_arrays, save_arrays
from drrho_clip.measure.held_out import check_held_out, known_images, shows_known_image
from drrho_clip.run import Run, open_run
from drrho_clip.train import train

SMALL = ["--backend", "numpy", "--epochs", "1", "--width", "4", "--image-size", "8", "--batch-size", "8"]


def write_table(folder: Path, pictures: Sequence[Path], captions: Sequence[str]) -> Path:
    """Copy pictures under new names into a folder, and return the table of these pairs."""
    folder.mkdir()
    lines = ["image,caption,label"]
    for row, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        name = f"copy-{row}{picture.suffix}"
        shutil.copy(picture, folder / name)
        lines.append(f"{name},{caption},{('odd', 'even')[row % 2]}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def draw(folder: Path, count: int, seed: int) -> list[Path]:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    files = [folder / f"{row}.png" for row in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(file)
    return files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and with the table that the run was trained on."""
    place = tmp_path_factory.mktemp("held-out")
    pictures = draw(place / "drawn", 40, seed=0)
    table = write_table(place / "own", pictures, [f"thing number {row}" for row in range(40)])
    assert main(["train", "--data", str(table), "--method", "clip", "--out", str(place / "run"), *SMALL]) == 0
    return place


@pytest.fixture
def run(place: Path) -> Run:
    return open_run(place / "run")


@pytest.fixture
def splits(place: Path) -> DataSplits:
    return pair_splits(place / "own" / "table.csv")


def evaluated(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run `drrho evaluate` and return the row of the JSON file and the output."""
    capsys.readouterr()
    file = folder / "figures.json"
    assert main(["evaluate", str(folder / "run"), "--json", str(file), *arguments]) == 0
    return json.loads(file.read_text())[0], capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


class TestPairsThatTheRunHasSeen:
    def test_copies_of_training_and_validation_images_are_left_out(
        self, place: Path, splits: DataSplits, capsys: pytest.CaptureFixture[str]
    ) -> None:
        new = draw(place / "new", 7, seed=1)
        own = read_pairs(place / "own" / "table.csv").files
        table = write_table(place / "mixed", [*own, *new], [f"other words {row}" for row in range(47)])
        row, shown = evaluated(capsys, place, "--data", str(table))
        seen = len(splits.train) + len(splits.validation)
        sentence = f"{seen} of 47 pairs show images that the run was trained on or validated with; they are left out\n"
        assert sentence in shown
        assert row["num_left_out"] == seen
        # The run's own test images are unseen, as are the new ones.
        assert row["metrics"]["num_pairs"] == len(splits.test) + 7

    def test_the_runs_own_table_is_measured_on_its_test_pairs(
        self, place: Path, splits: DataSplits, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole, _ = evaluated(capsys, place, "--data", str(place / "own" / "table.csv"))
        own, _ = evaluated(capsys, place)
        assert whole["metrics"] == own["metrics"]

    def test_a_table_without_a_training_image_is_measured_whole(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table = write_table(place / "fresh", draw(place / "fresh-drawn", 9, seed=2), [f"a {row}" for row in range(9)])
        row, shown = evaluated(capsys, place, "--data", str(table))
        assert "none of the 9 pairs shows an image that the run was trained on\n" in shown
        assert (row["num_left_out"], row["metrics"]["num_pairs"]) == (0, 9)

    def test_a_table_of_training_images_alone_is_refused(
        self, place: Path, splits: DataSplits, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = read_pairs(place / "own" / "table.csv").files
        known = {digest.tobytes() for digest in splits.train.image_digests()}
        digests = read_pairs(place / "own" / "table.csv").image_digests()
        seen = [file for file, digest in zip(files, digests, strict=True) if digest.tobytes() in known][:5]
        # A single unseen image, although in two pairs, is no gallery.
        new = draw(place / "single", 1, seed=3) * 2
        table = write_table(place / "leaked", seen + new, list("abcdefg"))
        line = refused(capsys, "evaluate", str(place / "run"), "--data", str(table))
        assert line == (
            "drrho: data must have at least 2 images that the run was not trained on, got 1 "
            "(5 of 7 pairs show images that the run was trained on or validated with)"
        )

    def test_an_older_run_says_that_nothing_can_be_recognised(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(place / "run", tmp_path / "run")
        (tmp_path / "run" / "training_images.safetensors").unlink()
        row, shown = evaluated(capsys, tmp_path, "--data", str(place / "own" / "table.csv"))
        assert "training_images.safetensors is missing" in shown
        assert "cannot be recognised" in shown
        assert row["metrics"]["num_pairs"] == 40

    def test_a_damaged_file_is_refused(self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(place / "run", tmp_path / "run")
        file = tmp_path / "run" / "training_images.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        line = refused(capsys, "evaluate", str(tmp_path / "run"), "--data", str(place / "own" / "table.csv"))
        assert "training_images.safetensors must be an undamaged drrho training-images" in line

    @pytest.mark.parametrize(
        "arrays",
        [{}, {"digests": np.zeros((3, 8), np.uint8)}, {"digests": np.zeros(16, np.uint8)}, {"digests": np.eye(16)}],
        ids=["none", "short", "one-dimensional", "floats"],
    )
    def test_a_file_of_other_arrays_is_refused(
        self, arrays: dict[str, np.ndarray], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(place / "run", tmp_path / "run")
        save_arrays(tmp_path / "run" / "training_images.safetensors", "training-images", arrays, {})
        line = refused(capsys, "evaluate", str(tmp_path / "run"), "--data", str(place / "own" / "table.csv"))
        assert line.endswith("training_images.safetensors must hold digests of 16 bytes, got other arrays")

    def test_the_file_holds_training_and_validation_images_and_no_test_image(
        self, run: Run, splits: DataSplits
    ) -> None:
        known = known_images(run)
        assert known is not None
        assert known.shape == (len(splits.train) + len(splits.validation), 16)
        assert shows_known_image(splits.train, known).all()
        assert shows_known_image(splits.validation, known).all()
        assert not shows_known_image(splits.test, known).any()

    def test_a_steered_run_knows_the_images_of_its_reference_too(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = write_table(place / "other", draw(place / "other-drawn", 30, seed=4), [f"b {row}" for row in range(30)])
        command = ["train", "--data", str(other), "--method", "drrho", "--reference", str(place / "run")]
        assert main([*command, "--out", str(place / "steered"), *SMALL]) == 0
        arrays, _ = load_arrays(place / "steered" / "training_images.safetensors", "training-images")
        by_reference = known_images(open_run(place / "run"))
        assert by_reference is not None
        assert np.array_equal(arrays["reference_digests"], by_reference)
        line = refused(
            capsys, "evaluate", str(place / "steered"), "--data", str(place / "own" / "table.csv"), "--split", "test"
        )
        assert line == "drrho: split must be left out with --data FILE, which is measured whole, got test"

    def test_a_reference_that_has_seen_test_images_is_reported(
        self, place: Path, tmp_path: Path, splits: DataSplits, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # Another seed holds out other images, so the reference has seen most of them.
        table = place / "own" / "table.csv"
        other = pair_splits(table, seed=1).test
        known = known_images(open_run(place / "run"))
        assert known is not None
        count = int(shows_known_image(other, known).sum())
        assert 0 < count <= len(other)
        command = ["train", "--data", str(table), "--method", "drrho", "--reference", str(place / "run"), *SMALL]
        line = f"warning: {count} of {len(other)} test pairs show images that the reference model was trained on\n"
        for seed, expected in (("0", False), ("1", True)):
            assert main([*command, "--data-seed", seed, "--out", str(tmp_path / seed)]) == 0
            assert (line in capsys.readouterr().err) is expected


def test_rows_of_one_image_are_one_query(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [picture for picture in draw(place / "several-drawn", 8, seed=7) for _ in range(3)]
    table = write_table(place / "several", pictures, [f"d {row}" for row in range(24)])
    row, shown = evaluated(capsys, place, "--data", str(table))
    assert "R@1, R@5, R@10: 24 pairs, 32 queries, galleries of 8 images\n" in shown
    assert (row["metrics"]["num_queries"], row["metrics"]["gallery_size"]) == (32, 8)


class TestGallery:
    def test_its_size_is_that_of_the_option(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        table = write_table(place / "large", draw(place / "large-drawn", 11, seed=5), [f"c {row}" for row in range(11)])
        row, shown = evaluated(capsys, place, "--data", str(table), "--gallery", "3")
        assert (row["metrics"]["gallery_size"], row["metrics"]["num_pairs"]) == (3, 9)
        assert "9 pairs, 18 queries, galleries of 3 images\n" in shown
        whole, _ = evaluated(capsys, place, "--data", str(table), "--gallery", "all")
        assert "full: R@1 in a single gallery of all 11 pairs\n" in shown
        assert whole["metrics"]["gallery_size"] == 11
        assert whole["metrics"]["retrieval_r1"] == row["metrics"]["retrieval_r1_full"]

    @pytest.mark.parametrize("size", ["1", "0", "-3", "2.5", "every"])
    def test_a_size_that_is_none_is_refused(self, place: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
        line = refused(capsys, "evaluate", str(place / "run"), f"--gallery={size}")
        assert line.startswith("drrho: --gallery must be an integer of at least 2 or 'all', got ")


class TestStateOfTheRun:
    def test_an_unfinished_run_is_refused_unless_it_is_allowed(
        self, place: Path, splits: DataSplits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = replace(open_run(place / "run").config, epochs=3)
        total = train(config, tmp_path / "run", splits=splits, quiet=True, stop_after=2).run.progress().total
        line = refused(capsys, "evaluate", str(tmp_path / "run"))
        expected = f"drrho: run must be a finished run, got {tmp_path / 'run'}, which is at step 2 of {total}: "
        assert line == expected + "finish it with --resume, or say --allow-unfinished"
        row, _ = evaluated(capsys, tmp_path, "--allow-unfinished")
        assert row["state"] == "last"
        train(config, tmp_path / "run", resume=True, splits=splits, quiet=True)
        row, _ = evaluated(capsys, tmp_path)
        assert row["state"] == "best"

    def test_the_state_of_the_option_is_measured(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # The last state gets random parameters; the best state stays.
        shutil.copytree(place / "run", tmp_path / "run")
        run = open_run(tmp_path / "run")
        arrays, state = load_arrays(run.checkpoint, "checkpoint")
        rng = np.random.default_rng(0)
        changed = {
            name: rng.normal(size=array.shape).astype(array.dtype) if name.startswith("parameters/") else array
            for name, array in arrays.items()
        }
        save_arrays(run.checkpoint, "checkpoint", changed, state)
        run.state_file("reference").unlink(missing_ok=True)
        table = write_table(
            tmp_path / "far", draw(tmp_path / "far-drawn", 30, 6), [f"thing {row}" for row in range(30)]
        )
        rows = {
            state: evaluated(capsys, tmp_path, "--data", str(table), "--state", state)[0]
            for state in ("best", "last", "reference")
        }
        assert rows["last"]["metrics"] != rows["best"]["metrics"]
        # Without a state that is kept for a reference, the best state stands for it.
        assert rows["reference"] == rows["best"]


def truncated_jpeg(file: Path, seed: int) -> None:
    """Write a JPEG that opens as an image and breaks off in the middle of its pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, format="JPEG")
    file.write_bytes(file.read_bytes()[:-400])


class TestUnreadableImages:
    @pytest.mark.parametrize("part", ["validation", "test"])
    def test_a_held_out_one_is_found_before_the_first_step(self, part: str, place: Path, tmp_path: Path) -> None:
        shutil.copytree(place / "own", tmp_path / "own")
        splits = pair_splits(tmp_path / "own" / "table.csv")
        file = getattr(splits, part).files[-1]
        truncated_jpeg(file, seed=0)
        config = TrainConfig(data=str(tmp_path / "own" / "table.csv"), method="clip", backend="numpy", batch_size=8)
        with pytest.raises(BadInput, match=f"cannot decode image .*{file.name}"):
            train(config, tmp_path / "run", splits=splits, quiet=True)
        assert not (tmp_path / "run").exists()

    def test_the_command_ends_with_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        files = draw(tmp_path / "drawn", 20, seed=0)
        for row, file in enumerate(files):
            truncated_jpeg(file, seed=row)
        table = write_table(tmp_path / "own", files, [f"thing number {row}" for row in range(20)])
        out = tmp_path / "run"
        line = refused(capsys, "train", "--data", str(table), "--method", "clip", "--out", str(out), *SMALL)
        assert "is not a readable image: image file is truncated" in line
        assert not out.exists()

    def test_an_image_with_several_captions_is_decoded_once(self, place: Path, tmp_path: Path) -> None:
        pictures = [picture for picture in draw(tmp_path / "drawn", 30, seed=0) for _ in range(3)]
        splits = pair_splits(write_table(tmp_path / "own", pictures, [f"thing number {row}" for row in range(90)]))
        counts = [Counting(splits.validation), Counting(splits.test)]
        check_held_out(DataSplits(splits.train, *counts), quiet=True)
        assert [sum(count.looks.values()) for count in counts] == [len(set(data.image_ids)) for data in counts]
        assert all(set(count.looks.values()) == {1} for count in counts)


class Counting:
    """A data set that counts how often each row was read."""

    def __init__(self, data: Dataset) -> None:
        self.data, self.looks = data, Counter[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __getitem__(self, row: int) -> Sample:
        self.looks[row] += 1
        return self.data[row]
