"""The exponential of the tiles on the CPU."""

from __future__ import annotations

import array_api_compat.numpy
import array_api_compat.torch
import numpy as np
import pytest
import torch
from drrho_torch import exponential

from drrho_core._routines import tile_routines

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def test_it_is_the_one_that_tiles_take() -> None:
    assert tile_routines(torch.ones(1), array_api_compat.torch)[1] is exponential.exp
    x = np.linspace(-3.0, 3.0, 7)
    before = x.copy()
    assert np.array_equal(tile_routines(x, array_api_compat.numpy)[1](x, False), np.exp(before))
    assert np.array_equal(x, before)


@pytest.mark.parametrize("dtype", UNIT)
def test_it_is_exact_but_for_the_argument(dtype: torch.dtype) -> None:
    x = torch.linspace(-80.0, 80.0, 20001, dtype=torch.float64).to(dtype)
    expected = np.exp(x.numpy().astype(np.longdouble))
    got = exponential.exp(x.clone(), True).numpy().astype(np.longdouble)
    # Two units for the result, and what rounding x and the constant costs: one unit of |x| each.
    allowed = (2 + 2 * np.abs(x.numpy().astype(np.float64))) * UNIT[dtype]
    assert np.max(np.abs(got / expected - 1) / allowed) <= 1.0


@pytest.mark.parametrize("dtype", UNIT)
def test_its_ends_are_those_of_exp(dtype: torch.dtype) -> None:
    x = torch.asarray([-torch.inf, -1e5, 0.0, 1e5, torch.inf, torch.nan], dtype=dtype)
    got = exponential.exp(x.clone(), True)
    assert got.dtype == dtype
    torch.testing.assert_close(got, torch.exp(x), rtol=0.0, atol=0.0, equal_nan=True)


def test_it_overwrites_its_argument_only_if_it_may() -> None:
    x = torch.ones(3)
    kept = exponential.exp(x, False)
    assert kept.data_ptr() != x.data_ptr()
    assert torch.equal(x, torch.ones(3))
    assert exponential.exp(x, True).data_ptr() == x.data_ptr()
    assert torch.equal(x, kept)


def test_other_devices_have_their_own() -> None:
    x = torch.ones(3, device="meta")
    assert exponential.exp(x, True) is not x
