"""`drrho bench`: the measured candidates, the comparison with an earlier measurement, the written files.

No test asserts a time: they depend on the machine.
"""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.contrastive import measure, page, worker
from benchmarks.contrastive.candidates import reason_to_skip
from drrho_clip.bench import contrastive_benchmark
from drrho_clip.cli import main
from drrho_clip.errors import BadInput
from drrho_core import contrastive_step, info_nce

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> Any:
    """One small measurement, in processes of its own as always."""
    said: list[str] = []
    result = measure.run(["numpy"], sizes=[8, 16], memory_sizes=[16], rounds=2, say=said.append)
    assert [line.partition(":")[0] for line in said] == [
        "numpy b=8", "numpy b=16", "numpy b=16 one pass", "numpy b=16 two passes"
    ]  # fmt: skip
    return result


def test_every_candidate_takes_turns(found: Any) -> None:
    assert found["setting"]["libraries"] == {"numpy": np.__version__}
    assert [row["batch_size"] for row in found["times"]] == [8, 16]
    for row in found["times"]:
        assert set(row["milliseconds"]) == {"product", "one pass", "two passes", "no reference"}
        assert 2 <= row["rounds"] <= worker.MOST_TURNS  # as many as were asked for, and more where they are short
        assert all(row["fastest"][name] <= row["milliseconds"][name] for name in row["fastest"])
        assert set(row["ratios"]) == {"share", "two-pass share"}  # without autograd there is nothing else to hold it to
    assert all(row["megabytes"] >= 0 for row in found["memory"])


def test_comparison_names_a_ratio_that_falls(found: Any) -> None:
    assert measure.compare(found, found) == []
    before = copy.deepcopy(found)
    share = before["times"][1]["ratios"]["share"]
    before["times"][1]["ratios"]["share"] = share / 0.84  # 16 % below it now
    before["times"][0]["ratios"]["share"] /= 0.86
    (line,) = measure.compare(found, before)
    assert line.startswith("numpy 16 share: ")
    before["times"] = [row | {"batch_size": 3} for row in before["times"]]
    with pytest.raises(BadInput, match="check must hold figures of these libraries and batch sizes, got none of them"):
        measure.compare(found, before)


def test_page_and_plots_hold_the_figures(found: Any) -> None:
    text = page.markdown(found, "drrho bench --made-up")
    assert "    drrho bench --made-up\n" in text
    for row in found["times"]:
        assert f"| {row['batch_size']:,} | {row['milliseconds']['product']:.1f} |" in text
        assert f"{row['ratios']['share']:.0%}" in text
    drawn = page.pictures(found)
    assert list(drawn) == ["share.svg", "two-passes.svg"]  # NumPy has nobody to be compared with
    for file, picture in drawn.items():
        assert f"]({file})" in text
        assert picture.startswith("<svg")
        assert ">numpy<" in picture


def test_candidate_that_does_not_fit_into_memory_is_skipped_with_a_reason() -> None:
    assert reason_to_skip("dense autograd", 2**20) == "not run: about 32768 GiB"
    assert reason_to_skip("one pass", 2**20) == "not run: with logits above 1 GiB the step makes two passes"
    assert reason_to_skip("two passes", 2**20) is None
    assert reason_to_skip("dense autograd", 256) is None


def test_command_writes_figures_and_checks_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--backend", "numpy", "--sizes", "8", "16", "--memory-sizes", "0", "--rounds", "1"]
    assert main(["bench", *options, "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "contrastive.json", "share.svg", "two-passes.svg"
    ]  # fmt: skip
    command = f"drrho bench {' '.join(options)} --out {tmp_path}"
    assert command in (tmp_path / "README.md").read_text(encoding="utf-8")
    figures = json.loads((tmp_path / "contrastive.json").read_text(encoding="utf-8"))
    for row in figures["times"]:
        row["ratios"]["share"] = 1e6
    path = tmp_path / "before.json"
    path.write_text(json.dumps(figures), encoding="utf-8")
    capsys.readouterr()
    assert main(["bench", *options, "--check", str(path)]) == 1
    assert "numpy 8 share: 1e+06 before, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "1"], "--sizes must be an integer of at least 2, got 1"),
        (["--rounds", "0"], "--rounds must be an integer of at least 1, got 0"),
        (["--threads", "0"], "--threads must be an integer of at least 1, got 0"),
        (["--dtype", "int8"], "--dtype must be one of float32, float64, bfloat16, float16, got 'int8'"),
        (["--check", "nowhere.json"], "check must be the figures of an earlier measurement, got nowhere.json"),
        (["--backend", "fortran"], "backend must be one of"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_baselines_agree_with_contrastive_step(library: str) -> None:
    """Times of a program that computed another function would say nothing."""
    pytest.importorskip(library)
    baselines = importlib.import_module(f"benchmarks.contrastive.with_{library}")
    generator = np.random.default_rng(3)
    features = [generator.standard_normal((7, 5)).astype(np.float32) for _ in range(4)]
    features = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in features]
    state = generator.standard_normal(7).astype(np.float32)
    state[2] = -np.inf
    convert = {"torch": "from_numpy", "jax": "asarray"}[library]
    module = pytest.importorskip("torch" if library == "torch" else "jax.numpy")
    arrays = [getattr(module, convert)(x.copy()) for x in (*features, state)]
    got = [np.asarray(x) for x in baselines.dense_step(*arrays)]
    step = contrastive_step(
        *features[:2], state, state,
        temperature=baselines.TEMPERATURE, gamma=baselines.GAMMA, reference_features=(features[2], features[3]),
    )  # fmt: skip
    expected = [
        step.image_gradient, step.text_gradient, step.temperature_gradient,
        step.loss, step.surrogate, step.log_inner_image, step.log_inner_text,
    ]  # fmt: skip
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)
    plain = info_nce(*features[:2], temperature=baselines.TEMPERATURE)
    got = [np.asarray(x) for x in baselines.cross_entropy(*arrays)]
    for one, other in zip(got, (plain.image_gradient, plain.text_gradient), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-4)
    baselines.synchronize(baselines.cross_entropy(*arrays))


def test_released_form_agrees_with_contrastive_step_up_to_constant_factors() -> None:
    """The released form divides by b instead of b - 1, and its loss lacks the temperature and the factor 1/2."""
    torch = pytest.importorskip("torch")
    baselines = importlib.import_module("benchmarks.contrastive.with_torch")
    b, generator = 7, np.random.default_rng(4)
    features = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in generator.standard_normal((4, b, 5))]
    state, share = generator.standard_normal(b), np.log((b - 1) / b)
    state[2] = -np.inf
    step = contrastive_step(
        *features[:2], state, state,
        temperature=baselines.TEMPERATURE, gamma=baselines.GAMMA, reference_features=(features[2], features[3]),
    )  # fmt: skip
    arrays = [torch.from_numpy(x) for x in (*features, state + share)]
    image_gradient, text_gradient, _, log_image, log_text = (np.asarray(x) for x in baselines.released_form(*arrays))
    factor = 2 / baselines.TEMPERATURE * b / (b - 1)
    np.testing.assert_allclose(image_gradient, factor * step.image_gradient, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(text_gradient, factor * step.text_gradient, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(log_image, step.log_inner_image + share, rtol=1e-6)
    np.testing.assert_allclose(log_text, step.log_inner_text + share, rtol=1e-6)


def test_without_a_clone_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    # A copy of the package alone, as a wheel installs it, started in an empty folder.
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    shutil.copytree(ROOT / "drrho_clip", installed / "drrho_clip")
    empty.mkdir()
    code = (
        f"import sys; sys.path[:] = [{str(installed)!r}] + [p for p in sys.path if p not in ('', {str(ROOT)!r})]; "
        f"sys.path += [{str(ROOT)!r}]; from drrho_clip.cli import main; sys.exit(main(['bench']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "drrho bench needs a clone of the repository" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_clone_is_found_in_a_given_folder(tmp_path: Path) -> None:
    assert contrastive_benchmark([tmp_path, ROOT]).__name__ == "benchmarks.contrastive.command"
    with pytest.raises(BadInput, match="drrho bench needs a clone of the repository"):
        contrastive_benchmark([tmp_path])
