"""The rules by which rank 0 finds the failed rank, without sockets, threads and clocks.

A *rank* is one of the processes that train together. Every rank says about once a second how it stands (`Standing`).
The `Judge`, in the process of rank 0, compares the standings of all ranks and finds the rank that keeps the others from
going on. Time passes only through `Judge.pass_time`, so tests need not wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["RANK_TIMEOUT", "Judge", "Limits", "Standing", "Verdict", "ranks_in_words"]

RANK_TIMEOUT = 600.0
"""Seconds without progress after which a rank counts as hanging, unless the user names another time."""

PREPARING = 3.0
"""Factor by which the limit for hangs is longer before the end of the first step, which may have to be compiled."""


def ranks_in_words(ranks: Sequence[int], size: int | None = None) -> str:
    """Return ranks as words of a sentence; with `size` also the number of all ranks.

    Examples
    --------
    >>> ranks_in_words([2], 4), ranks_in_words([0, 1, 3])
    ('rank 2 of 4', 'ranks 0, 1 and 3')
    """
    numbers = [str(rank) for rank in ranks]
    listed = " and ".join(filter(None, [", ".join(numbers[:-1]), numbers[-1]]))
    return f"rank{'s' * (len(numbers) > 1)} {listed}" + ("" if size is None else f" of {size}")


@dataclass(frozen=True)
class Limits:
    """Times in seconds after which a rank counts as failed.

    Attributes
    ----------
    hang : float
        Time without progress while another rank waits; before the end of the first step, `PREPARING` times as long.
    silence : float
        Time without any message. A rank that is stopped, or whose machine is gone, sends none.
    grace : float
        Time for which a reported error waits for a better explanation. If a rank dies, the exchanges of the other
        ranks fail as well, and these failures must not be taken for the cause.
    """

    hang: float = RANK_TIMEOUT
    silence: float = 20.0
    grace: float = 0.8


@dataclass(frozen=True)
class Standing:
    """The state of the work of a rank, as the rank reports it.

    Attributes
    ----------
    exchanges : int
        Number of exchanges between all ranks that the rank has begun. All ranks take part in the same exchanges in the
        same order, so the rank with the smallest number is the rank for which the others wait.
    exchanging : bool
        The rank may wait for other ranks: the last exchange that it has begun need not be over.
    signs : int
        Number of all signs of progress.
    prepared : bool
        The rank has finished a step.
    work : str
        The work that only this rank does at the moment, such as "writing a checkpoint".
    place : str
        The line of Python that the rank executes at the moment.
    process : str
        The number of the process, with the name of the machine.
    saved : int or None
        The step of the last checkpoint, known to rank 0.
    left : bool
        The rank has done all its work.
    failure : str
        The rest of a sentence about the error that has ended the work, such as "failed: no space left"; empty if there
        is no error.
    consequence : bool
        The error may be a consequence of a failure of another rank.
    repeats : bool
        The error only repeats that of another rank.
    """

    exchanges: int = 0
    exchanging: bool = False
    signs: int = 0
    prepared: bool = False
    work: str = ""
    place: str = ""
    process: str = ""
    saved: int | None = None
    left: bool = False
    failure: str = ""
    consequence: bool = False
    repeats: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Standing:
        """Build a standing from the result of `to_json`; unknown keys are ignored."""
        return cls(**{option.name: values[option.name] for option in fields(cls) if option.name in values})


@dataclass(frozen=True)
class Verdict:
    """The ranks that have failed, and the reason.

    Attributes
    ----------
    ranks : tuple of int
        The failed ranks.
    reason : str
        The rest of a sentence about these ranks, such as "ended without a word (killed?)".
    shared : bool
        All ranks have met the same error, which is to be printed once.
    saved : int or None
        The step from which a new start of the run continues, if there is a checkpoint.
    """

    ranks: tuple[int, ...]
    reason: str
    shared: bool = False
    saved: int | None = None

    @property
    def hint(self) -> str:
        """The end of a message that says how the run goes on."""
        return "" if self.saved is None else f"; --resume continues from step {self.saved}"

    def line(self, size: int) -> str:
        """Return the line for the user.

        Examples
        --------
        >>> print(Verdict((2,), "ended without a word (killed?)", saved=120).line(4))
        rank 2 of 4 ended without a word (killed?); the run stops; --resume continues from step 120
        """
        return f"{ranks_in_words(self.ranks, size)} {self.reason}; the run stops{self.hint}"

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Verdict:
        """Build a verdict from the result of `to_json`."""
        return cls(tuple(values["ranks"]), values["reason"], bool(values["shared"]), values["saved"])


@dataclass
class _Member:
    """The last standing of a rank, and the seconds since its last message and since its last sign of progress."""

    standing: Standing = field(default_factory=Standing)
    silent: float = 0.0
    idle: float = 0.0


class Judge:
    """The standings of all ranks, and the verdict on them.

    Parameters
    ----------
    size : int
        Number of ranks.
    limits : Limits
        The times after which a rank counts as failed.

    Attributes
    ----------
    verdict : Verdict or None
        The failed ranks, as soon as there are any.

    Examples
    --------
    >>> judge = Judge(2, Limits())
    >>> judge.hear(0, Standing(exchanges=1))
    >>> judge.lose(1)
    >>> judge.verdict.line(2)
    'rank 1 of 2 ended without a word (killed?); the run stops'
    """

    def __init__(self, size: int, limits: Limits) -> None:
        self.verdict: Verdict | None = None
        self._members = [_Member() for _ in range(size)]
        self._limits = limits
        # The ranks that have reported an error, in the order of the reports, and the time since the first report.
        self._reported: list[int] = []
        self._waited = 0.0

    @property
    def waits(self) -> bool:
        """An error has been reported, and the verdict is due soon."""
        return bool(self._reported) and self.verdict is None

    @property
    def over(self) -> bool:
        """All ranks have done all their work."""
        return all(member.standing.left for member in self._members)

    def hear(self, rank: int, standing: Standing) -> None:
        """Take in what a rank says about itself."""
        member = self._members[rank]
        if standing.signs != member.standing.signs or standing.left:
            member.idle = 0.0
        member.standing, member.silent = standing, 0.0
        if standing.failure and rank not in self._reported:
            self._reported.append(rank)
            # If all ranks have met an error, no better explanation can come.
            if len(self._reported) == len(self._members):
                self._judge_reports()

    def lose(self, rank: int) -> None:
        """Take in that the connection to a rank has broken."""
        standing = self._members[rank].standing
        # A rank that has done its work, or has reported its error, may go.
        if standing.left or standing.failure:
            return
        # An error that was reported before may have been the cause, unless it looks like a consequence.
        if any(not self._members[other].standing.consequence for other in self._reported):
            return
        self._decide([rank], "ended without a word (killed?)")

    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        if self.verdict is not None or self.over:
            return
        for member in self._members:
            member.silent += seconds
            member.idle += seconds
        if self._reported:
            self._waited += seconds
            if self._waited >= self._limits.grace:
                self._judge_reports()
        else:
            self._judge_silence()
            self._judge_progress()

    def _judge_reports(self) -> None:
        """Choose among the reported errors the first that is no consequence, or that at least repeats no other."""
        standings = {rank: self._members[rank].standing for rank in self._reported}
        own = [rank for rank, standing in standings.items() if not standing.repeats] or self._reported
        causes = [rank for rank in own if not standings[rank].consequence] or own
        message = standings[causes[0]].failure
        ranks = sorted(rank for rank in causes if standings[rank].failure == message)
        self._decide(ranks, message, shared=len(ranks) == len(self._members))

    def _judge_silence(self) -> None:
        """Find the ranks that send no messages."""
        limit = min(self._limits.silence, self._limits.hang)
        # A rank that has done its work may be gone already.
        silent = [
            rank for rank, member in enumerate(self._members) if member.silent >= limit and not member.standing.left
        ]
        if silent:
            self._decide(
                silent, f"gave no sign of life for {limit:g} s (stopped, or the machine is gone?){self._where(silent)}"
            )

    def _judge_progress(self) -> None:
        """Find the ranks that hang: of those with the smallest number of exchanges, the ranks without progress."""
        # All ranks may encode, measure or read for hours, as a single process does. Time counts when a rank waits.
        if not any(member.standing.exchanging or member.standing.left for member in self._members):
            for member in self._members:
                member.idle = 0.0
            return
        fewest = min(member.standing.exchanges for member in self._members if not member.standing.left)
        prepared = all(member.standing.prepared for member in self._members)
        limit = self._limits.hang * (1.0 if prepared else PREPARING)
        hanging = [
            rank
            for rank, member in enumerate(self._members)
            if member.standing.exchanges == fewest and not member.standing.left and member.idle >= limit
        ]
        if hanging:
            verb = "hangs" if len(hanging) == 1 else "hang"
            self._decide(
                hanging, f"{verb}: no progress for {limit:g} s (--rank-timeout){self._where(hanging, places=True)}"
            )

    def _where(self, ranks: Sequence[int], *, places: bool = False) -> str:
        """Return the places of the processes of these ranks, which may still be there after the end of the others."""
        described = []
        for rank in ranks:
            standing = self._members[rank].standing
            parts = [standing.work, standing.place] if places else []
            described.append(", ".join(filter(None, [*parts, standing.process])))
        # Many ranks at once would give a very long line.
        words = "; ".join(filter(None, described[:4]))
        return f", {words}" if words else ""

    def _decide(self, ranks: Sequence[int], reason: str, *, shared: bool = False) -> None:
        """Set the verdict, unless there is an earlier verdict."""
        if self.verdict is None:
            self.verdict = Verdict(tuple(ranks), reason, shared, self._members[0].standing.saved)
