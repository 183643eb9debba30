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
    GlobalTemperatureState,
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
from drrho_core.state.temperatures import SCHEMES, make_temperature
from helpers import problems

NEVER = -np.inf
ROWS = ("temperature_image", "temperature_text", "momentum_image", "momentum_text")
_JITTED: dict[Any, Any] = {}


def jitted(space: Any, key: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, jitted over its arrays where the space is: once per key, because XLA compiles slowly."""
    if space.jit is None:
        return function
    return _JITTED.setdefault((space.name, space.dtype_name, key), space.jit(function))


def numbers(space: Any, state: Any) -> list[np.ndarray]:
    return [np.asarray(space.to_numpy(array)).astype(np.float64) for array in state]


# ---------------------------------------------------------------------------------------------------------------------
# The gradient with respect to the temperature
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# One temperature
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# One per sample
# ---------------------------------------------------------------------------------------------------------------------


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


def made(space: Any, n: int = 7, **options: Any) -> PerSampleTemperature:
    """Return temperatures whose rows all differ, after a batch of three samples."""
    learned = PerSampleTemperature(n, 0.07, like=space.asarray(np.zeros(1)), **options)
    gradient = space.asarray(np.array([0.1, -0.2, 0.3])), space.asarray(np.array([-0.4, 0.5, -0.6]))
    return learned.update(space.asarray(np.array([5, 0, 2])), gradient, learning_rate=0.01)


def tables(space: Any, learned: PerSampleTemperature) -> dict[str, list[float]]:
    return {name: space.to_numpy(getattr(learned, name)).tolist() for name in ROWS}


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


# ---------------------------------------------------------------------------------------------------------------------
# Compiled
# ---------------------------------------------------------------------------------------------------------------------


def test_the_updates_compile_into_one_graph() -> None:
    import array_api_compat.torch as xp
    import torch

    torch.compiler.reset()

    def both(state: Any, rows: Any, gradient: Any, slope: Any, rate: Any) -> Any:
        return (
            update_global_temperature(state, gradient, learning_rate=rate, slow_below=0.5, xp=xp),
            update_temperature_rows(rows, slope, learning_rate=rate, xp=xp),
        )

    state = GlobalTemperature(0.07, like=torch.zeros(1)).state
    rows = TemperatureRows(torch.full((3,), 0.07), torch.zeros(3))
    arguments = state, rows, torch.tensor(0.5), torch.tensor([1.0, -2.0, 0.3]), torch.tensor(0.01)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(compiled, both(*arguments), strict=True):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    torch.compiler.reset()


def test_a_whole_step_compiles_under_jax_jit() -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    p = problems.draw(2, gamma="one", radius=0.5)
    arrays = [jax.numpy.asarray(array) for array in p.arrays]

    def train(state: GlobalTemperatureState, arrays: Any) -> GlobalTemperatureState:
        step = contrastive_step(*arrays, temperature=state.temperature, radius=0.5)
        return update_global_temperature(state, step.temperature_gradient, learning_rate=0.01)

    state = GlobalTemperature(0.07, like=arrays[0]).state
    with jax.transfer_guard("disallow"):
        moved = jax.jit(train)(state, arrays)
    assert float(moved.temperature) == pytest.approx(float(train(state, arrays).temperature), rel=1e-12)
    assert float(moved.temperature) != 0.07


def test_a_bad_gradient_becomes_nan_under_tracing() -> None:
    import jax

    state = GlobalTemperature(0.07, like=jax.numpy.zeros(1)).state
    step = jax.jit(lambda state, g: update_global_temperature(state, g, learning_rate=0.1))
    assert np.isnan(float(step(state, jax.numpy.asarray(np.nan)).temperature))


# ---------------------------------------------------------------------------------------------------------------------
# One interface
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_training_loop_treats_all_temperatures_alike(eager_space: Any, scheme: str) -> None:
    like = eager_space.asarray(np.zeros(1))
    options: dict[str, Any] = {"num_samples": 5, "like": like, "minimum": 0.05, "maximum": 0.4}
    index = eager_space.asarray(np.array([4, 0, 2]))
    slopes = eager_space.asarray(np.array([0.3, -0.1, 0.2])), eager_space.asarray(np.array([-0.2, 0.1, 0.4]))
    gradient: Any = {"fixed": None, "global": eager_space.asarray(np.asarray(0.7)), "per_sample": slopes}[scheme]
    learned = make_temperature(scheme, 0.2, **options)
    moved = learned.after_batch(index, gradient, learning_rate=0.01)
    plain: Any = {
        "fixed": lambda: 0.2,
        "global": lambda: (
            GlobalTemperature(0.2, like=like, minimum=0.05, maximum=0.4)
            .update(gradient, learning_rate=0.01)
            .temperature
        ),
        "per_sample": lambda: (
            PerSampleTemperature(5, 0.2, like=like, minimum=0.05, maximum=0.4)
            .update(index, gradient, learning_rate=0.01)
            .gather(index)
        ),
    }[scheme]()
    got = moved.for_batch(index)
    pairs = zip(got, plain, strict=True) if scheme == "per_sample" else [(got, plain)]
    for one, other in pairs:
        if scheme == "fixed":
            assert one == other == 0.2
        else:
            assert eager_space.to_numpy(one).tolist() == eager_space.to_numpy(other).tolist()
    assert moved.learned == (scheme != "fixed")
    again = make_temperature(scheme, 0.3, **options)
    again.load_state_dict(moved.state_dict())
    assert list(again.state_dict()) == list(moved.state_dict())
    if scheme != "fixed":
        for name, array in moved.state_dict().items():
            assert eager_space.to_numpy(again.state_dict()[name]).tolist() == eager_space.to_numpy(array).tolist()


def test_bad_schemes_and_states_of_a_fixed_temperature_are_refused() -> None:
    options: dict[str, Any] = {"num_samples": 5, "like": np.zeros(1)}
    with pytest.raises(ValueError, match="scheme must be one of fixed, global, per_sample, got 'warm'"):
        make_temperature("warm", 0.2, **options)
    with pytest.raises(ValueError, match=r"temperature must be > 0, got 0\.0"):
        make_temperature("fixed", 0.0, **options)
    with pytest.raises(ValueError, match=r"state must be empty for a fixed temperature, got \['version'\]"):
        make_temperature("fixed", 0.2, **options).load_state_dict({"version": np.asarray(1)})


# ---------------------------------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------------------------------


def learned_ones(space: Any) -> list[tuple[Any, Any]]:
    """Return a learned temperature of both classes, each with a fresh object of the class."""
    like = space.asarray(np.zeros(1))
    return [
        (GlobalTemperature(0.07, like=like).update(0.5, learning_rate=0.01), GlobalTemperature(0.5, like=like)),
        (made(space), PerSampleTemperature(7, 0.5, like=like)),
    ]


def test_state_survives_a_round_trip(eager_space: Any) -> None:
    for learned, fresh in learned_ones(eager_space):
        saved = learned.state_dict()
        names = {"version", *(GlobalTemperatureState._fields if "step" in saved else ROWS)}
        assert set(saved) == names
        assert int(saved["version"]) == 1
        fresh.load_state_dict(saved)
        again = fresh.state_dict()
        for name in names:
            assert eager_space.to_numpy(again[name]).tolist() == eager_space.to_numpy(saved[name]).tolist()
            assert again[name].dtype == saved[name].dtype


def test_a_saved_state_is_a_copy(eager_space: Any) -> None:
    index, ones = eager_space.asarray(np.array([5, 0])), eager_space.asarray(np.ones(2))
    learned = made(eager_space)
    saved = learned.state_dict()
    before = {name: eager_space.to_numpy(array).tolist() for name, array in saved.items()}
    learned = learned.update(index, (ones, ones), learning_rate=0.01)
    assert {name: eager_space.to_numpy(array).tolist() for name, array in saved.items()} == before
    learned.load_state_dict(saved)
    learned.update(index, (ones, ones), learning_rate=0.01)
    assert {name: eager_space.to_numpy(array).tolist() for name, array in saved.items()} == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: [], TypeError, "state must be a mapping, got list"),
        (lambda s: {name: s[name] for name in ROWS}, ValueError, "state must hold version, temperature_image, .* got"),
        (lambda s: s | {"step": s["version"]}, ValueError, "state must hold version, .* and nothing else"),
        (lambda s: s | {"version": np.asarray(2)}, ValueError, "version must be 1, got 2"),
        (lambda s: s | {"momentum_text": np.zeros(6)}, ValueError, r"momentum_text must have shape .* got \(6,\)"),
        (lambda s: s | {"momentum_text": np.zeros(7, "f4")}, TypeError, "momentum_text must have dtype float64, got"),
        (lambda s: s | {"temperature_image": np.zeros(7)}, ValueError, "temperature_image must be finite and > 0, got"),
        (lambda s: s | {"momentum_image": np.full(7, np.nan)}, ValueError, "momentum_image must be finite, got nan"),
        (lambda s: s | {"momentum_image": [0.0] * 7}, TypeError, "momentum_image must be an array, got list"),
    ],
)
def test_a_foreign_state_changes_nothing(change: Any, error: Any, message: str) -> None:
    learned = PerSampleTemperature(7, 0.07, like=np.zeros(1))
    learned.update(np.arange(3), (np.ones(3), np.ones(3)), learning_rate=0.01)
    before = {name: getattr(learned, name).tolist() for name in ROWS}
    with pytest.raises(error, match=message):
        learned.load_state_dict(change(learned.state_dict()))
    assert {name: getattr(learned, name).tolist() for name in ROWS} == before
    single = GlobalTemperature(0.07, like=np.zeros(1))
    with pytest.raises((ValueError, TypeError), match="second_moment must be >= 0, got -1"):
        single.load_state_dict(single.state_dict() | {"second_moment": np.asarray(-1.0)})
    assert float(single.state.second_moment) == 0.0


def test_the_state_is_float32_or_wider(eager_space: Any) -> None:
    xp = eager_space.xp
    for kind in (lambda **o: GlobalTemperature(0.1, **o), lambda **o: PerSampleTemperature(2, 0.1, **o)):
        like = eager_space.asarray(np.zeros(1))
        assert str(like.dtype) in repr(kind(like=like))
        assert "float64" in repr(kind(like=like, dtype=xp.float64))
        assert "float32" in repr(kind(like=eager_space.asarray(np.zeros(1, dtype=np.int64))))
        with pytest.raises(TypeError, match="dtype must be float32 or wider, got"):
            kind(like=like, dtype=xp.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


BOUNDS: list[tuple[dict[str, Any], Any, str]] = [
    ({"temperature": 0.0}, ValueError, r"temperature must be in \[minimum, maximum\] = \[0\.01, 1\.0\], got 0\.0"),
    ({"temperature": 1.5}, ValueError, r"temperature must be in .* got 1\.5"),
    ({"temperature": np.nan}, ValueError, "temperature must be finite, got nan"),
    ({"temperature": "warm"}, TypeError, "temperature must be a real number, got 'warm'"),
    ({"minimum": 0.0}, ValueError, r"minimum must be > 0, got 0\.0"),
    ({"maximum": 0.001}, ValueError, r"maximum must be at least minimum \(0\.01\), got 0\.001"),
    ({"maximum": np.inf}, ValueError, "maximum must be finite, got inf"),
    ({"like": 0.0}, TypeError, "like must be an array, got float"),
]


@pytest.mark.parametrize(("options", "error", "message"), BOUNDS)
def test_both_classes_refuse_arguments_outside_their_domain(options: dict[str, Any], error: Any, message: str) -> None:
    given = {"temperature": 0.07, "like": np.zeros(1)} | options
    with pytest.raises(error, match=message):
        GlobalTemperature(**given)
    with pytest.raises(error, match=message):
        PerSampleTemperature(5, **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GlobalTemperature(0.1, like=np.zeros(1), slow_below=0.0), r"slow_below must be > 0, got 0\.0"),
        (lambda: GlobalTemperature(0.1, like=np.zeros(1), beta1=1.0), r"beta1 must be in \[0, 1\), got 1\.0"),
        (lambda: GlobalTemperature(0.1, like=np.zeros(1), beta2=-0.1), r"beta2 must be in \[0, 1\), got -0\.1"),
        (lambda: PerSampleTemperature(0, 0.1, like=np.zeros(1)), "num_samples must be at least 1, got 0"),
        (lambda: PerSampleTemperature(3, 0.1, like=np.zeros(1), beta=0.0), r"beta must be in \(0, 1\], got 0\.0"),
    ],
)
def test_each_class_refuses_its_own_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("gradient", "rate", "error", "message"),
    [
        (np.nan, 0.1, ValueError, "gradient must be finite, got nan"),
        (np.asarray(np.inf), 0.1, ValueError, "gradient must be finite, got inf"),
        (np.zeros(1), 0.1, ValueError, "gradient must be a scalar, got ndarray"),
        ((np.zeros(2), np.zeros(2)), 0.1, TypeError, "gradient must be a real number, got"),
        (1.0, -0.1, ValueError, r"learning_rate must be >= 0, got -0\.1"),
        (1.0, np.nan, ValueError, "learning_rate must be finite, got nan"),
    ],
)
def test_a_bad_step_of_a_global_temperature_is_refused(gradient: Any, rate: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        GlobalTemperature(0.1, like=np.zeros(1)).update(gradient, learning_rate=rate)


def test_a_bad_step_changes_nothing(eager_space: Any) -> None:
    learned = made(eager_space)
    before = tables(eager_space, learned)
    index = eager_space.asarray(np.array([1, 4]))
    one, two = (eager_space.asarray(np.ones(size)) for size in (1, 2))
    bad: list[tuple[Any, Any, float, Any, str]] = [
        (index, (two, one), 0.1, ValueError, r"gradient\[1\] must have shape \(batch_size,\) = \(2,\), got \(1,\)"),
        (index, two, 0.1, TypeError, r"gradient must be a pair \(image, text\) of arrays, got"),
        (index, (two, [1.0, 1.0]), 0.1, TypeError, r"gradient\[1\] must be an array, got list"),
        (index, (index, two), 0.1, TypeError, r"gradient\[0\] must have a real floating dtype"),
        (index, (two, two), -0.1, ValueError, r"learning_rate must be >= 0, got -0\.1"),
        (two, (two, two), 0.1, TypeError, "sample_index must have an integer dtype"),
    ]
    if "device1" not in str(device_of(two)):  # values are looked at on the host
        nan = eager_space.asarray(np.array([0.0, np.nan]))
        twice, outside = (eager_space.asarray(np.array(values)) for values in ([3, 3], [0, 7]))
        bad += [
            (index, (two, nan), 0.1, ValueError, r"gradient\[1\] must be finite, got nan at position 1"),
            (twice, (two, two), 0.1, ValueError, "sample_index must not repeat an index within a batch, got 3 twice"),
            (
                outside,
                (two, two),
                0.1,
                ValueError,
                r"sample_index must hold row ids from 0 to 6 \(see docs/large-data\.md, .*\), got 7",
            ),
        ]
    for at, gradient, rate, error, message in bad:
        with pytest.raises(error, match=message):
            learned.update(at, gradient, learning_rate=rate)
    assert tables(eager_space, learned) == before


def test_autograd_and_foreign_libraries_are_refused() -> None:
    import torch

    learned = PerSampleTemperature(4, 0.1, like=torch.zeros(1))
    index, fine = torch.arange(2), torch.zeros(2)
    with pytest.raises(ValueError, match=r"gradient\[1\] must not require gradients"):
        learned.update(index, (fine, torch.zeros(2, requires_grad=True)), learning_rate=0.1)
    with pytest.raises(TypeError, match=r"gradient\[0\] must come from the library of the state \(torch\)"):
        learned.update(index, (np.zeros(2), fine), learning_rate=0.1)
    with pytest.raises(TypeError, match="gradient must come from the library"):
        GlobalTemperature(0.1, like=torch.zeros(1)).update(np.asarray(0.5), learning_rate=0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": (np.zeros(3), np.zeros(2))}, ValueError, r"rows\.momentum must have shape .* = \(3,\), got \(2,\)"),
        ({"rows": (np.zeros((3, 1)), np.zeros(3))}, ValueError, r"rows\.temperature must have 1 axes"),
        ({"rows": (np.zeros(3, "f2"), np.zeros(3, "f2"))}, TypeError, "temperature must be float32 or wider"),
        ({"slope": np.zeros(2)}, ValueError, r"slope must have shape .* = \(3,\), got \(2,\)"),
        ({"slope": np.array([0, np.inf, 0])}, ValueError, "slope must be finite, got inf at position 1"),
        ({"slope": np.zeros(3, "i8")}, TypeError, "slope must have a real floating dtype, got int64"),
        ({"beta": 1.5}, ValueError, r"beta must be in \(0, 1\], got 1\.5"),
        ({"minimum": -1.0}, ValueError, r"minimum must be > 0, got -1\.0"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused(options: dict[str, Any], error: Any, message: str) -> None:
    given: dict[str, Any] = {"rows": (np.ones(3), np.zeros(3)), "slope": np.zeros(3), "learning_rate": 0.1} | options
    with pytest.raises(error, match=message):
        update_temperature_rows(TemperatureRows(*given.pop("rows")), given.pop("slope"), **given)


def test_a_bad_state_of_a_global_temperature_is_refused() -> None:
    state = GlobalTemperature(0.1, like=np.zeros(1)).state
    with pytest.raises(ValueError, match=r"state\.first_moment must have shape \(\) = \(\), got \(2,\)"):
        update_global_temperature(state._replace(first_moment=np.zeros(2)), 1.0, learning_rate=0.1)
