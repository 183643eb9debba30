"""AdamW on every namespace against the AdamW of torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from drrho_clip.optimizer import AdamW

SETTINGS = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3}
RATES = [0.1, 0.07, 0.02, 0.3, 0.05, 0.01, 0.2, 0.11, 0.04, 0.08]


def problem() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    generator = np.random.default_rng(2)
    shapes = {"kernel": (3, 4), "bias": (4,), "conv": (2, 3, 3, 3), "scale": ()}
    parameters = {name: np.asarray(generator.standard_normal(shape)) for name, shape in shapes.items()}
    steps = [{name: np.asarray(generator.standard_normal(shape)) for name, shape in shapes.items()} for _ in RATES]
    return parameters, steps


def torchs_own() -> dict[str, np.ndarray]:
    torch = pytest.importorskip("torch")
    parameters, steps = problem()
    leaves = {name: torch.tensor(values, requires_grad=True) for name, values in parameters.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [leaf for leaf in leaves.values() if leaf.ndim >= 2], "weight_decay": SETTINGS["weight_decay"]},
            {"params": [leaf for leaf in leaves.values() if leaf.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
        eps=SETTINGS["epsilon"],
    )
    for rate, gradients in zip(RATES, steps, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(gradients[name])
        optimizer.step()
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}


def test_ten_steps_match_the_adamw_of_torch(space: Any) -> None:
    parameters, steps = problem()
    optimizer = AdamW(space.xp, **SETTINGS)

    parameters = {name: space.asarray(values) for name, values in parameters.items()}
    names = list(parameters)
    state = optimizer.init(parameters)
    state_names = list(state)

    def update(rate: Any, *flat: Any) -> Any:
        n = len(names)
        new, new_state = optimizer.update(
            dict(zip(names, flat[:n], strict=True)),
            dict(zip(names, flat[n : 2 * n], strict=True)),
            dict(zip(state_names, flat[2 * n :], strict=True)),
            rate,
        )
        return *[new[name] for name in names], *[new_state[name] for name in state_names]

    for rate, gradients in zip(RATES, steps, strict=True):
        flat = [*parameters.values(), *[space.asarray(gradients[name]) for name in names], *state.values()]
        results = space.run(update, space.asarray(np.asarray(rate)), *flat)
        parameters = dict(zip(names, results[: len(names)], strict=True))
        state = dict(zip(state_names, results[len(names) :], strict=True))
    assert int(state["step"]) == len(RATES)
    assert state["step"].dtype == space.xp.int32
    assert all(array.dtype == space.dtype for name, array in state.items() if name != "step")
    for name, expected in torchs_own().items():
        np.testing.assert_allclose(space.to_numpy(parameters[name]), expected, rtol=0, atol=space.unit, err_msg=name)


def test_state_is_flat_and_starts_at_zero(eager_space: Any) -> None:
    parameters = {"a": eager_space.asarray(np.ones((2, 3))), "b": eager_space.asarray(np.ones(3))}
    state = AdamW(eager_space.xp, weight_decay=0.0).init(parameters)
    assert list(state) == ["step", "first_moment/a", "first_moment/b", "second_moment/a", "second_moment/b"]
    assert not any(np.any(eager_space.to_numpy(array)) for array in state.values())


def test_the_arguments_are_not_written_to() -> None:
    parameters, steps = problem()
    optimizer = AdamW(np, **SETTINGS)
    state = optimizer.init(parameters)
    _, state = optimizer.update(parameters, steps[0], state, 0.1)
    before = [array.copy() for array in (*parameters.values(), *steps[1].values(), *state.values())]
    optimizer.update(parameters, steps[1], state, 0.1)
    after = [*parameters.values(), *steps[1].values(), *state.values()]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(isinstance(array, np.ndarray) for array in state.values())  # no scalar: checkpoints hold arrays


def test_the_first_step_is_the_learning_rate_in_float32() -> None:
    # m_hat / sqrt(v_hat) is the gradient's sign; 1 - 0.999**1 in plain float32 would be off by 5e-5
    parameters = {"a": np.zeros(3, dtype=np.float32)}
    optimizer = AdamW(np, weight_decay=0.0, beta2=0.999, epsilon=1e-30)
    gradients = {"a": np.asarray([1e-3, -2.0, 5.0], dtype=np.float32)}
    new, _ = optimizer.update(parameters, gradients, optimizer.init(parameters), 1.0)
    np.testing.assert_allclose(new["a"], [-1.0, 1.0, -1.0], rtol=5e-7)


def test_betas_of_zero_keep_no_memory() -> None:
    # beta1 = beta2 = 0: p - lr g / (|g| + epsilon)
    parameters, steps = problem()
    optimizer = AdamW(np, weight_decay=0.0, beta1=0.0, beta2=0.0, epsilon=0.5)
    new, _ = optimizer.update(parameters, steps[0], optimizer.init(parameters), 0.1)
    for name, p in parameters.items():
        g = steps[0][name]
        np.testing.assert_allclose(new[name], p - 0.1 * g / (np.abs(g) + 0.5), rtol=1e-14)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"weight_decay": -0.1}, ValueError, r"weight_decay must be >= 0, got -0\.1"),
        ({"weight_decay": "0"}, TypeError, "weight_decay must be a real number, got '0'"),
        ({"beta1": 1.0}, ValueError, r"beta1 must be in \[0, 1\), got 1\.0"),
        ({"beta2": -0.5}, ValueError, r"beta2 must be in \[0, 1\), got -0\.5"),
        ({"beta2": math.nan}, ValueError, "beta2 must be finite, got nan"),
        ({"epsilon": 0.0}, ValueError, r"epsilon must be > 0, got 0\.0"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        AdamW(np, **{**SETTINGS, **setting})
