"""Defects of other programs that no other test here would catch by name, and the page that lists all of them."""

from __future__ import annotations

import ast
import gc
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import drrho_jax
import drrho_torch
import numpy as np
import pytest
import torch

import drrho_core
from drrho_core import (
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    contrastive_step,
    hinge_margin_loss,
    sigmoid_loss,
    unimodal_contrastive_step,
    worst_case,
)
from helpers import problems

ROOT = Path(__file__).parents[2]
NEVER = -np.inf


# ---------------------------------------------------------------------------------------------------------------------
# How functions are called
# ---------------------------------------------------------------------------------------------------------------------


def test_no_error_of_the_users_is_an_assertion() -> None:
    # An assertion says nothing to its reader, and python -O takes it away.
    files = [file for folder in ("drrho_core", "backends", "reference_impl") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 30
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def public_functions() -> Iterator[tuple[str, Any]]:
    for module in (drrho_core, drrho_torch, drrho_jax):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                for member, method in vars(value).items():
                    # Nobody makes an object of a protocol; typing gives each protocol an __init__ of its own.
                    if member == "__init__" and Protocol in value.__bases__:
                        continue
                    if inspect.isfunction(method) and (member in ("__init__", "forward") or member[0] != "_"):
                        yield f"{module.__name__}.{name}.{member}", method
            elif inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value


def test_no_public_function_swallows_what_it_does_not_know() -> None:
    functions = dict(public_functions())
    assert {"drrho_core.contrastive_step", "drrho_torch.ContrastiveLoss.forward"} <= functions.keys()
    kinds = {name: [p.kind for p in inspect.signature(f).parameters.values()] for name, f in functions.items()}
    assert [name for name, kind in kinds.items() if inspect.Parameter.VAR_KEYWORD in kind] == []


# ---------------------------------------------------------------------------------------------------------------------
# The estimator
# ---------------------------------------------------------------------------------------------------------------------


def test_one_temperature_and_equal_ones_per_anchor_take_one_step() -> None:
    # Two copies of one estimator drifted apart elsewhere, by the positives' similarity.
    p = problems.draw(1, b=6, gamma="pair", mask="empty", radius=0.4, eps=0.1)
    t = np.full(6, p.temperature)
    one = contrastive_step(*p.arrays, **p.options)
    each = contrastive_step(*p.arrays, **{**p.options, "temperature": (t, t)})
    for name in ("loss", "surrogate", "image_gradient", "text_gradient", "log_inner_image", "log_inner_text"):
        np.testing.assert_allclose(getattr(one, name), getattr(each, name), rtol=1e-13, atol=1e-15, err_msg=name)
    total = each.temperature_gradient[0].sum() + each.temperature_gradient[1].sum()
    np.testing.assert_allclose(one.temperature_gradient, total, rtol=1e-12)


def test_first_visits_take_the_batchs_own_estimate_whoever_else_was_seen() -> None:
    p = problems.draw(2, b=6, never=0.0, r=None)
    new = np.asarray([True, False, True, False, False, True])
    state = [np.where(side, NEVER, old) for side, old in zip((new, ~new), p.arrays[2:], strict=True)]
    for gamma in (1.0, 0.2, 0.01):
        step = contrastive_step(*p.arrays[:2], *state, temperature=0.1, gamma=gamma)
        own = contrastive_step(*p.arrays[:2], *state, temperature=0.1, gamma=1.0)
        for side, first in ((0, new), (1, ~new)):
            got, batch = np.exp(step[5 + side]), np.exp(own[5 + side])
            np.testing.assert_array_equal(got[first], batch[first])
            old = np.exp(state[side][~first])
            np.testing.assert_allclose(got[~first], (1 - gamma) * old + gamma * batch[~first], rtol=1e-12)


def test_no_graph_stays_behind_a_step() -> None:
    temperature = torch.nn.Parameter(torch.tensor(0.1))
    module = drrho_torch.ContrastiveLoss(8, temperature=temperature, gamma=0.5)
    features = [torch.nn.functional.normalize(torch.randn(8, 3, generator=torch.manual_seed(n)), dim=1) for n in (0, 1)]
    sizes = []
    for _ in range(6):
        leaves = [x.clone().requires_grad_() for x in features]
        loss = module(*leaves, torch.arange(8))
        loss.backward()
        del leaves, loss
        gc.collect()
        sizes.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert sizes[2:] == sizes[2:3] * 4
    assert [buffer.grad_fn for buffer in module.buffers()] == [None] * len(list(module.buffers()))
    assert not any(buffer.requires_grad for buffer in module.buffers())


# ---------------------------------------------------------------------------------------------------------------------
# Extremes that were swallowed
# ---------------------------------------------------------------------------------------------------------------------


def near(matrix: np.ndarray, noise: np.ndarray, cosine: float) -> np.ndarray:
    """Rows with that cosine to the rows of a matrix, roughly."""
    noise = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    mixed = cosine * matrix + np.sqrt(1 - cosine**2) * noise
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def assert_close(got: Any, wanted: Any, names: tuple[str, ...]) -> None:
    """float32 against float64: 1e-3 of the largest entry, for at temperature 0.01 the logits have a few digits less."""
    for name in names:
        mine, its = (np.asarray(getattr(step, name), dtype=np.float64) for step in (got, wanted))
        assert np.isfinite(mine).all(), name
        assert np.abs(its).max() > 0, name
        np.testing.assert_allclose(mine, its, rtol=0, atol=1e-3 * np.abs(its).max(), err_msg=name)


@pytest.mark.parametrize("tile_size", [None, 2])
@pytest.mark.parametrize("cosine", [0.999, -0.999])
def test_well_and_badly_aligned_pairs_at_temperature_001(cosine: float, tile_size: int | None) -> None:
    # exp(-100) is below what others add to a logarithm or clamp at, exp(+200) above what float32 holds.
    rng = np.random.default_rng(3)
    images = np.linalg.qr(rng.normal(size=(8, 8)))[0][:6]
    texts = near(np.sign(cosine) * images, rng.normal(size=(6, 8)), abs(cosine))
    state = np.full(6, NEVER)
    single, double = (
        contrastive_step(
            *(x.astype(dtype) for x in (images, texts, state, state)), temperature=0.01, gamma=0.5, tile_size=tile_size
        )
        for dtype in (np.float32, np.float64)
    )
    assert_close(single, double, ("loss", "image_gradient", "text_gradient", "temperature_gradient", "log_inner_image"))
    # Weights of an anchor sum to 1, however far its negatives are: that is what surrogate - loss counts.
    assert (double.surrogate - double.loss) / 0.01 == pytest.approx(1.0, rel=1e-12)
    # So an image is pulled towards its text by (1 + its share in the text anchors' weights) / 2b.
    assert np.linalg.norm(double.image_gradient, axis=1).min() > 0.01


@pytest.mark.parametrize("cosine", [0.88, 0.9, 0.999])
def test_two_views_that_are_close_at_temperature_001(cosine: float) -> None:
    rng = np.random.default_rng(4)
    one = np.linalg.qr(rng.normal(size=(8, 8)))[0][:5]
    two = near(one, rng.normal(size=(5, 8)), cosine)
    state = np.full(5, NEVER)
    single, double = (
        unimodal_contrastive_step(*(x.astype(dtype) for x in (one, two, state, state)), temperature=0.01)
        for dtype in (np.float32, np.float64)
    )
    assert_close(single, double, ("loss", "view1_gradient", "view2_gradient", "log_inner_view1", "log_inner_view2"))


@pytest.mark.parametrize(
    "ambiguity_set",
    [
        *(CVaR(0.5), KLPenalty(1.0), CappedKLPenalty(1.0, 0.4), KLBall(0.2), ChiSquarePenalty(2.0)),
        *(ChiSquareBall(0.2), CressieReadBall(1.5, 0.2)),
    ],
)
def test_all_negative_losses_are_weighted_as_positive_ones(ambiguity_set: Any) -> None:
    x = np.asarray([-1.0, -2.0, -4.0, -8.0])
    weights = worst_case(x, ambiguity_set).weights
    assert weights[0] > 1.2 / 4
    np.testing.assert_allclose(weights, worst_case(x + 16, ambiguity_set).weights, rtol=0, atol=1e-14)


def test_a_hinge_at_its_corner_has_a_gradient_of_0() -> None:
    # A norm of 0 divides by 0 elsewhere; here nothing is divided by what may vanish.
    same = np.repeat(np.asarray([[0.6, 0.8]]), 3, axis=0)
    for features in (same, np.zeros((3, 2))):
        got = hinge_margin_loss(features, features, margin=0.0)
        assert got.loss == 0
        np.testing.assert_array_equal(got.image_gradient, np.zeros((3, 2)))
        assert np.isfinite(hinge_margin_loss(features, features, margin=0.5).image_gradient).all()


def test_a_sigmoid_at_scale_1000_stays_finite_in_float32() -> None:
    features = np.asarray([[1.0, 0.0], [-1.0, 0.0]], dtype=np.float32)
    for texts in (features, -features):
        got = sigmoid_loss(features, texts, scale=1000.0, bias=-10.0)
        assert all(np.isfinite(field).all() for field in got)


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def rows_of_the_page() -> list[list[str]]:
    text = (ROOT / "docs/defects.md").read_text(encoding="utf-8")
    rows = [line.strip().strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows if row[0].strip() != "where"]


def test_every_defect_names_a_test_that_exists_or_says_that_the_thing_does_not() -> None:
    rows = rows_of_the_page()
    assert len(rows) >= 30
    names: dict[str, set[str]] = {}
    for row in rows:
        assert len(row) == 4, row
        tests = re.findall(r"`(tests/[\w/]+\.py)` `(\w+)`", row[2])
        assert tests or row[2] == "not built yet", row
        for file, name in tests:
            if file not in names:
                tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
                names[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in names[file], f"{file}::{name}"
