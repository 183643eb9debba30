"""`drrho report`: runs side by side, unfinished runs, runs of different data, damaged files and hostile names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.data import read_pairs
from drrho_clip.encode import Encoder
from drrho_clip.evaluate import evaluate
from drrho_clip.measure.held_out import unseen_pairs
from drrho_clip.report.runs import grouped, open_runs
from drrho_clip.run import open_run
from drrho_clip.train import train
from drrho_core.backend import get_backend
from helpers.pages import HOSTILE, Reader, write_table

RUNS = ("a", "b", "stopped", "elsewhere")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs on one table, an unfinished run, and a run on another table."""
    home = tmp_path_factory.mktemp("comparison")
    table, other = write_table(home / "data", 40), write_table(home / "other", 30)
    config = TrainConfig(
        data=str(table), method="clip", backend="numpy", architecture="mlp", epochs=3, batch_size=8, width=4,
        feature_dim=8, image_size=8, log_every=2,
    )  # fmt: skip
    train(config, home / "a", quiet=True)
    train(replace(config, method="sogclr", learning_rate=5e-3), home / "b", quiet=True)
    train(replace(config, seed=4), home / "stopped", quiet=True, stop_after=5)
    train(replace(config, data=str(other)), home / "elsewhere", quiet=True)
    return home


def report(home: Path, *names: str, out: Path) -> str:
    """Write the report of these runs and return the page."""
    assert main(["report", *(str(home / name) for name in names), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_figures_are_those_of_the_results(home: Path, tmp_path: Path) -> None:
    page = report(home, "a", "b", out=tmp_path / "r.html")
    rows = dict(re.findall("<bdi>([ab])</bdi><small>.*?</small></th>(.*?)</tr>", page))
    for name, row in rows.items():
        metrics = json.loads((home / name / "results.json").read_text())[0]["metrics"]
        cells = re.findall("<td>(?:<strong>)?(.*?)(?:</strong>)?(?: <small>.*?</small>)?</td>", row)
        shares = ("retrieval_r1", "retrieval_r5", "retrieval_r10", "retrieval_r1_full")
        assert cells[:4] == [f"{100 * metrics[share]:.1f}" for share in shares]
        error = metrics["retrieval_r1_standard_error"]
        assert re.findall("<small>± (.*?)</small>", row) == ([f"{100 * error:.1f}"] if error > 0 else [])
        assert f"{metrics['num_pairs']:,}" in cells
        assert f"{metrics['gallery_size']:,}" in cells
    assert set(rows) == {"a", "b"}
    r1 = {name: json.loads((home / name / "results.json").read_text())[0]["metrics"]["retrieval_r1"] for name in "ab"}
    leaders = [name for name in "ab" if r1[name] == max(r1.values())]
    assert f"{' and '.join(leaders)} put{'s' if len(leaders) == 1 else ''} the right partner first in" in page


def test_the_standard_error_and_the_full_gallery_are_explained(home: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(home / name, tmp_path / name)
        rows = json.loads((tmp_path / name / "results.json").read_text())
        # An error of 0 is not known; see `Retrieval`.
        rows[0]["metrics"]["retrieval_r1_standard_error"] = 0.0374 if name == "a" else 0.0
        (tmp_path / name / "results.json").write_text(json.dumps(rows))
    page = report(tmp_path, "a", "b", out=tmp_path / "r.html")
    assert re.findall("<small>± (.*?)</small>", page) == ["3.7"]
    assert "The number after ± is the standard error of R@1" in page
    assert "“R@1, all pairs” searches among all held-out images at once" in page


def test_json_has_the_figures_of_every_run(home: Path, tmp_path: Path) -> None:
    folders = [str(home / name) for name in ("a", "stopped", "b")]
    assert main(["report", *folders, "--out", str(tmp_path / "r.html"), "--json", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [row["run"] for row in rows] == folders
    for row in rows:
        results = Path(row["run"]) / "results.json"
        expected = json.loads(results.read_text())[0] if results.exists() else {"metrics": {}}
        assert row["metrics"] == expected["metrics"]
    assert [row["status"].split(",")[0] for row in rows] == ["finished", "unfinished", "finished"]
    # A row has the entries of `drrho evaluate --json`, and two more.
    assert main(["evaluate", folders[0], "--json", str(tmp_path / "e.json")]) == 0
    (evaluated,) = json.loads((tmp_path / "e.json").read_text())
    assert rows[0] == evaluated | {"run": folders[0], "status": "finished"}


def test_another_table_is_measured_on_pairs_that_no_run_has_seen(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first 40 pictures are those of the runs a and b, the first 30 those of the run elsewhere.
    table = write_table(tmp_path / "more", 60)
    folders = [str(home / name) for name in ("a", "stopped", "elsewhere")]
    command = ["report", *folders, "--data", str(table), "--json", str(tmp_path / "r.json")]
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "r.html")]) == 0
    out = capsys.readouterr().out
    left_out = re.search(r"(\d+) of 60 pairs show images that the runs were trained on or validated with", out)
    assert left_out is not None
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [row["metrics"].get("num_pairs_full") for row in rows] == [
        60 - int(left_out[1]),
        None,
        60 - int(left_out[1]),
    ]
    assert 20 <= 60 - int(left_out[1]) < 40
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert left_out[0] in page
    assert "right partner first in <strong" in page  # the runs have other test pairs of their own, but not here
    assert f"--data {table}" in page
    assert page.count("What each run finds") == 1
    # The figures are those of the table without these pairs.
    unseen = unseen_pairs(read_pairs(table), *(open_run(folder) for folder in folders)).pairs
    encoder = Encoder.load(open_run(folders[0]), get_backend("numpy", dtype="float32"))
    assert rows[0]["metrics"] == evaluate(encoder, unseen)


def test_built_in_data_are_measured_on_their_test_pairs(home: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data="digits:reference", method="clip", backend="numpy", architecture="mlp", epochs=1, width=4, feature_dim=8
    )
    train(config, tmp_path / "run", quiet=True)
    command = ["--data", "digits", "--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "r.html")]
    assert main(["report", str(tmp_path / "run"), *command]) == 0
    (row,) = json.loads((tmp_path / "r.json").read_text())
    own = json.loads((tmp_path / "run" / "results.json").read_text())[0]
    assert (row["dataset"], row["metrics"]) == ("digits", own["metrics"])


def test_settings_that_differ_are_listed_and_no_others(home: Path, tmp_path: Path) -> None:
    page = report(home, "a", "b", out=tmp_path / "r.html")
    table = re.search('aria-label="Settings that differ".*?</table>', page, re.DOTALL)
    assert table is not None
    rows = re.findall('<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', table[0])
    assert rows == [("method", "clip", "sogclr"), ("learning_rate", "0.001", "0.005")]


def test_every_run_has_a_curve_and_finds_images(home: Path, tmp_path: Path) -> None:
    page = report(home, "a", "b", "stopped", out=tmp_path / "r.html")
    validation = re.search("Validation R@1 against steps.*?</svg>", page, re.DOTALL)
    assert validation is not None
    assert len(re.findall('class="line', validation[0])) == 3
    # a and stopped have the same method, so their losses share a chart.
    losses = re.findall(">Loss of (?:CLIP|SogCLR) against steps.*?</svg>", page, re.DOTALL)
    assert sorted(len(re.findall('class="line', chart)) for chart in losses) == [1, 2]
    strips = re.findall('<h4 class="method [a-z0-9-]+">(.*?)</h4>', page)
    assert strips.count("a") == strips.count("b") == strips.count("stopped") > 0


def test_an_unfinished_run_is_shown_as_such(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    page = report(home, "a", "stopped", out=tmp_path / "r.html")
    total = open_run(home / "stopped").progress().total
    sentence = f"The run stopped is unfinished (step 5 of {total}) and has no figures of held-out pairs."
    assert sentence in page
    assert sentence in capsys.readouterr().out
    assert f"<small>CLIP · unfinished, step 5 of {total}</small>" in page


def test_runs_of_different_data_are_not_compared(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    page = report(home, "a", "elsewhere", "b", out=tmp_path / "r.html")
    assert "These runs were measured on different data and cannot be compared." in page
    assert "right partner first in <strong" not in page
    assert page.count("<caption") == 0
    assert [len(group.runs) for group in grouped(open_runs([home / name for name in ("a", "elsewhere", "b")]))] == [
        2,
        1,
    ]
    told = capsys.readouterr().out
    assert "figures of different data cannot be compared: a, b on pairs.csv; elsewhere on pairs.csv." in told


def test_a_reference_on_disjoint_training_data_is_compared_by_the_same_held_out_pairs(tmp_path: Path) -> None:
    for name, data in (("reference", "digits:reference"), ("learner", "digits")):
        config = TrainConfig(
            data=data, method="clip", backend="numpy", architecture="mlp", epochs=1, width=4, feature_dim=8
        )
        train(config, tmp_path / name, quiet=True)
    (group,) = grouped(open_runs([tmp_path / "reference", tmp_path / "learner"]))
    assert [shown.name for shown in group.runs] == ["reference", "learner"]


def test_without_the_data_the_figures_stay_and_the_page_says_why_there_are_no_pictures(
    home: Path, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "data", 40)
    config = replace(open_run(home / "a").config, data=str(table))
    for seed, name in enumerate(("a", "b")):
        train(replace(config, seed=seed), tmp_path / name, quiet=True)
    shutil.rmtree(tmp_path / "data")
    page = report(tmp_path, "a", "b", out=tmp_path / "r.html")
    assert "The retrievals are left out, because the data cannot be opened: data must be where " in page
    assert "right partner first in <strong" in page  # the runs have recorded the same held-out pairs
    assert "What each run finds" not in page


def test_a_table_with_other_content_under_the_same_name_is_not_taken_for_the_data(home: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "data", 40)
    config = replace(open_run(home / "a").config, data=str(table))
    train(config, tmp_path / "a", quiet=True)
    content = table.read_text(encoding="utf-8")
    table.write_text(content.replace("red", "green"), encoding="utf-8")
    train(config, tmp_path / "b", quiet=True)
    first, second = grouped(open_runs([tmp_path / "a", tmp_path / "b"]))
    assert (first.dataset is None, second.dataset is None) == (True, False)
    assert "other content" in first.reason


def test_galleries_of_different_sizes_are_named_and_no_figure_is_the_best(home: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(home / name, tmp_path / name)
    rows = json.loads((tmp_path / "a" / "results.json").read_text())
    rows[0]["metrics"]["gallery_size"] = 2
    (tmp_path / "a" / "results.json").write_text(json.dumps(rows))
    page = report(tmp_path, "a", "b", out=tmp_path / "r.html")
    assert "The galleries have different sizes" in page
    assert "<td><strong>" not in page


def test_a_run_that_is_named_twice_counts_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    assert [shown.name for shown in open_runs([Path("a"), home / "a", Path("b/../a"), Path("b")])] == ["a", "b"]


def test_names_are_as_long_as_needed_to_differ(home: Path, tmp_path: Path) -> None:
    for folder in ("x/a", "y/a", "y/b"):
        shutil.copytree(home / "a", tmp_path / folder)
    names = [shown.name for shown in open_runs([tmp_path / folder for folder in ("x/a", "y/a", "y/b")])]
    assert names == ["x/a", "y/a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b"null", b"[1]", b'[{"metrics": {}}]', b'[{"metrics": [], "samples_seen": 1, "seconds": 1}]',
        b'[{"metrics": {"retrieval_r1": "x"}, "samples_seen": 1, "seconds": 1}]', b"\xff\xfe", b"[" * 100_000,
        b'[{"metrics": {"retrieval_r1": 0.5}, "samples_seen": "many", "seconds": 1}]',
    ],
)  # fmt: skip
def test_damaged_results_are_one_line_and_nothing_is_written(
    content: bytes, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "a", tmp_path / "a")
    (tmp_path / "a" / "results.json").write_bytes(content)
    capsys.readouterr()
    assert main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "r.html")]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "results.json must be the results of a run" in captured.err
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "r.html"], "nowhere"),
        (["a", "--out", "results.json"], "out must be a file that ends in .html, got results.json"),
        (["a"], "--out"),
        (["--out", "r.html"], "RUN"),
        (["a", "--out", "r.html", "--json", "r.html"], "json must be a file of its own, got r.html"),
        (["a", "--out", "r.html", "--json", "a"], "json must be a file that can be written, got a, which is a folder"),
        (["a", "--out", "r.html", "--data", "nowhere.csv"], "nowhere.csv"),
        (
            ["a", "--out", "r.html", "--json", "data/pairs.csv", "--data", "data/pairs.csv"],
            "json must be a file of its own",
        ),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str],
    message: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home)
    before = sorted(home.iterdir())
    capsys.readouterr()
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert sorted(home.iterdir()) == before


def copies(home: Path, folder: Path, names: list[str]) -> list[Path]:
    """Copy a run and the table of that run under several names, which also name the table."""
    made = []
    for number, name in enumerate(names):
        place = folder / str(number) / name
        shutil.copytree(home / "a", place)
        document = json.loads((place / "config.json").read_text())
        document["config"]["data"] = name
        (place / "config.json").write_text(json.dumps(document))
        made.append(place)
    return made


def test_hostile_names_of_runs_and_data_change_no_tag(home: Path, tmp_path: Path) -> None:
    # A folder's name is at most 255 bytes long and has neither a slash nor a nul.
    names = [name.replace("/", "|").replace("\0", "")[:60] for name in HOSTILE if "\ud83d" not in name]
    pages = []
    for kind, texts in (("hostile", names), ("harmless", [f"name {number}" for number in range(len(names))])):
        out = tmp_path / f"{kind}.html"
        folders = copies(home, tmp_path / kind, texts)
        assert main(["report", *map(str, folders), "--out", str(out)]) == 0
        pages.append(Reader(out.read_text(encoding="utf-8")).skeleton)
    assert pages[0] == pages[1]


@pytest.mark.slow
@pytest.mark.parametrize("names", [("a",), ("stopped",), ("a", "b"), RUNS])
def test_report_has_no_problem_in_a_browser(
    names: tuple[str, ...], check_report: Callable[[Path], None], home: Path, tmp_path: Path
) -> None:
    report(home, *names, out=tmp_path / "r.html")
    check_report(tmp_path / "r.html")


@pytest.mark.slow
def test_twenty_runs_with_long_names_have_no_problem_in_a_browser(
    check_report: Callable[[Path], None], home: Path, tmp_path: Path
) -> None:
    names = [f"a-long-name-of-a-run-{number}" * 3 for number in range(20)]
    for name in names:
        shutil.copytree(home / "a", tmp_path / name)
    report(tmp_path, *names, out=tmp_path / "r.html")
    check_report(tmp_path / "r.html")
    assert open_run(tmp_path / names[0]).results.is_file()
