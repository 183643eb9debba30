"""The user's own classes and templates for zero-shot accuracy: files, features, and the labels of the data."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.data import WordTokenizer, read_pairs
from drrho_clip.encode import Encoder
from drrho_clip.errors import BadInput
from drrho_clip.evaluate import evaluate
from drrho_clip.measure.prompts import ClassName, Prompts, indistinguishable, read_classes, read_templates
from drrho_clip.run import Run, open_run
from drrho_core.backend import get_backend
from helpers.pages import COLOURS, write_table


def labelled(folder: Path, count: int) -> Path:
    """Write pictures of three colours with captions of three words, and with the colours as labels."""
    table = write_table(folder, count)
    with table.open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "label"])
        for row, (image, _) in enumerate(rows[1:]):
            name = list(COLOURS)[row % 3]
            writer.writerow(
                [image, f"{('nice', 'plain', 'odd', 'old')[row % 4]} {name} thing", f"{name} thing".upper()]
            )
    return table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("prompts")
    table = labelled(home / "data", 60)
    small = ["--backend", "numpy", "--epochs", "15", "--width", "8", "--image-size", "8", "--learning-rate", "5e-3"]
    assert main(["train", "--data", str(table), "--method", "clip", "--out", str(home / "run"), *small]) == 0
    return open_run(home / "run")


@pytest.fixture(scope="module")
def encoder(run: Run) -> Encoder:
    return Encoder.load(run, get_backend("numpy"))


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "lines.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_feature_of_a_class_is_the_normalised_mean_over_the_templates(encoder: Encoder) -> None:
    templates = ("a {}", "odd {} and {}", "{}")
    features = Prompts(templates).features(encoder, ["red thing", "blue thing"])
    for row, name in enumerate(["red thing", "blue thing"]):
        each = [encoder.texts([template.replace("{}", name)])[0].astype(np.float64) for template in templates]
        mean = sum(each) / 3
        np.testing.assert_allclose(features[row], mean / np.linalg.norm(mean), atol=1e-6)


def test_default_prompts_are_those_of_the_table(run: Run, encoder: Encoder) -> None:
    data = read_pairs(run.config.data)
    task = data.zero_shot(image_size=8)
    assert task is not None
    assert [texts for (texts,) in Prompts().texts_of(data.class_names)] == list(task.prompts)
    assert evaluate(encoder, data, prompts=Prompts()) == evaluate(encoder, data)


def test_names_and_templates_change_the_accuracy_as_they_should(run: Run, encoder: Encoder) -> None:
    data = read_pairs(run.config.data)
    classes = [ClassName(number, f"{name} thing", f"{name} thing") for number, name in enumerate(COLOURS)]
    right = Prompts(("plain {}", "odd {}"), tuple(classes))
    assert evaluate(encoder, data, prompts=right)["zero_shot_accuracy"] == 1.0
    # If the names of two classes are swapped, all images of these two classes are wrong and those of the third stay.
    names = ("green thing", "red thing", "blue thing")
    swapped = [ClassName(entry.line, entry.label, name) for entry, name in zip(classes, names, strict=True)]
    figures = evaluate(encoder, data, prompts=Prompts(right.templates, tuple(swapped)))
    assert figures["zero_shot_accuracy"] == pytest.approx(1 / 3)
    assert (figures["num_classes"], figures["num_zero_shot_images"]) == (3, 60)


def test_command_reads_both_files(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_bytes(
        b"\xef\xbb\xbfRED  thing\tred thing\r\n\r\ngreen thing\rblue Thing\t blue thing \n"
    )
    (tmp_path / "templates.txt").write_text("plain {}\nodd {}\n")
    files = ["--classes", str(tmp_path / "classes.txt"), "--templates", str(tmp_path / "templates.txt")]
    figures = tmp_path / "figures.json"
    assert main(["evaluate", str(run.folder), *files, "--json", str(figures)]) == 0
    row = json.loads(figures.read_text())[0]
    assert row["metrics"]["num_classes"] == 3
    assert row["metrics"]["zero_shot_accuracy"] == 1.0
    assert "cannot tell" not in capsys.readouterr().out


def test_prompts_that_the_run_cannot_distinguish_are_named(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = written(tmp_path, "red thing\tzeppelin\ngreen thing\tdirigible\nblue thing\n")
    assert main(["evaluate", str(run.folder), "--classes", str(classes)]) == 0
    assert "takes all unknown words as the same word: dirigible, zeppelin" in capsys.readouterr().out.replace("\n", " ")


def test_classes_are_indistinguishable_if_all_their_prompts_have_equal_tokens() -> None:
    tokenizer = WordTokenizer(["a", "red", "blue"], 3)
    prompts = [["a red", "red"], ["a  RED", "Red"], ["a blue", "red"], ["a b c d", "x"], ["a y z q", "v"]]
    assert indistinguishable(prompts, tokenizer) == [[0, 1], [3, 4]]


def test_a_run_reads_the_prompts_of_its_labels_to_the_end(run: Run) -> None:
    # The captions have three words, and "a photo of a red thing" has six.
    assert run.tokenizer.context_length == 6
    assert indistinguishable(Prompts().texts_of(read_pairs(run.config.data).class_names), run.tokenizer) == []
    assert json.loads(run.results.read_text())[0]["metrics"]["zero_shot_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must have at least two classes, got 0"),
        ("\n \n\t\n", "must have at least two classes, got 0"),
        ("one\n", "must have at least two classes, got 1"),
        ("a\nb\nA\n", "line 3: the label must differ from that of line 1, got 'A'"),
        ("a\tx\nb\tX\n", "line 2: the name must differ from that of line 1, got 'X'"),
        ("a\tx\ty\nb\n", "line 1: must be a label, or a label, a tab and a name, got 'a\\tx\\ty'"),
        ("a\n\tx\n", "line 2: must be a label, or a label, a tab and a name, got '\\tx'"),
        ("a\nb\t\n", "line 2: must be a label, or a label, a tab and a name, got 'b\\t'"),
        (b"caf\xe9\nb\n", "must be UTF-8, got the byte 0xe9"),
        ("a\nb\n".encode("utf-16"), "must be UTF-8"),
        (b"a\0b\nc\n", "got a file with zero bytes"),
        ("red thing\ngreen thing\n", "must name every label of the data, got no class 'BLUE THING'"),
        ("red thing\nx\ngreen thing\nblue thing\ny\n", "line 2: the class must be a label of the data, got 'x', "),
    ],
)  # fmt: skip
def test_damaged_classes_are_one_line(
    content: str | bytes, message: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, content)
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), "--classes", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert str(path) in captured.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must have at least one template, got none"),
        ("a {}\na photo of a dog\n", "line 2: a template must contain {} for the name, got 'a photo of a dog'"),
        ("a photo of a { }\n", "line 1: a template must contain {}"),
        ("a photo of a {0}\n", "line 1: a template must contain {}"),
        ("{}\n{}  \n", "line 2: the template must differ from that of line 1, got '{}'"),
        (b"\xff{}", "must be UTF-8, got the byte 0xff"),
    ],
)  # fmt: skip
def test_damaged_templates_are_one_line(
    content: str | bytes, message: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, content)
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), "--templates", str(path)]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err


def test_files_that_are_no_plain_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, got in (
        (tmp_path, "no plain file"),
        (tmp_path / "pipe", "no plain file"),
        (tmp_path / "x", "no such file"),
    ):
        for read in (read_classes, read_templates):
            with pytest.raises(BadInput, match=f"got {got}"):
                read(path)


def test_a_template_is_no_program(tmp_path: Path) -> None:
    # Python's own format would read the attribute of the class, and would fail at the single brace.
    (template,) = read_templates(written(tmp_path, "{0.__class__} {} {"))
    assert Prompts((template,)).texts_of(["{}"]) == [["{0.__class__} {} {"]]


def test_prompts_for_data_without_labels_are_refused(run: Run, encoder: Encoder, tmp_path: Path) -> None:
    table = write_table(tmp_path / "plain", 6)
    with pytest.raises(BadInput, match="classes and templates need data with at least two different labels"):
        evaluate(encoder, read_pairs(table), prompts=Prompts())


def test_own_names_serve_a_built_in_data_set(tmp_path: Path) -> None:
    small = ["--backend", "numpy", "--epochs", "1", "--width", "4", "--feature-dim", "8"]
    assert main(["train", "--data", "digits", "--method", "clip", "--out", str(tmp_path / "run"), *small]) == 0
    templates = written(tmp_path, "a handwritten {}\n")
    assert main(["evaluate", str(tmp_path / "run"), "--templates", str(templates)]) == 0
