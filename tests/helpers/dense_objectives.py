"""The objectives written a second time, densely and with log-sum-exp, for torch and for JAX.

`compare` measures the noise of our float32 gradients against that of the framework's own autograd; both are compared
with autograd in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

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


ORDERS = 3
"""In how many orders of the features' columns the framework computes its gradients."""

MOVE = 2.0**-22
"""The size of a relative move of the features that is no larger than what a float32 product loses.

A sum of D products may be off by D / 2 units in the last place of each factor, and MOVE is two of them.
"""


def compare(library: str, draws: list[tuple[Any, ...]]) -> None:
    """Check the errors of our gradients against the framework's; both are measured against float64.

    `draws` are tuples (objective, its options, arrays, our gradients). Two figures are compared:

    * The error that one row of ten exceeds, which is the noise of nearly all rows.
    * The worst error. Where two logits nearly tie, the last bit of one product decides it, and which way that bit is
      rounded depends on the processor: the errors of two exact replicas may differ by a factor of 50. So the framework
      has its worst of several orders of the columns, and our error may also be what moved features change.
    """
    f = FRAMEWORKS[library]()
    ours, theirs, moved = Errors(), Errors(), Errors()
    for number, (objective, options, arrays, gradients) in enumerate(draws):
        exact = tuple(array.astype(np.float64) for array in arrays)
        truth = f.gradients(objective, exact, options)
        ours.add(gradients(*arrays), truth)
        rng = np.random.default_rng(number)
        for order in range(ORDERS):
            columns = rng.permutation(arrays[0].shape[1]) if order else np.arange(arrays[0].shape[1])
            shuffled = tuple(np.ascontiguousarray(array[:, columns]) for array in arrays)
            theirs.add(f.gradients(objective, shuffled, options), [gradient[:, columns] for gradient in truth])
            near = tuple(x * (1.0 + MOVE * rng.uniform(-1.0, 1.0, size=x.shape)) for x in exact)
            moved.add(f.gradients(objective, near, options), truth)

    ours.check("nine rows of ten are off by at most", 0.9, 1.0, theirs)
    ours.check("the worst row is off by", 1.0, 2.0, theirs, moved)


class Errors:
    """The errors of gradients, row by row, in units of their largest entry."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []

    def add(self, got: list[np.ndarray], truth: list[np.ndarray]) -> None:
        largest = max(*(float(np.max(np.abs(g))) for g in truth), 1e-30)
        self.rows += [np.max(np.abs(g - w), axis=1) / largest for g, w in zip(got, truth, strict=True)]

    def quantile(self, share: float) -> float:
        # A framework's own gradient may be nan where ours is not; such a row says nothing about noise.
        rows = np.concatenate(self.rows)
        return float(np.quantile(rows[~np.isnan(rows)], share)) if not np.all(np.isnan(rows)) else 0.0

    def check(self, words: str, share: float, times: float, *bounds: Errors) -> None:
        assert not np.any(np.isnan(np.concatenate(self.rows)))
        worst, allowed = self.quantile(share), [bound.quantile(share) for bound in bounds]
        assert worst <= times * max(allowed) + 1e-6, (
            f"our gradient: {words} {worst:.1e}; framework's: {', '.join(format(x, '.1e') for x in allowed)}"
        )


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
