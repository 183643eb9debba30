"""No function makes nan of finite input, or an infinity of a result that its dtype holds, however extreme the input.

Every case draws from a seeded table of extreme values (0, the smallest and the largest numbers of the dtype and what
lies between), computes the definition with mpmath, whose exponents have no bounds, and compares. A ValueError is an
answer, too: when code is traced, it becomes nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mpmath
import numpy as np
import pytest

import drrho_core as core

mpf = mpmath.mpf

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
ROUNDS = {"numpy": 40, "torch": 40, "jax": 6, "jax-jit": 3}  # JAX compiles every jitted round and every operation


def limits(dtype: str) -> tuple[float, float, float]:
    """Return the smallest normal number, the largest number and eps."""
    info = ml_dtypes.finfo(DTYPES[dtype])
    return float(info.smallest_normal), float(info.max), float(info.eps)


def rounded(values: Any, dtype: str) -> np.ndarray:
    _, largest, _ = limits(dtype)
    return np.clip(values, -largest, largest).astype(DTYPES[dtype]).astype(np.float64)


@dataclass(frozen=True)
class Table:
    """Extreme values of a dtype; `wide` is the one that it is computed in."""

    rng: np.random.Generator
    dtype: str

    @property
    def wide(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    def draw(self, *shape: int, wide: bool = False, signed: bool = True, positive: bool = False) -> np.ndarray:
        dtype = self.wide if wide else self.dtype
        tiny, largest, eps = limits(dtype)
        powers = np.exp(np.linspace(np.log(tiny), np.log(largest), 9))
        pool = np.concatenate([[0.0, largest, largest / 2, 1.0, 1.0 + eps, 0.9 * math.sqrt(largest)], powers])
        # Few sizes at a time, so that values meet their like and cancel.
        sizes = self.rng.choice(pool, size=self.rng.integers(1, 4))
        values = self.rng.choice(sizes, size=shape) * self.rng.choice([1.0, 1.0, 0.75, 0.5], size=shape)
        values = values * (self.rng.choice([-1.0, 1.0], size=shape) if signed else 1.0)
        return rounded(np.maximum(values, 2 * tiny) if positive else values, dtype)

    def number(self, *, signed: bool = False, positive: bool = False) -> float:
        return float(self.draw(wide=True, signed=signed, positive=positive))

    def weight(self) -> float:
        return float(self.rng.choice([0.0, 1.0, 2.5, self.number()]))

    def fraction(self) -> float:
        """A number in (0, 1]."""
        return float(rounded(self.rng.choice([1.0, 0.5, 1e-3, 1e-30, 1 - 1e-7]), self.wide))


@dataclass(frozen=True)
class Answer:
    """An exact result and what its error is measured against; the exact one is None where only finite is asked for."""

    value: Any
    size: Any = 0


@dataclass(frozen=True)
class Case:
    """What a function is called with, arrays of the dtype and of the wide dtype apart, and what is right."""

    function: Callable[..., Any]
    arrays: tuple[np.ndarray, ...]
    answers: list[Answer]
    wide_arrays: tuple[np.ndarray, ...] = ()


def exact(values: Any) -> list[Any]:
    return [mpf(float(value)) for value in np.ravel(values)]


def mean(values: list[Any]) -> Any:
    return mpmath.fsum(values) / len(values)


def excess(loss: Any, reference: Any, weight: float) -> list[Answer]:
    pairs = zip(exact(loss), exact(reference), strict=True)
    return [Answer(a - mpf(weight) * b, abs(a) + mpf(weight) * abs(b)) for a, b in pairs]


def log_mean_exp(values: list[Any], tau: Any) -> Any:
    top = max(values)
    return top + tau * mpmath.log(mean([mpmath.exp((value - top) / tau) for value in values]))


def excess_loss(table: Table) -> Case:
    loss, reference, weight = table.draw(5), table.draw(5), table.weight()
    return Case(
        lambda *x: core.excess_loss(*x, reference_weight=weight), (loss, reference), excess(loss, reference, weight)
    )


def drrho_risk(table: Table) -> Case:
    loss, reference, weight = table.draw(4), table.draw(4), table.weight()
    x = sorted(excess(loss, reference, weight), key=lambda answer: answer.value)
    answer = Answer((x[-1].value + x[-2].value) / 2, max(one.size for one in x))
    return Case(
        lambda *x: core.drrho_risk(*x, core.CVaR(0.5), reference_weight=weight).risk, (loss, reference), [answer]
    )


def excess_variance(table: Table) -> Case:
    loss, reference, weight = table.draw(2, 3), table.draw(2, 3), table.weight()
    answers = excess(loss, reference, weight)
    x = [answer.value for answer in answers]
    rows = [x[:3], x[3:]]
    within = mean([(value - mean(row)) ** 2 for row in rows for value in row])
    between = mean([(mean(row) - mean(x)) ** 2 for row in rows])
    # Deviations are exact to the eps of what was subtracted, and so are their squares, twice, times the deviation.
    size, eps = max(answer.size for answer in answers), limits(table.wide)[2]
    error = [value + 2 * size * mpmath.sqrt(value) + eps * size * size for value in (within + between, within, between)]
    values = [Answer(*pair) for pair in zip((within + between, within, between), error, strict=True)]
    return Case(lambda *x: core.excess_variance(*x, reference_weight=weight), (loss, reference), values)


def effective_sample_size(table: Table) -> Case:
    small = float(table.rng.choice([0.0, limits(table.dtype)[0], 1e-4]))
    weights = rounded(np.asarray([0.5, 0.5, small, small]), table.dtype)
    value = 1 / mpmath.fsum(p * p for p in exact(weights))
    return Case(core.effective_sample_size, (weights,), [Answer(value, value)])


def generalization_bound(table: Table) -> Case:
    risk, variance = table.draw(3), table.draw(3, signed=False)
    radius, c1, c2 = (table.number() for _ in range(3))
    n = int(table.rng.choice([1, 7, 10**15]))
    spread = [mpf(c1) * mpmath.sqrt(2 * mpf(radius) * value) for value in exact(variance)]
    value, size = min((a + b, abs(a) + b) for a, b in zip(exact(risk), spread, strict=True))
    return Case(
        lambda *x: core.generalization_bound(*x, radius=radius, c1=c1, c2=c2, num_samples=n),
        (risk, variance),
        [Answer(value + mpf(c2) / n, size + mpf(c2) / n)],
    )


def log_mean_exp_bias(table: Table) -> Case:
    losses, tau = table.draw(6), table.number(positive=True)
    x, t = exact(losses), mpf(tau)
    whole = log_mean_exp(x, t)
    measured = mean([log_mean_exp(x[i : i + 2], t) for i in (0, 2, 4)]) - whole
    p = [mpmath.exp((value - whole) / t) / 6 for value in x]
    predicted = -(t / 2) * 6 * mpmath.fsum((value - mpf(1) / 6) ** 2 for value in p) * 2 / 5
    size = max(x) - min(x) + limits(table.wide)[2] * max(map(abs, x))
    return Case(
        lambda x: core.log_mean_exp_bias(x, batch_size=2, temperature=tau),
        (losses,),
        # A weight is the exponential of a quotient, whose relative error is an absolute one of its logarithm.
        [Answer(measured, size), Answer(predicted, abs(predicted) + min(t, size * size / t) * min(1 + size / t, 200))],
    )


def scent_gamma(table: Table) -> Case:
    log_inner, log_alpha, floor = table.draw(4, wide=True), table.number(signed=True), table.fraction()
    sums = [mpf(log_alpha) + value for value in exact(log_inner)]
    values = [max(mpf(floor), 1 / (1 + mpmath.exp(-value))) for value in sums]
    # The sum's error is the logarithm's; where that is large the exponential is 0.
    answers = [
        Answer(v, min(1, v * (1 + min(abs(s), 200) + abs(mpf(log_alpha))))) for v, s in zip(values, sums, strict=True)
    ]
    return Case(lambda x: core.scent_gamma(x, log_alpha=log_alpha, gamma_floor=floor), (), answers, (log_inner,))


def moving_average_kl(table: Table) -> Case:
    loss, reference, weight = table.draw(3), table.draw(3), table.weight()
    tau, gamma = table.number(positive=True), table.fraction()
    log_inner = table.number(signed=True) if table.rng.uniform() < 0.7 else -np.inf
    answers = excess(loss, reference, weight)
    x, t, g = [answer.value for answer in answers], mpf(tau), mpf(gamma)
    log_u = log_mean_exp(x, t) / t
    if log_inner > -np.inf:
        terms = [log_u + mpmath.log(g)] + ([mpf(log_inner) + mpmath.log(1 - g)] if g < 1 else [])
        log_u = max(terms) + mpmath.log(mpmath.fsum(mpmath.exp(term - max(terms)) for term in terms))
    size = max(answer.size for answer in answers) / t + (abs(mpf(log_inner)) if log_inner > -np.inf else 0) + 100
    exponents = [value / t - log_u for value in x]
    weights = [mpmath.exp(exponent) / 3 for exponent in exponents]
    known = size * limits(table.wide)[2] < 1e-3  # else the exponents have no digits behind the point
    return Case(
        lambda *x: core.moving_average_kl(*x, log_inner, temperature=tau, gamma=gamma, reference_weight=weight),
        (loss, reference),
        [
            Answer(t * log_u, t * size),
            *(Answer(w, w * size) if known else Answer(None, 1 / g) for w in weights),
            Answer(log_u, size),
        ],
    )


def update_temperature_rows(table: Table) -> Case:
    temperature = rounded(np.asarray([0.5, 0.011, 0.9]), table.wide)
    momentum, slope, rate = table.draw(3, wide=True), table.draw(3, wide=True), table.number()
    low, high, eps = mpf(0.01), mpf(1.0), limits(table.wide)[2]
    moved, momenta = [], []
    for t, m, s in zip(*map(exact, (temperature, momentum, slope)), strict=True):
        new, size = m / 4 + 3 * s / 4, abs(m) / 4 + 3 * abs(s) / 4
        momenta.append(Answer(new, size))
        ends = [min(max(t - mpf(rate) * (new + way * eps * size), low), high) for way in (-8, 0, 8)]
        moved.append(Answer(ends[1], 1 + (ends[0] - ends[2]) / eps))
    return Case(
        lambda *x: core.update_temperature_rows(core.TemperatureRows(*x[:2]), x[2], learning_rate=rate, beta=0.75),
        (),
        moved + momenta,
        (temperature, momentum, slope),
    )


def update_global_temperature(table: Table) -> Case:
    gradient, rate = table.draw(), float(table.rng.choice([0.0, 1e-3, table.number()]))
    # Adam's first step is the rate, whatever the gradient's size; its 1e-8 matters where that is small.
    g, r = mpf(float(gradient)), mpf(rate)
    new = min(max(mpf(0.5) - r * g / (abs(g) + mpf(1e-8)), mpf(0.01)), mpf(1.0))
    return Case(
        lambda g, t, m, v: _updated(g, t, m, v, rate)[:3],
        (gradient,),
        [Answer(new, 1 + min(r, 2)), Answer(None), Answer(None)],
        (np.asarray(0.5), np.zeros(()), np.zeros(())),
    )


def _updated(gradient: Any, temperature: Any, first: Any, second: Any, rate: float) -> Any:
    import array_api_compat

    xp = array_api_compat.array_namespace(temperature)
    state = core.GlobalTemperatureState(temperature, first, second, xp.asarray(0, dtype=xp.int32))
    return core.update_global_temperature(state, gradient, learning_rate=rate)


def log_inner_from_libauc_v2(table: Table) -> Case:
    u, b = table.draw(4, wide=True, positive=True), table.draw(4, wide=True)
    answers = [Answer(mpmath.log(x) + y, abs(mpmath.log(x)) + abs(y)) for x, y in zip(exact(u), exact(b), strict=True)]
    return Case(core.log_inner_from_libauc_v2, (), answers, (u, b))


def log_inner_from_libauc_v1(table: Table) -> Case:
    u, tau = table.draw(3, wide=True, positive=True), table.number(positive=True)
    similarity = rounded(np.asarray([-1.0, 0.3, 1.0]), table.wide)
    logs = [(mpmath.log(x), s / mpf(tau)) for x, s in zip(exact(u), exact(similarity), strict=True)]
    return Case(
        lambda *x: core.log_inner_from_libauc_v1(x[0], temperature=tau, positive_similarity=x[1]),
        (),
        [Answer(a - b, abs(a) + abs(b)) for a, b in logs],
        (u, similarity),
    )


def log_inner_from_sogclr_loss(table: Table) -> Case:
    log_u, eps = table.draw(4, wide=True), float(table.rng.choice([0.0, 1e-8]))
    return Case(
        lambda x: core.log_inner_from_sogclr_loss(x, batch_size=4, eps=eps), (), [Answer(None, math.inf)] * 4, (log_u,)
    )


CASES = [
    excess_loss,
    drrho_risk,
    excess_variance,
    effective_sample_size,
    generalization_bound,
    log_mean_exp_bias,
    scent_gamma,
    moving_average_kl,
    update_temperature_rows,
    update_global_temperature,
    log_inner_from_libauc_v2,
    log_inner_from_libauc_v1,
    log_inner_from_sogclr_loss,
]


def flat(result: Any) -> list[Any]:
    if isinstance(result, tuple):
        return [value for member in result for value in flat(member)]
    return np.ravel(np.asarray(result.tolist() if hasattr(result, "tolist") else result, dtype=np.float64)).tolist()


def check(case: Case, outcome: list[float], dtypes: list[str], wide: str) -> None:
    """Compare results, each with the dtype that it has; -inf as a logarithm of 0 counts as finite where it is exact."""
    assert len(outcome) == len(case.answers)
    for got, answer, dtype in zip(outcome, case.answers, dtypes, strict=True):
        tiny, largest, eps = limits(dtype)
        assert not math.isnan(got), (outcome, case)
        if answer.value is None:
            assert not math.isinf(got) or answer.size > largest, (outcome, case)
            continue
        size = abs(answer.value)
        bound = 64 * limits(wide)[2] * answer.size + 4 * eps * size + 16 * tiny
        if math.isinf(got):
            assert size + bound > 0.99 * largest, (outcome, case)
        elif size < 0.99 * largest:
            assert abs(got - answer.value) <= bound, (got, answer, outcome, case)
        else:
            assert abs(got) + bound > 0.9 * largest, (outcome, case)


@pytest.fixture(scope="module", params=["numpy", "torch", "jax", "jax-jit"])
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def arrays_of(library: str, case: Case, dtype: str, wide: str) -> list[Any]:
    def convert(values: np.ndarray, name: str) -> Any:
        if library == "numpy":
            return np.asarray(values, dtype=DTYPES[name])
        if library == "torch":
            import torch

            return torch.asarray(values.tolist(), dtype=torch.float64).to(getattr(torch, name))
        return jnp.asarray(np.asarray(values, dtype=DTYPES[name]))

    return [convert(x, dtype) for x in case.arrays] + [convert(x, wide) for x in case.wide_arrays]


def dtype_names(result: Any, count: int) -> list[str]:
    if isinstance(result, tuple):
        names = [name for member in result for name in dtype_names(member, 0)]
        assert count in (0, len(names))
        return names
    return [str(result.dtype).rpartition(".")[2]] * max(1, math.prod(result.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", CASES, ids=lambda draw: draw.__name__)
def test_extreme_values_give_the_exact_result_or_an_error(
    draw: Callable[[Table], Case], dtype: str, library: str
) -> None:
    if (library, dtype) == ("numpy", "bfloat16"):
        pytest.skip("NumPy has no bfloat16")
    jax.config.update("jax_enable_x64", True)
    answered = 0
    with mpmath.workdps(700 if dtype == "float64" else 130), np.errstate(over="ignore"):
        for seed in range(ROUNDS[library]):
            case = draw(Table(np.random.default_rng(seed), dtype))
            wide = "float64" if dtype == "float64" else "float32"
            given = arrays_of(library, case, dtype, wide)
            try:
                result = case.function(*given)
            except ValueError as error:
                assert " must " in str(error), (error, case)  # noqa: PT017
                continue
            if library == "jax-jit":
                result = jax.jit(case.function)(*given)
            answered += 1
            check(case, flat(result), dtype_names(result, len(case.answers)), wide)
    assert answered >= max(1, ROUNDS[library] // 8)
