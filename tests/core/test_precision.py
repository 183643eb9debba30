"""Gradients in float32 at any temperature: no noisier than a framework's own autograd, and never nan.

Every objective is written a second time below, densely and with log-sum-exp, for torch and for JAX. In float64 their
autograd gives the truth; in float32 it is the noise that a user of that framework would have without this library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from drrho_core import (
    contrastive_step,
    distillation_loss,
    hinge_margin_loss,
    info_nce,
    sigmoid_loss,
    unimodal_contrastive_step,
)

B, D, R = 32, 12, 6
KINDS = ["unit", "aligned", "clusters", "long", "heavy reference"]


class Torch:
    """Torch, as far as the dense objectives need it."""

    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch")

    def gradients(
        self, objective: Callable[..., Any], arrays: tuple[np.ndarray, ...], options: dict[str, Any]
    ) -> list[np.ndarray]:
        leaves = [self.torch.from_numpy(array.copy()).requires_grad_() for array in arrays]
        objective(self, *leaves, **options).backward()
        return [leaf.grad.numpy().astype(np.float64) for leaf in leaves]

    def constant(self, array: np.ndarray, like: Any) -> Any:
        return self.torch.from_numpy(np.array(array)).to(like.dtype)

    def log_sum_exp(self, x: Any, axis: int) -> Any:
        return self.torch.logsumexp(x, dim=axis)

    def without_diagonal(self, x: Any) -> Any:
        return x.masked_fill(self.torch.eye(len(x), dtype=self.torch.bool), -self.torch.inf)

    def fixed(self, x: Any) -> Any:
        return x.detach()

    def softplus(self, x: Any) -> Any:
        return self.torch.logaddexp(x, self.torch.zeros_like(x))

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return self.torch.where(condition, a, b)

    def cat(self, arrays: list[Any], axis: int) -> Any:
        return self.torch.cat(arrays, dim=axis)

    def eye(self, n: int, like: Any) -> Any:
        return self.torch.eye(n, dtype=like.dtype)

    def exp(self, x: Any) -> Any:
        return self.torch.exp(x)


class Jax(Torch):
    """The same for JAX."""

    def __init__(self) -> None:
        self.jax = pytest.importorskip("jax")
        self.jax.config.update("jax_enable_x64", True)
        self.jnp = self.jax.numpy

    def gradients(
        self, objective: Callable[..., Any], arrays: tuple[np.ndarray, ...], options: dict[str, Any]
    ) -> list[np.ndarray]:
        function = self.function(objective)
        got = function([self.jnp.asarray(array) for array in arrays], options)
        return [np.asarray(g).astype(np.float64) for g in got]

    def function(self, objective: Callable[..., Any]) -> Callable[..., Any]:
        return self.jax.grad(lambda leaves, options: objective(self, *leaves, **options))

    def constant(self, array: np.ndarray, like: Any) -> Any:
        return self.jnp.asarray(array, dtype=like.dtype)

    def log_sum_exp(self, x: Any, axis: int) -> Any:
        return self.jax.nn.logsumexp(x, axis=axis)

    def without_diagonal(self, x: Any) -> Any:
        return self.jnp.where(self.jnp.eye(len(x), dtype=bool), -self.jnp.inf, x)

    def fixed(self, x: Any) -> Any:
        return self.jax.lax.stop_gradient(x)

    def softplus(self, x: Any) -> Any:
        return self.jnp.logaddexp(x, self.jnp.zeros_like(x))

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return self.jnp.where(condition, a, b)

    def cat(self, arrays: list[Any], axis: int) -> Any:
        return self.jnp.concatenate(arrays, axis=axis)

    def eye(self, n: int, like: Any) -> Any:
        return self.jnp.eye(n, dtype=like.dtype)

    def exp(self, x: Any) -> Any:
        return self.jnp.exp(x)


class JaxJitted(Jax):
    """JAX compiled: its products round in another order than those of the eager calls."""

    def function(self, objective: Callable[..., Any]) -> Callable[..., Any]:
        return _JITTED.setdefault(objective, self.jax.jit(super().function(objective)))


# Autograd of JAX is jitted for our eager gradients, too, because eager JAX compiles each of its operations.
FRAMEWORKS = {"numpy": Torch, "torch": Torch, "jax": JaxJitted, "jax-jit": JaxJitted}
_JITTED: dict[Any, Any] = {}


def draw(kind: str, seed: int) -> tuple[np.ndarray, ...]:
    """Images, texts and both reference features in float32."""
    rng = np.random.default_rng(seed)

    def unit(columns: int) -> np.ndarray:
        x = rng.normal(size=(B, columns))
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    images, texts, references = unit(D), unit(D), (unit(R), unit(R))
    if kind == "aligned":
        texts = images + 0.3 * texts
        texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    elif kind == "clusters":  # some anchors are near many others, some near none: their peaks are far apart
        images[: B // 2] = images[:1] + 0.05 * images[: B // 2]
        texts[: B // 2] = images[:1] + 0.05 * texts[: B // 2]
        images[B // 2 :] *= 0.1
    elif kind == "long":
        images, texts = 30.0 * images, 7.0 * texts
    return tuple(x.astype(np.float32) for x in (images, texts, *references))


def similarities(f: Any, images: Any, texts: Any, references: Any, weight: float) -> Any:
    S = images @ texts.T
    return S if references is None else S - weight * (f.constant(references[0], S) @ f.constant(references[1], S).T)


def contrastive(
    f: Any, images: Any, texts: Any, *, t: Any, references: Any, weight: float, gamma: Any, states: Any
) -> Any:
    """The surrogate of `contrastive_step`, with the inner estimates held fixed."""
    Z = similarities(f, images, texts, references, weight)
    total = 0.0
    for matrix, state, temperature in ((Z, states[0], t[0]), (Z.T, states[1], t[1])):
        temperature = f.constant(temperature, Z)
        D = (matrix - matrix.diagonal()[:, None]) / temperature[:, None]
        log_g = f.log_sum_exp(f.without_diagonal(D), 1) - float(np.log(B - 1))
        old = f.constant(state, Z)
        gap = f.where(old == -np.inf, f.fixed(log_g), old) - f.fixed(log_g)  # log(u / g)
        share = 1.0 / ((1.0 - gamma) * f.exp(gap) + gamma)
        total = total + (temperature * share * log_g).sum()  # its gradient is that of t g / u
    return total / (2 * B)


def cross_entropy(f: Any, images: Any, texts: Any, *, t: float) -> Any:
    logits = images @ texts.T / t
    both = [(f.log_sum_exp(x, 1) - x.diagonal()).sum() for x in (logits, logits.T)]
    return (both[0] + both[1]) / (2 * B)


def distilled(f: Any, images: Any, texts: Any, *, t: float, references: Any) -> Any:
    logits = images @ texts.T / t
    teacher = f.constant(references[0], logits) @ f.constant(references[1], logits).T / t
    total = 0.0
    for x, y in ((logits, teacher), (logits.T, teacher.T)):
        target = f.exp(y - f.log_sum_exp(y, 1)[:, None])
        total = total - (target * (x - f.log_sum_exp(x, 1)[:, None])).sum()
    return total / (2 * B)


def sigmoid(f: Any, images: Any, texts: Any, *, scale: float) -> Any:
    logits = scale * (images @ texts.T) - 3.0
    return f.softplus(f.where(f.eye(B, logits) > 0, -logits, logits)).sum() / B


def two_views(f: Any, view1: Any, view2: Any, *, t: float) -> Any:
    total = 0.0
    for own, other in ((view1, view2), (view2, view1)):
        p = (own * other).sum(1)[:, None]
        D = [f.without_diagonal((own @ x.T - p) / t) for x in (own, other)]
        total = total + t * f.log_sum_exp(f.cat(D, 1), 1).sum()
    return total / (2 * B)


def compare(library: str, draws: list[tuple[Any, ...]]) -> None:
    """Check the worst error of our gradients against the framework's worst, both against float64.

    `draws` are tuples (objective, its options, arrays, our gradients). They are pooled: where two logits nearly tie,
    one rounding decides the error, and on a single draw torch's is up to fifty times JAX's.
    """
    f, ours, theirs = FRAMEWORKS[library](), 0.0, 0.0
    for objective, options, arrays, gradients in draws:
        truth = f.gradients(objective, tuple(array.astype(np.float64) for array in arrays), options)
        largest = max(max(float(np.max(np.abs(g))) for g in truth), 1e-30)

        def error(got: list[np.ndarray], truth: Any = truth, largest: float = largest) -> float:
            return max(float(np.max(np.abs(g - w))) for g, w in zip(got, truth, strict=True)) / largest

        ours = max(ours, error(gradients(*arrays)))
        theirs = max(theirs, error(f.gradients(objective, arrays, options)))
    assert ours <= 2.0 * theirs + 1e-6, f"our gradient is off by {ours:.1e}, the framework's by {theirs:.1e}"


LIBRARIES = ["numpy", "torch", "jax", "jax-jit"]
INVERSE = {"numpy": [10.0**k for k in range(11)], "torch": [10.0**k for k in range(11)], "jax": [1.0, 1e2, 1e10]}
INVERSE["jax-jit"] = [1.0, 1e2, 1e4, 1e6, 1e10]
SEEDS = {"numpy": 6, "torch": 6, "jax": 3, "jax-jit": 6}


def in_library(library: str, value: Any) -> Any:
    """Carry NumPy arrays, and tuples of them, into a library."""
    if isinstance(value, tuple):
        return tuple(in_library(library, member) for member in value)
    if not isinstance(value, np.ndarray):
        return value
    if library == "torch":
        import torch

        return torch.from_numpy(value.copy())
    if library.startswith("jax"):
        import jax.numpy as jnp

        return jnp.asarray(value)
    return value


def our_gradients(library: str, function: Callable[..., Any], *more: np.ndarray, **options: Any) -> Callable[..., Any]:
    """Return a function of float32 NumPy features that gives our two gradients in one library."""

    def call(arrays: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
        result = function(*arrays, **options)
        return [getattr(result, name) for name in result._fields if name.endswith("_gradient")][:2]

    def gradients(*arrays: np.ndarray) -> list[np.ndarray]:
        here = call
        given = {name: in_library(library, value) for name, value in options.items()}
        if library == "jax-jit":  # numbers are arguments too, so that each function is compiled once
            import jax

            here = _JITTED.setdefault((function, *sorted(options)), jax.jit(call))
            given = {name: np.float32(value) if isinstance(value, float) else value for name, value in given.items()}
        return [np.asarray(g).astype(np.float64) for g in here(in_library(library, (*arrays, *more)), given)]

    return gradients


UNSEEN = np.full(B, -np.inf, dtype=np.float32)


def unmoved(t: Any, **options: Any) -> dict[str, Any]:
    """The options of `contrastive` for a step without memory."""
    return {"t": t, "gamma": 1.0, "states": (UNSEEN, UNSEEN), **options}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_step_is_no_noisier_than_autograd(library: str, kind: str) -> None:
    weight = 300.0 if kind == "heavy reference" else 1.0
    for inverse in INVERSE[library]:
        draws: list[Any] = []
        t = np.full(B, 1.0 / inverse, dtype=np.float32)
        for seed in range(SEEDS[library]):
            *arrays, one, other = draw(kind, seed)
            references = None if seed % 2 and kind != "heavy reference" else (one, other)
            options: dict[str, Any] = {"temperature": float(t[0])}
            if references is not None:
                options |= {"reference_features": references, "reference_weight": weight}
            ours = our_gradients(library, contrastive_step, UNSEEN, UNSEEN, **options)
            draws.append((contrastive, unmoved((t, t), references=references, weight=weight), tuple(arrays), ours))
        compare(library, draws)


@pytest.mark.parametrize("library", LIBRARIES)
def test_temperatures_per_anchor_are_no_noisier_than_autograd(library: str) -> None:
    spread = np.random.default_rng(3).uniform(0.5, 2.0, size=(2, B))
    for inverse in INVERSE[library]:
        t, draws = tuple((side / inverse).astype(np.float32) for side in spread), []
        for seed in range(SEEDS[library]):
            *arrays, one, other = draw("unit", seed)
            ours = our_gradients(
                library, contrastive_step, UNSEEN, UNSEEN, temperature=t, reference_features=(one, other)
            )
            draws.append((contrastive, unmoved(t, references=(one, other), weight=1.0), tuple(arrays), ours))
        compare(library, draws)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_step_with_memory_is_no_noisier_than_autograd(library: str) -> None:
    for inverse in [1.0, 10.0, 100.0]:
        draws: list[Any] = []
        t = np.full(B, 1.0 / inverse, dtype=np.float32)
        for seed in range(SEEDS[library]):
            arrays, rng = draw("unit", seed)[:2], np.random.default_rng(50 + seed)
            Z = arrays[0].astype(np.float64) @ arrays[1].astype(np.float64).T
            log_g = [np.log(np.mean(np.exp((m - np.diag(m)[:, None]) * inverse), axis=1)) for m in (Z, Z.T)]
            states = tuple((side + rng.normal(size=B)).astype(np.float32) for side in log_g)

            dense = {"t": (t, t), "references": None, "weight": 1.0, "gamma": 0.4, "states": states}
            ours = our_gradients(library, contrastive_step, *states, temperature=float(t[0]), gamma=0.4)
            draws.append((contrastive, dense, arrays, ours))
        compare(library, draws)


def distil(images: Any, texts: Any, one: Any, other: Any, **options: Any) -> Any:
    return distillation_loss(images, texts, one, other, **options)


@pytest.mark.parametrize("kind", ["unit", "aligned", "clusters", "long"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("loss", ["info_nce", "distillation_loss", "sigmoid_loss", "unimodal_contrastive_step"])
def test_other_losses_are_no_noisier_than_autograd(library: str, loss: str, kind: str) -> None:
    for inverse in INVERSE[library]:
        draws: list[Any] = []
        t = float(np.float32(1.0 / inverse))
        for seed in range(SEEDS[library]):
            *arrays, one, other = draw(kind, seed)
            forms: dict[str, tuple[Any, Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
                "info_nce": (cross_entropy, info_nce, (), {"temperature": t}, {"t": t}),
                "sigmoid_loss": (sigmoid, sigmoid_loss, (), {"scale": inverse, "bias": -3.0}, {"scale": inverse}),
                "unimodal_contrastive_step": (
                    two_views, unimodal_contrastive_step, (UNSEEN, UNSEEN), {"temperature": t}, {"t": t}
                ),
                "distillation_loss": (
                    distilled, distil, (one, other),
                    {"temperature": t, "reference_temperature": t}, {"t": t, "references": (one, other)},
                ),
            }  # fmt: skip
            dense, function, more, options, inner = forms[loss]

            draws.append((dense, inner, tuple(arrays), our_gradients(library, function, *more, **options)))
        compare(library, draws)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("per_anchor", [False, True])
def test_the_weights_of_an_anchor_sum_to_at_most_one_over_gamma(dtype: str, per_anchor: bool) -> None:
    """With all other anchors' weights at 0, the texts' gradients are w_ij image_i / 2b: their sum shows sum_j w_ij."""
    images, texts, *_ = (x.astype(dtype) for x in draw("unit", 7))
    rng, bound = np.random.default_rng(8), 1e-5 if dtype == "float32" else 1e-10
    for inverse in INVERSE["numpy"]:
        for gamma in (1.0, 0.3):
            states = np.where(rng.uniform(size=B) < 0.5, -np.inf, inverse * rng.normal(size=B)).astype(dtype)
            t: Any = np.full(B, 1.0 / inverse, dtype=dtype)
            for i in range(4):
                chosen = np.zeros(B, dtype=dtype)
                chosen[i] = 1.0
                step = contrastive_step(
                    images, texts, states, states,
                    temperature=(t, t) if per_anchor else float(t[0]),
                    gamma=gamma, anchor_weight=(chosen, np.zeros_like(chosen)),
                )  # fmt: skip
                others = np.delete(step.text_gradient.astype(np.float64), i, axis=0).sum(axis=0)
                image = images[i].astype(np.float64)
                total = 2 * B * float(others @ image) / float(image @ image)
                assert 0.0 <= total <= (1.0 + bound) / gamma
                if states[i] == -np.inf or gamma == 1.0:
                    assert total == pytest.approx(1.0, rel=bound)


# ---------------------------------------------------------------------------------------------------------------------
# Never nan
# ---------------------------------------------------------------------------------------------------------------------

SIZES = [1e-38, 1e-30, 1e-19, 1e-3, 1.0, 1e3, 1e18, 1e20, 1e30, 3e37]
TEMPERATURES = [1e-37, 1e-30, 1e-10, 1e-2, 1.0, 1e10, 1e30, 2e37]
FEW_SIZES, FEW_TEMPERATURES = [1e-38, 1.0, 1e20, 3e37], [1e-37, 1e-2, 1e10, 2e37]  # for eager JAX, which is slow


def everything(size: float, other_size: float, t: float, library: str) -> dict[str, Callable[[], Any]]:
    images, texts, one, other = (x[:5] for x in draw("unit", 9))
    a, b = (images * np.float32(size), texts * np.float32(other_size))
    a, b, one, other, never, per_anchor = in_library(
        library, (a, b, one, other, np.full(5, -np.inf, dtype=np.float32), np.full(5, t, dtype=np.float32))
    )
    return {
        "step": lambda: contrastive_step(a, b, never, never, temperature=t),
        "per anchor": lambda: contrastive_step(a, b, never, never, temperature=(per_anchor, per_anchor)),
        "reference": lambda: contrastive_step(a, b, never, never, temperature=t, reference_features=(b, a)),
        "unimodal": lambda: unimodal_contrastive_step(a, b, never, never, temperature=t),
        "info_nce": lambda: info_nce(a, b, temperature=t),
        "distillation": lambda: distillation_loss(a, b, one, other, temperature=t, reference_temperature=0.1),
        "teacher": lambda: distillation_loss(one, other, a, b, temperature=0.1, reference_temperature=t),
        "sigmoid": lambda: sigmoid_loss(a, b, scale=min(1.0 / t, 3e38), bias=-10.0),
        "hinge": lambda: hinge_margin_loss(a, b, margin=min(t, 1e30)),
    }


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_nothing_is_nan_whatever_the_size_of_features_and_temperatures(library: str) -> None:
    bad = []
    sizes, temperatures = (FEW_SIZES, FEW_TEMPERATURES) if library == "jax" else (SIZES, TEMPERATURES)
    for size in sizes:
        for other_size in (1.0, size):
            for t in temperatures:
                for name, call in everything(size, other_size, t, library).items():
                    with np.errstate(all="ignore"):
                        result = call()
                    for field, value in zip(result._fields, result, strict=True):
                        for part in value if isinstance(value, tuple) else (value,):
                            if np.any(np.isnan(np.asarray(part))):
                                bad.append(f"{name}.{field} at features {size:g}, {other_size:g} and temperature {t:g}")
    assert bad == []


@pytest.mark.parametrize("per_anchor", [False, True])
def test_gradients_stay_right_where_similarities_overflow(per_anchor: bool) -> None:
    images, texts, *_ = draw("unit", 10)
    t: Any = (np.full(B, 0.05, np.float32),) * 2 if per_anchor else 0.05
    with np.errstate(over="ignore"):  # the loss is larger than float32 holds
        step = contrastive_step(images * np.float32(1e25), texts * np.float32(1e20), UNSEEN, UNSEEN, temperature=t)
    wide: Any = (np.full(B, 0.05),) * 2 if per_anchor else 0.05
    large = images.astype("f8") * 1e25, texts.astype("f8") * 1e20
    expected = contrastive_step(*large, UNSEEN.astype("f8"), UNSEEN.astype("f8"), temperature=wide)
    for name in ("image_gradient", "text_gradient"):
        got, wanted = getattr(step, name), getattr(expected, name)
        assert np.max(np.abs(got - wanted)) <= 1e-6 * np.max(np.abs(wanted))


def test_a_hinge_without_violations_has_no_gradient_whatever_the_features_size() -> None:
    features = 3e25 * np.eye(3, dtype=np.float32)
    result = hinge_margin_loss(features, features, margin=0.0)
    assert result.loss == 0.0
    assert np.all(result.image_gradient == 0.0)
    assert np.all(result.text_gradient == 0.0)


@pytest.mark.parametrize("factor", [1e-38, 1e10, 3e38])
@pytest.mark.parametrize("t", [1e-35, 1e-2, 1e30])
def test_nothing_is_nan_whatever_the_size_of_anchor_weights(t: float, factor: float) -> None:
    images, texts, *_ = draw("unit", 13)
    weight = np.full(B, factor, dtype=np.float32)
    with np.errstate(over="ignore"):
        for function, states in ((contrastive_step, 2), (unimodal_contrastive_step, 2), (info_nce, 0)):
            result = function(images, texts, *(UNSEEN,) * states, temperature=t, anchor_weight=weight)
            for field, value in zip(result._fields, result, strict=True):
                assert not np.any(np.isnan(value)), (function.__name__, field)


def test_large_anchor_weights_scale_the_loss() -> None:
    images, texts, *_ = draw("unit", 14)
    plain = contrastive_step(images, texts, UNSEEN, UNSEEN, temperature=0.01)
    weight = np.full(B, 1e38, dtype=np.float32)
    scaled = contrastive_step(images, texts, UNSEEN, UNSEEN, temperature=0.01, anchor_weight=weight)
    assert scaled.loss == pytest.approx(1e38 * float(plain.loss), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes of the reference features, and options that nobody can look at
# ---------------------------------------------------------------------------------------------------------------------

HALF_AND_WIDE = [
    ("numpy", "float16", "float32"),
    ("numpy", "float32", "float64"),
    ("torch", "bfloat16", "float32"),
    ("torch", "float16", "float64"),
    ("jax", "bfloat16", "float32"),
    ("jax", "bfloat16", "float16"),
]


@pytest.mark.parametrize("function", [contrastive_step, unimodal_contrastive_step])
@pytest.mark.parametrize(("library", "dtype", "reference_dtype"), HALF_AND_WIDE)
def test_reference_features_of_another_dtype_are_promoted(
    library: str, dtype: str, reference_dtype: str, function: Any
) -> None:
    import array_api_compat

    images, texts, one, other = in_library(library, draw("unit", 11))
    never = in_library(library, UNSEEN)
    xp = array_api_compat.array_namespace(images)
    half, wide = getattr(xp, dtype), getattr(xp, reference_dtype)
    features = [xp.astype(x, half) for x in (images, texts)]
    references = tuple(xp.astype(x, wide) for x in (one, other))
    mixed = function(*features, never, never, temperature=0.1, reference_features=references)
    together = xp.result_type(half, wide)
    wider = [xp.astype(x, together) for x in features]
    same = function(
        *wider, never, never, temperature=0.1, reference_features=tuple(xp.astype(x, together) for x in references)
    )
    for name, got, wanted in zip(mixed._fields, mixed, same, strict=True):
        if name.endswith("_gradient") and not name.startswith("temperature"):
            assert got.dtype == half
            got, wanted = xp.astype(got, xp.float32), xp.astype(xp.astype(wanted, half), xp.float32)
        got, wanted = (np.asarray(x, dtype=np.float64) for x in (got, wanted))
        assert np.allclose(got, wanted, rtol=2e-5, atol=1e-6 if together == xp.float32 else 0.0), name


BEYOND = {
    "temperature": [0.0, -1.0, np.inf],
    "gamma": [0.0, 1.5, -0.1, np.nan],
    "eps": [-1.0],
    "radius": [-1.0],
    "reference_weight": [-0.5],
    "anchor_weight": [np.full(B, -1.0, dtype=np.float32)],
}


@pytest.mark.parametrize("name", BEYOND)
def test_an_option_outside_its_domain_gives_nan_where_code_is_traced(name: str) -> None:
    jax = pytest.importorskip("jax")
    images, texts, one, other = in_library("jax", draw("unit", 12))
    seen = jax.numpy.zeros(B, dtype=jax.numpy.float32)
    plain = {"temperature": 0.1, "gamma": 0.5, "reference_features": (one, other)}

    @jax.jit
    def step(value: Any) -> Any:
        return contrastive_step(images, texts, seen, seen, **(plain | {name: value}))

    for value in BEYOND[name]:
        got = step(jax.numpy.asarray(value, dtype=jax.numpy.float32))
        assert np.isnan(got.loss), value
        if name != "radius":  # which the gradient does not depend on
            assert np.all(np.isnan(got.image_gradient)), value
