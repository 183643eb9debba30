"""Learned and fixed temperatures behind one interface: training loops, compiled updates, saved states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drrho_core import (
    GlobalTemperature,
    GlobalTemperatureState,
    PerSampleTemperature,
    TemperatureRows,
    contrastive_step,
    update_global_temperature,
    update_temperature_rows,
)
from drrho_core.state.temperatures import SCHEMES, make_temperature
from helpers import problems
from helpers.temperatures import ROWS, made


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
