"""The settings that the claim *beyond* tries: families of changes to plain drrho, and the combination of two of them.

A reference model with a temperature of its own is not tried: its scores divided by its temperature t_ref are
``s_ref / t_ref = (t / t_ref) s_ref / t``, so this is the weight ``t / t_ref`` of the reference model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["CANDIDATES", "PLAIN", "QUICK", "WITHOUT", "Candidate", "combined"]


@dataclass(frozen=True)
class Candidate:
    """A method with settings.

    Parameters
    ----------
    label : str
        The name of the settings in the rows; empty for a method with the settings of the world.
    settings : mapping
        Settings of the run that differ from those of the world.
    method : str
    family : str
        Candidates of one family change the same thing; candidates of different families can be combined.
    references : mapping
        The reference model that steers, if it is none of the world's: see `drrho_clip.reproduce.measuring.guided`.
    """

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    method: str = "drrho"
    family: str = ""
    references: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """Method and label, which name the candidate in the rows."""
        return self.method, self.label

    def same_as(self, other: Candidate) -> bool:
        """Tell whether two candidates are the same run under two names."""
        return (self.method, self.settings, self.references) == (other.method, other.settings, other.references)


PLAIN: Final = Candidate("")
"""drrho as the paper has it."""

WITHOUT: Final = Candidate("", method="sogclr")
"""The same loss without a reference model."""


def _weight(weight: float) -> Candidate:
    return Candidate(f"reference_weight {weight:g}", {"reference_weight": weight}, family="weight")


def _gamma(label: str, **settings: Any) -> Candidate:
    return Candidate(label, settings, family="gamma")


def _guided(method: str) -> list[Candidate]:
    """Return the ways in which the reference model can judge the pairs of a method."""
    # Only candidates of drrho are combined, so another method is a family of its own.
    family = "pairs" if method == "drrho" else method
    return [
        Candidate("anchor_weights reference", {"anchor_weights": "reference"}, method, family),
        Candidate("anchor_weights posterior", {"anchor_weights": "posterior"}, method, family),
        Candidate("drop_suspects auto", {"drop_suspects": "auto"}, method, family),
        Candidate("drop_suspects 0.3", {"drop_suspects": 0.3}, method, family),
    ]


# The share of the strong reference model stands in the label.
_BLEND: Final = "blend"
CANDIDATES: Final[Sequence[Candidate]] = (
    *(_weight(weight) for weight in (0.0, 0.25, 0.5, 0.75, 1.25, 1.5, 2.0)),
    _gamma("gamma 1", gamma_min=1.0),
    _gamma("gamma_min 0.8", gamma_min=0.8),
    _gamma("gamma_min 0.2", gamma_min=0.2),
    _gamma("gamma_schedule step", gamma_schedule="step"),
    *_guided("drrho"),
    *_guided("sogclr"),
    *(
        Candidate(f"{_BLEND}: {share:.0%} strong", family="references", references={"share": share})
        for share in (0.25, 0.5, 0.75)
    ),
    Candidate("own pairs", family="references", references={"folds": 1}),
    Candidate("own halves", family="references", references={"folds": 2}),
    Candidate(
        "own halves + anchor_weights posterior",
        {"anchor_weights": "posterior"},
        family="references",
        references={"folds": 2},
    ),
)
"""All candidates besides `PLAIN` and `WITHOUT`, without combinations."""

QUICK: Final = tuple(
    candidate
    for candidate in CANDIDATES
    if candidate.label in ("reference_weight 0.5", "anchor_weights posterior", f"{_BLEND}: 50% strong", "own halves")
    and candidate.method == "drrho"
)
"""The candidates of the quick form: one of each kind."""


def combined(first: Candidate, second: Candidate) -> Candidate:
    """Return drrho with the settings and the reference model of two candidates of different families.

    Examples
    --------
    >>> both = combined(Candidate("a", {"gamma_min": 1.0}), Candidate("b", {"reference_weight": 0.5}))
    >>> both.label, both.settings
    ('a + b', {'gamma_min': 1.0, 'reference_weight': 0.5})
    """
    return Candidate(
        f"{first.label} + {second.label}",
        {**first.settings, **second.settings},
        family="combination",
        references={**first.references, **second.references},
    )
