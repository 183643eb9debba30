"""How the step is computed never changes what: one pass, two passes, any tiles; and what then exists in memory."""

from __future__ import annotations

import gc
import importlib
from typing import Any

import numpy as np
import pytest

from drrho_core import (
    contrastive_step,
    distillation_loss,
    hinge_margin_loss,
    info_nce,
    sigmoid_loss,
    unimodal_contrastive_step,
)
from drrho_core.contrastive import tiles
from helpers import problems

B = 5


def draw() -> Any:
    forms = {"per_anchor_temperature": True, "gamma": "pair", "mask": "empty"}
    return problems.draw(5, b=B, d=4, r=3, temperature=(0.05, 0.5), radius=0.3, eps=1e-4, **forms)


@pytest.mark.parametrize("tile_size", [1, 2, 3, 5, 100])
def test_tiles_change_nothing(space: Any, tile_size: int) -> None:
    if space.name == "jax" and (tile_size != 3 or space.jit is None):
        pytest.skip("XLA compiles every tile: one size, jitted, is enough")
    p = draw()
    dense = p.run(space)
    problems.check_step(p.run(space, tile_size=tile_size), dense, p.rounded(space), space.unit)


@pytest.mark.parametrize("mask", [None, "random", "none"])
@pytest.mark.parametrize("b", [2, 3, 8, 9])
def test_tiles_change_nothing_with_and_without_a_mask(b: int, mask: str | None) -> None:
    p = problems.draw(6, b=b, mask=mask, temperature=(1e-4, 1e-3), gamma="pair", log_inner=1e3)
    dense = contrastive_step(*p.arrays, **p.options)
    for tile_size in range(1, b + 1):
        tiled = contrastive_step(*p.arrays, **p.options, tile_size=tile_size)
        problems.check_step(tiled, dense, p, 1e-13, far=True)


@pytest.mark.parametrize(("dtype", "far"), [("float32", 70.0), ("float64", 470.0)])
def test_an_anchor_without_negatives_in_one_tile_gets_finite_gradients(dtype: str, far: float) -> None:
    # Image 0 has no negatives in the second tile of its row, whose largest entry is far above its own negative.
    Z = np.zeros((4, 4))
    Z[0, 1], Z[0, 2:], Z[1, 2:] = -0.8 * far, far, far
    mask = np.ones((4, 4), dtype=bool)
    mask[0, 2:] = False
    unseen, texts = np.full(4, -np.inf, dtype=dtype), np.eye(4, dtype=dtype)
    options: dict[str, Any] = {"temperature": 1.0, "pair_mask": mask}
    tiled = contrastive_step(Z.astype(dtype), texts, unseen, unseen, **options, tile_size=2)
    whole = contrastive_step(Z.astype(dtype), texts, unseen, unseen, **options, tile_size=4)
    for one, other in zip(tiled, whole, strict=True):
        assert np.all(np.isfinite(one))
        assert np.allclose(one, other, rtol=1e-5)


def test_one_pass_and_two_passes_over_the_default_tiles_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "DEFAULT_TILE", 3)
    p = draw()
    forced = contrastive_step(*p.arrays, **p.options, tile_size=3)
    for budget in (0, B * B * 8 - 1, B * B * 8, None):
        step = contrastive_step(*p.arrays, **p.options, memory_budget=budget)
        for one, other in zip(step, forced, strict=True):
            assert np.array_equal(one, other), budget


def logits_computed(p: Any, register: Any, function: Any, **options: Any) -> int:
    """Count how often a tile of logits is computed: each product that is not one of the two pulls of a tile."""
    shapes = []

    def matmul(a: Any, b: Any) -> Any:
        shapes.append((a.shape, b.shape))
        return a @ b

    register("numpy", matmul=lambda like: matmul)
    function(*p.arrays[: 4 if function is contrastive_step else 2], **options)
    side = min(options.get("tile_size", B), B)
    return len(shapes) - 2 * (-(-B // side)) ** 2


@pytest.mark.parametrize("function", [contrastive_step, info_nce])
def test_the_budget_decides_how_often_logits_are_computed(register_routines: Any, function: Any) -> None:
    p = problems.draw(8, b=B, r=None)
    for options, expected in (
        ({}, 1),
        ({"memory_budget": B * B * 8}, 1),
        ({"memory_budget": B * B * 8 - 1}, 2),
        ({"memory_budget": 0}, 2),
        ({"tile_size": B}, 2),
        ({"tile_size": 4}, 8),
        ({"tile_size": 4, "memory_budget": 10**9}, 8),
        ({"tile_size": 1}, 2 * B * B),
    ):
        assert logits_computed(p, register_routines, function, temperature=0.3, **options) == expected, options


def test_the_default_budget_is_a_gibibyte() -> None:
    assert tiles.tiling(11585, 8, None, None)[1]  # 11585^2 * 8 = 0.99997 GiB
    assert not tiles.tiling(11586, 8, None, None)[1]
    assert tiles.tiling(16384, 4, None, None)[1]
    assert not tiles.tiling(16385, 4, None, None)[1]


def test_where_tiles_start() -> None:
    assert tiles.tiling(5, 4, 2, None) == (2, False)
    assert tiles.tiling(2500, 4, None, None) == (1024, True)
    assert tiles.tiling(2048, 4, None, None) == (1024, True)
    assert tiles.tiling(2047, 4, None, None) == (1024, True)  # two tiles a side, and not one
    assert tiles.tiling(1501, 4, None, None) == (751, True)
    assert tiles.tiling(1024, 4, None, None) == (512, True)
    assert tiles.tiling(513, 4, None, None) == (512, True)
    assert tiles.tiling(5, 4, None, None) == (512, True)
    for batch_size, side, stops in ((5, 2, [2, 4, 5]), (4, 2, [2, 4]), (2, 9, [2]), (2500, 1024, [834, 1668, 2500])):
        features = np.zeros((batch_size, 1))
        spans = tiles.split(features, features, tile_size=side, xp=np).spans
        assert [span.stop for span in spans] == stops
        assert [span.start for span in spans] == [0, *stops[:-1]]


@pytest.mark.parametrize("function", [contrastive_step, info_nce])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tile_size": 0}, ValueError, "tile_size must be at least 1, got 0"),
        ({"tile_size": -2}, ValueError, "tile_size must be at least 1, got -2"),
        ({"tile_size": 1.5}, TypeError, r"tile_size must be an integer, got 1\.5"),
        ({"tile_size": True}, TypeError, "tile_size must be an integer, got True"),
        ({"tile_size": "3"}, TypeError, "tile_size must be an integer, got '3'"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be at least 0, got -1"),
        ({"memory_budget": 1e9}, TypeError, r"memory_budget must be an integer, got 1000000000\.0"),
        ({"memory_budget": -1, "tile_size": 2}, ValueError, "memory_budget must be at least 0, got -1"),
    ],
)
def test_bad_sizes_are_refused(function: Any, options: Any, error: Any, message: str) -> None:
    p = problems.draw(8, r=None)
    with pytest.raises(error, match=message):
        function(*p.arrays[: 4 if function is contrastive_step else 2], temperature=0.3, **options)


# ---------------------------------------------------------------------------------------------------------------------
# What exists
# ---------------------------------------------------------------------------------------------------------------------


def shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of all values of a jaxpr and of the jaxprs inside it."""
    found = {tuple(v.aval.shape) for v in (*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars) if hasattr(v.aval, "shape")}
    for equation in jaxpr.eqns:
        found |= {tuple(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")}
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else [parameter]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= shapes(inner)
    return found


@pytest.mark.parametrize("reference", [False, True])
def test_with_a_tile_size_no_array_is_b_by_b(reference: bool) -> None:
    jax = jax_with_its_loop()
    b = 11  # no other axis is as long
    p = problems.draw(9, b=b, d=4, r=3 if reference else None, per_anchor_temperature=True)

    def all_shapes(function: Any, count: int, **options: Any) -> set[tuple[int, ...]]:
        arrays = [jax.numpy.asarray(x) for x in p.arrays[:count]]
        return shapes(jax.make_jaxpr(jax.jit(lambda *inner: function(*inner, **options)))(*arrays).jaxpr)

    options = {"temperature": 0.3}
    if reference:
        options["reference_features"] = tuple(jax.numpy.asarray(side) for side in p.reference_features)
    for function, count, more in ((contrastive_step, 4, options), (info_nce, 2, {"temperature": 0.3})):
        dense, tiled = all_shapes(function, count, **more), all_shapes(function, count, **more, tile_size=4)
        largest = max(int(np.prod(shape)) for shape in tiled)
        assert (b, b) in dense  # so the check does see one
        assert not any(shape.count(b) > 1 for shape in tiled)
        assert largest <= 12 * (4 + 3)  # the widened features, filled up to whole tiles, nothing greater
        assert (4, 4) in tiled


# ---------------------------------------------------------------------------------------------------------------------
# A library's own loop over many tiles
# ---------------------------------------------------------------------------------------------------------------------


def rolled_cases(b: int) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """Every function that meets tiles, with asymmetric inputs and masks; positional arrays are traced."""
    rng = np.random.default_rng(17)

    def unit(width: int) -> Any:
        x = rng.standard_normal((b, width))
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    images, texts, *reference = unit(5), unit(5), unit(3), unit(3)
    states = rng.standard_normal((2, b))
    states[0, 3] = -np.inf
    mask = rng.random((b, b)) < 0.7
    mask[4] = False
    temperatures = rng.uniform(0.1, 0.3, (2, b))

    def with_everything(
        x: Any, y: Any, u: Any, v: Any, r: Any, s: Any, counts: Any, t1: Any, t2: Any, **how: Any
    ) -> Any:
        options = {"gamma": 0.7, "eps": 1e-3, "radius": 0.2, "reference_features": (r, s), "pair_mask": counts}
        return contrastive_step(x, y, u, v, temperature=(t1, t2), **options, **how)

    def views(x: Any, y: Any, u: Any, v: Any, r: Any, s: Any, t1: Any, t2: Any, **how: Any) -> Any:
        return unimodal_contrastive_step(x, y, u, v, temperature=(t1, t2), reference_features=(r, s), **how)

    def siglip(x: Any, y: Any, counts: Any, **how: Any) -> Any:
        return sigmoid_loss(x, y, scale=3.0, bias=-1.0, pair_mask=counts, **how)

    def hinge(x: Any, y: Any, counts: Any, **how: Any) -> Any:
        return hinge_margin_loss(x, y, margin=0.3, pair_mask=counts, **how)

    def distilled(x: Any, y: Any, r: Any, s: Any, **how: Any) -> Any:
        return distillation_loss(x, y, r, s, temperature=0.1, reference_temperature=0.2, **how)

    def nce(x: Any, y: Any, **how: Any) -> Any:
        return info_nce(x, y, temperature=0.1, **how)

    return [
        ("contrastive_step", with_everything, (images, texts, *states, *reference, mask, *temperatures)),
        ("unimodal_contrastive_step", views, (images, texts, *states, *reference, *temperatures)),
        ("info_nce", nce, (images, texts)),
        ("sigmoid_loss", siglip, (images, texts, mask)),
        ("hinge_margin_loss", hinge, (images, texts, mask)),
        ("distillation_loss", distilled, (images, texts, *reference)),
    ]


def jax_with_its_loop() -> Any:
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    importlib.import_module("drrho_jax")  # registers it
    return jax


HOW = {"one pass": {}, "two passes": {"tile_size": 4}}


WHOLE, PADDED = 20, 23
"""Batch sizes that fill whole tiles, and that leave a last block to be padded."""


@pytest.mark.parametrize(
    ("b", "case", "how"),
    [
        *((PADDED, case, how) for case in range(6) for how in HOW),
        # Without padding and without a mask all entries beside the diagonal count.
        *((WHOLE, case, "one pass") for case in (0, 2)),
        (WHOLE, 0, "two passes"),
    ],
)
def test_jaxs_own_loop_over_tiles_changes_nothing(b: int, case: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jax = jax_with_its_loop()
    name, function, arrays = rolled_cases(b)[case]
    expected = function(*arrays)
    monkeypatch.setattr(tiles, "DEFAULT_TILE", 4)
    compiled = jax.jit(lambda *inner: function(*inner, **HOW[how]))
    arrays = tuple(map(jax.numpy.asarray, arrays))
    assert "while" in compiled.lower(*arrays).as_text()
    got = compiled(*arrays)
    for field, one, other in zip(expected._fields, expected, got, strict=True):
        pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
        for mine, its in pairs:
            np.testing.assert_allclose(np.asarray(its), mine, rtol=1e-12, atol=1e-13, err_msg=f"{name}.{field}")


@pytest.mark.parametrize(("how", "products"), [("one pass", 6), ("two passes", 8)])
def test_one_pass_multiplies_once_in_jaxs_loop_too(how: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    jax = jax_with_its_loop()
    monkeypatch.setattr(tiles, "DEFAULT_TILE", 4)
    _, function, arrays = rolled_cases(20)[0]
    traced = jax.make_jaxpr(lambda *inner: function(*inner, **HOW[how]))(*map(jax.numpy.asarray, arrays))
    # The diagonal's tiles and the others have a body each: logits, then the pull of either side.
    assert str(traced).count("dot_general") == products


def test_jaxs_loop_multiplies_no_transposed_tile() -> None:
    jax = jax_with_its_loop()
    features = np.random.default_rng(0).normal(size=(2, 20, 5))
    traced = jax.make_jaxpr(lambda *x: info_nce(*x, temperature=0.5, tile_size=4))(*map(jax.numpy.asarray, features))
    # V is (4, 4); the features are (4, 5), and transposed (5, 4): a pull of columns has them on the left.
    bodies = [str(line) for line in str(traced).splitlines() if "dot_general" in line]
    assert sum("f64[5,4]" in line.split("=")[0] for line in bodies) == 2
    assert not any("transpose" in line and "4,4" in line for line in str(traced).splitlines())


@pytest.mark.parametrize(("how", "passes"), [("one pass", 1), ("two passes", 2)])
def test_the_products_of_a_step(how: str, passes: int, monkeypatch: pytest.MonkeyPatch, register_routines: Any) -> None:
    b, blocks, d = 20, 5, 5
    lefts, pulls = [], []

    def matmul(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        if left.shape[1] == d:  # logits
            lefts.append(left)
        else:
            pulls.append((left.shape, right.shape))
        return left @ right

    features = np.random.default_rng(0).normal(size=(2, b, d))
    monkeypatch.setattr(tiles, "DEFAULT_TILE", 4)
    register_routines("numpy", matmul=lambda like: matmul)
    info_nce(*features, temperature=0.5, **HOW[how])
    assert pulls == [((4, 4), (4, d))] * 2 * blocks**2
    assert len(lefts) == passes * blocks**2
    # Without a reference a row's left factor is its features as they are, in both passes.
    assert len({id(left) for left in lefts}) == blocks


@pytest.mark.parametrize("options", [{}, {"tile_size": 4}], ids=["one pass", "two passes"])
@pytest.mark.parametrize("function", [contrastive_step, unimodal_contrastive_step])
def test_the_memory_of_a_step_is_free_when_it_ends(function: Any, options: dict[str, Any]) -> None:
    # Objects that refer to each other would keep a batch's tiles until Python looks for such cycles.
    p = problems.draw(3, b=9)
    function(*p.arrays, temperature=0.3, **options)
    gc.collect()
    gc.disable()
    try:
        # A thread that another test has left behind may add objects of its own to one of the counts.
        counts = []
        for _ in range(3):
            function(*p.arrays, temperature=0.3, **options)
            counts.append(gc.collect())
        assert min(counts) == 0
    finally:
        gc.enable()
