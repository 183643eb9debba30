"""drrho bench: what is measured, how it is compared, and what is written; no figure is asserted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip import bench
from drrho_clip.cli import main
from drrho_clip.errors import BadInput
from drrho_core import contrastive_step, info_nce


@pytest.fixture(scope="module")
def found() -> Any:
    """One small measurement, in processes of its own as always."""
    said: list[str] = []
    result = bench.run(["numpy"], sizes=[8, 16], memory_sizes=[16], rounds=2, say=said.append)
    assert [line.partition(":")[0] for line in said] == [
        "numpy b=8", "numpy b=16", "numpy b=16 one pass", "numpy b=16 two passes"
    ]  # fmt: skip
    return result


def test_every_candidate_takes_its_turns(found: Any) -> None:
    assert found["setting"]["libraries"] == {"numpy": np.__version__}
    assert [row["batch_size"] for row in found["times"]] == [8, 16]
    for row in found["times"]:
        assert set(row["milliseconds"]) == {"product", "one pass", "two passes", "no reference"}
        assert 2 <= row["rounds"] <= bench._MOST_TURNS  # as many as were asked for, and more where they are short
        assert all(row["fastest"][name] <= row["milliseconds"][name] for name in row["fastest"])
        assert set(row["ratios"]) == {"share", "two-pass share"}  # without autograd there is nothing else to hold it to
    assert all(row["megabytes"] >= 0 for row in found["memory"])


def test_a_ratio_that_falls_is_named(found: Any) -> None:
    assert bench.compare(found, found) == []
    before = copy.deepcopy(found)
    share = before["times"][1]["ratios"]["share"]
    before["times"][1]["ratios"]["share"] = share / 0.84  # 16 % below it now
    before["times"][0]["ratios"]["share"] /= 0.86
    (line,) = bench.compare(found, before)
    assert line.startswith("numpy 16 share: ")
    before["times"] = [row | {"batch_size": 3} for row in before["times"]]
    with pytest.raises(BadInput, match="check must hold figures of these libraries and batch sizes, got none of them"):
        bench.compare(found, before)


def test_page_and_plots_hold_the_figures(found: Any) -> None:
    page = bench.markdown(found, "drrho bench --made-up")
    assert "    drrho bench --made-up\n" in page
    for row in found["times"]:
        assert f"| {row['batch_size']:,} | {row['milliseconds']['product']:.1f} |" in page
        assert f"{row['ratios']['share']:.0%}" in page
    drawn = bench.pictures(found)
    assert list(drawn) == ["share.svg", "two-passes.svg"]  # NumPy has nobody to be compared with
    for file, text in drawn.items():
        assert f"]({file})" in page
        assert text.startswith("<svg")
        assert ">numpy<" in text


def test_what_does_not_fit_is_said_and_not_run() -> None:
    assert bench._too_large("dense autograd", 2**20) == "not run: about 32768 GiB"
    assert bench._too_large("one pass", 2**20) == "above the budget: two passes"
    assert bench._too_large("two passes", 2**20) is None
    assert bench._too_large("dense autograd", 256) is None


def test_the_command_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        (["--dtype", "int8"], "dtype must be one of float32, float64, bfloat16, float16, got 'int8'"),
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
def test_the_baselines_compute_the_same(library: str) -> None:
    """A comparison with something else would be worth nothing."""
    baselines = pytest.importorskip(f"drrho_{library}.baselines")
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


def test_the_released_form_computes_the_same_but_for_its_factors() -> None:
    """It divides by b where the mean is over b - 1, and its loss has neither the temperature nor the 1/2."""
    torch, baselines = pytest.importorskip("torch"), pytest.importorskip("drrho_torch.baselines")
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
