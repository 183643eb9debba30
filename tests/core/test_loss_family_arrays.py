"""SigLIP, distillation and hinge in tiles, with half types, and compiled."""

from __future__ import annotations

from typing import Any

import pytest

import drrho_core as dc
from helpers.loss_family import CASES, FIELDS, MASK, B, check, draw


@pytest.mark.parametrize("name", CASES)
def test_tiles_change_nothing(name: str) -> None:
    case = CASES[name]
    arrays = draw(b=7)[: case.arrays]
    dense = case.function(*arrays, **case.scalars)
    for options in ({"tile_size": 1}, {"tile_size": 3}, {"tile_size": 7}, {"memory_budget": 0}):
        check(case.function(*arrays, **case.scalars, **options), dense._asdict(), 1e-13 * case.steepness)


@pytest.mark.parametrize("name", ["sigmoid", "distillation", "hinge"])
def test_with_a_tile_size_no_array_is_b_by_b(name: str) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    case, b = CASES[name], 11  # no other axis is as long
    arrays = draw(b=b)[: case.arrays]

    def traced(**options: Any) -> str:
        return str(jax.make_jaxpr(lambda *inner: case.function(*inner, **case.scalars, **options))(*arrays))

    if name != "distillation":  # beside the mask itself
        mask = jax.numpy.ones((b, b), dtype=bool)
        assert f"f64[{b},{b}]" in traced(pair_mask=mask)
        assert f"f64[{b},{b}]" not in traced(pair_mask=mask, tile_size=6)
        assert f"i32[{b},{b}]" not in traced(pair_mask=mask, tile_size=6)

    assert f"[{b},{b}]" in traced()  # so the check does see one
    assert f"[{b},{b}]" not in traced(tile_size=6)
    assert "[6,6]" in traced(tile_size=6)  # one loop over equal tiles, the last of which are padded


def test_the_budget_is_for_the_logits_of_both_models(register_routines: Any) -> None:
    products: list[Any] = []

    def matmul(left: Any, right: Any) -> Any:
        products.append(left.shape)
        return left @ right

    register_routines("numpy", matmul=lambda like: matmul)
    for budget, count in ((2 * B * B * 8, 4), (2 * B * B * 8 - 1, 6)):  # logits of two models, once or twice, and pulls
        products.clear()
        dc.distillation_loss(*draw(), temperature=1.0, reference_temperature=1.0, memory_budget=budget)
        assert len(products) == count


@pytest.mark.parametrize("name", ["sigmoid", "distillation", "hinge"])
def test_half_types_are_computed_in_float32(name: str) -> None:
    import torch

    case = CASES[name]
    for dtype in (torch.float16, torch.bfloat16):
        arrays = [torch.asarray(x).to(dtype) for x in draw()[: case.arrays]]
        got = case.function(*arrays, **case.scalars)
        wanted = case.function(*(x.to(torch.float64) for x in arrays), **case.scalars)
        assert got.loss.dtype == torch.float32
        assert float(got.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
        for field in got._fields[1:]:
            mine, its = getattr(got, field), getattr(wanted, field)
            assert mine.dtype == (dtype if field in FIELDS else torch.float32)
            bound = (torch.finfo(dtype).eps if field in FIELDS else 1e-5) * float(its.abs().max())
            assert float((mine.to(torch.float64) - its).abs().max()) <= bound


def test_torch_compiles_them_whole() -> None:
    import array_api_compat.torch as xp
    import torch

    def everything(arrays: list[Any], scale: Any, mask: Any) -> Any:
        sigmoid = dc.sigmoid_loss(*arrays[:2], scale=scale, bias=-1.0, pair_mask=mask, xp=xp)
        hinge = dc.hinge_margin_loss(*arrays[:2], margin=0.2, pair_mask=mask, xp=xp)
        teacher = dc.distillation_loss(*arrays, temperature=0.2, reference_temperature=0.3, xp=xp)
        return sigmoid, hinge, teacher, dc.weighted_sum((0.5, sigmoid), (scale, hinge), (1.0, teacher), xp=xp)

    arrays, scale = [torch.asarray(x) for x in draw()], torch.tensor(2.0, dtype=torch.float64)
    mask = torch.asarray(MASK)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)(arrays, scale, mask)
    for got, wanted in zip(compiled, everything(arrays, scale, mask), strict=True):
        for field in FIELDS:
            torch.testing.assert_close(getattr(got, field), getattr(wanted, field), rtol=1e-13, atol=1e-15)
