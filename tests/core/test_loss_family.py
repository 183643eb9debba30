"""SigLIP, distillation, hinge and weighted sums against loops in long numbers, torch's autograd, and by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import drrho_reference
import mpmath as mp
import numpy as np
import pytest

import drrho_core as dc
from helpers.features import unit_rows

B, D, R = 4, 3, 2
FIELDS = ("loss", "image_gradient", "text_gradient")


class Case(NamedTuple):
    function: Callable[..., Any]
    scalars: dict[str, float]
    formula: Callable[..., Any]
    steepness: float  # how much larger than the features' rounding a loss's may be

    @property
    def arrays(self) -> int:
        return 4 if self.function is dc.distillation_loss else 2


def dot(left: Any, right: Any) -> Any:
    return mp.fsum(x * y for x, y in zip(left, right, strict=True))


def sigmoid_formula(images: Any, texts: Any, scale: Any, bias: Any, mask: Any = None) -> Any:
    total = mp.mpf(0)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            if mask is not None and i != j and not mask[i, j]:
                continue
            y = 1 if i == j else -1
            total -= mp.log(1 / (1 + mp.exp(-y * (scale * dot(image, text) + bias))))
    return total / len(images)


def distillation_formula(images: Any, texts: Any, r1: Any, r2: Any, tau: Any, reference_tau: Any) -> Any:
    b, total = len(images), mp.mpf(0)
    for columns in (False, True):
        for i in range(b):
            p, q = (
                [mp.exp(dot(one[j if columns else i], two[i if columns else j]) / t) for j in range(b)]
                for one, two, t in ((images, texts, tau), (r1, r2, reference_tau))
            )
            total -= mp.fsum(q[j] / mp.fsum(q) * mp.log(p[j] / mp.fsum(p)) for j in range(b))
    return total / (2 * b)


def hinge_formula(images: Any, texts: Any, margin: Any, mask: Any = None) -> Any:
    b, total = len(images), mp.mpf(0)
    for columns in (False, True):
        for anchor in range(b):
            pairs = [(other, anchor) if columns else (anchor, other) for other in range(b) if other != anchor]
            pairs = [pair for pair in pairs if mask is None or mask[pair]]
            own = dot(images[anchor], texts[anchor])
            terms = [max(mp.mpf(0), dot(images[i], texts[j]) - own + margin) ** 2 for i, j in pairs]
            total += mp.fsum(terms) / max(len(terms), 1)
    return total / (2 * b)


CASES = {
    "sigmoid": Case(dc.sigmoid_loss, {"scale": 7.0, "bias": -2.0}, sigmoid_formula, 1.0),
    "sigmoid, steep": Case(dc.sigmoid_loss, {"scale": 900.0, "bias": 3.0}, sigmoid_formula, 100.0),
    "distillation": Case(
        dc.distillation_loss, {"temperature": 0.2, "reference_temperature": 0.5}, distillation_formula, 1.0
    ),
    "distillation, cold": Case(
        dc.distillation_loss, {"temperature": 1e-3, "reference_temperature": 3e-4}, distillation_formula, 300.0
    ),
    "hinge": Case(dc.hinge_margin_loss, {"margin": 0.2}, hinge_formula, 1.0),
    "hinge, wide": Case(dc.hinge_margin_loss, {"margin": 4.0}, hinge_formula, 1.0),
}


# Not symmetric; the second image and the first text have no negatives. What the diagonal says does not matter.
MASK = np.array([[0, 1, 0, 1], [0, 1, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]], dtype=bool)
assert MASK.shape == (B, B)


def thin(space: Any, dtypes: tuple[str, ...] = ("float64", "float32")) -> None:
    """JAX compiles every operation that is not jitted: it is met once so, and jitted for the rest."""
    if space.name == "jax" and space.jit is None and space.dtype_name in dtypes:
        pytest.skip("JAX is met jitted")


def draw(seed: int = 3, b: int = B) -> list[np.ndarray]:
    """Images and texts that match a little, and a reference model of another width."""
    rng = np.random.default_rng(seed)
    images = unit_rows(rng, b, D)
    texts = images + 0.8 * unit_rows(rng, b, D)
    return [images, texts / np.linalg.norm(texts, axis=1, keepdims=True), unit_rows(rng, b, R), unit_rows(rng, b, R)]


@functools.cache
def exact(name: str, dtype: str, masked: bool = False) -> dict[str, Any]:
    """Loss and all gradients of the inputs as `dtype` has them: 60 digits, differences taken over 1e-20."""
    case = CASES[name]
    formula = functools.partial(case.formula, mask=MASK) if masked else case.formula
    rounded = [np.asarray(x, dtype=dtype).astype(np.float64) for x in draw()[: case.arrays]]
    scalars = {key: float(np.asarray(value, dtype=dtype)) for key, value in case.scalars.items()}
    with mp.workdps(60):
        features = [[[mp.mpf(float(x)) for x in row] for row in array] for array in rounded]
        values = [mp.mpf(value) for value in scalars.values()]
        h = mp.mpf("1e-20")

        def slope(place: list[Any], index: int) -> float:
            middle, ends = place[index], []
            for step in (h, -h):
                place[index] = middle + step
                ends.append(formula(*features, *values))
            place[index] = middle
            return float((ends[0] - ends[1]) / (2 * h))

        result: dict[str, Any] = {"loss": float(formula(*features, *values))}
        for side, field in enumerate(FIELDS[1:]):
            result[field] = np.array([[slope(row, k) for k in range(D)] for row in features[side]])
        for index, key in enumerate(scalars):
            result[f"{key}_gradient"] = slope(values, index)
    return result


def given(space: Any, case: Case, as_arrays: bool) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments and scalars in the library."""
    numbers = {key: float(space.rounded(value)) for key, value in case.scalars.items()}
    if as_arrays:
        numbers = {key: space.asarray(np.asarray(value, dtype=space.dtype_name)) for key, value in numbers.items()}
    return [space.asarray(x) for x in draw()[: case.arrays]], numbers


def check(result: Any, expected: dict[str, Any], bound: float, to_numpy: Callable[[Any], Any] = np.asarray) -> None:
    """Every field that is there within `bound` of its largest value; the loss of max(1, loss)."""
    for field in result._fields:
        got, wanted = to_numpy(getattr(result, field)).astype(np.float64), np.asarray(expected[field])
        assert got.shape == wanted.shape, field
        size = max(1.0, float(np.max(np.abs(wanted)))) if wanted.ndim == 0 else float(np.max(np.abs(wanted)))
        error = float(np.max(np.abs(got - wanted)))
        assert error <= bound * size, f"{field}: off by {error:.2e} of {size:.2e}; {got} for {wanted}"


@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_loops(space: Any, name: str) -> None:
    thin(space)
    case = CASES[name]
    arrays, scalars = given(space, case, as_arrays=False)
    result = space.run(case.function, *arrays, **scalars)
    assert result.image_gradient.dtype == result.text_gradient.dtype == arrays[0].dtype
    check(result, exact(name, space.dtype_name), case.steepness * space.unit, space.to_numpy)


@pytest.mark.parametrize("name", ["sigmoid", "distillation", "hinge"])
def test_scalars_may_be_arrays(eager_space: Any, name: str) -> None:
    thin(eager_space, ("float32",))
    case = CASES[name]
    arrays, scalars = given(eager_space, case, as_arrays=True)
    result = case.function(*arrays, **scalars)
    check(result, exact(name, eager_space.dtype_name), eager_space.unit, eager_space.to_numpy)


def torch_values(arrays: list[Any], scalars: dict[str, Any], name: str) -> Any:
    """The three losses as torch's own functions say them."""
    import torch
    from torch.nn import functional

    images, texts = arrays[:2]
    S = images @ texts.T
    eye = torch.eye(len(S), dtype=torch.bool)
    if name == "sigmoid":
        logits = scalars["scale"] * S + scalars["bias"]
        y = 2.0 * eye - 1.0
        return -functional.logsigmoid(y * logits).sum() / len(S)
    if name == "distillation":
        logits, targets = S / scalars["temperature"], arrays[2] @ arrays[3].T / scalars["reference_temperature"]
        both = ((logits, targets), (logits.T, targets.T))
        return sum(functional.cross_entropy(mine, its.softmax(1)) for mine, its in both) / 2
    positive = S.diagonal()
    hinges = [
        functional.relu(S - place + scalars["margin"])[~eye] ** 2 for place in (positive[:, None], positive[None, :])
    ]
    return (hinges[0].mean() + hinges[1].mean()) / 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["sigmoid", "distillation", "hinge"])
def test_gradients_are_autograds(name: str, seed: int) -> None:
    import torch

    case = CASES[name]
    arrays = [torch.asarray(x) for x in draw(seed, b=7)[: case.arrays]]
    leaves = [x.clone().requires_grad_(True) for x in arrays]
    scalars = {key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in case.scalars.items()}
    value = torch_values(leaves, scalars, name)
    value.backward()
    expected = {"loss": value.detach(), "image_gradient": leaves[0].grad, "text_gradient": leaves[1].grad}
    expected |= {f"{key}_gradient": scalar.grad for key, scalar in scalars.items()}
    check(case.function(*arrays, **case.scalars), expected, 1e-13, lambda x: x.numpy())


def test_the_losses_of_the_docstrings_by_hand() -> None:
    # S = [[1, 0.5], [0.2, 0.8]]
    images, texts = np.eye(2), np.array([[1.0, 0.2], [0.5, 0.8]])
    loss = dc.sigmoid_loss(images, texts, scale=10.0, bias=-4.0).loss
    wrong = [-6.0, 1.0, -2.0, -4.0]
    assert loss == pytest.approx(sum(math.log1p(math.exp(x)) for x in wrong) / 2, rel=1e-14)
    hinge = dc.hinge_margin_loss(images, texts, margin=0.4)
    # image anchors: 0.5 - 1, 0.2 - 0.8; text anchors: 0.2 - 1, 0.5 - 0.8 -> only the last comes within 0.4
    assert hinge.loss == pytest.approx(0.1**2 / 4, rel=1e-13)
    # d loss / d S = 2 * 0.1 / 4 * (1 at (0, 1), -1 at (1, 1))
    np.testing.assert_allclose(hinge.image_gradient, 0.05 * np.array([texts[1], -texts[1]]), rtol=1e-12)
    np.testing.assert_allclose(hinge.text_gradient, 0.05 * np.array([[0, 0], [1.0, -1.0]]), rtol=1e-12)


def test_distilling_a_certain_reference_is_info_nce() -> None:
    images, texts = draw(b=6)[:2]
    certain = np.eye(6)
    got = dc.distillation_loss(images, texts, certain, certain, temperature=0.1, reference_temperature=1e-3)
    wanted = dc.info_nce(images, texts, temperature=0.1)
    check(got, wanted._asdict(), 1e-14)


def test_distilling_oneself_has_no_gradient_but_a_loss() -> None:
    images, texts = draw(b=6)[:2]
    got = dc.distillation_loss(images, texts, images, texts, temperature=0.1, reference_temperature=0.1)
    assert got.loss > 0.3  # the entropy
    assert np.all(got.image_gradient == 0)
    assert np.all(got.text_gradient == 0)
    assert got.temperature_gradient == 0


def test_a_well_separated_batch_costs_a_hinge_nothing() -> None:
    got = dc.hinge_margin_loss(np.eye(3), np.eye(3), margin=0.9)
    assert got.loss == 0
    assert not np.any(got.image_gradient)
    assert dc.hinge_margin_loss(np.eye(3), np.eye(3), margin=0.0).loss == 0


# ---------------------------------------------------------------------------------------------------------------------
# Pairs that are no negatives
# ---------------------------------------------------------------------------------------------------------------------

MASKED = ("sigmoid", "sigmoid, steep", "hinge", "hinge, wide")


@pytest.mark.parametrize("name", MASKED)
def test_masked_losses_are_the_loops(space: Any, name: str) -> None:
    # The gradients are differences of the loops, in 60 digits.
    thin(space)
    case = CASES[name]
    arrays, scalars = given(space, case, as_arrays=False)
    result = space.run(
        lambda e1, e2, mask: case.function(e1, e2, pair_mask=mask, **scalars), *arrays, space.asarray(MASK)
    )
    wanted = exact(name, space.dtype_name, masked=True)
    assert wanted["loss"] != exact(name, space.dtype_name)["loss"]
    check(result, wanted, case.steepness * space.unit, space.to_numpy)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("seed", range(3))
def test_masked_losses_are_the_oracles(name: str, seed: int) -> None:
    case, b = CASES[name], 7
    arrays = draw(seed, b=b)[:2]
    mask = np.random.default_rng(seed).uniform(size=(b, b)) < 0.5
    oracle = getattr(drrho_reference, case.function.__name__)
    wanted = oracle(*arrays, pair_mask=mask, **case.scalars)
    got = case.function(*arrays, pair_mask=mask, **case.scalars)
    check(got, {field: getattr(wanted, field) for field in got._fields}, case.steepness * 1e-13)


@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_a_mask_in_tiles(name: str) -> None:
    case, b = CASES[name], 7
    arrays = draw(b=b)[:2]
    mask = np.random.default_rng(4).uniform(size=(b, b)) < 0.5
    dense = case.function(*arrays, pair_mask=mask, **case.scalars)
    for options in ({"tile_size": 1}, {"tile_size": 3}, {"memory_budget": 0}):
        check(case.function(*arrays, pair_mask=mask, **case.scalars, **options), dense._asdict(), 1e-14)
    whole, none = np.ones((b, b), dtype=bool), case.function(*arrays, **case.scalars)
    for full in (whole, whole & ~np.eye(b, dtype=bool)):  # whatever it says of the diagonal
        for options in ({}, {"tile_size": 3}):
            check(case.function(*arrays, pair_mask=full, **case.scalars, **options), none._asdict(), 1e-15)


def test_no_negatives_at_all() -> None:
    images, texts = draw()[:2]
    nothing = np.zeros((B, B), dtype=bool)
    hinge = dc.hinge_margin_loss(images, texts, margin=4.0, pair_mask=nothing)
    assert hinge.loss == 0
    assert not np.any(hinge.image_gradient)
    assert not np.any(hinge.text_gradient)
    positives = dc.sigmoid_loss(images, texts, scale=3.0, bias=-1.0, pair_mask=nothing)
    logits = 3.0 * np.sum(images * texts, axis=1) - 1.0
    assert positives.loss == pytest.approx(np.mean(np.log1p(np.exp(-logits))), rel=1e-14)
    slopes = -1 / (1 + np.exp(logits)) / B
    np.testing.assert_allclose(positives.image_gradient, 3.0 * slopes[:, None] * texts, rtol=1e-13)
    assert positives.bias_gradient == pytest.approx(np.sum(slopes), rel=1e-13)


def test_twins_that_are_masked_are_as_good_as_apart() -> None:
    # Every pair is met as if one of the two had been left out; those of the others are then met twice.
    images, texts = draw()[:2]
    mask = np.ones((B, B), dtype=bool)
    mask[0, 1] = mask[1, 0] = False
    texts[1] = texts[0]
    whole, first, second, rest = (
        len(rows) * dc.sigmoid_loss(images[rows], texts[rows], scale=5.0, bias=0.0, pair_mask=mask[rows][:, rows]).loss
        for rows in ([0, 1, 2, 3], [0, 2, 3], [1, 2, 3], [2, 3])
    )
    assert whole == pytest.approx(first + second - rest, rel=1e-14)


BADLY_MASKED: dict[Any, dict[str, Any]] = {
    dc.sigmoid_loss: {"scale": 1.0, "bias": 0.0},
    dc.hinge_margin_loss: {"margin": 1.0},
    dc.info_nce: {"temperature": 1.0},
}


@pytest.mark.parametrize("function", BADLY_MASKED)
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (MASK[:3], ValueError, r"pair_mask must have shape \(batch_size, batch_size\) = \(4, 4\), got \(3, 4\)"),
        (MASK[0], ValueError, r"pair_mask must have shape .* got \(4,\)"),
        (MASK.astype(float), TypeError, "pair_mask must have dtype bool, got float64"),
        (MASK.tolist(), TypeError, "pair_mask must be an array, got list"),
    ],
)
def test_a_bad_mask_is_refused(function: Any, mask: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        function(*draw()[:2], pair_mask=mask, **BADLY_MASKED[function])


# ---------------------------------------------------------------------------------------------------------------------
# How it is computed
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

NAN = np.where(np.eye(B, D) == 1, np.nan, 1.0)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("sigmoid", {"scale": 0.0}, ValueError, r"scale must be > 0, got 0\.0"),
        ("sigmoid", {"scale": "1"}, TypeError, "scale must be a real number, got '1'"),
        ("sigmoid", {"scale": np.ones(2)}, ValueError, "scale must be a scalar, got ndarray of shape"),
        ("sigmoid", {"bias": math.inf}, ValueError, "bias must be finite, got inf"),
        ("sigmoid", {"bias": np.asarray(np.nan)}, ValueError, "bias must be finite, got nan"),
        ("sigmoid", {"tile_size": 0}, ValueError, "tile_size must be at least 1, got 0"),
        ("hinge", {"margin": -0.1}, ValueError, r"margin must be >= 0, got -0\.1"),
        ("hinge", {"memory_budget": -1}, ValueError, "memory_budget must be at least 0, got -1"),
        ("distillation", {"temperature": -1.0}, ValueError, r"temperature must be > 0, got -1\.0"),
        ("distillation", {"reference_temperature": 0.0}, ValueError, r"reference_temperature must be > 0, got 0\.0"),
        ("hinge", {0: np.ones(3)}, ValueError, r"image_features must have 2 axes \(batch_size, feature_dim\)"),
        ("hinge", {0: NAN}, ValueError, r"image_features must be finite, got nan at position \(0, 0\)"),
        ("sigmoid", {1: NAN}, ValueError, "text_features must be finite, got nan"),
        ("sigmoid", {1: np.ones((B + 1, D))}, ValueError, "text_features must have shape"),
        ("sigmoid", {0: np.ones((1, D)), 1: np.ones((1, D))}, ValueError, "image_features must hold at least 2 pairs"),
        ("distillation", {2: np.ones(B)}, ValueError, r"reference_image must have 2 axes \(batch_size, ref"),
        ("distillation", {2: np.ones((B + 1, R))}, ValueError, r"reference_image must have shape .* got \(5, 2\)"),
        ("distillation", {3: np.ones((B, R + 1))}, ValueError, r"reference_text must have shape .* got \(4, 3\)"),
        ("distillation", {2: np.full((B, R), np.inf)}, ValueError, "reference_image must be finite, got inf"),
        ("distillation", {3: np.ones((B, R), dtype=np.float32)}, TypeError, "reference_text must have the dtype"),
        ("distillation", {3: np.ones((B, R), dtype=int)}, TypeError, "reference_text must have a real floating dtype"),
        ("distillation", {2: [[1.0]]}, TypeError, "reference_image must be an array, got list"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(name: str, change: dict[Any, Any], error: Any, message: str) -> None:
    case = CASES[name]
    arrays, options = draw()[: case.arrays], dict(case.scalars)
    for key, value in change.items():
        if isinstance(key, int):
            arrays[key] = value
        else:
            options[key] = value
    with pytest.raises(error, match=message):
        case.function(*arrays, **options)


def test_what_asks_for_autograd_is_refused() -> None:
    import torch

    arrays = [torch.asarray(x) for x in draw()]
    arrays[2].requires_grad_(True)
    with pytest.raises(ValueError, match="reference_image must not require gradients"):
        dc.distillation_loss(*arrays, temperature=1.0, reference_temperature=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Weighted sums
# ---------------------------------------------------------------------------------------------------------------------


def test_a_weighted_sum_of_everything(space: Any) -> None:
    thin(space)
    arrays = [space.asarray(x) for x in draw()]
    pair = tuple(space.asarray(np.linspace(0.3, 0.6, B) + shift) for shift in (0.0, 0.1))
    state, weight = space.asarray(np.full(B, -np.inf)), space.asarray(np.asarray(0.25, dtype=space.dtype_name))

    def everything(arrays: Any, pair: Any, state: Any, weight: Any) -> Any:
        images, texts = arrays[:2]
        step = dc.contrastive_step(images, texts, state, state, temperature=pair)
        sigmoid = dc.sigmoid_loss(images, texts, scale=5.0, bias=-1.0)
        clip = dc.info_nce(images, texts, temperature=0.4)
        hinge = dc.hinge_margin_loss(images, texts, margin=0.3)
        inner = dc.weighted_sum((0.5, sigmoid), (4.0, clip))
        return (step, sigmoid, clip, hinge), dc.weighted_sum((weight, step), [2.0, inner], (-1.0, hinge))

    terms, total = space.run(everything, arrays, pair, state, weight)
    step, sigmoid, clip, hinge = terms
    weights = (0.25, 1.0, 8.0, -1.0)
    for field in FIELDS:
        wanted = sum(w * space.to_numpy(getattr(term, field)) for w, term in zip(weights, terms, strict=True))
        got = space.to_numpy(getattr(total, field))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=4 * space.unit * np.max(np.abs(wanted)))
    assert total.image_gradient.dtype == arrays[0].dtype
    parameters = total.parameter_gradients
    assert [sorted(own) for own in parameters] == [
        ["temperature_gradient"], ["bias_gradient", "scale_gradient"], ["temperature_gradient"], [],
    ]  # fmt: skip
    for side in (0, 1):
        got = space.to_numpy(parameters[0]["temperature_gradient"][side])
        np.testing.assert_array_equal(got, 0.25 * space.to_numpy(step.temperature_gradient[side]))
    for own, name, factor, term in (
        (1, "scale_gradient", 1.0, sigmoid), (1, "bias_gradient", 1.0, sigmoid), (2, "temperature_gradient", 8.0, clip)
    ):  # fmt: skip
        assert float(parameters[own][name]) == pytest.approx(factor * float(getattr(term, name)), rel=1e-6)
    assert hinge._fields == FIELDS


def test_a_weighted_sum_of_half_types_is_summed_in_float32() -> None:
    import torch

    arrays = [torch.asarray(x).to(torch.float16) for x in draw()]
    term = dc.hinge_margin_loss(*arrays[:2], margin=1.0)
    total = dc.weighted_sum(*[(0.01, term)] * 100)
    assert total.loss.dtype == torch.float32
    assert total.image_gradient.dtype == torch.float16
    torch.testing.assert_close(total.image_gradient, term.image_gradient, rtol=2e-3, atol=1e-4)


def hinge(b: int = B, dtype: Any = np.float64) -> Any:
    return dc.hinge_margin_loss(*(x.astype(dtype) for x in draw(b=b)[:2]), margin=1.0)


@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ((), ValueError, "weighted_sum must get at least one pair"),
        ((hinge(),), TypeError, r"terms\[0\] must be a pair \(weight, result\), got FeatureGradients"),
        (((1.0, hinge()), 3.0), TypeError, r"terms\[1\] must be a pair \(weight, result\), got 3\.0"),
        (((1.0, 2.0),), TypeError, r"terms\[0\]\[1\] must be a named tuple with loss, image_gradient and .*, got 2\.0"),
        (((math.nan, hinge()),), ValueError, r"terms\[0\]\[0\] must be finite, got nan"),
        ((("1", hinge()),), TypeError, r"terms\[0\]\[0\] must be a real number, got '1'"),
        (((1.0, hinge()), (1.0, hinge(b=5))), ValueError, r"1\]\.image_gradient must have shape .* = \(4, 3\)"),
        (((1.0, hinge()), (1.0, hinge(dtype=np.float32))), TypeError, r"1\]\.image_gradient must have the dtype"),
    ],
)  # fmt: skip
def test_bad_terms_get_one_clear_error(terms: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        dc.weighted_sum(*terms)
