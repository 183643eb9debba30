"""The page on many devices shows the plan and the last measurement; the traffic model has no error."""

from __future__ import annotations

import json

import pytest

from benchmarks.many_devices import measure, page

pytest.importorskip("torch")


def test_the_page_shows_what_the_command_plans() -> None:
    assert f"\n\n{page.planned_table()}\n\n" in page.PAGE.read_text(encoding="utf-8")


def test_the_page_shows_the_measured_figures() -> None:
    figures = json.loads(page.FIGURES.read_text(encoding="utf-8"))
    assert f"\n\n{page.measured_tables(figures)}\n\n" in page.PAGE.read_text(encoding="utf-8")


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
