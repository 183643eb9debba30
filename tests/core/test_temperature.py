"""Learned temperatures: slopes against differences and the KL ball, updates against Adam and recorded figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_api_compat import device as device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from drrho_core import (
    GlobalTemperature,
    KLBall,
    PerSampleTemperature,
    TemperatureRows,
    contrastive_step,
    info_nce,
    log_inner_from_libauc_v2,
    update_global_temperature,
    update_temperature_rows,
    worst_case,
)
from helpers import problems
from helpers.temperatures import made, tables

NEVER = -np.inf
_JITTED: dict[Any, Any] = {}


def jitted(space: Any, key: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, jitted over its arrays where the space is: once per key, because XLA compiles slowly."""
    if space.jit is None:
        return function
    return _JITTED.setdefault((space.name, space.dtype_name, key), space.jit(function))


def numbers(space: Any, state: Any) -> list[np.ndarray]:
    return [np.asarray(space.to_numpy(array)).astype(np.float64) for array in state]


@given(seed=st.integers(0, 2**32 - 1), radius=st.sampled_from([0.0, 0.7, 3.0]), masked=st.booleans())
@settings(max_examples=15)
def test_gradient_matches_differences_of_the_objective(seed: int, radius: float, masked: bool) -> None:
    """Central differences of the loss without memory: per anchor, and their sum for a global temperature."""
    p = problems.draw(
        seed, per_anchor_temperature=True, gamma="one", radius=radius, eps=0.05, mask="empty" if masked else None
    )

    def loss(temperature: Any) -> float:
        return float(contrastive_step(*p.arrays, **(p.options | {"temperature": temperature})).loss)

    found = contrastive_step(*p.arrays, **p.options).temperature_gradient
    h = 1e-5
    for side in (0, 1):
        for anchor in range(p.batch_size):
            moved = [[t.copy() for t in p.temperature] for _ in range(2)]
            for sign, one in zip((1, -1), moved, strict=True):
                one[side][anchor] += sign * h
            slope = (loss(tuple(moved[0])) - loss(tuple(moved[1]))) / (2 * h)
            assert found[side][anchor] == pytest.approx(slope, abs=2e-7)
    together = contrastive_step(*p.arrays, **(p.options | {"temperature": 0.4})).temperature_gradient
    assert float(together) == pytest.approx((loss(0.4 + h) - loss(0.4 - h)) / (2 * h), abs=2e-7)


@given(seed=st.integers(0, 2**32 - 1), radius=st.floats(0.05, 0.9))
@settings(max_examples=30)
def test_best_temperature_is_the_dual_price_of_the_kl_ball(seed: int, radius: float) -> None:
    """Minimised over its temperature, an anchor's part of the objective is the risk of its pair losses over a ball."""
    p = problems.draw(seed, b=6, gamma="one", per_anchor_temperature=True, radius=radius, never=1.0)
    Z = p.image_features @ p.text_features.T - p.reference_features[0] @ p.reference_features[1].T
    off = ~np.eye(6, dtype=bool)
    sides = [
        (matrix - np.diag(matrix)[:, None])[off].reshape(6, 5)  # pair losses: those of anchor i in row i
        for matrix in (Z, Z.T)
    ]
    balls = [worst_case(x, KLBall(radius)) for x in sides]
    for x, ball in zip(sides, balls, strict=True):
        for losses, risk, price in zip(x, ball.risk, ball.dual[1], strict=True):

            def part(log_t: float, losses: np.ndarray = losses) -> float:
                t, top = np.exp(log_t), losses.max()
                return float(top + t * (np.log(np.mean(np.exp((losses - top) / t))) + radius))

            best = minimize_scalar(part, bounds=(np.log(price) - 3, np.log(price) + 3), method="bounded")
            assert best.fun == pytest.approx(risk, abs=1e-9)
            assert np.exp(best.x) == pytest.approx(price, rel=1e-2)  # a flat minimum
    # There the slope is 0, below it negative, above it positive.
    for factor, sign in ((1.0, 0.0), (0.9, -1.0), (1.1, 1.0)):
        temperature = tuple(factor * ball.dual[1] for ball in balls)
        step = contrastive_step(*p.arrays, **(p.options | {"temperature": temperature}))
        slopes = 2 * 6 * np.concatenate(step.temperature_gradient)
        assert np.all(np.abs(slopes) < 1e-9) if sign == 0.0 else np.all(np.sign(slopes) == sign)
    # And what the objective is worth there is the mean of all risks.
    step = contrastive_step(*p.arrays, **(p.options | {"temperature": tuple(ball.dual[1] for ball in balls)}))
    assert float(step.loss) == pytest.approx(np.mean([ball.risk for ball in balls]), abs=1e-12)


@given(seed=st.integers(0, 2**32 - 1), radius=st.sampled_from([0.0, 0.3, 1.0, np.log(4), 2.0]))
@settings(max_examples=30)
def test_slope_is_radius_minus_divergence_of_the_weights(seed: int, radius: float) -> None:
    """So at radius 0 a temperature only rises, and from the logarithm of the number of negatives on it only falls."""
    p = problems.draw(seed, b=5, gamma="one", per_anchor_temperature=True, radius=radius)
    slopes = 10 * np.concatenate(contrastive_step(*p.arrays, **p.options).temperature_gradient)
    assert np.all(slopes <= radius + 1e-12)
    assert np.all(slopes >= radius - np.log(4) - 1e-12)
    Z = p.image_features @ p.text_features.T - p.reference_features[0] @ p.reference_features[1].T
    weights = np.exp(Z[0, 1:] / p.temperature[0][0])
    weights /= weights.sum()
    assert slopes[0] == pytest.approx(radius - np.sum(weights * np.log(4 * weights)), abs=1e-12)


def adam(gradients: list[float], rate: float, low: float, high: float, slow_below: float | None) -> list[list[float]]:
    """Adam as its paper writes it, in Python numbers."""
    tau, m, v, states = 0.07, 0.0, 0.0, []
    for k, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        used = rate / 3 if slow_below is not None and tau <= slow_below else rate
        tau -= used * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)) ** 0.5 + 1e-8)
        tau = min(max(tau, low), high)
        states.append([tau, m, v, k])
    return states


@pytest.mark.parametrize("slow_below", [None, 0.06])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=5)
def test_a_global_temperature_follows_adam(space: Any, seed: int, slow_below: float | None) -> None:
    rng = np.random.default_rng(seed)
    gradients = space.rounded(rng.normal(rng.normal(), 1.0, size=12)).tolist()
    step = jitted(
        space,
        ("global", slow_below),
        lambda state, g, rate: update_global_temperature(
            state, g, learning_rate=rate, minimum=0.03, maximum=0.1, slow_below=slow_below, xp=space.xp
        ),
    )
    state = GlobalTemperature(0.07, like=space.asarray(np.zeros(1))).state
    rate = float(space.rounded(0.011))
    for g, expected in zip(gradients, adam(gradients, rate, 0.03, 0.1, slow_below), strict=True):
        state = step(state, *(space.asarray(np.asarray(x, dtype=space.dtype_name)) for x in (g, rate)))
        np.testing.assert_allclose(np.stack(numbers(space, state)), expected, rtol=0, atol=4 * space.unit)
        assert [array.dtype for array in state] == [space.dtype] * 3 + [space.xp.int32]
        assert all(tuple(array.shape) == () for array in state)


def test_global_temperature_matches_adam_of_torch() -> None:
    import torch

    theirs = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.99))
    ours = GlobalTemperature(0.3, like=np.zeros(1), beta1=0.8, beta2=0.99)
    for g in (1.0, -0.25, 0.5, 0.5, -3.0):
        theirs.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        ours = ours.update(g, learning_rate=0.01)
        assert float(ours.temperature) == pytest.approx(theirs.item(), rel=1e-14)


def test_a_global_temperature_stops_at_its_bounds(eager_space: Any) -> None:
    learned = GlobalTemperature(0.07, like=eager_space.asarray(np.zeros(1)), minimum=0.05, maximum=0.08)
    for gradient, bound in ((3.0, 0.05), (-50.0, 0.08)):
        for _ in range(12):
            learned = learned.update(gradient, learning_rate=0.005)
        assert float(learned.temperature) == float(eager_space.rounded(bound))
    learned = learned.update(50.0, learning_rate=0.0)
    assert float(learned.temperature) == float(eager_space.rounded(0.08))  # a rate of 0 moves nothing


def test_an_update_leaves_the_old_object_unchanged(eager_space: Any) -> None:
    old = GlobalTemperature(0.07, like=eager_space.asarray(np.zeros(1)))
    new = old.update(1.0, learning_rate=0.01)
    assert numbers(eager_space, old.state) == [float(eager_space.rounded(0.07)), 0, 0, 0]
    assert float(new.temperature) < 0.0601
    assert int(new.state.step) == 1
    assert device_of(new.temperature) == device_of(old.temperature)


def test_learned_temperature_makes_the_divergence_equal_the_radius() -> None:
    p = problems.draw(3, b=8, gamma="one", never=1.0, radius=0.4)
    learned = GlobalTemperature(0.9, like=p.image_features)
    for k in range(300):
        step = contrastive_step(*p.arrays, **(p.options | {"temperature": learned.temperature}))
        learned = learned.update(step.temperature_gradient, learning_rate=0.02 / (1 + k / 10))
    assert abs(float(step.temperature_gradient)) < 1e-3
    assert 0.02 < float(learned.temperature) < 0.9


def test_global_temperature_learns_from_the_gradient_of_info_nce() -> None:
    p = problems.draw(1)
    learned = GlobalTemperature(0.07, like=p.image_features)
    plain = info_nce(p.image_features, p.text_features, temperature=learned.temperature)
    moved = learned.update(plain.temperature_gradient, learning_rate=0.01)
    assert float(moved.temperature) == pytest.approx(0.07 - 0.01 * np.sign(float(plain.temperature_gradient)))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=5)
def test_rows_follow_the_momentum_formula(space: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slopes = space.rounded(rng.normal(size=(6, 4)) * 3)
    step = jitted(
        space,
        "rows",
        lambda rows, slope, rate: update_temperature_rows(
            rows, slope, learning_rate=rate, minimum=0.03, maximum=0.5, beta=0.25, xp=space.xp
        ),
    )
    rows = TemperatureRows(space.asarray(np.full(4, 0.2)), space.asarray(np.zeros(4)))
    t, m = space.rounded(np.full(4, 0.2)), np.zeros(4)
    for slope in slopes:
        rows = step(rows, space.asarray(slope), space.asarray(np.asarray(0.05, dtype=space.dtype_name)))
        m = 0.75 * m + 0.25 * slope
        t = np.clip(t - 0.05 * m, 0.03, 0.5)
        np.testing.assert_allclose(np.stack(numbers(space, rows)), [t, m], rtol=0, atol=8 * space.unit)
        assert [array.dtype for array in rows] == [space.dtype] * 2


def test_temperatures_per_sample_match_libauc() -> None:
    """LibAUC's iSogCLR, recorded: the whole tables of temperatures and momenta after each of five batches."""
    z = np.load(Path(__file__).parents[1] / "data" / "peers" / "libauc_v2_isogclr_f64.npz")
    learned = PerSampleTemperature(
        64, 0.1, like=np.zeros(1), minimum=z["hp_tau_min"].item(), maximum=z["hp_tau_max"].item(), beta=0.9
    )
    old = [np.full(64, NEVER)] * 2
    for k, index in enumerate(z["index"]):
        # A first visit in a batch with known samples: there the estimate is gamma times the batch's own.
        rows = [np.maximum(side[index], -1e4) for side in old]
        gamma = tuple(np.full(16, 1.0 if np.all(side[index] == NEVER) else 0.7) for side in old)
        step = contrastive_step(
            z["feat1"][k], z["feat2"][k], *rows, temperature=learned.gather(index), gamma=gamma, radius=6.0
        )
        learned = learned.update(index, step.temperature_gradient, learning_rate=0.01)
        for side, name in (("image", "img"), ("text", "txt")):
            temperatures, momenta = (getattr(learned, f"{what}_{side}") for what in ("temperature", "momentum"))
            np.testing.assert_allclose(temperatures, z[f"out_learnable_tau_{name}"][k, :, 0], rtol=0, atol=1e-13)
            np.testing.assert_allclose(momenta, z[f"out_grad_tau_{name}"][k, :, 0], rtol=0, atol=1e-12)
        old = [log_inner_from_libauc_v2(z[f"out_u{side}"][k], z[f"out_b{side}"][k]) for side in (1, 2)]
    assert len(np.unique(learned.temperature_image)) > 20
    assert learned.temperature_image.min() == 0.005  # some have met their bound


def test_update_of_a_row_does_not_depend_on_the_batch_size() -> None:
    """Two batches as one, each of which sees only itself: the slopes are the same, the mean's 1/2b is half as large."""
    p = problems.draw(5, b=4, r=None, gamma="one", temperature=(0.2, 0.2), radius=0.3)
    twice = [np.concatenate([array, array]) for array in p.arrays]
    mask = np.kron(np.eye(2, dtype=bool), np.ones((4, 4), dtype=bool))
    one, two = PerSampleTemperature(8, 0.2, like=twice[0]), PerSampleTemperature(8, 0.2, like=twice[0])
    options = {"radius": 0.3}
    small = contrastive_step(*p.arrays, temperature=one.gather(np.arange(4)), **options)
    large = contrastive_step(*twice, temperature=two.gather(np.arange(8)), pair_mask=mask, **options)
    one = one.update(np.arange(4), small.temperature_gradient, learning_rate=0.01)
    two = two.update(np.arange(8), large.temperature_gradient, learning_rate=0.01)
    for name in ("temperature_image", "temperature_text"):
        moved = getattr(one, name)[:4]
        assert np.all(np.abs(moved - 0.2) > 1e-5)
        np.testing.assert_allclose(getattr(two, name), np.tile(moved, 2), rtol=1e-12)


def test_only_the_rows_of_the_batch_change(eager_space: Any) -> None:
    learned = made(eager_space, beta=0.5)
    start = float(eager_space.rounded(0.07))
    for name, slopes in (("image", [0.6, -1.2, 1.8]), ("text", [-2.4, 3.0, -3.6])):
        temperature, momentum = (
            eager_space.to_numpy(getattr(learned, f"{x}_{name}")) for x in ("temperature", "momentum")
        )
        np.testing.assert_allclose(momentum[[5, 0, 2]], 0.5 * np.array(slopes), rtol=1e-6)
        np.testing.assert_allclose(temperature[[5, 0, 2]], 0.07 - 0.005 * np.array(slopes), rtol=1e-6)
        assert temperature[[1, 3, 4, 6]].tolist() == [start] * 4
        assert momentum[[1, 3, 4, 6]].tolist() == [0.0] * 4
        assert temperature.dtype == eager_space.dtype_name
    image, text = learned.gather(eager_space.asarray(np.array([2, 6])))
    assert eager_space.to_numpy(image).tolist() == [tables(eager_space, learned)["temperature_image"][2], start]
    assert eager_space.to_numpy(text).tolist() == [tables(eager_space, learned)["temperature_text"][2], start]
    assert device_of(image) == device_of(eager_space.asarray(np.zeros(1)))


def test_a_gathered_batch_is_a_copy() -> None:
    learned = PerSampleTemperature(4, 0.07, like=np.zeros(1))
    image, _ = learned.gather(np.array([0, 1]))
    learned.update(np.array([0, 1]), (np.ones(2), np.ones(2)), learning_rate=0.01)
    assert image.tolist() == [0.07, 0.07]


def test_rows_stop_at_their_bounds(eager_space: Any) -> None:
    learned = made(eager_space, minimum=0.05, maximum=0.08)
    index, ones = eager_space.asarray(np.array([5, 0])), eager_space.asarray(np.ones(2))
    for sign, bound in ((1.0, 0.05), (-1.0, 0.08)):
        for _ in range(8):
            learned = learned.update(index, (sign * ones, sign * ones), learning_rate=0.1)
        for side in learned.gather(index):
            assert eager_space.to_numpy(side).tolist() == [float(eager_space.rounded(bound))] * 2


def test_grow_keeps_rows_and_appends_rows_with_the_first_value(eager_space: Any) -> None:
    learned = made(eager_space)
    before = tables(eager_space, learned)
    grown = learned.grow(9)
    assert (learned.num_samples, grown.num_samples) == (7, 9)
    for name, values in tables(eager_space, grown).items():
        fresh = float(eager_space.rounded(0.07)) if name.startswith("temperature") else 0.0
        assert values == before[name] + [fresh, fresh]
        assert getattr(grown, name).dtype == eager_space.dtype
    assert grown.grow(9).num_samples == 9
    with pytest.raises(ValueError, match="num_samples must be at least 9, got 8"):
        grown.grow(8)
