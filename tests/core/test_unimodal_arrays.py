"""The unimodal step in tiles, compiled, and with half types."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from drrho_core import unimodal_contrastive_step
from drrho_core.contrastive import tiles
from helpers import problems
from helpers.unimodal import FULL, check, exact, run, to_numpy


def test_tiles_change_nothing(space: Any) -> None:
    if space.name == "jax" and not (space.jit and space.dtype_name == "float64"):
        pytest.skip("XLA compiles every tile: one size, jitted, is enough")
    p = problems.draw(5, b=5, **FULL)
    dense = run(p, space)
    for tile_size in (3,) if space.name == "jax" else (1, 2, 4, 5, 100):
        check(run(p, space, tile_size=tile_size), dense, p.rounded(space), space.unit)


def test_one_pass_and_two_passes_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "DEFAULT_TILE", 3)
    p = problems.draw(6, b=8, **FULL)
    forced = unimodal_contrastive_step(*p.arrays, **p.options, tile_size=3)
    for budget in (0, 3 * 8 * 8 * 8, None):
        for one, other in zip(
            unimodal_contrastive_step(*p.arrays, **p.options, memory_budget=budget), forced, strict=True
        ):
            assert np.array_equal(one, other), budget


def test_the_budget_and_symmetry_decide_how_many_tiles_are_computed(register_routines: Any) -> None:
    b, products = 5, []
    p = problems.draw(7, b=b, r=None)

    def matmul(left: Any, right: Any) -> Any:
        products.append((left.shape, right.shape))
        return left @ right

    register_routines("numpy", matmul=lambda like: matmul)
    # Pulls: two per tile of Z12, two per tile above the diagonals of Z11 and Z22, one per tile on them.
    for options, logits, pulls in (
        ({}, 3, 4),
        ({"memory_budget": 3 * b * b * 8}, 3, 4),
        ({"memory_budget": 3 * b * b * 8 - 1}, 6, 4),
        ({"tile_size": b}, 6, 4),
        # Of a symmetric matrix the tile below the diagonal is not needed.
        ({"tile_size": 4}, 2 * (4 + 3 + 3), 8 + 4 + 4),
    ):
        products.clear()
        unimodal_contrastive_step(*p.arrays, temperature=0.3, **options)
        assert len(products) == logits + pulls, options


def test_with_a_tile_size_no_array_is_b_by_b() -> None:
    import jax

    b = 11  # no other axis is as long

    def shapes(**options: Any) -> set[tuple[int, ...]]:
        p = problems.draw(9, b=b, d=4, r=3)
        features = [jax.numpy.asarray(x) for x in p.arrays]
        reference = tuple(map(jax.numpy.asarray, p.reference_features))
        jaxpr = jax.make_jaxpr(
            lambda *inner: unimodal_contrastive_step(*inner, temperature=0.3, reference_features=reference, **options)
        )(*features)
        return {tuple(v.aval.shape) for equation in jaxpr.eqns for v in equation.outvars}

    assert (b, b) in shapes()  # so the check does see one
    assert not any(shape.count(b) > 1 for shape in shapes(tile_size=4))


def test_it_compiles_as_one_graph() -> None:
    import array_api_compat.torch as xp
    import torch

    p = problems.draw(10, b=5, **FULL)

    def tensors(value: Any) -> Any:
        return tuple(map(tensors, value)) if isinstance(value, tuple) else torch.tensor(value)

    options = {name: tensors(value) if isinstance(value, tuple) else value for name, value in p.options.items()}
    compiled = torch.compile(unimodal_contrastive_step, fullgraph=True, backend="aot_eager")
    step = compiled(*map(tensors, p.arrays), **options, tile_size=3, xp=xp)
    check(to_numpy(step, lambda x: x.numpy()), exact(p), p, 1e-12)


@pytest.mark.parametrize(("library", "half", "digits"), [
    ("numpy", "float16", 11), ("torch", "float16", 11), ("torch", "bfloat16", 8),
])  # fmt: skip
def test_half_features_are_computed_with_in_float32(library: str, half: str, digits: int) -> None:
    import importlib

    xp = importlib.import_module(f"array_api_compat.{library}")
    p = problems.draw(11, b=4, d=3, r=5, temperature=(0.05, 0.4), **FULL)
    single = p.mapped(lambda x: xp.asarray(x, dtype=xp.float32), float)
    narrow = {
        "image_features": xp.astype(single.image_features, getattr(xp, half)),
        "text_features": xp.astype(single.text_features, getattr(xp, half)),
        "reference_features": tuple(xp.astype(side, getattr(xp, half)) for side in single.reference_features),
    }
    single = replace(single, **narrow)
    step = unimodal_contrastive_step(*single.arrays, **single.options)
    assert step.view1_gradient.dtype == step.view2_gradient.dtype == single.image_features.dtype
    for value in (step.loss, step.surrogate, *step.temperature_gradient, step.log_inner_view1, step.log_inner_view2):
        assert value.dtype == single.log_inner_image.dtype

    rounded = single.mapped(lambda x: np.asarray(xp.astype(x, xp.float32)).astype(np.float64), float)
    expected = exact(rounded)
    got = to_numpy(step, lambda x: xp.astype(x, xp.float32))
    check(got._replace(view1_gradient=expected.view1_gradient, view2_gradient=expected.view2_gradient), expected,
          rounded, 5e-6)  # fmt: skip
    for name in ("view1_gradient", "view2_gradient"):
        wanted = getattr(expected, name)
        error = np.abs(getattr(got, name) - wanted)
        assert np.all(error <= np.abs(wanted) * 2.0**-digits + 1e-5 + 2.0**-25), name


@pytest.mark.parametrize(("features", "state"), [("float32", "float64"), ("float64", "float32")])
def test_the_state_keeps_its_dtype(features: str, state: str) -> None:
    p = problems.draw(12, b=4, **FULL)
    arrays = [x.astype(which) for x, which in zip(p.arrays, (features, features, state, state), strict=True)]
    options = {**p.options, "reference_features": tuple(side.astype(features) for side in p.reference_features)}
    step = unimodal_contrastive_step(*arrays, **options)
    assert step.view1_gradient.dtype == step.view2_gradient.dtype == features
    assert step.log_inner_view1.dtype == step.log_inner_view2.dtype == state
    assert step.loss.dtype == step.surrogate.dtype == step.temperature_gradient[0].dtype == "float64"
