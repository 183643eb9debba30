"""The inner estimates of a data set, and the rules that choose gamma."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from array_api_compat import device as device_of
from drrho_reference import cosine_gamma as oracle_cosine
from drrho_reference import scent_gamma as oracle_scent
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import InnerEstimator, cosine_gamma, recommended_gamma_min, scent_gamma
from drrho_core.numerics import log_moving_average
from drrho_core.state.table import scatter_rows

NEVER = -math.inf


def make(space: Any, n: int = 6) -> InnerEstimator:
    """Return an estimator with image rows 0, 10, 20, ... and text rows 1, 11, ...; the last sample is unvisited."""
    made = InnerEstimator(n, like=space.asarray(np.zeros(1)))
    return made.scatter(
        space.asarray(np.arange(n - 1)),
        space.asarray(10.0 * np.arange(n - 1)),
        space.asarray(10.0 * np.arange(n - 1) + 1),
    )


def rows(space: Any, made: InnerEstimator) -> list[list[float]]:
    return [space.to_numpy(side).tolist() for side in (made.log_inner_image, made.log_inner_text)]


# ---------------------------------------------------------------------------------------------------------------------
# Size, dtype and device
# ---------------------------------------------------------------------------------------------------------------------


def test_new_estimator_has_no_visited_sample(eager_space: Any) -> None:
    like = eager_space.asarray(np.zeros((2, 3)))
    made = InnerEstimator(3, like=like)
    assert rows(eager_space, made) == [[NEVER] * 3] * 2
    assert made.num_samples == 3
    assert made.log_inner_image.dtype == like.dtype
    assert made.log_inner_image is not made.log_inner_text
    assert device_of(made.log_inner_text) == device_of(like)
    assert repr(made) == f"InnerEstimator(num_samples=3, dtype={like.dtype})"


def test_dtype_is_float32_or_wider(eager_space: Any) -> None:
    xp, like = eager_space.xp, eager_space.asarray(np.zeros(1))
    assert InnerEstimator(1, like=like, dtype=xp.float64).log_inner_image.dtype == xp.float64
    assert InnerEstimator(1, like=like, dtype=xp.float32).log_inner_text.dtype == xp.float32
    assert InnerEstimator(1, like=eager_space.asarray(np.zeros(1, dtype=np.int64))).log_inner_image.dtype == xp.float32
    for narrow in ("float16", "bfloat16"):
        if hasattr(xp, narrow):
            half = getattr(xp, narrow)
            assert InnerEstimator(1, like=xp.astype(like, half)).log_inner_image.dtype == xp.float32
            with pytest.raises(TypeError, match=r"dtype must be float32 or wider, got .*float16"):
                InnerEstimator(1, like=like, dtype=half)
    with pytest.raises(TypeError, match=r"dtype must be float32 or wider, got .*int32"):
        InnerEstimator(1, like=like, dtype=xp.int32)


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "num_samples must be at least 1, got 0"),
        (2.0, TypeError, r"num_samples must be an integer, got 2\.0"),
        (True, TypeError, "num_samples must be an integer, got True"),
    ],
)
def test_number_of_samples_must_be_a_positive_integer(n: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        InnerEstimator(n, like=np.zeros(1))


def test_like_must_be_an_array() -> None:
    with pytest.raises(TypeError, match="like must be an array, got list"):
        InnerEstimator(2, like=[1.0])


# ---------------------------------------------------------------------------------------------------------------------
# gather and scatter
# ---------------------------------------------------------------------------------------------------------------------


def test_gather_returns_the_rows_that_scatter_wrote(eager_space: Any) -> None:
    made = make(eager_space)
    index = eager_space.asarray(np.array([5, 0, 3]))
    assert [eager_space.to_numpy(side).tolist() for side in made.gather(index)] == [[NEVER, 0, 30], [NEVER, 1, 31]]
    new = made.scatter(index, eager_space.asarray(np.array([-1.0, -2, -3])), eager_space.asarray(np.array([7.0, 8, 9])))
    assert rows(eager_space, new) == [[-2, 10, 20, -3, 40, -1], [8, 11, 21, 9, 41, 7]]
    assert type(new) is InnerEstimator
    assert device_of(new.log_inner_image) == device_of(index)
    for side in (new.log_inner_image, new.log_inner_text):
        assert side.dtype == eager_space.dtype


def test_scatter_is_in_place_if_arrays_can_be_written_to(eager_space: Any) -> None:
    made = make(eager_space)
    before = rows(eager_space, made)
    arrays = made.log_inner_image, made.log_inner_text
    new = made.scatter(eager_space.asarray(np.array([1])), *(eager_space.asarray(np.array([x])) for x in (-5.0, -6.0)))
    in_place = eager_space.name in ("numpy", "torch", "cupy")
    assert (new is made) == in_place
    assert (new.log_inner_image is arrays[0]) == in_place
    assert (new.log_inner_text is arrays[1]) == in_place
    assert (rows(eager_space, made) == before) == (not in_place)
    assert rows(eager_space, new)[0][1] == -5


def test_gather_returns_copies(eager_space: Any) -> None:
    made = make(eager_space)
    image, text = made.gather(eager_space.asarray(np.array([1, 2])))
    made.scatter(eager_space.asarray(np.array([1])), *(eager_space.asarray(np.array([x])) for x in (-5.0, -6.0)))
    assert [eager_space.to_numpy(side).tolist() for side in (image, text)] == [[10, 20], [11, 21]]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint64"])
def test_every_integer_dtype_can_index(eager_space: Any, dtype: str) -> None:
    if not hasattr(eager_space.xp, dtype):
        pytest.skip(f"{eager_space.name} has no {dtype}")
    made = make(eager_space, 300)  # more samples than eight bits can count
    index = eager_space.asarray(np.array([100, 2], dtype=dtype))
    assert [eager_space.to_numpy(side).tolist() for side in made.gather(index)] == [[1000, 20], [1001, 21]]
    new = made.scatter(index, *(eager_space.asarray(np.array(x)) for x in ([-5.0, -6.0], [-7.0, -8.0])))
    expected = [[10.0 * i for i in range(299)] + [NEVER], [10.0 * i + 1 for i in range(299)] + [NEVER]]
    expected[0][100], expected[0][2], expected[1][100], expected[1][2] = -5, -6, -7, -8
    assert rows(eager_space, new) == expected


def test_an_empty_batch_changes_nothing(eager_space: Any) -> None:
    made = make(eager_space)
    index, nothing = eager_space.asarray(np.zeros(0, dtype=np.int64)), eager_space.asarray(np.zeros(0))
    assert [side.shape for side in made.gather(index)] == [(0,), (0,)]
    before = rows(eager_space, made)
    assert rows(eager_space, made.scatter(index, nothing, nothing)) == before


@given(data=st.data())
@settings(max_examples=30)
def test_scatter_by_sorting_equals_assignment(data: Any) -> None:
    import array_api_strict as xp

    n = data.draw(st.integers(1, 12))
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=0, max_size=n, unique=True)), dtype=np.int64)
    state = np.array(data.draw(st.lists(st.floats(-1e4, 1e4) | st.just(NEVER), min_size=n, max_size=n)))
    new = np.array(data.draw(st.lists(st.floats(-1e4, 1e4), min_size=len(index), max_size=len(index))))
    given_state = xp.asarray(state)
    result = scatter_rows(given_state, xp.asarray(index), xp.asarray(new), xp=xp)
    assert (result is given_state) == (len(index) == 0)
    assert np.array_equal(np.asarray(given_state), state)
    state[index] = new
    assert np.array_equal(np.asarray(result), state)


def test_scatter_replaces_a_read_only_array() -> None:
    state = np.zeros(3)
    state.flags.writeable = False
    result = scatter_rows(state, np.asarray([1]), np.asarray([2.0]), xp=np)
    assert result.tolist() == [0, 2, 0]
    assert state.tolist() == [0, 0, 0]


BAD_INDEX = [
    (
        [0, 6],
        ValueError,
        r"sample_index must hold row ids from 0 to 5 \(see docs/large-data\.md, .*\), got 6 at position 1",
    ),
    (
        [-1, 2],
        ValueError,
        r"sample_index must hold row ids from 0 to 5 \(see docs/large-data\.md, .*\), got -1 at position 0",
    ),
    ([3, 1, 3], ValueError, "sample_index must not repeat an index within a batch, got 3 twice"),
    (
        [[0, 1]],
        ValueError,
        r"sample_index must have shape \(batch_size,\), one row id per sample of the batch, got \(1, 2\)",
    ),
    (1, ValueError, r"sample_index must have shape \(batch_size,\), one row id per sample of the batch, got \(\)"),
    ([0.0, 1.0], TypeError, "sample_index must have an integer dtype, got .*float"),
    ([True, False], TypeError, "sample_index must have an integer dtype, got .*bool"),
]


def on_host(space: Any) -> bool:
    return space.name == "numpy" or "cpu" in str(space.device).lower()


@pytest.mark.parametrize(("index", "error", "message"), BAD_INDEX)
def test_a_bad_index_is_refused(eager_space: Any, index: Any, error: Any, message: str) -> None:
    if error is ValueError and "axes" not in message and not on_host(eager_space):
        pytest.skip("values are looked at on the host only")
    made = make(eager_space)
    before = rows(eager_space, made)
    given_index = eager_space.asarray(np.asarray(index))
    zeros = eager_space.asarray(np.zeros(np.size(index)))
    with pytest.raises(error, match=message):
        made.gather(given_index)
    with pytest.raises(error, match=message):
        made.scatter(given_index, zeros, zeros)
    assert rows(eager_space, made) == before


def test_an_index_of_another_library_is_refused() -> None:
    import jax.numpy as jnp

    made = InnerEstimator(3, like=np.zeros(1))
    with pytest.raises(TypeError, match="sample_index must be an array, got list"):
        made.gather([0, 1])
    with pytest.raises(
        TypeError, match=r"sample_index must come from the library of the state \(numpy\), got.* jax\.numpy"
    ):
        made.gather(jnp.asarray([0, 1]))


def test_values_on_a_device_are_not_read() -> None:
    import array_api_strict as xp

    device = xp.Device("device1")
    made = InnerEstimator(3, like=xp.zeros(1, device=device))
    image, text = made.gather(xp.asarray([1, 1], device=device))  # a repeated index costs a synchronisation to find
    assert image.shape == text.shape == (2,)


@pytest.mark.parametrize(
    ("image", "text", "error", "message"),
    [
        (np.zeros(3), np.zeros(2), ValueError, r"log_inner_image must have shape \(batch_size,\) = \(2,\), got \(3,\)"),
        (np.zeros(2), np.zeros((2, 1)), ValueError, r"log_inner_text must have shape .* = \(2,\), got \(2, 1\)"),
        (np.zeros(2), np.zeros(2, dtype="f4"), TypeError, "log_inner_text must have the state's dtype float64"),
        (np.array([0, np.nan]), np.zeros(2), ValueError, "log_inner_image must be finite, .*, got nan at position 1"),
        (np.zeros(2), np.array([np.inf, 0]), ValueError, "log_inner_text must be finite, .*, got inf at position 0"),
        ([0.0, 1.0], np.zeros(2), TypeError, "log_inner_image must be an array, got list"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_and_nothing_is_written(image: Any, text: Any, error: Any, message: str) -> None:
    made = InnerEstimator(4, like=np.zeros(1))
    with pytest.raises(error, match=message):
        made.scatter(np.asarray([0, 2]), image, text)
    assert made.log_inner_image.tolist() == made.log_inner_text.tolist() == [NEVER] * 4


def test_rows_that_ask_for_autograd_are_refused() -> None:
    import torch

    made = InnerEstimator(4, like=torch.zeros(1))
    index, good, bad = torch.asarray([1]), torch.ones(1), torch.ones(1, requires_grad=True)
    for pair, name in (((bad, good), "log_inner_image"), ((good, bad), "log_inner_text")):
        with pytest.raises(ValueError, match=f"{name} must not require gradients"):
            made.scatter(index, *pair)
    with pytest.raises(ValueError, match="log_inner_text must not require gradients"):
        made.load_state_dict({"log_inner_image": torch.ones(4), "log_inner_text": torch.ones(4, requires_grad=True)})
    assert torch.all(made.log_inner_image == NEVER)
    assert not made.log_inner_image.requires_grad


def test_rows_on_another_device_are_refused_before_anything_is_written() -> None:
    import array_api_strict as xp

    made = InnerEstimator(4, like=xp.zeros(1))
    with pytest.raises(ValueError, match=r"log_inner_text must be on the device of .*CPU_DEVICE.*, got .*device1"):
        made.scatter(xp.asarray([1]), xp.ones(1), xp.ones(1, device=xp.Device("device1")))
    with pytest.raises(ValueError, match=r"sample_index must be on the device of .*CPU_DEVICE.*, got .*device1"):
        made.gather(xp.asarray([1], device=xp.Device("device1")))


# ---------------------------------------------------------------------------------------------------------------------
# grow, state_dict, load_state_dict
# ---------------------------------------------------------------------------------------------------------------------


def test_grow_keeps_rows_and_appends_unvisited_ones(eager_space: Any) -> None:
    made = make(eager_space, 3)
    before = rows(eager_space, made)
    grown = made.grow(5)
    assert rows(eager_space, grown) == [[0, 10, NEVER, NEVER, NEVER], [1, 11, NEVER, NEVER, NEVER]]
    assert grown.num_samples == 5
    assert grown.log_inner_image.dtype == eager_space.dtype
    assert rows(eager_space, made) == before
    assert rows(eager_space, made.grow(3)) == before
    grown.scatter(eager_space.asarray(np.array([0])), *(eager_space.asarray(np.array([x])) for x in (-5.0, -6.0)))
    assert rows(eager_space, made) == before
    with pytest.raises(ValueError, match="num_samples must be at least 3, got 2"):
        made.grow(2)


def test_state_dict_copies_both_ways(eager_space: Any) -> None:
    made = make(eager_space)
    state = made.state_dict()
    assert sorted(state) == ["log_inner_image", "log_inner_text"]
    before = rows(eager_space, made)
    index, row = eager_space.asarray(np.array([0])), eager_space.asarray(np.array([-9.0]))
    made = made.scatter(index, row, row)
    assert rows(eager_space, made) != before
    made.load_state_dict(state)
    assert rows(eager_space, made) == before
    made = made.scatter(index, row, row)
    assert [eager_space.to_numpy(side).tolist() for side in state.values()] == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_inner_text": None}, ValueError, r"must hold log_inner_image and log_inner_text .*got \['log_inner_i"),
        ({"gamma": np.zeros(3)}, ValueError, "and nothing else, got .*gamma"),
        ({1: np.zeros(3)}, ValueError, "and nothing else, got .*1"),
        ({"log_inner_image": np.zeros(2)}, ValueError, r"log_inner_image must have shape .* = \(3,\), got \(2,\)"),
        ({"log_inner_text": np.zeros(3, dtype="f4")}, TypeError, "log_inner_text must have dtype float64, got float32"),
        ({"log_inner_text": np.array([0, 0, np.nan])}, ValueError, "log_inner_text must be finite, or -inf .* got nan"),
        ({"log_inner_text": [0.0, 0.0, 0.0]}, TypeError, "log_inner_text must be an array, got list"),
    ],
)  # fmt: skip
def test_a_bad_state_is_refused_and_nothing_is_changed(change: Any, error: Any, message: str) -> None:
    made = make(type("NumPy", (), {"asarray": staticmethod(np.asarray)}), 3)
    state = {**{name: value - 1 for name, value in made.state_dict().items()}, **change}
    before = made.log_inner_image.tolist(), made.log_inner_text.tolist()
    with pytest.raises(error, match=message):
        made.load_state_dict({name: value for name, value in state.items() if value is not None})
    assert (made.log_inner_image.tolist(), made.log_inner_text.tolist()) == before


@pytest.mark.parametrize("state", [None, 3, [1, 2]])
def test_a_state_must_be_a_mapping(state: Any) -> None:
    with pytest.raises(TypeError, match="state must be a mapping, got"):
        InnerEstimator(3, like=np.zeros(1)).load_state_dict(state)


def test_a_state_of_another_device_is_refused() -> None:
    import array_api_strict as xp

    made = InnerEstimator(2, like=xp.zeros(1))
    other = InnerEstimator(2, like=xp.zeros(1, device=xp.Device("device1")))
    with pytest.raises(ValueError, match=r"log_inner_image must be on the device of the estimator .*got .*device1"):
        made.load_state_dict(other.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# gamma
# ---------------------------------------------------------------------------------------------------------------------


def test_cosine_gamma_by_hand() -> None:
    assert cosine_gamma(0, num_epochs=8, gamma_min=0.2) == 1.0
    assert cosine_gamma(4, num_epochs=8, gamma_min=0.2) == pytest.approx(0.6, abs=1e-15)
    assert cosine_gamma(2, num_epochs=8, gamma_min=0.2) == pytest.approx(0.6 + 0.4 * math.sqrt(0.5), abs=1e-15)
    assert cosine_gamma(8, num_epochs=8, gamma_min=0.2) == pytest.approx(0.2, abs=1e-15)
    assert cosine_gamma(80, num_epochs=8, gamma_min=0.2) == pytest.approx(0.2, abs=1e-15)
    assert cosine_gamma(3, num_epochs=8, gamma_min=1.0) == 1.0


@given(epoch=st.floats(0, 40), num_epochs=st.floats(0.1, 40), gamma_min=st.floats(1e-6, 1.0))
def test_cosine_gamma_matches_oracle(epoch: float, num_epochs: float, gamma_min: float) -> None:
    got = cosine_gamma(epoch, num_epochs=num_epochs, gamma_min=gamma_min)
    assert got == pytest.approx(oracle_cosine(epoch, num_epochs=num_epochs, gamma_min=gamma_min), rel=1e-15)
    assert gamma_min <= got <= 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epoch": -1}, ValueError, "epoch must be >= 0, got -1"),
        ({"epoch": math.nan}, ValueError, "epoch must be finite, got nan"),
        ({"epoch": "2"}, TypeError, "epoch must be a real number, got '2'"),
        ({"num_epochs": 0}, ValueError, "num_epochs must be > 0, got 0"),
        ({"num_epochs": True}, TypeError, "num_epochs must be a real number, got True"),
        ({"gamma_min": 0.0}, ValueError, r"gamma_min must be in \(0, 1\], got 0\.0"),
        ({"gamma_min": 1.5}, ValueError, r"gamma_min must be in \(0, 1\], got 1\.5"),
    ],
)
def test_cosine_gamma_refuses_arguments_outside_its_domain(arguments: dict[str, Any], error: Any, message: str) -> None:
    options: dict[str, Any] = {"epoch": 1, "num_epochs": 4, "gamma_min": 0.5, **arguments}
    with pytest.raises(error, match=message):
        cosine_gamma(options.pop("epoch"), **options)


def test_schedules_take_arrays_without_axes(eager_space: Any) -> None:
    four, half = eager_space.asarray(np.asarray(4.0, dtype=eager_space.dtype_name)), 0.5
    got = cosine_gamma(four, num_epochs=8, gamma_min=half)
    assert got == cosine_gamma(4, num_epochs=8, gamma_min=half)
    assert type(got) is float
    assert recommended_gamma_min(four) == recommended_gamma_min(4)


def test_recommended_gamma_min_by_hand() -> None:
    assert recommended_gamma_min(1) == recommended_gamma_min(7) == 1.0  # 4.177 / 7^0.7265 = 1.016
    assert recommended_gamma_min(8) == pytest.approx(4.177 / 8**0.7265, rel=1e-15)
    assert recommended_gamma_min(8) == pytest.approx(0.922, abs=1e-3)
    assert recommended_gamma_min(1000) == pytest.approx(0.02763, abs=1e-5)
    for bad, error in ((0, ValueError), (-3, ValueError), (math.inf, ValueError), ("7", TypeError)):
        with pytest.raises(error, match="num_epochs must be"):
            recommended_gamma_min(bad)  # type: ignore[arg-type]


def test_scent_gamma_matches_oracle(space: Any) -> None:
    log_inner = np.array([NEVER, -1e4, -30.0, -9.0, -1.0, 0.0, 2.5, 30.0, 1e4])
    for log_alpha, floor in ((10.0, 1e-3), (-3.0, 1e-6), (0.0, 1.0), (1e4, 0.5)):
        got = space.run(
            lambda x, a=log_alpha, f=floor: scent_gamma(x, log_alpha=a, gamma_floor=f), space.asarray(log_inner)
        )
        expected = oracle_scent(log_inner, log_alpha=log_alpha, gamma_floor=floor)
        np.testing.assert_allclose(space.to_numpy(got), expected, rtol=8 * np.finfo(space.dtype_name).eps)
        assert got.dtype == space.dtype


def test_scent_gamma_takes_arrays_without_axes(space: Any) -> None:
    log_inner, alpha, floor = (np.array(x, dtype=space.dtype_name) for x in ([NEVER, -2.0, 1.0], 0.5, 0.25))
    got = space.run(
        lambda x, a, f: scent_gamma(x, log_alpha=a, gamma_floor=f), *map(space.asarray, (log_inner, alpha, floor))
    )
    expected = oracle_scent(log_inner, log_alpha=0.5, gamma_floor=0.25)
    np.testing.assert_allclose(space.to_numpy(got), expected, rtol=8 * np.finfo(space.dtype_name).eps)


def test_scent_gamma_is_a_proximal_step() -> None:
    """With nu = log u the step argmin_n  alpha (e^(s - n) + n) + D(n, nu), D the Bregman divergence of exp(-n)."""
    from scipy.optimize import minimize_scalar

    for nu, s, log_alpha in ((0.3, 1.2, 0.5), (-2.0, 0.4, 1.5), (1.5, -1.0, -0.7)):
        alpha = math.exp(log_alpha)

        def step(n: float, nu: float = nu, s: float = s, alpha: float = alpha) -> float:
            bregman = math.exp(-n) - math.exp(-nu) + math.exp(-nu) * (n - nu)
            return alpha * (math.exp(s - n) + n) + bregman

        argmin = minimize_scalar(step, bounds=(-6, 6), method="bounded", options={"xatol": 1e-10}).x
        gamma = float(scent_gamma(np.asarray([nu]), log_alpha=log_alpha)[0])
        assert math.log((1 - gamma) * math.exp(nu) + gamma * math.exp(s)) == pytest.approx(argmin, abs=1e-6)


def test_above_the_floor_scents_step_has_a_closed_form_in_the_logarithm() -> None:
    """nu + log(1 + alpha e^s) - log(1 + alpha e^nu), whatever the sizes; at the floor gamma is the floor's."""
    nu, s = np.array([-3.0, 0.5, 40.0, -8.0]), np.array([2.0, -600.0, 700.0, -700.0])
    for log_alpha in (-2.0, 10.0):
        gamma = scent_gamma(nu, log_alpha=log_alpha, gamma_floor=1e-12)
        closed = nu + np.logaddexp(0, log_alpha + s) - np.logaddexp(0, log_alpha + nu)
        np.testing.assert_allclose(log_moving_average(nu, s, gamma, xp=np), closed, rtol=0, atol=1e-12 * 700)
    assert scent_gamma(nu, log_alpha=-2.0, gamma_floor=0.25).tolist()[:2] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("log_inner", "options", "error", "message"),
    [
        (np.array([0.0, np.nan]), {}, ValueError, "log_inner must be finite, or -inf for a sample .*, got nan .*1"),
        (np.array([np.inf]), {}, ValueError, "log_inner must be finite, or -inf for a sample .*, got inf"),
        (np.array([0, 1]), {}, TypeError, "log_inner must have a real floating dtype, got int64"),
        (np.zeros(2, dtype="f2"), {}, TypeError, "log_inner must be float32 or wider, got float16"),
        ([0.0], {}, TypeError, "log_inner must be an array, got list"),
        (np.zeros(2), {"log_alpha": math.inf}, ValueError, "log_alpha must be finite, got inf"),
        (np.zeros(2), {"log_alpha": "10"}, TypeError, "log_alpha must be a real number, got '10'"),
        (np.zeros(2), {"gamma_floor": 0.0}, ValueError, r"gamma_floor must be in \(0, 1\], got 0\.0"),
        (np.zeros(2), {"gamma_floor": 1.1}, ValueError, r"gamma_floor must be in \(0, 1\], got 1\.1"),
    ],
)  # fmt: skip
def test_scent_gamma_refuses_arguments_outside_its_domain(
    log_inner: Any, options: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        scent_gamma(log_inner, **{"log_alpha": 1.0, **options})


def test_scent_gamma_refuses_autograd() -> None:
    import torch

    with pytest.raises(ValueError, match="log_inner must not require gradients"):
        scent_gamma(torch.zeros(2, requires_grad=True), log_alpha=1.0)
