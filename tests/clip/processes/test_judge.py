"""The rules by which rank 0 finds the failed rank; no test waits, because time passes only through `pass_time`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from drrho_clip.processes.judge import Judge, Limits, Standing, Verdict, ranks_in_words

LIMITS = Limits(hang=60.0, silence=20.0, grace=1.0)
READY = Standing(exchanges=5, signs=5, prepared=True)


def judge_of(*standings: Standing) -> Judge:
    """A judge who has heard every rank."""
    judge = Judge(len(standings), LIMITS)
    for rank, standing in enumerate(standings):
        judge.hear(rank, standing)
    return judge


def pass_time_with_messages(judge: Judge, seconds: float, *standings: Standing) -> None:
    """Let time pass in which every rank keeps saying how it stands."""
    for _ in range(round(seconds)):
        for rank, standing in enumerate(standings):
            judge.hear(rank, standing)
        judge.pass_time(1.0)


def test_the_rank_that_has_not_begun_the_exchange_hangs() -> None:
    waiting = replace(READY, exchanges=6, exchanging=True)
    standings = [replace(waiting, signs=6), replace(READY, place="a.py:1 (f)"), waiting]
    judge = judge_of(*standings)
    pass_time_with_messages(judge, 59, *standings)
    assert judge.verdict is None
    pass_time_with_messages(judge, 1, *standings)
    assert judge.verdict == Verdict((1,), "hangs: no progress for 60 s (--rank-timeout), a.py:1 (f)")


def test_a_rank_that_gets_on_with_its_own_work_does_not_hang() -> None:
    waiting, working = replace(READY, exchanges=6, exchanging=True), READY
    judge = judge_of(waiting, working)
    for signs in range(5, 10):
        pass_time_with_messages(judge, 50, waiting, replace(working, signs=signs))
    assert judge.verdict is None


def test_the_first_step_may_take_three_times_as_long() -> None:
    standings = [replace(READY, prepared=False), replace(READY, exchanges=6, exchanging=True)]
    judge = judge_of(*standings)
    pass_time_with_messages(judge, 179, *standings)
    assert judge.verdict is None
    pass_time_with_messages(judge, 1, *standings)
    assert judge.verdict is not None
    assert judge.verdict.ranks == (0,)


def test_if_all_ranks_wait_in_one_exchange_all_are_named() -> None:
    waiting = replace(READY, exchanging=True)
    judge = judge_of(waiting, waiting)
    pass_time_with_messages(judge, 60, waiting, waiting)
    assert judge.verdict == Verdict((0, 1), "hang: no progress for 60 s (--rank-timeout)")


def test_all_ranks_may_work_without_an_exchange_as_long_as_they_need() -> None:
    judge = judge_of(READY, READY)
    pass_time_with_messages(judge, 500, READY, READY)
    assert judge.verdict is None
    # The time of the slower rank begins when the other rank waits.
    waiting = replace(READY, exchanges=6, exchanging=True)
    pass_time_with_messages(judge, 59, waiting, READY)
    assert judge.verdict is None
    pass_time_with_messages(judge, 1, waiting, READY)
    assert judge.verdict is not None
    assert judge.verdict.ranks == (1,)


def test_a_rank_that_has_done_its_work_waits_as_long_as_the_others_need() -> None:
    done = replace(READY, left=True)
    judge = judge_of(done, READY)
    for signs in range(5, 10):
        pass_time_with_messages(judge, 50, done, replace(READY, signs=signs))
    assert (judge.verdict, judge.over) == (None, False)
    # It may even be gone already.
    judge.lose(0)
    judge.hear(1, done)
    judge.pass_time(1000.0)
    assert (judge.verdict, judge.over) == (None, True)


def test_a_rank_that_hangs_is_named_although_others_have_done_their_work() -> None:
    done = replace(READY, left=True)
    judge = judge_of(done, READY)
    pass_time_with_messages(judge, 60, done, READY)
    assert judge.verdict is not None
    assert judge.verdict.ranks == (1,)


def test_a_rank_without_messages_is_named_before_it_counts_as_hanging() -> None:
    judge = judge_of(READY, replace(READY, process="process 7 on host a"))
    for signs in range(6, 26):
        judge.hear(0, replace(READY, signs=signs))
        judge.pass_time(1.0)
    reason = "gave no sign of life for 20 s (stopped, or the machine is gone?), process 7 on host a"
    assert judge.verdict == Verdict((1,), reason)


def test_an_error_wins_over_its_consequences_whatever_comes_first() -> None:
    lost = replace(READY, failure="failed: RuntimeError: closed", consequence=True)
    cause = replace(READY, failure="failed: no space left")
    judge = judge_of(READY, lost, READY)
    judge.pass_time(0.5)
    judge.hear(2, cause)
    assert judge.waits
    judge.pass_time(0.5)
    assert judge.verdict == Verdict((2,), "failed: no space left")
    assert not judge.waits


def test_a_reported_error_is_the_cause_of_a_later_death() -> None:
    judge = judge_of(READY, replace(READY, failure="failed: no space left"), READY)
    judge.lose(2)
    judge.pass_time(1.0)
    assert judge.verdict == Verdict((1,), "failed: no space left")


def test_a_death_is_the_cause_of_an_earlier_failed_exchange() -> None:
    judge = judge_of(READY, replace(READY, failure="failed: RuntimeError: closed", consequence=True), READY)
    judge.lose(2)
    assert judge.verdict == Verdict((2,), "ended without a word (killed?)")


def test_a_rank_that_has_reported_an_error_may_go() -> None:
    judge = judge_of(READY, replace(READY, failure="failed: no space left"))
    judge.lose(1)
    judge.pass_time(1.0)
    assert judge.verdict == Verdict((1,), "failed: no space left")


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_error_on_all_ranks_is_shared(size: int) -> None:
    failed = replace(READY, failure="failed: data must be a table, got none")
    judge = judge_of(*[failed] * size)
    # Nobody is left who could have a better explanation, so no time has to pass.
    assert judge.verdict == Verdict(tuple(range(size)), failed.failure, shared=True)


def test_other_errors_of_other_ranks_are_not_shared() -> None:
    judge = judge_of(replace(READY, failure="failed: a"), replace(READY, failure="failed: b"))
    assert judge.verdict == Verdict((0,), "failed: a")


def test_the_verdict_has_the_step_that_rank_0_has_saved() -> None:
    judge = judge_of(replace(READY, saved=120), READY, READY, READY)
    judge.lose(2)
    assert judge.verdict is not None
    assert Verdict.from_json(judge.verdict.to_json()) == judge.verdict
    assert judge.verdict.line(4) == (
        "rank 2 of 4 ended without a word (killed?); the run stops; --resume continues from step 120"
    )


def test_a_later_version_may_say_more_about_a_rank() -> None:
    assert Standing.from_json(READY.to_json() | {"later": 1}) == READY


@pytest.mark.parametrize(
    ("ranks", "words"), [([3], "rank 3"), ([0, 2], "ranks 0 and 2"), ([0, 1, 2], "ranks 0, 1 and 2")]
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert ranks_in_words(ranks) == words
