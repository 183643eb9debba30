"""The errors of bad input of the temperatures and of their updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from array_api_compat import device as device_of

from drrho_core import (
    GlobalTemperature,
    PerSampleTemperature,
    TemperatureRows,
    update_global_temperature,
    update_temperature_rows,
)
from helpers.temperatures import made, tables

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
