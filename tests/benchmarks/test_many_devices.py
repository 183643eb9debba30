"""The page on many devices shows the plan and the last measurement; the traffic model has no error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.many_devices import harness, measure, page

pytest.importorskip("torch")


def test_the_page_shows_what_the_command_plans() -> None:
    assert f"\n\n{page.planned_table()}\n\n" in page.PAGE.read_text(encoding="utf-8")


def test_the_page_shows_the_measured_figures() -> None:
    figures = json.loads(page.FIGURES.read_text(encoding="utf-8"))
    text = page.PAGE.read_text(encoding="utf-8")
    assert f"\n\n{page.measured_tables(figures)}\n\n" in text
    assert f"\n\n{page.harness_table(figures)}\n\n" in text


def test_the_runs_of_the_page_receive_the_planned_bytes() -> None:
    for runs in json.loads(page.FIGURES.read_text(encoding="utf-8"))["harness"].values():
        assert runs.keys() == harness.CASES.keys()
        for row in runs.values():
            # The dry run prints bytes in units of 1,000.
            assert row["planned_mb"] == pytest.approx(row["counted_mb"], abs=5.1e-4)
            assert 0.95 < row["planned_mb"] / row["loopback_mb"] < 1.0


def test_the_dry_run_gets_the_rates_that_the_processes_have_measured(tmp_path: Path) -> None:
    # A step alone takes 0.1 s and 1 ms per pair: 1.124 s for the batch of 1,024 pairs, 0.612 s for a half.
    # The selections from 1,024 and from 512 pairs take 0.2 s and 0.05 s besides.
    seconds = {"large": 0.5, "few bytes": 0.02, "alone": 1.324, "alone, share": 0.662, "step": 0.8, "loopback": 2e6}
    seconds |= {"selection": 0.2, "selection, share": 0.05}
    slow = {"batch": 1024, "form": "ring", "probe": 1 << 22, "received": 8e5, "exchanges": 10, "rounds": [seconds] * 3}
    fast = slow | {"rounds": [{name: value / 2 for name, value in seconds.items()}] * 3, "received": 9e5}
    row = harness.compared("sogclr, ring", [fast, slow], tmp_path)
    # Each process selects from all pairs, so the longer selection is overhead.
    assert row["overhead_ms"] == pytest.approx(300)
    assert (row["measured_ms"], row["counted_mb"], row["loopback_mb"]) == pytest.approx((800, 0.9, 1.0))
    # 512 pairs take 0.512 s, and a little more in the form ring. An exchange takes 2 ms, and 8 MiB take a second.
    exchanges = row["planned_mb"] * 1e6 / (1 << 23) * 1e3 + 10 * 2
    assert row["exchanges_ms"] == pytest.approx(exchanges, abs=0.1)
    assert row["planned_ms"] == pytest.approx(300 + 512 + row["exchanges_ms"], rel=0.02)


def test_the_bytes_of_all_forms_and_options_are_those_of_the_model() -> None:
    assert measure.largest_error_of_bytes() < 1e-12


def test_a_planned_step_is_work_plus_bytes_over_bandwidth_plus_latencies() -> None:
    # The slowest process counts in every round: 5 s of work, 1 s for a sum of 100 bytes, 0.2 s for 4 exchanges.
    rounds = {"large": 1.0, **{f"{form} {name}": 5.0 for form in ("reduce", "ring") for name in ("alone", "step")}}
    rounds |= {"reduce few bytes": 0.2, "ring few bytes": 0.2}
    form = {"received": 300.0, "planned": 300.0, "exchanges": 4, "loopback": 700}
    slow = {"rounds": [rounds], "probe": 100, "reduce": form, "ring": form}
    fast = slow | {"rounds": [{name: value / 2 for name, value in rounds.items()}]}
    row = measure.summarised([fast, slow])["reduce"]
    # With two processes a sum of 100 bytes brings 100 bytes, so 300 bytes take 3 s.
    assert row["predicted_ms"] == pytest.approx(5000 + 3000 + 200)
    assert row["interface_mb"] == pytest.approx(350e-6)
