"""The commands ``drrho verify`` and ``drrho vectors``: table, files and exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import drrho_core
from drrho_clip.cli import main


def test_verify_passes_on_numpy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "errors.json"
    assert main(["verify", "--backend", "numpy", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("numpy on cpu: passed\n")
    for name in ("worst_case", "contrastive_step", "select_jest"):
        assert f"\n{name}" in printed
    report = json.loads(out.read_text())["numpy"]
    assert report["passed"] is True
    assert report["device"] == "cpu"
    assert {field["verdict"] for case in report["cases"] for field in case["fields"]} == {"passed"}


def test_a_failed_case_gives_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drrho_core, "recommended_gamma_min", lambda epochs, /: 1.0)
    out = tmp_path / "errors.json"
    assert main(["verify", "--backend", "numpy", "--json", str(out)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("numpy on cpu: FAILED\n")
    assert "failed: recommended_gamma_min, many_epochs, float64: value" in printed
    assert json.loads(out.read_text())["numpy"]["passed"] is False


@pytest.mark.parametrize("missing", ["cosine_gamma", "CVaR"])
def test_a_missing_function_makes_the_report_incomplete(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(drrho_core, missing)
    assert main(["verify", "--backend", "numpy"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("numpy on cpu: INCOMPLETE\n")
    assert re.search(rf"not given: .*\b{missing}\b", printed) or f"not supported: worst_case: no {missing}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "abacus"], "backend must be one of"),
        (["--backend", "numpy", "--device", "cuda:0"], "device must be"),
        (["--device", "nowhere:7"], "device must be one that an installed library has"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_bad_usage_gives_exit_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_vectors_are_the_same_bytes_every_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "deep" / "first", tmp_path / "second"
    second.mkdir()
    for folder in (first, second):
        assert main(["vectors", "--out", str(folder), "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out.splitlines()
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (first, second)]
    assert contents[0] == contents[1]
    index = json.loads(contents[0]["vectors.json"])
    assert index["library_version"] == drrho_core.__version__
    assert index["dtypes"] == ["float32"]
    assert set(contents[0]) == {"vectors.json", "vectors.schema.json"} | {
        entry["file"] for entry in index["functions"].values()
    }
    assert printed[0].startswith(f"wrote {len(index['cases'])} cases, {len(contents[0])} files, ")
    assert printed[0].endswith(str(first))


def test_vectors_overwrite_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["vectors", "--out", str(tmp_path)]) == 2
    assert f"out must be a new or an empty folder, got {tmp_path} with mine.txt" in capsys.readouterr().err
    assert main(["vectors", "--out", str(tmp_path / "mine.txt")]) == 2
    assert "out must be a folder, got the file" in capsys.readouterr().err
    assert main(["vectors", "--out", str(tmp_path / "new"), "--dtype", "float16"]) == 2
    assert "--dtype must be one of float64, float32, got 'float16'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
