"""`drrho search`: the images that fit words best, on the terminal, in a JSON file and on a page with the pictures."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drrho_clip.cli import main
from drrho_clip.data import read_pairs
from drrho_clip.encode import Encoder
from drrho_clip.errors import BadInput
from drrho_clip.run import Run, open_run
from drrho_clip.search import search
from drrho_clip.train import train
from drrho_core.backend import get_backend
from helpers.pages import COLOURS, write_table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("search") / "data", 60)


@pytest.fixture(scope="module")
def run(table: Path) -> Run:
    out = table.parent.parent / "run"
    small = ["--backend", "numpy", "--epochs", "15", "--width", "8", "--image-size", "8", "--learning-rate", "5e-3"]
    assert main(["train", "--data", str(table), "--method", "clip", "--out", str(out), *small]) == 0
    return open_run(out)


@pytest.fixture(scope="module")
def encoder(run: Run) -> Encoder:
    return Encoder.load(run, get_backend("numpy"))


def test_matches_are_the_images_of_largest_cosine_in_falling_order(run: Run, encoder: Encoder, table: Path) -> None:
    data = read_pairs(table)
    images, _ = encoder.pairs(data)
    queries = ["a red thing", "blue"]
    texts = encoder.texts(queries)
    answers = search(encoder, run.tokenizer, data, queries, top=7, quiet=True)
    for answer, text in zip(answers, texts, strict=True):
        cosines = images.astype(np.float64) @ text.astype(np.float64)
        best = np.argsort(-cosines, kind="stable")[:7]
        assert [match.row for match in answer.matches] == best.tolist()
        assert [match.score for match in answer.matches] == pytest.approx(cosines[best], abs=1e-12)
        assert [match.image for match in answer.matches] == [f"{row}.png" for row in best]
        assert [match.caption for match in answer.matches] == [data.captions[row] for row in best]


def test_words_find_pictures_of_their_colour(run: Run, encoder: Encoder, table: Path) -> None:
    answers = search(encoder, run.tokenizer, read_pairs(table), [f"a {name} thing" for name in COLOURS], quiet=True)
    for name, answer in zip(COLOURS, answers, strict=True):
        assert [name in match.caption for match in answer.matches] == [True] * 10


def test_more_matches_than_images_are_all_images(run: Run, encoder: Encoder, table: Path) -> None:
    (answer,) = search(encoder, run.tokenizer, read_pairs(table), ["red"], top=10**9, quiet=True)
    assert sorted(match.row for match in answer.matches) == list(range(60))


def test_command_prints_and_writes_the_same_matches(
    run: Run, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    page, figures = tmp_path / "found.html", tmp_path / "found.json"
    queries = ["a red thing", "a zeppelin, blue and huge!"]
    files = ["--out", str(page), "--json", str(figures)]
    assert main(["search", str(run.folder), "--data", str(table), *queries, "--top", "3", *files]) == 0
    captured = capsys.readouterr()
    answers = json.loads(figures.read_text())
    assert [answer["query"] for answer in answers] == queries
    assert [answer["unknown_words"] for answer in answers] == [[], ["zeppelin", "and", "huge"]]
    assert "words that the model does not know: zeppelin, and, huge" in captured.out
    text = page.read_text(encoding="utf-8")
    for answer in answers:
        assert len(answer["matches"]) == 3
        for match in answer["matches"]:
            assert f"{match['score']:.3f}  {match['image']}" in captured.out
            assert f'<p dir="auto">{match["caption"]}</p>' in text
    assert text.count("data:image/png;base64,") == 6
    assert "encoding the images: 1/1" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["xyzzy !"], "words must have a word that occurs in the training captions of the run, got 'xyzzy !'"),
        (["a red thing", ""], "WORDS must be a text that is not empty, got ''"),
        (["red", "--top", "0"], "--top must be an integer of at least 1, got 0"),
        (["red", "--out", "found.csv"], "out must be a file that ends in .html, got found.csv"),
        (["red", "--out", "/dev/null/found.html"], "out must be a file that can be written, got /dev/null/found.html"),
        (["red", "--json", "."], "json must be a file that can be written, got ., which is a folder"),
        (["red", "--data", "none.csv"], "none.csv"),
        ([], "the following arguments are required: WORDS"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str],
    message: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["search", str(run.folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_cannot_be_decoded_is_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "data", 6)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "whole.jpg", quality=95)
    content = (tmp_path / "whole.jpg").read_bytes()
    # The header is whole, so the check of the table passes, but half of the pixels are missing.
    (tmp_path / "data" / "3.png").write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert main(["search", str(run.folder), "--data", str(table), "red"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("drrho: ")
    assert "3.png" in last


def test_the_runs_own_data_are_the_default(run: Run, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["search", str(run.folder), "red", "--top", "4"]) == 0
    own = capsys.readouterr().out
    assert main(["search", str(run.folder), "red", "--top", "4", "--data", str(table)]) == 0
    assert capsys.readouterr().out == own


def test_a_built_in_data_set_has_rows_in_place_of_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--backend", "numpy", "--epochs", "1", "--width", "4", "--feature-dim", "8"]
    assert main(["train", "--data", "digits", "--method", "clip", "--out", str(tmp_path / "run"), *small]) == 0
    capsys.readouterr()
    assert main(["search", str(tmp_path / "run"), "a handwritten three", "--top", "2"]) == 0
    assert "digits-test row " in capsys.readouterr().out


def test_top_below_one_is_refused(run: Run, encoder: Encoder, table: Path) -> None:
    with pytest.raises(BadInput, match="top must be an integer of at least 1, got 0"):
        search(encoder, run.tokenizer, read_pairs(table), ["red"], top=0, quiet=True)


def test_an_image_with_several_captions_is_found_once(run: Run, encoder: Encoder, tmp_path: Path) -> None:
    table = write_table(tmp_path / "data", 6)
    lines = table.read_text(encoding="utf-8").splitlines()
    # Each image gets a second caption, and the first image a copy under another name with a third caption.
    (table.parent / "copy.png").write_bytes((table.parent / "0.png").read_bytes())
    more = [line.replace("thing", "object") for line in lines[1:]] + ["copy.png,a red copy"]
    table.write_text("\n".join([*lines, *more]) + "\n", encoding="utf-8")
    (answer,) = search(encoder, run.tokenizer, read_pairs(table), ["a red thing"], top=100, quiet=True)
    assert sorted(match.row for match in answer.matches) == list(range(6))


def test_the_page_of_suspects_stands_beside_the_table(
    run: Run, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "worst.csv"
    assert main(["suspects", str(run.folder), "--data", str(table), "--out", str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["worst.csv", "worst.html"]
    with out.open(newline="", encoding="utf-8") as file:
        ranked = list(csv.DictReader(file))
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert re.findall('<p class="path"><bdi>(.*?)</bdi>', page) == [pair["image"] for pair in ranked]
    assert re.findall('<p dir="auto">(.*?)</p>', page) == [pair["caption"] for pair in ranked]
    number = re.search("(?s)<strong class=.drrho.>(.*?)</strong> of 60 captions", page)
    assert number is not None
    assert page.count('<li class="card doubtful">') == int(number[1])
    told = capsys.readouterr().out
    assert f"{number[1]} of 60 captions are probably wrong" in told
    if "caveat: " in told:
        assert '<ul class="notes">' in page


def test_the_page_of_suspects_never_takes_the_place_of_the_table(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["suspects", str(run.folder), "--out", str(tmp_path / "worst.html")]) == 2
    assert "out must be a CSV file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_finished_is_refused_unless_asked_for(
    run: Run, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(run.config, seed=5), tmp_path / "half", quiet=True, stop_after=3)
    capsys.readouterr()
    assert main(["search", str(tmp_path / "half"), "red"]) == 2
    assert "--allow-unfinished" in capsys.readouterr().err
    assert main(["search", str(tmp_path / "half"), "red", "--allow-unfinished"]) == 0
