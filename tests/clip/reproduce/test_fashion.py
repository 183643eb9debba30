"""The world of photographs, Fashion-MNIST: the division by seed, the captions, and a package that is not installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits, PairsDataset
from drrho_clip.reproduce.packaged.packages import Missing
from drrho_clip.reproduce.worlds.fashion import FASHION

NUM = 18_500


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with as many photographs as the world needs, of 2 x 2 pixels, and with a test part."""
    root = tmp_path_factory.mktemp("root")
    folder = root / "usr" / "share" / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    # Each photograph shows its number, so all are different.
    for part, numbers in (("train", np.arange(NUM)), ("t10k", np.arange(NUM, NUM + 50))):
        sizes = np.array([len(numbers), 2, 2], dtype=">u4").tobytes()
        pixels = numbers.astype(">u4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3)) + sizes + pixels)
        labels = (numbers % 10).astype(np.uint8).tobytes()
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1)) + sizes[:4] + labels)
    (folder / "classes.txt").write_text("\n".join(f"class{number}" for number in range(10)))
    return root


def opened(root: Path, runs: Path, *, data: str = "fashion-mnist", seed: int = 0, train_size: int = 400) -> DataSplits:
    FASHION.prepare(runs, [root])
    values = {**FASHION.data, "data": data, "train_size": train_size}
    return FASHION.open(TrainConfig(method="clip", data_seed=seed, **values), runs)


def numbers(pairs: object) -> list[int]:
    """Return the numbers of the photographs of a data set."""
    assert isinstance(pairs, PairsDataset)
    return pairs.source_rows.tolist()


def test_targets_reference_models_and_held_out_pairs_share_no_photograph(root: Path, tmp_path: Path) -> None:
    target = opened(root, tmp_path)
    reference = opened(root, tmp_path, data="fashion-mnist:reference", train_size=15_000)
    assert numbers(target.validation) == numbers(reference.validation)
    assert numbers(target.test) == numbers(reference.test)
    rows = [numbers(part) for part in (*target, reference.train)]
    assert [len(part) for part in rows] == [400, 1_000, 2_000, 15_000]
    assert len({row for part in rows for row in part}) == sum(map(len, rows))
    # The test part of the package stays unused: its photographs have the last rows.
    assert max(row for part in rows for row in part) < NUM
    # Another seed divides in another way, and a larger training set begins with a smaller one.
    assert numbers(opened(root, tmp_path, seed=1).test) != numbers(target.test)
    assert numbers(opened(root, tmp_path, train_size=100).train) == rows[0][:100]


def test_half_of_the_training_captions_are_swapped_and_held_out_captions_are_right(root: Path, tmp_path: Path) -> None:
    splits = opened(root, tmp_path)
    for part in (splits.validation, splits.test):
        assert isinstance(part, PairsDataset)
        assert list(part.captions) == [f"a photo of a {label}" for label in part.labels]
    train = splits.train
    assert isinstance(train, PairsDataset)
    wrong = [label not in caption for label, caption in zip(train.labels, train.captions, strict=True)]
    # A swapped caption may name the same class in another template.
    assert 0.4 < np.mean(wrong) <= 0.5
    again = opened(root, tmp_path).train
    assert isinstance(again, PairsDataset)
    assert again.captions == train.captions


def test_the_world_goes_to_the_root_that_has_the_package(root: Path, tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"dataset-fashion-mnist is not installed .*apt-get install"):
        FASHION.prepare(tmp_path, [tmp_path / "empty"])
    FASHION.prepare(tmp_path, [tmp_path / "empty", root])
    link = tmp_path / "data" / "fashion-mnist"
    assert link.resolve().is_relative_to(root.resolve())
    # The package has moved.
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    FASHION.prepare(tmp_path, [moved])
    assert link.resolve().is_relative_to(moved.resolve())
