"""The sort that `drrho_torch` registers is torch's."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch
from drrho_torch.sorting import sort

from drrho_core import extend
from drrho_core._routines import descending


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_sorts_as_torch_does(register_routines: Any, dtype: str) -> None:
    x = torch.asarray(np.random.default_rng(0).normal(size=(3, 50)).astype(dtype))
    x[0, :3] = torch.asarray([0.0, -0.0, 0.0])
    before = x.clone()
    expected = torch.sort(x, dim=-1, descending=True).values
    assert extend.registered("torch").sort is sort
    for values in (x, x.T.contiguous().T):  # rows that are strided in memory
        got = descending(values, xp)
        assert got.dtype == x.dtype
        assert torch.equal(got, expected)
    assert torch.equal(x, before)
    register_routines("torch")
    assert torch.equal(descending(x, xp), expected)


def test_it_is_torchs_own_where_code_is_compiled() -> None:
    x = torch.asarray([[3.0, 1.0, 2.0]])
    torch._dynamo.reset()
    compiled = torch.compile(lambda values: sort(values) + 1, backend="aot_eager", fullgraph=True)
    assert compiled(x).tolist() == [[2.0, 3.0, 4.0]]
