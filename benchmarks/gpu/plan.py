"""The cases that are measured, their order and their time limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Case = dict[str, Any]
"""The description of one measurement: text, numbers, truth values. The row of the result repeats all these entries."""

SIZES = (4096, 8192, 16384, 32768, 65536)
WIDTH = 768
LIBRARIES = ("torch", "jax", "cupy")
HALF = {"torch": "bfloat16", "jax": "bfloat16", "cupy": "float16"}
PARTS = ("kit", "sweeps", "ranks", "peers", "tests", "demo")
PEERS = ("siglip-kernel", "memeff")

MINUTES = 8.0
"""Time limit in minutes of all sections together, including the time to start and to end."""

DRY_SIZES, DRY_WIDTH = (48, 96), 32

RANKS_SIZE, DRY_RANKS_SIZE = 16384, 64
"""Pairs of a batch that ranks share."""

DRY_MINUTES = 10.0
"""Time limit of a dry run. A dry run takes about a hundred seconds, so only a run that hangs reaches this limit."""


@dataclass(frozen=True)
class Section:
    """Cases that one process measures, one after the other."""

    name: str
    part: str
    cases: tuple[Case, ...]
    # Planned time. The time limit is divided among the groups of sections in proportion to the longest section of each
    # group. Time that earlier groups did not use is added.
    seconds: float
    # A case that takes longer is ended, and the next case gets a fresh process.
    case_seconds: float
    # The library that the section needs. If one section finds that this library is absent, all other sections that
    # need the library are skipped.
    needs: str | None = None


def sweep_cases(library: str, sizes: Sequence[int], width: int) -> tuple[Case, ...]:
    """Return the cases of the sweeps in their order.

    The library's own product comes first, then the kernels (smallest batch, largest batch, other batches), then the
    plain core (the same step without kernels) and dense autograd (autograd through b x b matrices).
    """
    sizes = sorted(sizes)
    headline_second = list(dict.fromkeys([sizes[0], sizes[-1], *sizes[1:-1]]))
    engines = ("plain", "dense") if library in ("torch", "jax") else ("plain",)
    order = [("fused", b) for b in headline_second] + [(engine, b) for b in sizes for engine in engines]
    product: Case = {"library": library, "engine": "product"}
    return (
        product,
        *(
            {"library": library, "engine": engine, "b": b, "d": width, "dtype": HALF[library], "reference": reference}
            for engine, b in order
            for reference in (True, False)
        ),
    )


def kit_cases(library: str) -> tuple[Case, ...]:
    """Return the conformance checks of the functions that are timed, first with the kernels and then without."""
    return tuple(
        {"library": library, "engine": engine, "check": check}
        for engine in ("fused", "plain")
        for check in ("half types", "contrastive_step")
    )


def peer_cases(sizes: Sequence[int], width: int) -> dict[str, tuple[Case, ...]]:
    """Return the cases of the peers (two other programs); batch sizes are in the same order as in `sweep_cases`."""
    sizes = sorted(sizes)
    order = list(dict.fromkeys([sizes[0], sizes[-1], *sizes[1:-1]]))
    return {
        peer: tuple(
            {"library": peer, "engine": "their own", "b": b, "d": width, "dtype": "bfloat16", "reference": False}
            for b in order
        )
        for peer in PEERS
    }


def rank_cases(*, dry_run: bool) -> tuple[Case, ...]:
    """Return the steps of a rank: of a group of one process, and of a rank of four with stand-ins for the others."""
    b, width = (DRY_RANKS_SIZE, DRY_WIDTH) if dry_run else (RANKS_SIZE, WIDTH)
    sizes: Case = {"b": b, "d": width, "dtype": "bfloat16", "reference": True}
    return tuple(
        {"library": "torch", "engine": engine, "ranks": ranks, "form": form, **sizes}
        for engine in ("fused", "plain")
        for ranks in (1, 4)
        for form in ("reduce", "ring")
    )


def schedule(*, sizes: Sequence[int], only: Sequence[str], dry_run: bool) -> list[list[Section]]:
    """Return groups of sections, the most important group first; the sections of a group run at the same time.

    Timed sections run alone. The conformance kit (comparisons with the oracle, the slow NumPy implementation), the
    tests and the demo only check results, so several of them run at the same time.
    """
    width = DRY_WIDTH if dry_run else WIDTH
    groups = [[Section(f"kit, {name}", "kit", kit_cases(name), 110, 110, name) for name in LIBRARIES]]
    groups += [
        [Section(f"sweeps, {name}", "sweeps", sweep_cases(name, sizes, width), seconds, 45, name)]
        for name, seconds in (("torch", 75.0), ("jax", 75.0), ("cupy", 40.0))
    ]
    groups.append([Section("ranks, torch", "ranks", rank_cases(dry_run=dry_run), 35, 45, "torch")])
    for peer, cases in peer_cases(sizes, width).items():
        groups.append([Section(f"peers, {peer}", "peers", cases, 20, 45)])
    # The last group holds the least important sections, because this group is cut off if the time is short.
    last = [Section("tests", "tests", ({"check": "tests of the kernels"}, {"check": "tests marked gpu"}), 95, 60)]
    last += [Section(f"demo, {name}", "demo", ({"library": name},), 95, 95, name) for name in ("torch", "jax")]
    for name in LIBRARIES:
        rest: Case = {"library": name, "engine": "plain", "check": "all other functions"}
        last.append(Section(f"kit, {name}", "kit", (rest,), 95, 95, name))
    groups.append(last)
    chosen = [[section for section in group if section.part in only] for group in groups]
    return [group for group in chosen if group]
