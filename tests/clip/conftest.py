"""Fixtures of the harness: a browser that looks at a page, an invented report, a command that fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.report import GalleryRow, ReportData, RetrievedImage
from helpers.chromium import Chromium, problems


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """A headless Chromium; tests are skipped if Chromium is missing, unless DRRHO_REQUIRE_CHROMIUM is set."""
    program = shutil.which("chromium")
    if program is None:
        if os.environ.get("DRRHO_REQUIRE_CHROMIUM"):
            pytest.fail("DRRHO_REQUIRE_CHROMIUM is set and there is no chromium on the PATH")
        pytest.skip("no chromium on the PATH (Debian: apt-get install chromium)")
    browser = Chromium(program)
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def report_problems(chromium: Chromium) -> Callable[[Path], list[str]]:
    """A function that opens a report in Chromium and returns a list of all faults."""
    return lambda path: problems(chromium, path)


@pytest.fixture(scope="session")
def check_page(chromium: Chromium) -> Callable[[Path], None]:
    """A function that opens a page, which may have no chart, in Chromium and fails with a list of all faults."""

    def check(path: Path) -> None:
        found = problems(chromium, path, charts=False)
        assert not found, "\n".join(found)

    return check


@pytest.fixture(scope="session")
def check_report(report_problems: Callable[[Path], list[str]]) -> Callable[[Path], None]:
    """A function that opens a report in Chromium and fails with a list of all faults."""

    def check(path: Path) -> None:
        found = report_problems(path)
        assert not found, "\n".join(found)

    return check


@pytest.fixture(scope="session")
def sample_report() -> ReportData:
    """An invented report with every part: four methods, two seeds, two queries, weights that span decades."""
    generator = np.random.default_rng(0)
    r1 = {"reference": 0.454, "clip": 0.262, "sogclr": 0.336, "drrho": 0.52}
    results = [
        {
            "method": method,
            "dataset": "scenes",
            "seed": seed,
            "samples_seen": 160_000,
            "seconds": 61.25,
            "metrics": {
                "retrieval_r1": value + shift,
                "retrieval_r5": value + shift + 0.2,
                "retrieval_r10": value + shift + 0.3,
                "zero_shot_accuracy": value + shift + 0.1,
            },
        }
        for seed, shift in ((0, -0.01), (1, 0.01))
        for method, value in r1.items()
    ]
    curves: dict[str, list[dict[str, float | None]]] = {}
    for method, value in r1.items():
        curves[method] = []
        for step in range(1, 301):
            reached = 1 - np.exp(-step / 60)
            point: dict[str, float | None] = {"samples_seen": 256 * step, "loss": 1 - reached, "surrogate": 1.0}
            point["validation_r1"] = value * reached if step % 50 == 0 else None
            curves[method].append(point)

    def found(correct: bool) -> RetrievedImage:
        picture = generator.integers(0, 256, size=(12, 16, 3), dtype=np.uint8)
        return RetrievedImage(picture, "a red cube" if correct else "a blue ball", correct)

    gallery = [
        GalleryRow(
            query="a red cube",
            retrieved={method: [found(rank == place) for rank in range(5)] for place, method in enumerate(r1)},
            image=generator.integers(0, 256, size=(12, 16), dtype=np.uint8),
        )
        for _ in range(2)
    ]
    return ReportData(
        title="Steering CLIP with a reference model",
        results=results,
        introduction="Four models learn to match made-up pictures with captions.",
        curves=curves,
        gallery=gallery,
        weights={
            method: {
                "clean": np.exp(generator.normal(0, 0.6, size=(30, 20))),
                "swapped": np.exp(generator.normal(mean, 0.6, size=200)),
            }
            for method, mean in (("sogclr", 0.4), ("drrho", -1.5))
        },
        weights_note="A weight is what the loss gives a pair.",
        learning_rates={method: {1e-3: value - 0.1, 2e-3: value, 4e-3: value - 0.05} for method, value in r1.items()},
        facts=[("Same for all methods", "initial parameters, order, samples seen, temperature, optimiser")],
        command="drrho demo --out demo",
    )


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command, expects exit code 2 and one line on standard error, and returns it."""
    from drrho_clip.cli import main

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return run
