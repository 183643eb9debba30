"""Problems for the contrastive step: drawn in NumPy float64, asymmetric, converted to any array library.

`Problem.given` returns the arguments for a library, `Problem.rounded` the same numbers for the oracle, the NumPy
implementation: both are rounded to the library's dtype, so that this rounding does not count as an error. `sizes`
returns the sizes that errors are divided by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from drrho_core import ContrastiveStep, contrastive_step
from helpers.features import unit_rows

NEVER = -np.inf
SCALARS = ("temperature", "gamma", "reference_weight", "radius", "eps")


@dataclass(frozen=True)
class Problem:
    """One batch. Scalars are floats or pairs of arrays; `as_arrays` names the scalars to be passed as 0-d arrays."""

    image_features: np.ndarray
    text_features: np.ndarray
    log_inner_image: np.ndarray
    log_inner_text: np.ndarray
    temperature: Any = 0.5
    gamma: Any = 1.0
    reference_features: tuple[np.ndarray, np.ndarray] | None = None
    reference_weight: float = 1.0
    radius: float = 0.0
    eps: float = 0.0
    pair_mask: np.ndarray | None = None
    as_arrays: frozenset[str] = field(default_factory=frozenset)

    @property
    def batch_size(self) -> int:
        return len(self.image_features)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.image_features, self.text_features, self.log_inner_image, self.log_inner_text

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments; reference features and a mask are among them only if the problem has them."""
        options = {name: getattr(self, name) for name in SCALARS}
        for name in ("reference_features", "pair_mask"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        return options

    def mapped(self, arrays: Callable[[Any], Any], numbers: Callable[[Any], Any]) -> Problem:
        """Apply one function to every floating array (0-d arrays included), and another one to every number."""

        def change(name: str, value: Any) -> Any:
            if value is None or name in ("pair_mask", "as_arrays"):
                return value
            if isinstance(value, tuple):
                return tuple(arrays(member) for member in value)
            return numbers(value) if isinstance(value, float) and name not in self.as_arrays else arrays(value)

        return replace(self, **{name: change(name, value) for name, value in vars(self).items()})

    def rounded(self, space: Any) -> Problem:
        """Return the problem in float64 after rounding to the library's dtype."""
        return replace(
            self.mapped(space.rounded, lambda value: float(space.rounded(value))), as_arrays=frozenset()
        ).mapped(lambda value: value if np.ndim(value) else float(value), float)

    def given(self, space: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and the keyword arguments as arrays of the library."""
        here = self.mapped(
            lambda value: space.asarray(np.asarray(value, dtype=space.dtype_name)),  # torch casts no 0-d NumPy array
            lambda value: float(space.rounded(value)),
        )
        options = here.options
        if self.pair_mask is not None:
            options["pair_mask"] = space.asarray(self.pair_mask)
        return here.arrays, options

    def run(self, space: Any, **static: Any) -> ContrastiveStep:
        """Take the step in the library; results come back as float64 NumPy arrays."""
        return to_numpy(space, step_function(space, **static)(*self.given(space)))


_STEP_FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def step_function(space: Any, **static: Any) -> Callable[..., Any]:
    """Return ``function(arrays, options)``; in a jitted space it is jitted and cached: each shape compiles once."""

    def step(arrays: tuple[Any, ...], options: dict[str, Any]) -> ContrastiveStep:
        return contrastive_step(*arrays, **options, **static)

    if space.jit is None:
        return step
    return _STEP_FUNCTIONS.setdefault((space.name, tuple(static.items())), space.jit(step))


def to_numpy(space: Any, step: ContrastiveStep) -> ContrastiveStep:
    def convert(value: Any) -> Any:
        return tuple(map(convert, value)) if isinstance(value, tuple) else space.to_numpy(value).astype(np.float64)

    return ContrastiveStep(*map(convert, step))


def draw(
    seed: int,
    *,
    b: int = 5,
    d: int = 4,
    r: int | None = 3,
    features: str = "random",
    temperature: tuple[float, float] = (0.1, 2.0),
    per_anchor_temperature: bool = False,
    gamma: str = "number",
    log_inner: float = 1.0,
    never: float = 0.3,
    mask: str | None = None,
    reference_weight: float = 1.0,
    radius: float = 0.0,
    eps: float = 0.0,
    as_arrays: tuple[str, ...] = (),
) -> Problem:
    """Draw a problem. Images differ from texts, and so do states, temperatures and masks: no table is symmetric."""
    rng = np.random.default_rng(seed)
    # The features are random, unless `features` names one of the special cases below.
    images, texts = unit_rows(rng, b, d), unit_rows(rng, b, d)
    reference = None if r is None else (unit_rows(rng, b, r), unit_rows(rng, b, r))
    if features == "aligned":
        texts = images + 0.3 * texts
        texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    elif features == "opposite":
        texts = -images
        reference = reference and (reference[0], reference[0])
    elif features == "identical":
        images = texts = np.repeat(images[:1], b, axis=0)
        reference = reference and (np.repeat(reference[0][:1], b, axis=0), np.repeat(reference[1][:1], b, axis=0))
    elif features == "ties":
        twins = rng.integers(0, 2, size=(2, b))
        images, texts = images[twins[0]], texts[twins[1]]
    # Temperatures are uniform in logarithms. About every fifth gamma is 1, with which the old state has no influence.
    tau = np.exp(rng.uniform(*np.log(temperature), size=(2, b)))
    gammas = np.where(rng.uniform(size=(2, b)) < 0.2, 1.0, rng.uniform(0.05, 1.0, size=(2, b)))
    return Problem(
        images,
        texts,
        *np.where(rng.uniform(size=(2, b)) < never, NEVER, log_inner * rng.normal(size=(2, b))),
        temperature=tuple(tau) if per_anchor_temperature else float(tau[0, 0]),
        gamma={"number": float(gammas[0, 0]), "pair": tuple(gammas), "one": 1.0}[gamma],
        reference_features=reference,
        reference_weight=reference_weight,
        radius=radius,
        eps=eps,
        pair_mask=None if mask is None else draw_mask(rng, b, mask),
        as_arrays=frozenset(as_arrays),
    )


def draw_mask(rng: np.random.Generator, b: int, kind: str) -> np.ndarray:
    """Draw a mask; "empty": one image anchor and one text anchor have no negatives; "none": no anchor has any."""
    mask = rng.uniform(size=(b, b)) < 0.6
    if kind == "empty":
        mask[rng.integers(b), :] = False
        mask[:, rng.integers(b)] = False
    return np.eye(b, dtype=bool) if kind == "none" else mask


@dataclass(frozen=True)
class Sizes:
    """The sizes that errors are compared with: the sizes of the terms of each sum, because the terms may cancel."""

    loss: float
    surrogate: float
    feature_gradient: float
    temperature_gradient: Any


def sizes(p: Problem, expected: ContrastiveStep) -> Sizes:
    """Return the sizes of the terms of the closed form, computed in float64 with logarithms of u."""
    b = p.batch_size
    # Z = S - lambda R, and the negatives that the mask leaves.
    Z = p.image_features @ p.text_features.T
    if p.reference_features is not None:
        Z = Z - p.reference_weight * p.reference_features[0] @ p.reference_features[1].T
    t = [
        np.broadcast_to(side, b)
        for side in (p.temperature if isinstance(p.temperature, tuple) else (p.temperature,) * 2)
    ]
    negatives = (np.ones((b, b), dtype=bool) if p.pair_mask is None else p.pair_mask) & ~np.eye(b, dtype=bool)
    row_sum, weighted, levels = [], [], []
    for matrix, counts, tau, log_u in (
        (Z, negatives, t[0], expected.log_inner_image),
        (Z.T, negatives.T, t[1], expected.log_inner_text),
    ):
        active, number = counts.any(axis=1), np.maximum(counts.sum(axis=1), 1)
        # The exponents D, log(eps + u) and the weights w = exp(D - log(eps + u) - log N) of one direction.
        D = (matrix - np.diag(matrix)[:, None]) / tau[:, None]
        with np.errstate(divide="ignore"):
            level = np.where(active, np.logaddexp(np.where(active, log_u, 0.0), np.log(p.eps)), 0.0)
        w = np.exp(np.where(counts, D - level[:, None] - np.log(number)[:, None], -np.inf))
        row_sum.append(w.sum(axis=1))
        weighted.append((w * np.abs(D)).sum(axis=1))
        levels.append(np.abs(level) + p.radius * active)
    # The error of a logarithm is compared with max(1, |value|), because the logarithm is a sum whose terms may cancel.
    terms = [np.maximum(1.0, np.maximum(*pair)) for pair in zip(levels, weighted, strict=True)]
    value = float(np.mean([t[0] * levels[0], t[1] * levels[1]]))
    tiny = 1e-37  # errors of numbers that float32 cannot represent do not count
    return Sizes(
        loss=value,
        surrogate=value + float(np.mean([t[0] * row_sum[0], t[1] * row_sum[1]])),
        feature_gradient=max(float(np.max(row_sum[0] + row_sum[1])) / (2 * b), tiny),
        temperature_gradient=(
            tuple(np.full(b, np.max(term) / (2 * b)) for term in terms)
            if isinstance(p.temperature, tuple)
            else float(np.max(terms))
        ),
    )


def check_step(
    actual: ContrastiveStep, expected: ContrastiveStep, p: Problem, unit: float, *, far: bool = False
) -> None:
    """Compare all fields; a relative error may be k times `unit`, k = max(1, 0.1 / temperature).

    The error of the loss is divided by max(|value|, temperature) or, if `far` is true, by the size of the terms, which
    are far larger than their sum.
    """
    # Exponents have the size 1/t, and so have their rounding errors: for t below 0.1 the bound grows with 1/t.
    coldest = min(np.min(side) for side in (p.temperature if isinstance(p.temperature, tuple) else (p.temperature,)))
    bound = max(1.0, 0.1 / float(coldest)) * unit
    size = sizes(p, expected)
    warmest = max(np.max(side) for side in (p.temperature if isinstance(p.temperature, tuple) else (p.temperature,)))
    scales = ContrastiveStep(
        loss=max(abs(float(expected.loss)), float(warmest), size.loss if far else 0.0),
        surrogate=max(abs(float(expected.surrogate)), float(warmest), size.surrogate if far else 0.0),
        image_gradient=size.feature_gradient,
        text_gradient=size.feature_gradient,
        temperature_gradient=size.temperature_gradient,
        log_inner_image=np.maximum(1.0, np.abs(expected.log_inner_image)),
        log_inner_text=np.maximum(1.0, np.abs(expected.log_inner_text)),
    )
    for name, value, right, scale in zip(ContrastiveStep._fields, actual, expected, scales, strict=True):
        # A temperature gradient per anchor is a pair of arrays; each side is compared alone.
        sides = zip(value, right, scale, strict=True) if isinstance(right, tuple) else [(value, right, scale)]
        for got, answer, size_of_side in sides:
            assert np.shape(got) == np.shape(answer), name
            here, there, unit_here = np.broadcast_arrays(got, answer, size_of_side)
            differ = here != there  # states of -inf do not
            error = np.abs(here[differ] - there[differ]) / unit_here[differ]
            assert np.all(error <= bound), (
                f"{name}: off by {np.max(error):.2e}, allowed {bound:.2e}; {got} for {answer}"
            )
