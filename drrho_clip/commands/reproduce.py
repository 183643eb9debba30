"""The command ``drrho reproduce``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drrho_clip.errors import BadInput
from drrho_clip.options import FLAG, PATH, TEXT, at_least, choice, setting
from drrho_clip.terminal.printing import print_cells, say

if TYPE_CHECKING:
    from drrho_clip.reproduce.claim import Claim
    from drrho_clip.reproduce.results import Results

# The names stand here, because the modules of the claims take time to import.
NAMES = (
    "weak-to-strong",
    "table",
    "data-efficiency",
    "scaling-law",
    "variance",
    "generic",
    "estimator",
    "good-reference",
    "beyond",
)
"""The claims that can be reproduced, in the order of their numbers."""


@dataclass(frozen=True)
class Reproduce:
    """Measure the claims of the Model Steering paper again, in small, and print figures, intervals and verdicts.

    Without a claim the command lists the claims with the verdicts of the results that are there. Results are kept, one
    line per experiment, and an interrupted command goes on with the experiments that are missing.

    For example:
      drrho reproduce
      drrho reproduce variance
      drrho reproduce --all --quick
      drrho reproduce --report
      drrho reproduce weak-to-strong --scale 8
    """

    claims: tuple[str, ...] = setting(
        (),
        rule=choice(*NAMES),
        metavar="CLAIM",
        several="*",
        positional=True,
        shown="none; the claims are listed",
        help=f"Claims to measure: {', '.join(NAMES)}.",
    )
    all: bool = setting(False, rule=FLAG, help="Measure all claims.")
    quick: bool = setting(
        False,
        rule=FLAG,
        help="Use few drawn scenes and tiny models. This shows that every part works, but not whether a claim holds.",
    )
    report: bool = setting(
        False, rule=FLAG, help="Write a page with pictures for each claim that has results, and the table of claims."
    )
    scale: int = setting(
        1,
        rule=at_least(1, most=1024),
        metavar="K",
        help="Use models that are K times as wide and batches that are K times as large, with about as many steps, as "
        "a GPU can. A world whose data are too few for such batches is left out.",
    )
    out: Path | None = setting(
        None,
        rule=PATH,
        shown="docs/claims; with --quick build/claims-quick, with --scale K build/claims-scale-K",
        help="Folder of the results, CLAIM.jsonl, and of the pages.",
    )
    runs: Path = setting(
        Path("build/claims"), rule=PATH, help="Folder of reference models and runs; it may be deleted afterwards."
    )
    root: tuple[Path, ...] = setting(
        (Path("/"),),
        rule=PATH,
        several="+",
        help="Folders below which packages of pictures are installed, such as a folder of dpkg -x.",
    )
    jobs: int = setting(
        2, rule=at_least(1, most=1024), help="Experiments at a time, each in a process with one thread."
    )
    worlds: tuple[str, ...] = setting(
        (),
        rule=TEXT,
        metavar="WORLD",
        several="+",
        shown="all whose data are there",
        help="Worlds (data sets with the settings of their models) to measure on, such as scenes-30.",
    )
    seeds: int | None = setting(
        None, rule=at_least(2, most=100), shown="5; with --quick 2", help="Number of seeds: 0, 1, 2 and so on."
    )

    def run(self) -> int:
        """Measure, print the verdicts and write the pages."""
        from drrho_clip.reproduce.claims import CLAIMS
        from drrho_clip.reproduce.engine import reproduce
        from drrho_clip.reproduce.pages import write_pages
        from drrho_clip.reproduce.results import Results
        from drrho_clip.reproduce.worlds import WORLDS

        if self.all and self.claims:
            raise BadInput(f"claims must be left out with --all, got {' '.join(self.claims)}")
        wrong = [name for name in self.worlds if name not in WORLDS]
        if wrong:
            raise BadInput(f"worlds must be among {', '.join(WORLDS)}, got {' '.join(wrong)}")
        if self.quick and self.scale > 1:
            raise BadInput(f"scale must be 1 with --quick, got {self.scale}")
        out = self.out or Path(self._folder())
        known = [claim for claim in CLAIMS.values() if claim.scales or self.scale == 1]
        fixed = [name for name in self.claims if CLAIMS[name] not in known]
        if fixed:
            raise BadInput(f"scale must be 1 for the claim {fixed[0]}, which has models of its own, got {self.scale}")
        chosen = [claim for claim in known if self.all or claim.name in self.claims]
        if chosen:
            say(*(line for claim in chosen for line in claim.missing()))
            worlds = [world for name, world in WORLDS.items() if not self.worlds or name in self.worlds]
            seeds = range(self.seeds or (2 if self.quick else 5))
            results = reproduce(
                chosen,
                out,
                self.runs,
                worlds=worlds,
                roots=self.root,
                seeds=seeds,
                jobs=self.jobs,
                quick=self.quick,
                scale=self.scale,
            )
            for claim in chosen:
                _print_judgement(claim, results)
        else:
            results = Results(out, quick=self.quick, scale=self.scale)
            _print_claims(known, results)
        if self.report:
            files = write_pages(known, results)
            say(f"wrote {', '.join(map(str, files))}" if files else f"no pages: {out} has no results of two seeds")
        return 0

    def _folder(self) -> str:
        """Return the folder of the results if the user names none."""
        if self.scale > 1:
            return f"build/claims-scale-{self.scale}"
        return "build/claims-quick" if self.quick else "docs/claims"


def _print_claims(claims: list[Claim], results: Results) -> None:
    """Print the table of the claims with their verdicts."""
    from drrho_clip.reproduce.standing import standing_of

    cells = []
    for claim in claims:
        standing = standing_of(claim, results)
        words = "not measured" if standing.judgement is None else standing.judgement.verdict
        # A world that is not complete has no part in the verdict.
        words += f"; missing: {', '.join(standing.missing)}" if standing.missing and standing.rows else ""
        cells.append((str(claim.number), claim.name, words))
    print_cells(("", "claim", "verdict"), cells, left=3)


def _print_judgement(claim: Claim, results: Results) -> None:
    """Print figures, intervals and the verdict of a claim."""
    from drrho_clip.reproduce.pages import in_words
    from drrho_clip.reproduce.standing import standing_of

    judgement, missing = standing_of(claim, results)[2:4]
    say(f"claim {claim.number}, {claim.name}")
    if judgement is None:
        say(f"not measured: no world is complete; experiments are missing on {', '.join(missing)}")
        return
    say(*(f"  {figure.label}: {in_words(figure.interval)}" for figure in judgement.figures))
    say(*(f"  {note}" for note in judgement.notes))
    say(f"{judgement.verdict}: {judgement.sentence}")
    if results.rows and next(iter(results.rows.values())).quick:
        say("These are figures of --quick: they show that every part works, but not whether the claim holds.")
