"""A backend registers routines of its library in one call, and the core uses them for the arrays of that library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drrho_core import contrastive_step, extend, unimodal_contrastive_step
from drrho_core.contrastive.tiles import Tiles


def step(size: int = 8, **options: Any) -> Any:
    features = np.random.default_rng(0).normal(size=(2, size, 3))
    return contrastive_step(*features, *np.full((2, size), -np.inf), temperature=0.5, **options)


def test_a_library_without_a_registration_uses_the_standards_operations() -> None:
    assert extend.registered("some.library") == extend.Extensions(None, None, None, None, None, None)


def test_a_registration_replaces_the_one_before(register_routines: Any) -> None:
    register_routines("some.library", loop=extend.plain_loop)
    assert extend.registered("some.library") == extend.Extensions(loop=extend.plain_loop)
    register_routines("some.library", sort=np.sort)
    assert extend.registered("some.library") == extend.Extensions(sort=np.sort)


def test_tiles_use_the_registered_product_and_exponential(register_routines: Any) -> None:
    products, overwritten = [], []

    def matmul(a: Any, b: Any) -> Any:
        products.append((a.shape, b.shape))
        return a @ b

    def exp(x: Any, overwrite: bool) -> Any:
        overwritten.append(overwrite)
        return np.exp(x, out=x) if overwrite else np.exp(x)

    expected = step(tile_size=8)
    register_routines("numpy", matmul=lambda like: matmul if like.dtype == np.float64 else None, exp=exp)
    for got, wanted in zip(step(tile_size=8), expected, strict=True):
        assert np.array_equal(got, wanted)
    # Logits, logits again, and both pulls; only the exponents of the second pass are not needed afterwards.
    assert products == [((8, 3), (3, 8))] * 2 + [((8, 8), (8, 3))] * 2
    assert overwritten == [False, True]


@pytest.mark.parametrize(
    ("size", "tile_size", "asked"), [(8, 8, 0), (8, 100, 0), (8, 7, 1)], ids=["one tile", "large", "four tiles"]
)
def test_only_a_batch_of_several_tiles_asks_for_the_librarys_own_loop(
    register_routines: Any, size: int, tile_size: int, asked: int
) -> None:
    answers: list[Any] = []

    class Counted(Tiles):
        """Tiles that note how often they are swept."""

        def sweep(self, visit: Any, merge: Any) -> Any:
            answers.append("sweep")
            return super().sweep(visit, merge)

    def choose() -> type[Tiles]:
        answers.append("choose")
        return Counted

    expected = step(size, tile_size=tile_size)
    register_routines("numpy", tiles=choose)
    for got, wanted in zip(step(size, tile_size=tile_size), expected, strict=True):
        assert np.array_equal(got, wanted)
    assert answers == ["choose", "sweep", "sweep"] * asked


def test_without_an_own_loop_the_tiles_are_the_cores(register_routines: Any) -> None:
    expected = step(tile_size=3)
    register_routines("numpy", tiles=lambda: None)
    for got, wanted in zip(step(tile_size=3), expected, strict=True):
        assert np.array_equal(got, wanted)


def test_two_views_use_the_registered_product(register_routines: Any) -> None:
    features, unseen = np.random.default_rng(1).normal(size=(2, 4, 3)), np.full(4, -np.inf)
    products: list[Any] = []

    def matmul(a: Any, b: Any) -> Any:
        products.append(a.shape)
        return a @ b

    register_routines("numpy", matmul=lambda like: matmul)
    unimodal_contrastive_step(*features, unseen, unseen, temperature=0.5)
    assert len(products) == 3 + 2 + 1 + 1  # three matrices; both pulls across the views, one pull within each view


def test_kernels_are_loaded_once_and_their_absence_is_not_remembered(register_routines: Any) -> None:
    assert extend.load_sweeps("some.library") == "no kernels are registered for some.library"
    loads: list[int] = []

    def load() -> str:
        loads.append(1)
        return "the library is too old"

    register_routines("some.library", sweeps=load)
    assert [extend.load_sweeps("some.library") for _ in range(2)] == ["the library is too old"] * 2
    assert loads == [1]
    register_routines("some.library", sweeps=load)  # a new registration loads anew
    extend.load_sweeps("some.library")
    assert loads == [1, 1]
