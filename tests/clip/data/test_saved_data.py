"""Data sets of the library `datasets` saved on disk, and IDX files: parts, columns, captions, flaws, index."""

from __future__ import annotations

import csv
import gzip
import hashlib
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.data import open_data, pair_splits
from drrho_clip.data.pair_ids import pair_ids
from drrho_clip.data.sources import idx
from drrho_clip.data.sources.idx import FASHION_CLASSES, TEMPLATES
from drrho_clip.data.splits import open_splits
from drrho_clip.errors import BadInput
from drrho_clip.features.reading import ReferenceFeatures
from drrho_clip.run import open_run
from helpers.shards import image_bytes

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    datasets.disable_progress_bars()


def _rows(first: int, count: int) -> dict[str, list[Any]]:
    contents = [image_bytes((row, 9, 9), (5, 4)) for row in range(first, first + count)]
    return {
        "image": [{"bytes": content, "path": None} for content in contents],
        "caption": [f"caption {row}" for row in range(first, first + count)],
        "label": [row % 2 for row in range(first, first + count)],
    }


def _saved(folder: Path, columns: dict[str, list[Any]]) -> Any:
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    data = datasets.Dataset.from_dict(columns, features=features)
    if folder.name:
        data.save_to_disk(str(folder))
    return data


def test_a_saved_data_set_and_the_index_of_it_give_the_same_pairs(tmp_path: Path) -> None:
    _saved(tmp_path / "set", _rows(0, 20))
    data = open_data(tmp_path / "set")
    assert data.captions == tuple(f"caption {row}" for row in range(20))
    assert data.labels[:3] == ("cat", "dog", "cat")
    assert data.class_names == ("cat", "dog")
    assert data[7].image.shape == (4, 5, 3)
    assert (data[7].image == [7, 9, 9]).all()
    assert main(["index", str(tmp_path / "set"), "--out", str(tmp_path / "index")]) == 0
    index = open_data(tmp_path / "index")
    assert index.fingerprint() == data.fingerprint()
    assert np.array_equal(index[7].image, data[7].image)
    # A caption that is edited in the saved data is another content, although the images stay.
    edited = _rows(0, 20)
    edited["caption"][3] = "caption 8"
    shutil.move(tmp_path / "set", tmp_path / "kept")
    _saved(tmp_path / "set", edited)
    with pytest.raises(BadInput, match=r"got other content in .*state.json: index the data again"):
        open_data(tmp_path / "index")
    shutil.rmtree(tmp_path / "set")
    shutil.move(tmp_path / "kept", tmp_path / "set")
    # Other processes get a copy that opens the data themselves.
    copy = pickle.loads(pickle.dumps(data.images_only()))
    assert np.array_equal(copy[7].image, data[7].image)
    assert [part.fingerprint() for part in pair_splits(tmp_path / "index")] == [
        part.fingerprint() for part in pair_splits(tmp_path / "set")
    ]


def test_columns_of_bytes_and_of_paths_are_read_like_columns_of_images(tmp_path: Path) -> None:
    content = image_bytes((1, 2, 3))
    (tmp_path / "a.png").write_bytes(content)
    columns = {"picture": [content, content], "words": [["one", "two"], ["three"]]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "bytes"))
    paths = columns | {"picture": [str(tmp_path / "a.png")] * 2}
    datasets.Dataset.from_dict(paths).save_to_disk(str(tmp_path / "paths"))
    for name in ("bytes", "paths"):
        data = open_data(tmp_path / name, image_column="picture", caption_column="words")
        assert data.captions == ("one", "two", "three")
        assert data.image_ids.tolist() == [0, 0, 0]
        assert (data[2].image == [1, 2, 3]).all()
        with pytest.raises(BadInput, match=r"must have one column named 'image' .*: got the columns picture, words$"):
            open_data(tmp_path / name)


def test_the_parts_of_a_saved_dictionary_are_kept_and_share_no_image(tmp_path: Path) -> None:
    # Images 28 and 29 are in the training part and in the test part.
    parts = {"train": _rows(0, 30), "test": _rows(28, 6)}
    datasets.DatasetDict({name: _saved(Path(), rows) for name, rows in parts.items()}).save_to_disk(str(tmp_path / "d"))
    splits = pair_splits(tmp_path / "d")
    assert list(splits.test.captions) == [f"caption {row}" for row in range(28, 34)]
    held = set(splits.validation.captions)
    assert held
    assert set(splits.train.captions) | held == {f"caption {row}" for row in range(28)}
    assert not set(splits.train.captions) & held


def test_each_flaw_of_a_saved_data_set_has_a_message(tmp_path: Path) -> None:
    def refused(name: str, change: dict[str, Any], message: str) -> None:
        rows = _rows(0, 3)
        for column, value in change.items():
            rows[column][1] = value
        _saved(tmp_path / name, rows)
        with pytest.raises(BadInput, match=message):
            open_data(tmp_path / name)

    refused("empty", {"caption": " "}, r"empty, row 1: caption must not be empty$")
    refused("none", {"image": None}, r"none, row 1: an image must be bytes or a path, got NoneType$")
    bad = {"image": {"bytes": b"x", "path": None}}
    refused("text", bad, r"text, row 1: image is not a readable image: no image in")
    gone = datasets.Dataset.from_dict({"image": ["gone.png"], "caption": ["x"]})
    gone.save_to_disk(str(tmp_path / "gone"))
    with pytest.raises(BadInput, match=r"gone, row 0: there is no image file .*gone.png: No such file"):
        open_data(tmp_path / "gone")
    _saved(tmp_path / "torn", _rows(0, 3))
    (file,) = (tmp_path / "torn").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(BadInput, match="torn must be a data set that `save_to_disk` has written, got: "):
        open_data(tmp_path / "torn")


def _idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def _idx_folder(folder: Path, *, compressed: bool, num_train: int = 60, num_test: int = 20) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, size in (("train", num_train), ("t10k", num_test)):
        arrays = {"images-idx3": rng.integers(0, 256, (size, 28, 28)), "labels-idx1": np.arange(size) % 10}
        for name, array in arrays.items():
            content = _idx(array)
            file = folder / f"{part}-{name}-ubyte{'.gz' if compressed else ''}"
            file.write_bytes(gzip.compress(content) if compressed else content)
    return folder


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_become_pairs_with_captions_of_the_classes(
    tmp_path: Path, compressed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The labels of this small test part stand for those of Fashion-MNIST.
    digest = hashlib.sha256((np.arange(20) % 10).astype(np.uint8).tobytes()).hexdigest()
    monkeypatch.setattr(idx, "FASHION_LABELS", (digest,))
    folder = _idx_folder(tmp_path / "fashion-mnist", compressed=compressed)
    data = open_data(folder)
    assert capsys.readouterr().err.count("the classes get the names of that data set") == 1
    assert len(data) == 80
    assert set(data.class_names) == set(FASHION_CLASSES)
    for text, name in zip(data.captions, data.labels, strict=True):
        assert text in [template.format(name) for template in TEMPLATES]
    assert data.labels[9] == "ankle boot"
    assert data[0].image.shape == (28, 28, 1)
    task = data.zero_shot(image_size=28)
    assert task is not None
    assert task.images.shape == (80, 28, 28, 1)
    assert [task.class_names[label] for label in task.labels[:10]] == list(FASHION_CLASSES)
    splits = pair_splits(folder)
    assert len(splits.test) == 20
    assert len(splits.train) + len(splits.validation) == 60
    assert main(["index", str(folder), "--out", str(tmp_path / "index")]) == 0
    index = open_data(tmp_path / "index")
    assert index.fingerprint() == data.fingerprint()
    assert np.array_equal(index[70].image, data[70].image)
    labels = folder / f"t10k-labels-idx1-ubyte{'.gz' if compressed else ''}"
    content = labels.read_bytes()
    labels.write_bytes(gzip.compress(_idx(np.arange(1, 21) % 10)) if compressed else _idx(np.arange(1, 21) % 10))
    with pytest.raises(BadInput, match=r"got .* in .*t10k-labels-idx1-ubyte.*: index the data again"):
        open_data(tmp_path / "index")
    labels.write_bytes(content)
    (folder / "classes.txt").write_text("".join(f"number {digit}\n" for digit in range(10)))
    assert open_data(folder).labels[3] == "number 3"


def test_labels_of_other_idx_files_are_no_clothes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = open_data(_idx_folder(tmp_path / "mnist", compressed=True))
    assert data.class_names == tuple("0123456789")
    assert all(text in [template.format(3) for template in TEMPLATES] for text in data.captions[3:80:10])
    assert "the classes are named by their numbers, 0 to 9; classes.txt" in capsys.readouterr().err
    assert len(set(idx.FASHION_LABELS)) == 2


def test_a_share_of_the_training_captions_of_idx_files_can_be_swapped(tmp_path: Path) -> None:
    folder = str(_idx_folder(tmp_path / "f", compressed=True))
    clean = open_splits(TrainConfig(data=folder, method="clip", backend="numpy", swapped_fraction=0.0))
    noisy = open_splits(TrainConfig(data=folder, method="clip", backend="numpy", swapped_fraction=0.3))
    changed = sum(one != other for one, other in zip(clean.train.captions, noisy.train.captions, strict=True))
    assert changed == round(0.3 * len(clean.train))
    assert list(clean.test.captions) == list(noisy.test.captions)
    assert clean.train.fingerprint() != noisy.train.fingerprint()
    words = ["train", "--data", folder, "--backend", "numpy", "--method", "clip", "--epochs", "1", "--width", "8"]
    assert main([*words, "--image-size", "8", "--out", str(tmp_path / "run")]) == 0
    assert '"swapped_fraction": 0.0' in (tmp_path / "run" / "config.json").read_text()


def test_swapped_captions_of_idx_files_are_those_that_the_commands_rank_and_encode(tmp_path: Path) -> None:
    folder = str(_idx_folder(tmp_path / "f", compressed=True))
    run, moved = str(tmp_path / "run"), str(tmp_path / "moved")
    words = ["train", "--data", folder, "--backend", "numpy", "--method", "clip", "--epochs", "1", "--width", "8"]
    assert main([*words, "--image-size", "8", "--swapped-fraction", "0.3", "--out", run]) == 0
    original, train = open_data(folder), open_splits(open_run(run).config).train
    captions = list(original.captions)
    for row, caption in zip(train.source_rows, train.captions, strict=True):  # type: ignore[attr-defined]
        captions[row] = caption
    assert captions != list(original.captions)
    # The run's own data are recognised at another place, too; the changed captions of other data stay.
    shutil.copytree(folder, moved)
    other = str(_idx_folder(tmp_path / "other", compressed=True, num_train=50))
    for data, expected in (([], captions), (["--data", moved], captions), (["--data", other], None)):
        table = tmp_path / "suspects.csv"
        assert main(["suspects", run, "--out", str(table), *data]) == 0
        with table.open(newline="") as file:
            ranked = {int(line["row"]): line["caption"] for line in csv.DictReader(file)}
        assert [ranked[row] for row in range(len(ranked))] == list(expected or open_data(other).captions)
    # By default the captions of a cache are the original captions, like those of a run.
    for options, expected in (([], list(original.captions)), (["--swapped-fraction", "0.3"], captions)):
        out = tmp_path / f"cache{len(options)}"
        assert main(["encode", "--model", run, "--data", folder, "--out", str(out), *options]) == 0
        assert np.array_equal(ReferenceFeatures(out).ids, pair_ids(original.with_captions(expected)))
    steered = ["--method", "drrho", "--reference", str(out), "--swapped-fraction", "0.3", "--image-size", "8"]
    assert main([*words, *steered, "--out", str(tmp_path / "steered")]) == 0


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", "must be an IDX file of bytes with 3 axes, got another file"),
        ("train-images-idx3-ubyte", _idx(np.zeros(4)), "must be an IDX file of bytes with 3 axes, got another file"),
        ("train-images-idx3-ubyte", _idx(np.zeros((60, 28, 28)))[:-1], "must hold 60 x 28 x 28 bytes, got 47,039"),
        ("train-labels-idx1-ubyte", _idx(np.zeros(59)), "must have a label for each of the 60 images, got 59"),
        ("train-labels-idx1-ubyte", _idx(np.full(60, 10)), "must have labels below 10, .* got 10: name the classes"),
        ("t10k-labels-idx1-ubyte", None, "cannot read .*t10k-labels-idx1-ubyte.gz: No such file"),
        ("classes.txt", b"one\n", "must name two or more classes, one per line, got 1"),
        ("classes.txt", b"\xff\n", "must be UTF-8 with a class per line"),
    ],
)
def test_each_flaw_of_idx_files_has_a_message(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    folder = _idx_folder(tmp_path / "f", compressed=False)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        open_data(folder)
    folder = _idx_folder(tmp_path / "g", compressed=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(BadInput, match=r"cannot read .*train-images-idx3-ubyte.gz: "):
        open_data(folder)
