"""The KL-penalised risk with one moving average: against 60 digits, `worst_case`, the oracle and autograd."""

from __future__ import annotations

from typing import Any

import mpmath as mp
import numpy as np
import pytest
from drrho_reference import moving_average_kl as oracle_step
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import KLPenalty, MovingAverageKL, drrho_risk, moving_average_kl

NEVER = -np.inf
_JITTED: dict[Any, Any] = {}


def run(
    space: Any, loss: Any, reference: Any, log_inner: float, where: Any = None, **scalars: float
) -> MovingAverageKL:
    """Take the step in the library, jitted over everything where it is jitted; float64 NumPy arrays come back."""

    def step(*given: Any) -> MovingAverageKL:
        names = ("where", *scalars)
        return moving_average_kl(*given[:3], **dict(zip(names, given[3:], strict=True)))

    one = np.float64(1.0)
    arrays = [loss, reference, *(one * value for value in (log_inner,)), where, *(one * x for x in scalars.values())]
    given = [None if x is None else space.asarray(np.asarray(x, dtype=None if x is where else space.dtype_name))
             for x in arrays]  # fmt: skip
    if space.jit is not None:
        step = _JITTED.setdefault((space.dtype_name, where is None, tuple(scalars)), space.jit(step))
    return MovingAverageKL(*(np.asarray(space.to_numpy(x)).astype(np.float64) for x in step(*given)))


def exact(loss: Any, reference: Any, log_inner: float, where: Any = None, **scalars: float) -> MovingAverageKL:
    """The formulas as the module states them, in numbers of 60 digits with any exponent."""
    with mp.workdps(60):
        tau, gamma, weight = (mp.mpf(float(scalars[name])) for name in ("temperature", "gamma", "reference_weight"))
        counted = np.ones(len(loss), dtype=bool) if where is None else where
        terms = [
            mp.exp((mp.mpf(float(x)) - weight * mp.mpf(float(r))) / tau) if counts else mp.mpf(0)
            for x, r, counts in zip(loss, reference, counted, strict=True)
        ]
        n = int(counted.sum())
        g = mp.fsum(terms) / n
        u = g if log_inner == NEVER else (1 - gamma) * mp.exp(mp.mpf(float(log_inner))) + gamma * g
        return MovingAverageKL(
            np.float64(tau * mp.log(u)), np.array([float(term / u / n) for term in terms]), np.float64(mp.log(u))
        )


def check(got: MovingAverageKL, expected: MovingAverageKL, *, size: float, temperature: float, unit: float) -> None:
    """Losses of this size over the temperature are what exponents, and so logarithms and weights, are exact to."""
    exponent = 1.0 + size / temperature + abs(float(expected.log_inner))
    assert abs(got.log_inner - expected.log_inner) <= unit * exponent
    assert abs(got.risk - expected.risk) <= unit * exponent * temperature
    assert got.weights.shape == expected.weights.shape
    assert np.all(np.abs(got.weights - expected.weights) <= unit * exponent * max(np.max(expected.weights), 1e-30))


@given(data=st.data())
@settings(max_examples=20)
def test_the_step_is_exact(space: Any, data: Any) -> None:
    n = 5 if space.name == "jax" else data.draw(st.integers(1, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = data.draw(st.sampled_from([1e-6, 1.0, 100.0]))
    scalars = {
        "temperature": data.draw(st.sampled_from([0.01, 1.0, 50.0])) * size,
        "gamma": data.draw(st.sampled_from([0.05, 0.9, 1.0])),
        "reference_weight": data.draw(st.sampled_from([0.0, 1.0, 1.5])),
    }
    scalars = {name: float(space.rounded(value)) for name, value in scalars.items()}
    loss, reference = (space.rounded(size * x) for x in rng.normal(size=(2, n)))
    log_inner = float(space.rounded(data.draw(st.sampled_from([NEVER, 0.0, 3.0, -200.0, 90.0]))))
    where = data.draw(st.sampled_from([None, rng.uniform(size=n) < 0.5]))
    if where is not None:
        where[rng.integers(n)] = True
        loss[~where], reference[~where] = np.nan, np.inf  # never read
    got = run(space, loss, reference, log_inner, where, **scalars)
    check(got, exact(loss, reference, log_inner, where, **scalars), size=10 * size,
          temperature=scalars["temperature"], unit=4 * float(np.finfo(space.dtype_name).eps))  # fmt: skip


@given(
    seed=st.integers(0, 2**32 - 1), log_inner=st.sampled_from([NEVER, 0.0, -2.0]), weight=st.sampled_from([0.0, 1.5])
)
@settings(max_examples=20)
def test_the_step_is_the_oracles(seed: int, log_inner: float, weight: float) -> None:
    rng = np.random.default_rng(seed)
    loss, reference = rng.normal(size=(2, 6))
    options = {"temperature": 0.7, "gamma": 0.3, "reference_weight": weight, "where": rng.uniform(size=6) < 0.9}
    options["where"][0] = True
    got, expected = (
        moving_average_kl(loss, reference, log_inner, **options),
        oracle_step(loss, reference, log_inner, **options),
    )
    for name in MovingAverageKL._fields:
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e5])
def test_without_memory_it_is_the_worst_case_under_a_kl_penalty(space: Any, size: float, temperature: float) -> None:
    if space.name == "jax" and not space.jit:
        pytest.skip("jitted is enough")
    rng = np.random.default_rng(3)
    loss, reference = (space.rounded(size * x) for x in rng.normal(size=(2, 5)))
    tau = float(space.rounded(size * temperature))
    got = run(space, loss, reference, 3.0, temperature=tau, gamma=1.0)
    expected = drrho_risk(loss, reference, KLPenalty(tau))
    largest = np.max(np.abs(loss - reference))
    unit = 1e-14 if space.dtype_name == "float64" else 5e-6
    assert abs(got.risk - expected.risk) <= unit * largest
    np.testing.assert_allclose(got.weights, expected.weights, rtol=0, atol=unit / min(1.0, temperature))


def test_one_large_loss_among_thousands_keeps_its_digits() -> None:
    loss = np.zeros(3000, dtype="float32")
    loss[7] = 1000.0
    step = moving_average_kl(loss, 0 * loss, NEVER, temperature=1.0)
    assert step.risk == pytest.approx(1000.0 - np.log(3000.0), rel=1e-7)
    assert step.weights[7] == pytest.approx(1.0, abs=1e-6)


def test_the_gradient_is_autograds_where_the_average_is_a_constant() -> None:
    import torch

    rng = np.random.default_rng(4)
    loss, reference = rng.normal(size=(2, 6))
    step = moving_average_kl(loss, reference, 0.4, temperature=0.5, gamma=0.3, reference_weight=1.5)
    leaf = torch.tensor(loss, requires_grad=True)
    u = float(np.exp(step.log_inner))
    (0.5 * torch.exp((leaf - 1.5 * torch.tensor(reference)) / 0.5).mean() / u).backward()
    np.testing.assert_allclose(step.weights, leaf.grad.numpy(), rtol=1e-13)


def test_without_memory_weights_are_finite_differences_of_the_risk() -> None:
    rng = np.random.default_rng(5)
    loss, reference, direction = rng.normal(size=(3, 6))

    def risk(h: float) -> float:
        return float(moving_average_kl(loss + h * direction, reference, NEVER, temperature=0.5).risk)

    slope = (8 * (risk(1e-3) - risk(-1e-3)) - (risk(2e-3) - risk(-2e-3))) / 12e-3
    weights = moving_average_kl(loss, reference, NEVER, temperature=0.5).weights
    assert np.sum(weights * direction) == pytest.approx(slope, abs=1e-10)
    assert np.sum(weights) == pytest.approx(1.0, abs=1e-14)


def test_batches_in_turn_lead_to_the_data_sets_risk() -> None:
    # Batches of one sample each: their own risk is the sample's loss, whose mean lies far below the data set's risk.
    loss = np.log(np.array([1.0, 2.0, 3.0, 10.0]))
    whole = float(drrho_risk(loss, np.zeros(4), KLPenalty(1.0)).risk)
    log_inner: Any = NEVER
    for visit in range(1, 4001):
        sample = loss[(visit - 1) % 4 : (visit - 1) % 4 + 1]
        step = moving_average_kl(sample, np.zeros(1), log_inner, temperature=1.0, gamma=1 / visit)
        log_inner = step.log_inner
    assert step.risk == pytest.approx(whole, abs=1e-12)  # gamma = 1/visit makes u the plain mean, whole = log 4
    assert whole == pytest.approx(np.log(4.0), abs=1e-14)


def test_a_shift_of_the_reference_changes_no_weight() -> None:
    rng = np.random.default_rng(6)
    loss, reference = rng.normal(size=(2, 6))
    step = moving_average_kl(loss, reference, 0.4, temperature=0.5, gamma=0.3)
    shifted = moving_average_kl(loss, reference + 2.0, 0.4 - 2.0 / 0.5, temperature=0.5, gamma=0.3)
    np.testing.assert_allclose(shifted.weights, step.weights, rtol=1e-13)
    assert shifted.risk == pytest.approx(float(step.risk) - 2.0, abs=1e-13)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.05])
def test_weights_sum_to_at_most_one_over_gamma(gamma: float) -> None:
    step = moving_average_kl(np.array([3.0, 4.0]), np.zeros(2), -1e4, temperature=1.0, gamma=gamma)
    assert np.sum(step.weights) == pytest.approx(1 / gamma, rel=1e-13)


def test_what_comes_out_goes_in_again(eager_space: Any) -> None:
    # Also in NumPy, whose sums over all entries are no arrays.
    loss, reference = (eager_space.asarray(np.array(x)) for x in ([0.5, 1.0], [0.0, 0.0]))
    step = moving_average_kl(loss, reference, NEVER, temperature=1.0)
    again = moving_average_kl(loss, reference, step.log_inner, temperature=1.0, gamma=0.5)
    assert again.log_inner.dtype == step.log_inner.dtype == loss.dtype
    assert again.log_inner.shape == ()
    assert float(again.log_inner) == pytest.approx(float(step.log_inner), rel=eager_space.unit)


@pytest.mark.parametrize(("library", "half", "digits"), [
    ("numpy", "float16", 11), ("torch", "bfloat16", 8), ("jax", "bfloat16", 8),
])  # fmt: skip
def test_half_losses_are_computed_with_in_float32(library: str, half: str, digits: int) -> None:
    import importlib

    xp = importlib.import_module("jax.numpy" if library == "jax" else f"array_api_compat.{library}")
    rng = np.random.default_rng(7)
    loss, reference = (
        xp.astype(xp.asarray(x.astype(np.float32)), getattr(xp, half)) for x in 3 * rng.normal(size=(2, 6))
    )
    scalars = {"temperature": 0.75, "gamma": 0.5, "reference_weight": 0.25}
    step = moving_average_kl(loss, reference, 0.5, **scalars)
    assert step.risk.dtype == step.weights.dtype == loss.dtype
    assert step.log_inner.dtype == xp.float32
    expected = exact(*(np.asarray(xp.astype(x, xp.float32)) for x in (loss, reference)), 0.5, **scalars)
    assert float(step.log_inner) == pytest.approx(float(expected.log_inner), rel=2e-6)
    assert float(step.risk) == pytest.approx(float(expected.risk), rel=2.0**-digits)
    np.testing.assert_allclose(np.asarray(xp.astype(step.weights, xp.float32)), expected.weights,
                               rtol=1.01 * 2.0**-digits, atol=1e-7)  # fmt: skip


@pytest.mark.parametrize(("losses", "state"), [("float32", "float64"), ("float64", "float32")])
def test_the_state_keeps_its_dtype(losses: str, state: str) -> None:
    loss = np.array([0.5, 1.0], dtype=losses)
    step = moving_average_kl(loss, loss, np.asarray(0.25, dtype=state), temperature=1.0, gamma=0.5)
    assert step.risk.dtype == step.weights.dtype == losses
    assert step.log_inner.dtype == state


def test_it_compiles_as_one_graph() -> None:
    import array_api_compat.torch as xp
    import torch

    rng = np.random.default_rng(8)
    loss, reference = rng.normal(size=(2, 6))
    where = np.array([True, False, True, True, True, False])
    scalars = {"temperature": 0.5, "gamma": 0.25, "reference_weight": 1.5}
    compiled = torch.compile(moving_average_kl, fullgraph=True, backend="aot_eager")
    state = torch.tensor(0.3, dtype=torch.float64)
    step = compiled(torch.tensor(loss), torch.tensor(reference), state, **scalars, where=torch.tensor(where), xp=xp)
    check(MovingAverageKL(*(x.numpy() for x in step)), exact(loss, reference, 0.3, where, **scalars), size=1.0,
          temperature=0.5, unit=1e-14)  # fmt: skip


def test_under_tracing_what_cannot_be_refused_is_nan() -> None:
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda x, w: moving_average_kl(x, jnp.zeros(3), 0.0, temperature=1.0, gamma=0.5, where=w))
    good, every = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([True, True, True])
    assert not any(bool(jnp.any(jnp.isnan(x))) for x in step(good, every))
    for loss, where in ((good, ~every), (good.at[1].set(jnp.nan), every), (good.at[1].set(jnp.inf), every)):
        assert all(bool(jnp.all(jnp.isnan(x))) for x in step(loss, where))


def test_on_a_device_what_is_not_looked_at_is_nan() -> None:
    import array_api_strict as xp

    loss = xp.asarray([1.0, 2.0], device=xp.Device("device1"))
    for where, weight in ((loss > 9.0, 1.0), (None, xp.nan)):
        bad = xp.asarray([weight, 1.0], device=xp.Device("device1"))
        step = moving_average_kl(loss * bad, loss, 0.0, temperature=1.0, where=where)  # and nothing warns
        assert all(bool(xp.all(xp.isnan(x))) for x in step)


X = np.array([1.0, 2.0])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([[1.0], X, 0.0], {}, TypeError, "loss must be an array, got list"),
        ([X, X[:1], 0.0], {}, ValueError, r"reference_loss must have shape .* = \(2,\), got \(1,\)"),
        ([X, X.astype("f4"), 0.0], {}, TypeError, "reference_loss must have the dtype of loss"),
        ([X.astype(int), X.astype(int), 0.0], {}, TypeError, "loss must have a real floating dtype, got int64"),
        ([X[None], X[None], 0.0], {}, ValueError, r"loss must have 1 axes \(batch_size,\), got shape \(1, 2\)"),
        ([X[:0], X[:0], 0.0], {}, ValueError, "loss must have at least one entry along axis 0"),
        ([X, X * np.nan, 0.0], {}, ValueError, "reference_loss must be finite, got nan at position 0"),
        ([np.array([1.0, np.inf]), X, 0.0], {}, ValueError, "loss must be finite, got inf at position 1"),
        ([X * 1e307, -X * 1e307, 0.0], {}, ValueError, "loss - reference_weight .* must be finite and at most .*, got"),
        ([X * 1e30, X, np.asarray(0.0, dtype="f4")], {"temperature": 1e-8}, ValueError,
         "loss - reference_weight .* must fit log_inner when divided by temperature, got 1e.30 at position 0"),
        ([X * 1e30, X, np.asarray(0.0, dtype="f4")], {"temperature": np.asarray(1e-8)}, ValueError, "fit log_inner"),
        ([X, X, "0"], {}, TypeError, "log_inner must be a real number, got '0'"),
        ([X, X, True], {}, TypeError, "log_inner must be a real number, got True"),
        ([X, X, np.nan], {}, ValueError, "log_inner must be finite, got nan"),
        ([X, X, np.inf], {}, ValueError, "log_inner must be finite, got inf"),
        ([X, X, np.asarray(np.nan)], {}, ValueError, "log_inner must be finite and at most "),
        ([X, X, X], {}, ValueError, r"log_inner must have shape \(\) = \(\), got \(2,\)"),
        ([X, X, np.asarray(0.0, dtype="f2")], {}, TypeError, "log_inner must be float32 or wider, got float16"),
        ([X, X, 0.0], {"temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
        ([X, X, 0.0], {"temperature": (X, X)}, TypeError, "temperature must be a real number, got"),
        ([X, X, 0.0], {"gamma": 0.0}, ValueError, r"gamma must be in \(0, 1\], got 0\.0"),
        ([X, X, 0.0], {"gamma": np.asarray(2.0)}, ValueError, r"gamma must be in \(0, 1\], got 2\.0"),
        ([X, X, 0.0], {"reference_weight": -1.0}, ValueError, r"reference_weight must be >= 0, got -1\.0"),
        ([X, X, 0.0], {"where": X}, TypeError, "where must have dtype bool, got float64"),
        ([X, X, 0.0], {"where": np.ones(3, dtype=bool)}, ValueError, "where must broadcast to the shape of loss"),
        ([X, X, 0.0], {"where": X > 9}, ValueError, "where must mark at least one entry of every slice"),
        ([X, X, 0.0], {"xp": "numpy"}, TypeError, "xp must be an Array API namespace"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(arguments: Any, options: Any, error: Any, message: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(error, match=message):
        moving_average_kl(*arguments, **{"temperature": 0.5, **options})


def test_autograd_and_another_library_or_device_are_refused() -> None:
    import array_api_strict as xp
    import torch

    x = torch.ones(2)
    with pytest.raises(ValueError, match="loss must not require gradients"):
        moving_average_kl(x.clone().requires_grad_(), x, 0.0, temperature=1.0)
    with pytest.raises(ValueError, match="temperature must not require gradients"):
        moving_average_kl(x, x, 0.0, temperature=torch.tensor(1.0, requires_grad=True))
    with pytest.raises(TypeError, match=r"log_inner must come from the library of loss \(torch\)"):
        moving_average_kl(x, x, np.asarray(0.0), temperature=1.0)
    here, there = xp.ones(2), xp.asarray(0.0, device=xp.Device("device1"))
    with pytest.raises(ValueError, match="gamma must be on the device of loss"):
        moving_average_kl(here, here, 0.0, temperature=1.0, gamma=there)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_state_near_the_largest_number_is_refused_or_gives_finite_results(dtype: str) -> None:
    loss, reference = np.asarray([1.0, 2.0], dtype=dtype), np.zeros(2, dtype=dtype)
    largest = np.finfo(dtype).max
    for state in (largest, -largest):
        with pytest.raises(ValueError, match=r"^log_inner must be finite and at most .* in size, or -inf before"):
            moving_average_kl(loss, reference, np.asarray(state), temperature=1.0, gamma=0.5)
    for state in (largest / 2, -largest / 2):
        got = moving_average_kl(loss, reference, np.asarray(state), temperature=1.0, gamma=0.5)
        assert all(np.all(np.isfinite(np.asarray(field))) for field in got)
