"""The check of the rows of a batch before each step: no sample on two processes, and only own rows."""

from __future__ import annotations

import numpy as np
import pytest

from drrho_clip.data import HostBatch


def batch_of(own: list[int], whole: list[int] | None) -> HostBatch:
    """A batch with some rows and empty images and captions."""
    rows = np.asarray(own, dtype=np.int64)
    images, tokens = np.zeros((len(own), 1, 1, 1), np.uint8), np.zeros((len(own), 1), np.int32)
    return HostBatch(rows, images, tokens, None, None if whole is None else np.asarray(whole, dtype=np.int64))


def test_own_rows_of_a_batch_are_accepted() -> None:
    batch_of([3, 1], None).check_rows(0, 1)
    for rank, own in enumerate(([5, 2], [0, 7], [1, 4])):
        batch_of(own, [5, 2, 0, 7, 1, 4]).check_rows(rank, 3)


@pytest.mark.parametrize(
    ("own", "whole", "message"),
    [
        ([5, 7], [5, 2, 0, 7], "sample_index must hold the own rows of the batch, got 5 on process 1"),
        ([0, 7], [5, 0, 0, 7], "sample_index must hold each row once in a batch of all processes, got a row twice"),
        ([0], [5, 2, 0], "sample_index must hold the own rows of the batch, got 0 on process 1"),
        ([3, 3], None, "sample_index must hold each row once in a batch of all processes, got a row twice"),
    ],
)
def test_a_sample_of_another_process_is_refused(own: list[int], whole: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        batch_of(own, whole).check_rows(1, 2)
