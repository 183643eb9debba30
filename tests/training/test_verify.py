"""``drrho verify`` as its user meets it: a table, a file, an exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import drrho_core
from drrho_core.training.command_line import main


def test_it_passes_on_numpy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_failed_case_is_exit_code_1(
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
def test_what_is_missing_has_not_passed(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(drrho_core, missing)
    assert main(["verify", "--backend", "numpy"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("numpy on cpu: INCOMPLETE\n")
    assert f"not given: {missing}" in printed or f"not supported: worst_case: no {missing}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "abacus"], "backend must be one of"),
        (["--backend", "numpy", "--device", "cuda:0"], "device must be"),
        (["--device", "nowhere:7"], "device must be one that an installed library has"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_bad_usage_is_exit_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
