"""The stored numbers of the conformance kit: problems that leave float64's range, with answers computed by mpmath.

    python reference_impl/recipes/extremes.py          writes drrho_reference/cases/extremes.json
    python reference_impl/recipes/extremes.py --check  exits with code 1 if the file has different numbers

The oracle, the slow NumPy implementation, computes exponentials, which leave the range of float64 in these problems.
This program evaluates the same formulas with 120 digits and unbounded exponents. Its form differs from the oracle's and
the core's: it finds risks by bisection of their optimality condition, and gradients by the matrix formula. All inputs
are float32 numbers, so that they are equal in float64 and float32. Every expected number is the float64 nearest to the
exact number.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mpmath as mp
import numpy as np

FILE = Path(__file__).parents[1] / "drrho_reference" / "cases" / "extremes.json"
DIGITS = 120
NEVER = float("-inf")
SIZE, SAMPLES, BATCH, WIDTH = 7, 6, 5, 4
COLD = float(np.float32(1e-4))

Numbers = list[Any]


# ---------------------------------------------------------------------------------------------------------------------
# Risks
# ---------------------------------------------------------------------------------------------------------------------


def bisect(above: Callable[[Any], bool], low: Any, high: Any) -> Any:
    """Halve [low, high] 500 times; ``above(x)`` is true if the root lies above x."""
    for _ in range(500):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return (low + high) / 2


def mean(values: Sequence[Any]) -> Any:
    """Return the mean."""
    return mp.fsum(values) / len(values)


def cvar(x: Numbers, alpha: Any) -> tuple[Any, Numbers, Any, Any]:
    """Give 1 / (alpha n) to each loss above the quantile, and divide the rest among losses equal to the quantile."""
    k = alpha * len(x)
    quantile = sorted(x, reverse=True)[int(mp.ceil(k)) - 1]
    count, ties = sum(value > quantile for value in x), sum(value == quantile for value in x)
    weights = [1 / k if value > quantile else (1 - count / k) / ties if value == quantile else mp.mpf(0) for value in x]
    return mp.fdot(weights, x), weights, quantile, mp.mpf(0)


def kl_penalty(x: Numbers, temperature: Any) -> tuple[Any, Numbers, Any, Any]:
    """Compute softmax weights; the risk is the temperature times the logarithm of the mean exponential."""
    exponentials = [mp.exp((value - max(x)) / temperature) for value in x]
    risk = max(x) + temperature * mp.log(mean(exponentials))
    return risk, [value / mp.fsum(exponentials) for value in exponentials], risk, temperature


def capped_kl_penalty(x: Numbers, temperature: Any, alpha: Any) -> tuple[Any, Numbers, Any, Any]:
    """Find nu for which the mean of the capped exponentials is 1, by bisection of nu's distance to the maximum."""
    cap, largest = 1 / alpha, max(x)

    def ratios(nu: Any) -> Numbers:
        return [min(mp.exp((value - nu) / temperature), cap) for value in x]

    nu = largest - bisect(lambda distance: mean(ratios(largest - distance)) < 1, mp.mpf(0), largest - min(x))
    weights = [value / len(x) for value in ratios(nu)]
    price = temperature * mean([value * mp.log(value) - value + 1 if value > 0 else mp.mpf(1) for value in ratios(nu)])
    return mp.fdot(weights, x) - price, weights, nu, temperature


def kl_ball(x: Numbers, radius: Any) -> tuple[Any, Numbers, Any, Any]:
    """Find the scale for which the divergence of the softmax is the radius, by bisection of the scale's logarithm."""
    n, width = len(x), max(x) - min(x)

    def divergence(scale: Any) -> Any:
        weights = kl_penalty(x, scale)[1]
        return mp.fsum(p * mp.log(n * p) for p in weights if p > 0)

    if width == 0 or radius >= mp.log(mp.mpf(n) / x.count(max(x))):
        return saturated(x)
    scale = mp.exp(bisect(lambda log_s: divergence(mp.exp(log_s)) > radius, mp.log(width) - 250, mp.log(width) + 250))
    value, weights, nu, _ = kl_penalty(x, scale)
    return value + scale * radius, weights, nu, scale


def chi_square_penalty(x: Numbers, strength: Any) -> tuple[Any, Numbers, Any, Any]:
    """Find m, the number of losses with a weight above 0, by trying 1, 2, ...; these are the m largest losses."""
    n, ordered = len(x), sorted(x, reverse=True)
    for m in range(1, n + 1):
        nu = (mp.fsum(ordered[:m]) - strength * (n - m)) / m
        if ordered[m - 1] > nu - strength and (m == n or ordered[m] <= nu - strength):
            break
    weights = [max(mp.mpf(0), 1 + (value - nu) / strength) / n for value in x]
    price = strength * mean([(n * p - 1) ** 2 / 2 for p in weights])
    return mp.fdot(weights, x) - price, weights, nu, strength


def cressie_read_ball(x: Numbers, order: Any, radius: Any) -> tuple[Any, Numbers, Any, Any]:
    """Find theta of the dual form by bisection of the logarithm of the distance from theta to the maximum."""
    k, n, width = order, len(x), max(x) - min(x)
    if width == 0 or radius >= ((mp.mpf(n) / x.count(max(x))) ** (k - 1) - 1) / (k * (k - 1)):
        return saturated(x)
    conjugate = k / (k - 1)
    factor = (1 + k * (k - 1) * radius) ** (1 / k)

    def slope(theta: Any) -> Any:
        above = [max(value - theta, mp.mpf(0)) for value in x]
        moments = [mean([value**power for value in above]) for power in (conjugate - 1, conjugate)]
        return factor * moments[0] * moments[1] ** (1 / conjugate - 1)

    largest = max(x)
    log_distance = bisect(lambda at: slope(largest - mp.exp(at)) < 1, mp.log(width) - 250, mp.log(width) + 250)
    theta = largest - mp.exp(log_distance)
    shape = [max(value - theta, mp.mpf(0)) ** (1 / (k - 1)) for value in x]
    s = (k - 1) * mean(shape) ** (k - 1)
    weights = [value / mp.fsum(shape) for value in shape]
    return mp.fdot(weights, x), weights, theta + s / (k - 1), s


def saturated(x: Numbers) -> tuple[Any, Numbers, Any, Any]:
    """Divide the weight equally among the largest losses."""
    largest = max(x)
    return largest, [mp.mpf(value == largest) / x.count(largest) for value in x], largest, mp.mpf(0)


SETS: dict[str, tuple[Callable[..., tuple[Any, Numbers, Any, Any]], dict[str, float]]] = {
    "CVaR": (cvar, {"alpha": 0.375}),
    "KLPenalty": (kl_penalty, {"temperature": COLD}),
    "KLBall": (kl_ball, {"radius": 0.25}),
    "ChiSquarePenalty": (chi_square_penalty, {"strength": COLD}),
    "ChiSquareBall": (lambda x, radius: cressie_read_ball(x, mp.mpf(2), radius), {"radius": 0.375}),
    "CressieReadBall": (cressie_read_ball, {"order": 3.0, "radius": 0.25}),
    "CappedKLPenalty": (capped_kl_penalty, {"temperature": COLD, "alpha": 0.375}),
}
ROWS = ("1e30", "1e-30", "1e30 beside 1e-30", "-1e30", "-1e-30", "ties of 1e30", "a gap of 2")


def single(values: Any) -> np.ndarray:
    """Round to float32 and return float64."""
    return np.asarray(values, dtype=np.float32).astype(np.float64)


def extreme_losses(rng: np.random.Generator) -> np.ndarray:
    """Return one row of losses for each of ROWS."""
    signed = rng.normal(size=(SIZE, SAMPLES))
    rows = [1e30 * signed[0], 1e-30 * signed[1], np.where([1, 0, 1, 0, 0, 1], 1e30, 1e-30) * signed[2]]
    rows += [-1e30 * (1 + np.abs(signed[3])), -1e-30 * (1 + np.abs(signed[4]))]
    rows += [1e30 * np.array([0.5, 1.0, 1.0, -1.0, 0.25, 1.0]), np.array([-1.0, 1.0, 0.9999, 0.0, 0.25, 1.0])]
    return single(rows)


def risks(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return one problem with its answer for each ambiguity set."""
    losses = extreme_losses(rng)
    problems = []
    for name, (solve, parameters) in SETS.items():
        answers = [
            solve([mp.mpf(value) for value in row], **{key: mp.mpf(value) for key, value in parameters.items()})
            for row in losses.tolist()
        ]
        risk, weights, nu, s = zip(*answers, strict=True)
        problems.append(
            {
                "function": "worst_case",
                "name": f"{name}: extreme",
                "rows": list(ROWS),
                "sentence": "Huge and tiny losses of either sign; a penalty of 1e-4.",
                "positional": [array(losses), {"set": name, "parameters": parameters}],
                "options": {},
                "expected": {"risk": nearest(risk), "weights": nearest(weights), "dual": [nearest(nu), nearest(s)]},
            }
        )
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Contrastive steps
# ---------------------------------------------------------------------------------------------------------------------


def matrix(values: np.ndarray) -> Any:
    """Return the same numbers as an mpmath matrix."""
    return mp.matrix(values.tolist())


def averaged(log_u: float, g: Any, gamma: Any) -> Any:
    """Return the new u itself, not its logarithm: the exponents of mpmath's numbers are unbounded."""
    return g if log_u == NEVER else (1 - gamma) * mp.exp(mp.mpf(log_u)) + gamma * g


def anchors(D: list[dict[int, Any]], states: Sequence[float], t: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Compute loss, surrogate, weights, temperature gradient and state of every anchor from its exponents D."""
    gamma, eps, radius = (
        mp.mpf(options.get(name, default)) for name, default in (("gamma", 1), ("eps", 0), ("radius", 0))
    )
    results = []
    for exponents, log_u in zip(D, states, strict=True):
        g = mean([mp.exp(value) for value in exponents.values()])
        u = averaged(log_u, g, gamma)
        level = mp.log(eps + u) + radius
        weights = {j: mp.exp(value) / (eps + u) / len(exponents) for j, value in exponents.items()}
        pull = mp.fsum(weights[j] * value for j, value in exponents.items())
        results.append(
            {
                "loss": t * level,
                "surrogate": t * level + t * g / (eps + u),
                "slope": level - pull,
                "weights": weights,
                "state": mp.log(u),
                "size": max(
                    mp.mpf(1),
                    abs(mp.log(eps + u)) + radius,
                    mp.fsum(weights[j] * abs(value) for j, value in exponents.items()),
                ),
            }
        )
    return results


def step(image: np.ndarray, text: np.ndarray, states: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the closed form of the gradients: dE1 = (V E2 - c E2) / 2b, dE2 = (V^T E1 - c E1) / 2b.

    V_ij is the weight of text j for image anchor i plus the weight of image i for text anchor j, and c_i is the sum of
    all weights of image anchor i and of text anchor i.
    """
    b, t = len(image), mp.mpf(options["temperature"])
    E1, E2 = matrix(image), matrix(text)
    Z = E1 * E2.T
    others = [[j for j in range(b) if j != i] for i in range(b)]
    rows = anchors([{j: (Z[i, j] - Z[i, i]) / t for j in others[i]} for i in range(b)], states[0], t, options)
    columns = anchors([{i: (Z[i, j] - Z[j, j]) / t for i in others[j]} for j in range(b)], states[1], t, options)
    V = mp.matrix(b, b)
    for i in range(b):
        for j in others[i]:
            V[i, j] = rows[i]["weights"][j] + columns[j]["weights"][i]
    c = [mp.fsum(rows[i]["weights"].values()) + mp.fsum(columns[i]["weights"].values()) for i in range(b)]
    pull = mp.diag(c)
    return answer(
        rows, columns, (V * E2 - pull * E2) / (2 * b), (V.T * E1 - pull * E1) / (2 * b), ("image", "text"), options
    )


def unimodal(view1: np.ndarray, view2: np.ndarray, states: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the step of two views as one table of 2b rows: dL/dA_ak, then the gradients in both factors of A_ak."""
    b, t = len(view1), mp.mpf(options["temperature"])
    Z = matrix(np.concatenate([view1, view2]))
    A = Z * Z.T
    partner = [(a + b) % (2 * b) for a in range(2 * b)]
    D = [{k: (A[a, k] - A[a, partner[a]]) / t for k in range(2 * b) if k % b != a % b} for a in range(2 * b)]
    results = anchors(D, [*states[0], *states[1]], t, options)
    slopes = mp.matrix(2 * b, 2 * b)
    for a in range(2 * b):
        for k, weight in results[a]["weights"].items():
            slopes[a, k] += weight
            slopes[a, partner[a]] -= weight
    gradient = (slopes * Z + slopes.T * Z) / (2 * b)
    return answer(results[:b], results[b:], gradient[:b, :], gradient[b:, :], ("view1", "view2"), options)


def answer(
    first: list[dict[str, Any]],
    second: list[dict[str, Any]],
    gradient1: Any,
    gradient2: Any,
    sides: tuple[str, str],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the fields of a step's answer, and the sizes that their errors are divided by."""
    b, everybody, t = len(first), first + second, options["temperature"]
    total = {name: mp.fsum(anchor[name] for anchor in everybody) / (2 * b) for name in ("loss", "surrogate", "slope")}
    states = [nearest([anchor["state"] for anchor in side]) for side in (first, second)]
    weights = [
        mp.fsum(left["weights"].values()) + mp.fsum(right["weights"].values())
        for left, right in zip(first, second, strict=True)
    ]
    pull = nearest(max(weights) / (2 * b))
    expected = {
        "loss": nearest(total["loss"]),
        "surrogate": nearest(total["surrogate"]),
        f"{sides[0]}_gradient": nearest(gradient1.tolist()),
        f"{sides[1]}_gradient": nearest(gradient2.tolist()),
        "temperature_gradient": nearest(total["slope"]),
        f"log_inner_{sides[0]}": states[0],
        f"log_inner_{sides[1]}": states[1],
    }
    scales = {
        "loss": max(abs(expected["loss"]), t),
        "surrogate": max(abs(expected["surrogate"]), t),
        f"{sides[0]}_gradient": pull,
        f"{sides[1]}_gradient": pull,
        "temperature_gradient": nearest(max(anchor["size"] for anchor in everybody)),
        **{f"log_inner_{side}": [max(1.0, abs(state)) for state in states[i]] for i, side in enumerate(sides)},
    }
    return {"expected": expected, "scales": scales}


def features(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return unit rows in float32. Image 0 has the similarity -1 with text 0 and 1 with text 1, a difference of 2."""
    rows = rng.normal(size=(2, BATCH, WIDTH))
    image, text = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    text[0], text[1] = -image[0], image[0]
    return single(image), single(text)


def steps(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return the steps in which exponentials leave the range of float64."""
    fresh = np.full((2, BATCH), NEVER)
    far = single([[1e4, -1e4, NEVER, 50.0, -1e4], [-1e4, 1e4, -1e4, NEVER, 1e4]])
    problems: list[tuple[str, str, np.ndarray, dict[str, Any]]] = [
        ("temperature 1e-4", "Temperature 1e-4 and a gap of 2 between similarities.", fresh, {"temperature": COLD}),
        ("temperature 1e-4 and a memory", "Temperature 1e-4, states of +-1e4.", far,
         {"temperature": COLD, "gamma": 0.25}),
        ("log_inner 1e4", "States of +-1e4 at an ordinary temperature.", far, {"temperature": 0.5, "gamma": 0.25}),
        ("log_inner 1e4 and eps", "States of +-1e4, with eps above 0.", far,
         {"temperature": 0.5, "gamma": 0.25, "eps": 0.125, "radius": 0.5}),
    ]  # fmt: skip
    answered = []
    for name, sentence, states, options in problems:
        for function, evaluate in (("contrastive_step", step), ("unimodal_contrastive_step", unimodal)):
            first, second = features(rng)
            answered.append(
                {
                    "function": function,
                    "name": name,
                    "rows": [],
                    "sentence": sentence,
                    "positional": [array(first), array(second), array(states[0]), array(states[1])],
                    "options": options,
                    **evaluate(first, second, states, options),
                }
            )
    return answered


# ---------------------------------------------------------------------------------------------------------------------
# Moving average, selection
# ---------------------------------------------------------------------------------------------------------------------


def averages(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return moving averages in which exponentials leave the range of float64."""
    problems = []
    for name, sentence, state, options in (
        ("temperature 1e-4", "Temperature 1e-4: exponents up to 1e4.", NEVER, {"temperature": COLD, "gamma": 0.25}),
        ("log_inner 1e4", "A state of 1e4.", 1e4, {"temperature": 0.5, "gamma": 0.25}),
        ("log_inner -1e4", "A state of -1e4 and losses below it.", -1e4, {"temperature": 0.5, "gamma": 0.25}),
    ):
        shift = -5002.0 if state == -1e4 else 0.0  # shifts the exponents to about the state
        loss, reference = single(rng.normal(size=SAMPLES) + shift), single(rng.normal(size=SAMPLES))
        tau = mp.mpf(options["temperature"])
        exponents = [(mp.mpf(a) - mp.mpf(r)) / tau for a, r in zip(loss.tolist(), reference.tolist(), strict=True)]
        u = averaged(state, mean([mp.exp(value) for value in exponents]), mp.mpf(options["gamma"]))
        problems.append(
            {
                "function": "moving_average_kl",
                "name": name,
                "rows": [],
                "sentence": sentence,
                "positional": [array(loss), array(reference), array(np.array(state))],
                "options": options,
                "expected": {
                    "risk": nearest(tau * mp.log(u)),
                    "weights": nearest([mp.exp(value) / u / SAMPLES for value in exponents]),
                    "log_inner": nearest(mp.log(u)),
                },
            }
        )
    return problems


def selections(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return a problem of JEST's top-k variant with logits whose exponentials overflow."""
    learner, reference = (single(3e3 * rng.normal(size=(SAMPLES, SAMPLES))) for _ in range(2))
    k, sizes = 5, (3, 2)
    chosen: list[int] = []
    for size in sizes:
        scores = []
        for i in range(SAMPLES):
            score = mp.mpf(reference[i, i]) - mp.mpf(learner[i, i])
            if chosen:
                for logits, sign in ((learner, 1), (reference, -1)):
                    for ends in ([(i, j) for j in chosen], [(j, i) for j in chosen]):
                        total = mp.fsum(mp.exp(mp.mpf(logits[end])) for end in ends)
                        score += sign * mp.log(total) / 2
            scores.append(mp.mpf("-inf") if i in chosen else score)
        chosen += sorted(range(SAMPLES), key=lambda i: (-scores[i], i))[:size]
    return [
        {
            "function": "select_jest",
            "name": "scale 3000",
            "rows": [],
            "sentence": "Logits whose exponentials overflow.",
            "positional": [array(learner), array(reference)],
            "options": {"k": k, "num_chunks": len(sizes), "top_k": True},
            "expected": {"index": chosen},
        }
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def array(values: np.ndarray) -> dict[str, Any]:
    """Return an array in the JSON form of the file."""
    return {"array": plain(values.tolist())}


def plain(value: Any) -> Any:
    """Return finite numbers unchanged and all others, which JSON does not have, as strings."""
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value if np.isfinite(value) else str(value)


def nearest(value: Any) -> Any:
    """Round a number, or all numbers of a nested list, to float64."""
    if isinstance(value, (list, tuple)):
        return [nearest(entry) for entry in value]
    return float(value)


def build() -> str:
    """Return the file's content."""
    rng = np.random.default_rng(20250506)
    with mp.workdps(DIGITS):
        extremes = [*risks(rng), *steps(rng), *averages(rng), *selections(rng)]
    lines = ",\n".join(json.dumps(extreme, allow_nan=False, sort_keys=True) for extreme in extremes)
    return f"[\n{lines}\n]\n"


def main() -> int:
    """Write the file or, with --check, compare the file with the computed numbers."""
    content = build()
    if "--check" in sys.argv[1:]:
        return int(FILE.read_text() != content)
    FILE.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
