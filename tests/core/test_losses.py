"""info_nce against the oracle's loops, torch's cross-entropy under autograd, mpmath and by hand."""

from __future__ import annotations

import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from drrho_reference import info_nce as oracle_info_nce
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import LossGradients, info_nce
from helpers import problems


def run(space: Any, p: Any, **static: Any) -> LossGradients:
    """The loss in the library, temperature and mask traced where the space is jitted; float64 NumPy comes back."""
    image, text = (space.asarray(x) for x in p.arrays[:2])
    t = space.asarray(np.asarray(p.temperature, dtype=space.dtype_name))
    mask = () if p.pair_mask is None else (space.asarray(p.pair_mask),)

    def loss(e1: Any, e2: Any, tau: Any, *masks: Any) -> LossGradients:
        return info_nce(e1, e2, temperature=tau, pair_mask=masks[0] if masks else None, **static)

    result = space.run(loss, image, text, t, *mask)
    assert {result.image_gradient.dtype, result.text_gradient.dtype} == {image.dtype}
    return LossGradients(*(space.to_numpy(value).astype(np.float64) for value in result))


def check(got: LossGradients, expected: Any, t: float, unit: float) -> None:
    """The bars of the step: a loss not multiplied by t is a logarithm, its gradient has weights of at most 2 / 2b."""
    bound = max(1.0, 0.1 / t) * unit
    b = len(got.image_gradient)
    assert abs(got.loss - expected.loss) <= bound * max(1.0, abs(expected.loss))
    largest = max(1.0, np.max(np.abs(expected.image_gradient)) * t * 2 * b)
    for name in ("image_gradient", "text_gradient"):
        error = np.max(np.abs(getattr(got, name) - getattr(expected, name)))
        assert error <= bound * largest / (2 * b * t), name
    assert abs(got.temperature_gradient - expected.temperature_gradient) <= bound * 2 / t**2


@given(seed=st.integers(0, 2**32 - 1), features=st.sampled_from(["random", "aligned", "opposite", "identical"]),
       t=st.sampled_from([0.01, 0.07, 1.0, 30.0]))  # fmt: skip
@settings(max_examples=15)
def test_info_nce_is_the_oracles(eager_space: Any, seed: int, features: str, t: float) -> None:
    b, d = (6, 3) if eager_space.name == "jax" else (2 + seed % 7, 1 + seed % 5)
    p = problems.draw(seed, b=b, d=d, r=None, features=features)
    p = problems.replace(p, temperature=t)
    exact = p.rounded(eager_space)
    expected = oracle_info_nce(*exact.arrays[:2], temperature=exact.temperature)
    check(run(eager_space, p), expected, exact.temperature, eager_space.unit)


@given(seed=st.integers(0, 2**32 - 1), mask=st.sampled_from(["random", "alone", "siblings", "nobody"]),
       t=st.sampled_from([0.001, 0.07, 1.0]), tile_size=st.sampled_from([None, 1, 4]))  # fmt: skip
@settings(max_examples=15)
def test_masked_info_nce_is_the_oracles(
    eager_space: Any, seed: int, mask: str, t: float, tile_size: int | None
) -> None:
    # JAX compiles for every shape, so it gets a single shape and no tiles here.
    b, tile_size = (6, None) if eager_space.name == "jax" else (2 + seed % 7, tile_size)
    p = problems.draw(seed, b=b, d=3, r=None)
    p = problems.replace(p, temperature=t, pair_mask=draw_mask(np.random.default_rng(seed), b, mask))
    exact = p.rounded(eager_space)
    expected = oracle_info_nce(*exact.arrays[:2], temperature=exact.temperature, pair_mask=p.pair_mask)
    check(run(eager_space, p, tile_size=tile_size), expected, exact.temperature, eager_space.unit)


def draw_mask(rng: np.random.Generator, b: int, kind: str) -> np.ndarray:
    """A mask of negatives: any, one that leaves anchors alone, one of siblings, or one without any negative."""
    images = rng.integers(0, max(2, b // 2), size=b)
    mask: np.ndarray = rng.random((b, b)) < 0.6
    if kind == "alone":
        mask[0] = mask[:, b - 1] = False
    return {"siblings": images[:, None] != images, "nobody": np.zeros((b, b), dtype=bool)}.get(kind, mask)


@pytest.mark.parametrize("t", [0.01, 0.2, 5.0])
def test_masked_info_nce_is_torchs_cross_entropy_without_the_masked_classes(t: float) -> None:
    import torch

    p = problems.draw(4, b=7, d=4, r=None)
    image, text = (torch.asarray(x).requires_grad_() for x in p.arrays[:2])
    tau = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    mask = torch.asarray(draw_mask(np.random.default_rng(1), 7, "alone"))
    # A class with the logit -inf has the probability 0.
    classes = mask | torch.eye(7, dtype=torch.bool)
    logits, labels = (image @ text.T / tau).masked_fill(~classes, -torch.inf), torch.arange(7)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    loss.backward()
    got = info_nce(image.detach(), text.detach(), temperature=t, pair_mask=mask)
    expected = LossGradients(*(x.detach().numpy() for x in (loss, image.grad, text.grad, tau.grad)))
    check(LossGradients(*(x.numpy() for x in got)), expected, t, 1e-13)


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("t", [1e-4, 0.5])
def test_anchors_without_negatives_contribute_exactly_0(eager_space: Any, t: float, tiled: bool) -> None:
    if tiled and eager_space.name == "jax":
        pytest.skip("compiling for tiles takes JAX long, and another test has masks in JAX's tiles")
    tile_size = 2 if tiled else None
    p = problems.draw(8, b=6, d=3, r=None)
    # Nobody has negatives: loss and gradients are 0, not nan.
    alone = problems.replace(p, temperature=t, pair_mask=np.zeros((6, 6), dtype=bool))
    for value in run(eager_space, alone, tile_size=tile_size):
        assert np.all(value == 0.0)
    # Pair 2 is no negative of another pair and has none: its gradients are 0, and nobody else's depend on it.
    mask = np.ones((6, 6), dtype=bool)
    mask[2] = mask[:, 2] = False
    apart = problems.replace(p, temperature=t, pair_mask=mask)
    result = run(eager_space, apart, tile_size=tile_size)
    assert not np.any(result.image_gradient[2])
    assert not np.any(result.text_gradient[2])
    rest = np.arange(6) != 2
    others = run(eager_space, problems.replace(
        p, temperature=t, image_features=p.image_features[rest], text_features=p.text_features[rest]
    ), tile_size=tile_size)  # fmt: skip
    assert float(result.loss) == pytest.approx(float(others.loss) * 5 / 6, rel=10 * eager_space.unit)
    scale = np.max(np.abs(others.image_gradient))
    np.testing.assert_allclose(
        result.image_gradient[rest], others.image_gradient * 5 / 6, atol=10 * max(1, 0.1 / t) * eager_space.unit * scale
    )


@pytest.mark.parametrize("tile_size", [None, 4])
def test_jitted_and_in_tiles(tile_size: int | None) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    p = problems.draw(3, b=6, d=3, r=None)
    arrays = [jax.numpy.asarray(x) for x in p.arrays[:2]]
    got = jax.jit(lambda e1, e2: info_nce(e1, e2, temperature=0.05, tile_size=tile_size))(*arrays)
    check(LossGradients(*map(np.asarray, got)), oracle_info_nce(*p.arrays[:2], temperature=0.05), 0.05, 1e-12)


@pytest.mark.parametrize("t", [0.01, 0.2, 5.0])
def test_info_nce_is_torchs_cross_entropy(t: float) -> None:
    import torch

    p = problems.draw(4, b=7, d=4, r=None, features="aligned")
    image, text = (torch.asarray(x).requires_grad_() for x in p.arrays[:2])
    tau = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    logits, labels = image @ text.T / tau, torch.arange(7)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    loss.backward()
    got = info_nce(image.detach(), text.detach(), temperature=t)
    expected = LossGradients(*(x.detach().numpy() for x in (loss, image.grad, text.grad, tau.grad)))
    check(LossGradients(*(x.numpy() for x in got)), expected, t, 1e-13)


def test_by_hand() -> None:
    # Two pairs, image 0 = text 0 = (1, 0), image 1 = (0, 1), text 1 = (0.6, 0.8); t = 0.2.
    # S = [[1, 0.6], [0, 0.8]]; logits / t: [[5, 3], [0, 4]].
    image, text = np.array([[1.0, 0], [0, 1]]), np.array([[1.0, 0], [0.6, 0.8]])
    terms = [math.log1p(math.exp(x)) for x in (-2, -4, -5, -1)]  # rows 0, 1; columns 0, 1
    result = info_nce(image, text, temperature=0.2)
    assert result.loss == pytest.approx(sum(terms) / 4, abs=1e-15)
    weights = [1 / (1 + math.exp(-x)) for x in (-2, -4, -5, -1)]
    # d loss / d S_01 = (w_row0 + w_col1) / (4 t), d S_10 = (w_row1 + w_col0) / (4 t), the diagonals the opposite.
    up, down = (weights[0] + weights[3]) / 0.8, (weights[1] + weights[2]) / 0.8
    first, second = (weights[0] + weights[2]) / 0.8, (weights[1] + weights[3]) / 0.8
    expected = np.array([up * text[1] - first * text[0], down * text[0] - second * text[1]])
    np.testing.assert_allclose(result.image_gradient, expected, atol=1e-15)
    expected = np.array([down * image[1] - first * image[0], up * image[0] - second * image[1]])
    np.testing.assert_allclose(result.text_gradient, expected, atol=1e-15)
    slope = -sum(w * D for w, D in zip(weights, (-2, -4, -5, -1), strict=True)) / 4 / 0.2
    assert result.temperature_gradient == pytest.approx(slope, abs=1e-14)


@pytest.mark.parametrize("t", [1e-4, 1e-3])
@pytest.mark.parametrize("features", ["random", "aligned", "opposite", "identical"])
def test_cold_temperatures(eager_space: Any, t: float, features: str) -> None:
    p = problems.replace(problems.draw(5, b=6, d=3, r=None, features=features), temperature=t)
    got, exact = run(eager_space, p), p.rounded(eager_space)
    with mp.workdps(40):
        S = [[mp.fdot(map(mp.mpf, map(float, i)), map(mp.mpf, map(float, j))) for j in exact.text_features]
             for i in exact.image_features]  # fmt: skip
        tau = mp.mpf(exact.temperature)
        loss = slope = mp.mpf(0)
        V = np.zeros((6, 6))
        for matrix, transpose in ((S, False), (list(zip(*S, strict=True)), True)):
            for a, row in enumerate(matrix):
                D = [(s - row[a]) / tau for s in row]
                total = mp.fsum(map(mp.exp, D))
                w = [mp.exp(x) / total for x in D]
                loss += mp.log(total) / 12
                slope -= mp.fsum(x * y for x, y in zip(w, D, strict=True)) / tau / 12
                for j in range(6):
                    V[(j, a) if transpose else (a, j)] += float((w[j] - (j == a)) / tau / 12)
    expected = LossGradients(float(loss), V @ exact.text_features, V.T @ exact.image_features, float(slope))
    check(got, expected, t, eager_space.unit)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_features(half: str) -> None:
    import torch

    dtype = getattr(torch, half)
    p = problems.draw(6, b=6, d=3, r=None)
    image, text = (torch.asarray(x).to(dtype) for x in p.arrays[:2])
    got = info_nce(image, text, temperature=0.1)
    assert got.image_gradient.dtype == got.text_gradient.dtype == dtype
    assert got.loss.dtype == got.temperature_gradient.dtype == torch.float32
    expected = oracle_info_nce(image.double().numpy(), text.double().numpy(), temperature=0.1)
    assert float(got.loss) == pytest.approx(expected.loss, rel=5e-6)
    rounding = torch.finfo(dtype).eps / 2
    for name in ("image_gradient", "text_gradient"):
        wanted = getattr(expected, name)
        error = np.abs(getattr(got, name).double().numpy() - wanted)
        assert np.all(error <= rounding * np.abs(wanted) + 5e-6 / (2 * 6 * 0.1) * 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": [[1.0, 0.0]]}, TypeError, "image_features must be an array, got list"),
        ({"image": np.ones((1, 2)), "text": np.ones((1, 2))}, ValueError, "image_features must hold at least 2 pairs"),
        ({"text": np.ones((3, 3))}, ValueError, r"text_features must have shape .* = \(3, 2\), got \(3, 3\)"),
        ({"text": np.full((3, 2), np.nan)}, ValueError, r"text_features must be finite, got nan at position \(0, 0\)"),
        ({"text": np.ones((3, 2), dtype="f4")}, TypeError, "text_features must have the dtype of image_features"),
        ({"temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
        ({"temperature": np.nan}, ValueError, "temperature must be finite, got nan"),
        ({"temperature": True}, TypeError, "temperature must be a real number, got True"),
        ({"temperature": (np.ones(3), np.ones(3))}, TypeError, "temperature must be a real number, got "),
        ({"temperature": np.ones(3)}, ValueError, r"temperature must be a scalar, got ndarray of shape \(3,\)"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], error: Any, message: str) -> None:
    options = {"image": np.ones((3, 2)), "text": np.ones((3, 2)), "temperature": 0.5, **change}
    with pytest.raises(error, match=message):
        info_nce(options.pop("image"), options.pop("text"), **options)
