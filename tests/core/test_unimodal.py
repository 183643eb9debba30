"""The unimodal step against 60 digits on every array library, autograd, SimCLR's loss, and its own tiles.

The tests see it another way than the core: as 2b anchors and one (2b, 2b) matrix, view 1 first, view 2 after it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from drrho_reference import unimodal_contrastive_step as oracle_step
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import UnimodalStep, unimodal_contrastive_step
from drrho_core.contrastive import tiles
from helpers import problems

NEVER = -np.inf
SCALARS = ("temperature", "gamma", "reference_weight", "radius", "eps")
FULL = {"per_anchor_temperature": True, "gamma": "pair", "radius": 0.3, "eps": 1e-4, "reference_weight": 1.5}

# XLA compiles per shape and per structure of the arguments, so JAX gets few of them.
FIXED = [
    {"b": 2, "d": 1, "r": None, "per_anchor_temperature": False, "gamma": "number", "as_arrays": ()},
    {"b": 4, "d": 3, "r": 5, "per_anchor_temperature": True, "gamma": "pair", "as_arrays": ("eps",)},
]

_JITTED: dict[Any, Any] = {}


def run(p: Any, space: Any, **static: Any) -> UnimodalStep:
    """Take the step in the library; results come back as float64 NumPy arrays."""

    def step(arrays: Any, options: Any) -> UnimodalStep:
        return unimodal_contrastive_step(*arrays, **options, **static)

    if space.jit is not None:
        step = _JITTED.setdefault((space.dtype_name, tuple(static.items())), space.jit(step))
    return to_numpy(step(*p.given(space)), space.to_numpy)


def to_numpy(step: Any, convert: Any) -> UnimodalStep:
    def one(value: Any) -> Any:
        return tuple(map(one, value)) if isinstance(value, tuple) else np.asarray(convert(value)).astype(np.float64)

    return UnimodalStep(*map(one, step))


def both(value: Any, b: int) -> np.ndarray:
    """One value per anchor, view 1 first."""
    return np.concatenate([np.broadcast_to(side, b) for side in (value if isinstance(value, tuple) else (value,) * 2)])


def exact(p: Any) -> UnimodalStep:
    """The step over 2b anchors, in the linear domain of numbers of 60 digits with any exponent."""
    with mp.workdps(60):
        b = p.batch_size
        anchors = range(2 * b)
        views = [[mp.mpf(float(x)) for x in row] for row in np.concatenate([p.image_features, p.text_features])]

        def dot(left: Any, right: Any) -> Any:
            return mp.fsum(x * y for x, y in zip(left, right, strict=True))

        A = [[dot(views[i], views[j]) for j in anchors] for i in anchors]
        if p.reference_features is not None:
            reference = [[mp.mpf(float(x)) for x in row] for row in np.concatenate(p.reference_features)]
            weight = mp.mpf(p.reference_weight)
            A = [[A[i][j] - weight * dot(reference[i], reference[j]) for j in anchors] for i in anchors]
        tau, gamma = ([mp.mpf(float(x)) for x in both(value, b)] for value in (p.temperature, p.gamma))
        old = np.concatenate([p.log_inner_image, p.log_inner_text])
        loss = surrogate = mp.mpf(0)
        slopes, states = [], []
        pull = [[mp.mpf(0)] * len(views[0]) for _ in anchors]
        for a in anchors:
            positive = (a + b) % (2 * b)
            # A text's similarity to an image is read from the same entry as the image's to the text.
            p_a = A[a % b][a % b + b]
            D = {j: (A[a][j] - p_a) / tau[a] for j in anchors if j % b != a % b}
            g = mp.fsum(map(mp.exp, D.values())) / (2 * b - 2)
            u = g if old[a] == NEVER else (1 - gamma[a]) * mp.exp(mp.mpf(float(old[a]))) + gamma[a] * g
            w = {j: mp.exp(D[j]) / (mp.mpf(p.eps) + u) / (2 * b - 2) for j in D}
            level = mp.log(mp.mpf(p.eps) + u) + mp.mpf(p.radius)
            loss += tau[a] * level
            surrogate += tau[a] * (level + g / (mp.mpf(p.eps) + u))
            slopes.append(float((level - mp.fsum(w[j] * D[j] for j in D)) / (2 * b)))
            states.append(float(mp.log(u)))
            for j in D:
                for left, right, size in ((a, j, w[j]), (j, a, w[j]), (a, positive, -w[j]), (positive, a, -w[j])):
                    pull[left] = [x + size * y for x, y in zip(pull[left], views[right], strict=True)]
        gradient = np.array([[float(x / (2 * b)) for x in row] for row in pull])
        pair = np.array(slopes[:b]), np.array(slopes[b:])
        return UnimodalStep(
            np.float64(loss / (2 * b)),
            np.float64(surrogate / (2 * b)),
            gradient[:b],
            gradient[b:],
            pair if isinstance(p.temperature, tuple) else np.float64(sum(slopes)),
            np.array(states[:b]),
            np.array(states[b:]),
        )


def check(actual: UnimodalStep, expected: UnimodalStep, p: Any, unit: float) -> None:
    """Compare all fields within max(1, 0.1 / temperature) units of the size of what is summed, before it cancels."""
    b, tau = p.batch_size, both(p.temperature, p.batch_size)
    views = np.concatenate([p.image_features, p.text_features])
    A = views @ views.T
    if p.reference_features is not None:
        reference = np.concatenate(p.reference_features)
        A = A - p.reference_weight * reference @ reference.T
    positive = A[np.arange(2 * b), (np.arange(2 * b) + b) % (2 * b)]
    negative = (np.arange(2 * b)[:, None] - np.arange(2 * b)[None, :]) % b != 0
    with np.errstate(divide="ignore"):
        level = np.logaddexp(np.concatenate([expected.log_inner_view1, expected.log_inner_view2]), np.log(p.eps))
    D = (A - positive[:, None]) / tau[:, None]
    w = np.exp(np.where(negative, D - level[:, None] - np.log(2 * b - 2), NEVER))
    terms = np.maximum(1.0, np.maximum(np.abs(level) + p.radius, (w * np.abs(D)).sum(axis=1)))
    total = w.sum(axis=1)
    pull = max(float(np.max(total[:b] + total[b:])) / (2 * b), 1e-37)  # what float32 cannot hold is no error
    slope = np.full(b, np.max(terms) / (2 * b))
    scales = UnimodalStep(
        float(np.mean(tau * terms)),
        float(np.mean(tau * (terms + total))),
        pull,
        pull,
        (slope, slope) if isinstance(p.temperature, tuple) else float(np.max(terms)),
        np.maximum(1.0, np.abs(expected.log_inner_view1)),
        np.maximum(1.0, np.abs(expected.log_inner_view2)),
    )
    bound = max(1.0, 0.1 / float(np.min(tau))) * unit
    for name, got, wanted, scale in zip(UnimodalStep._fields, actual, expected, scales, strict=True):
        for one, other, size in (
            zip(got, wanted, scale, strict=True) if isinstance(wanted, tuple) else [(got, wanted, scale)]
        ):
            assert np.shape(one) == np.shape(other), name
            error = np.abs(one - other) / size
            assert np.all(error <= bound), f"{name}: off by {np.max(error):.2e}, allowed {bound:.2e}; {one} for {other}"


@given(data=st.data())
@settings(max_examples=12)
def test_the_step_is_exact(space: Any, data: Any) -> None:
    if space.name == "jax":
        structure = FIXED[space.dtype_name == "float32"]
        if space.jit is None and space.dtype_name == "float32":
            pytest.skip("XLA compiles every operation: one dtype, and both jitted, are enough")
    else:
        structure = {
            "b": data.draw(st.integers(2, 4)),
            "d": data.draw(st.integers(1, 4)),
            "r": data.draw(st.sampled_from([None, 1, 5])),
            "per_anchor_temperature": data.draw(st.booleans()),
            "gamma": data.draw(st.sampled_from(["number", "pair", "one"])),
            "as_arrays": data.draw(st.sampled_from([(), SCALARS, ("temperature", "eps")])),
        }
    coldest, log_inner = data.draw(st.sampled_from([(0.1, 1.0), (1e-2, 3.0), (1e-4, 1e2), (1e-3, 1e4)]))
    p = problems.draw(
        data.draw(st.integers(0, 2**32 - 1)),
        features=data.draw(st.sampled_from(["random", "aligned", "opposite", "identical", "ties"])),
        temperature=(coldest, 10 * coldest),
        log_inner=log_inner,
        reference_weight=data.draw(st.sampled_from([0.0, 0.5, 1.5])),
        eps=data.draw(st.sampled_from([0.0, 1e-4, 0.5])),
        radius=data.draw(st.sampled_from([0.0, 0.7])),
        **structure,
    )
    rounded = p.rounded(space)
    check(run(p, space), exact(rounded), rounded, space.unit)


@given(seed=st.integers(0, 2**32 - 1), b=st.integers(2, 6), r=st.sampled_from([None, 1, 5]))
@settings(max_examples=15)
def test_the_step_is_the_oracles(seed: int, b: int, r: int | None) -> None:
    p = problems.draw(seed, b=b, r=r, **FULL)
    expected = oracle_step(*p.arrays, **p.options)
    expected = UnimodalStep(*(getattr(expected, name) for name in UnimodalStep._fields))
    check(unimodal_contrastive_step(*p.arrays, **p.options), expected, p, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients by other routes
# ---------------------------------------------------------------------------------------------------------------------


def surrogate(xp: Any, p: Any, Z1: Any, Z2: Any, t1: Any, t2: Any, frozen: Any) -> Any:
    """sum_a [ t_a (sg L_a + radius) + sg t_a g_a / (eps + sg u_a) ] / 2b; `frozen` is u, or None: then t L."""
    b = p.batch_size
    views, tau = xp.concatenate([Z1, Z2]), xp.concatenate([t1, t2])
    A = views @ views.T
    if p.reference_features is not None:
        reference = np.concatenate(p.reference_features)
        A = A - xp.asarray(p.reference_weight * reference @ reference.T)
    index = np.arange(2 * b)
    negative = xp.asarray(((index[:, None] - index[None, :]) % b != 0) * 1.0)
    g = (xp.exp((A - A[index, (index + b) % (2 * b)][:, None]) / tau[:, None]) * negative).sum(1) / (2 * b - 2)
    if frozen is None:
        return (tau * (xp.log(p.eps + g) + p.radius)).sum() / (2 * b)
    level = xp.asarray(np.log(p.eps + frozen) + p.radius)
    return (tau * level + xp.asarray(both(p.temperature, b)) * g / xp.asarray(p.eps + frozen)).sum() / (2 * b)


def frozen_and_arguments(p: Any) -> tuple[UnimodalStep, np.ndarray, list[np.ndarray]]:
    step = unimodal_contrastive_step(*p.arrays, **p.options)
    u = np.exp(np.concatenate([step.log_inner_view1, step.log_inner_view2]))
    return step, u, [p.image_features, p.text_features, *(np.array(side) for side in p.temperature)]


def gradients(step: UnimodalStep) -> list[np.ndarray]:
    return [step.view1_gradient, step.view2_gradient, *step.temperature_gradient]


CASES = [{"r": None}, {"reference_weight": 1.5, "eps": 0.2, "radius": 0.7}, {"r": 5, "features": "aligned"}]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_torchs_autograd_of_the_surrogate(case: Any) -> None:
    import torch

    p = problems.draw(31, b=5, temperature=(0.2, 0.9), per_anchor_temperature=True, gamma="pair", **case)
    step, u, arguments = frozen_and_arguments(p)
    leaves = [torch.tensor(argument, requires_grad=True) for argument in arguments]
    value = surrogate(torch, p, *leaves, u)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(step.surrogate), rel=1e-13)
    for got, leaf in zip(gradients(step), leaves, strict=True):
        np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=0, atol=1e-13 * max(1.0, float(leaf.grad.abs().max())))


@pytest.mark.parametrize("case", CASES[1:2])
def test_gradients_are_jaxs_autograd_of_the_surrogate(case: Any) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    p = problems.draw(32, b=5, temperature=(0.2, 0.9), per_anchor_temperature=True, gamma="pair", **case)
    step, u, arguments = frozen_and_arguments(p)
    found = jax.jit(jax.grad(lambda *inner: surrogate(jax.numpy, p, *inner, u), argnums=(0, 1, 2, 3)))(*arguments)
    for got, expected in zip(gradients(step), found, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13 * max(1.0, float(np.max(np.abs(expected)))))


def test_without_memory_gradients_are_finite_differences_of_the_objective() -> None:
    p = problems.draw(33, b=4, temperature=(0.4, 0.9), per_anchor_temperature=True, gamma="one", eps=0.1, radius=0.7)
    step, _, arguments = frozen_and_arguments(p)
    assert float(surrogate(np, p, *arguments, None)) == pytest.approx(float(step.loss), rel=1e-13)
    rng = np.random.default_rng(0)
    for position, gradient in enumerate(gradients(step)):
        direction = rng.normal(size=gradient.shape)
        values = []
        for h in (1e-4, -1e-4, 2e-4, -2e-4):
            moved = list(arguments)
            moved[position] = moved[position] + h * direction
            values.append(float(surrogate(np, p, *moved, None)))
        slope = (8 * (values[0] - values[1]) - (values[2] - values[3])) / 12e-4  # exact to the fourth order
        assert np.sum(gradient * direction) == pytest.approx(slope, abs=1e-10)


def test_without_memory_it_is_simclrs_loss() -> None:
    import torch

    b, tau = 6, 0.3
    p = problems.draw(34, b=b, r=None)
    step = unimodal_contrastive_step(*p.arrays, temperature=tau, gamma=1.0, eps=1 / (2 * b - 2))
    leaves = [torch.tensor(side, requires_grad=True) for side in p.arrays[:2]]
    views = torch.cat(leaves)
    logits = (views @ views.T / tau).masked_fill(torch.eye(2 * b, dtype=torch.bool), NEVER)
    nt_xent = torch.nn.functional.cross_entropy(logits, (torch.arange(2 * b) + b) % (2 * b))
    (tau * nt_xent).backward()
    assert float(step.loss) == pytest.approx(tau * (float(nt_xent.detach()) - np.log(2 * b - 2)), rel=1e-13)
    np.testing.assert_allclose(step.view1_gradient, leaves[0].grad, rtol=0, atol=1e-14)
    np.testing.assert_allclose(step.view2_gradient, leaves[1].grad, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# How it is computed
# ---------------------------------------------------------------------------------------------------------------------


def test_tiles_change_nothing(space: Any) -> None:
    if space.name == "jax" and not (space.jit and space.dtype_name == "float64"):
        pytest.skip("XLA compiles every tile: one size, jitted, is enough")
    p = problems.draw(5, b=5, **FULL)
    dense = run(p, space)
    for tile_size in (3,) if space.name == "jax" else (1, 2, 4, 5, 100):
        check(run(p, space, tile_size=tile_size), dense, p.rounded(space), space.unit)


def test_one_pass_and_two_passes_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "DEFAULT_TILE", 3)
    p = problems.draw(6, b=8, **FULL)
    forced = unimodal_contrastive_step(*p.arrays, **p.options, tile_size=3)
    for budget in (0, 3 * 8 * 8 * 8, None):
        for one, other in zip(
            unimodal_contrastive_step(*p.arrays, **p.options, memory_budget=budget), forced, strict=True
        ):
            assert np.array_equal(one, other), budget


def test_the_budget_and_symmetry_decide_how_many_tiles_are_computed(register_routines: Any) -> None:
    b, products = 5, []
    p = problems.draw(7, b=b, r=None)

    def matmul(left: Any, right: Any) -> Any:
        products.append((left.shape, right.shape))
        return left @ right

    register_routines("numpy", matmul=lambda like: matmul)
    # Pulls: two per tile of Z12, two per tile above the diagonals of Z11 and Z22, one per tile on them.
    for options, logits, pulls in (
        ({}, 3, 4),
        ({"memory_budget": 3 * b * b * 8}, 3, 4),
        ({"memory_budget": 3 * b * b * 8 - 1}, 6, 4),
        ({"tile_size": b}, 6, 4),
        # Of a symmetric matrix the tile below the diagonal is not needed.
        ({"tile_size": 4}, 2 * (4 + 3 + 3), 8 + 4 + 4),
    ):
        products.clear()
        unimodal_contrastive_step(*p.arrays, temperature=0.3, **options)
        assert len(products) == logits + pulls, options


def test_with_a_tile_size_no_array_is_b_by_b() -> None:
    import jax

    b = 11  # no other axis is as long

    def shapes(**options: Any) -> set[tuple[int, ...]]:
        p = problems.draw(9, b=b, d=4, r=3)
        features = [jax.numpy.asarray(x) for x in p.arrays]
        reference = tuple(map(jax.numpy.asarray, p.reference_features))
        jaxpr = jax.make_jaxpr(
            lambda *inner: unimodal_contrastive_step(*inner, temperature=0.3, reference_features=reference, **options)
        )(*features)
        return {tuple(v.aval.shape) for equation in jaxpr.eqns for v in equation.outvars}

    assert (b, b) in shapes()  # so the check does see one
    assert not any(shape.count(b) > 1 for shape in shapes(tile_size=4))


def test_it_compiles_as_one_graph() -> None:
    import array_api_compat.torch as xp
    import torch

    p = problems.draw(10, b=5, **FULL)

    def tensors(value: Any) -> Any:
        return tuple(map(tensors, value)) if isinstance(value, tuple) else torch.tensor(value)

    options = {name: tensors(value) if isinstance(value, tuple) else value for name, value in p.options.items()}
    compiled = torch.compile(unimodal_contrastive_step, fullgraph=True, backend="aot_eager")
    step = compiled(*map(tensors, p.arrays), **options, tile_size=3, xp=xp)
    check(to_numpy(step, lambda x: x.numpy()), exact(p), p, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# dtypes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("library", "half", "digits"), [
    ("numpy", "float16", 11), ("torch", "float16", 11), ("torch", "bfloat16", 8),
])  # fmt: skip
def test_half_features_are_computed_with_in_float32(library: str, half: str, digits: int) -> None:
    import importlib

    xp = importlib.import_module(f"array_api_compat.{library}")
    p = problems.draw(11, b=4, d=3, r=5, temperature=(0.05, 0.4), **FULL)
    single = p.mapped(lambda x: xp.asarray(x, dtype=xp.float32), float)
    narrow = {
        "image_features": xp.astype(single.image_features, getattr(xp, half)),
        "text_features": xp.astype(single.text_features, getattr(xp, half)),
        "reference_features": tuple(xp.astype(side, getattr(xp, half)) for side in single.reference_features),
    }
    single = replace(single, **narrow)
    step = unimodal_contrastive_step(*single.arrays, **single.options)
    assert step.view1_gradient.dtype == step.view2_gradient.dtype == single.image_features.dtype
    for value in (step.loss, step.surrogate, *step.temperature_gradient, step.log_inner_view1, step.log_inner_view2):
        assert value.dtype == single.log_inner_image.dtype

    rounded = single.mapped(lambda x: np.asarray(xp.astype(x, xp.float32)).astype(np.float64), float)
    expected = exact(rounded)
    got = to_numpy(step, lambda x: xp.astype(x, xp.float32))
    check(got._replace(view1_gradient=expected.view1_gradient, view2_gradient=expected.view2_gradient), expected,
          rounded, 5e-6)  # fmt: skip
    for name in ("view1_gradient", "view2_gradient"):
        wanted = getattr(expected, name)
        error = np.abs(getattr(got, name) - wanted)
        assert np.all(error <= np.abs(wanted) * 2.0**-digits + 1e-5 + 2.0**-25), name


@pytest.mark.parametrize(("features", "state"), [("float32", "float64"), ("float64", "float32")])
def test_the_state_keeps_its_dtype(features: str, state: str) -> None:
    p = problems.draw(12, b=4, **FULL)
    arrays = [x.astype(which) for x, which in zip(p.arrays, (features, features, state, state), strict=True)]
    options = {**p.options, "reference_features": tuple(side.astype(features) for side in p.reference_features)}
    step = unimodal_contrastive_step(*arrays, **options)
    assert step.view1_gradient.dtype == step.view2_gradient.dtype == features
    assert step.log_inner_view1.dtype == step.log_inner_view2.dtype == state
    assert step.loss.dtype == step.surrogate.dtype == step.temperature_gradient[0].dtype == "float64"


# ---------------------------------------------------------------------------------------------------------------------
# What must hold
# ---------------------------------------------------------------------------------------------------------------------


def test_views_may_change_roles() -> None:
    p = problems.draw(21, b=5, **FULL)
    step = unimodal_contrastive_step(*p.arrays, **p.options)
    swapped = {name: value[::-1] if isinstance(value, tuple) else value for name, value in p.options.items()}
    back = unimodal_contrastive_step(*p.arrays[1::-1], *p.arrays[:1:-1], **swapped)
    order = (0, 1, 3, 2, 4, 6, 5)
    back = UnimodalStep(*(back[field] for field in order))._replace(
        temperature_gradient=back.temperature_gradient[::-1]
    )
    check(back, step, p, 1e-14)


def test_samples_may_come_in_any_order() -> None:
    p = problems.draw(22, b=5, **FULL)
    order = np.array([3, 0, 4, 1, 2])
    step = unimodal_contrastive_step(*p.arrays, **p.options)
    shuffled = p.mapped(lambda x: x[order], float)
    other = unimodal_contrastive_step(*shuffled.arrays, **shuffled.options)
    expected = UnimodalStep(step.loss, step.surrogate, *(
        tuple(side[order] for side in value) if isinstance(value, tuple) else value[order] for value in step[2:]
    ))  # fmt: skip
    check(other, expected, shuffled, 1e-14)


def test_a_reference_is_subtracted() -> None:
    p = problems.draw(23, b=5, reference_weight=0.0, temperature=(0.5, 0.6))
    step = unimodal_contrastive_step(*p.arrays, **p.options)
    plain = {name: value for name, value in p.options.items() if name != "reference_features"}
    check(unimodal_contrastive_step(*p.arrays, **plain), step, p, 1e-14)
    q = replace(p, reference_features=(p.image_features, p.text_features), reference_weight=0.75)
    halved = replace(p, temperature=4 * p.temperature)  # A - 3/4 A = A / 4
    a, b = (unimodal_contrastive_step(*x.arrays, **x.options) for x in (q, replace(halved, reference_features=None)))
    np.testing.assert_allclose(a.log_inner_view1, b.log_inner_view1, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(a.view2_gradient, b.view2_gradient, rtol=0, atol=1e-13)


def test_no_input_is_written_to(eager_space: Any) -> None:
    p = problems.draw(24, b=4, as_arrays=("eps",), **FULL)
    arrays, options = p.given(eager_space)
    everything = [*arrays]
    for value in options.values():
        everything += value if isinstance(value, tuple) else [value] if hasattr(value, "dtype") else []
    before = [np.array(eager_space.to_numpy(array), copy=True) for array in everything]
    unimodal_contrastive_step(*arrays, **options)
    for array, old in zip(everything, before, strict=True):
        assert np.array_equal(eager_space.to_numpy(array), old)


def test_repeated_visits_lead_to_the_objective() -> None:
    p = problems.draw(25, b=4, r=None, log_inner=3.0)
    first, second = p.arrays[2:]
    for _ in range(200):
        step = unimodal_contrastive_step(*p.arrays[:2], first, second, temperature=0.5, gamma=0.2)
        first, second = step.log_inner_view1, step.log_inner_view2
    without = unimodal_contrastive_step(*p.arrays[:2], first, second, temperature=0.5)
    check(step, without, replace(p, temperature=0.5), 1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

F, S = np.eye(3), np.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([[1.0], F, S, S], {}, TypeError, "view1_features must be an array, got list"),
        ([F[0], F, S, S], {}, ValueError, r"view1_features must have 2 axes \(batch_size, feature_dim\), got shape"),
        ([F, F[:, :2], S, S], {}, ValueError, r"view2_features must have shape .* = \(3, 3\), got \(3, 2\)"),
        ([F, F.astype("f4"), S, S], {}, TypeError, "view2_features must have the dtype of view1_features"),
        ([F.astype(int), F, S, S], {}, TypeError, "view1_features must have a real floating dtype, got int64"),
        ([F[:1], F[:1], S[:1], S[:1]], {}, ValueError, "view1_features must hold at least 2 pairs, .*, got 1"),
        ([F, np.where(F > 0, np.inf, 0.5), S, S], {}, ValueError, r"view2_features must be finite, got inf at"),
        ([F, F, S[:2], S], {}, ValueError, r"log_inner_view1 must have shape \(batch_size,\) = \(3,\), got \(2,\)"),
        ([F, F, S, S.astype("f2")], {}, TypeError, "log_inner_view2 must be float32 or wider, got float16"),
        ([F, F, S, S + np.nan], {}, ValueError, "log_inner_view2 must be finite, or -inf for a sample .*, got nan"),
        ([F, F, S, S], {"temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
        ([F, F, S, S], {"temperature": (S + 1,)}, ValueError,
         r"temperature must be a scalar or a pair \(view1, view2 anchors\), got 1 entries"),
        ([F, F, S, S], {"temperature": (S + 1, S)}, ValueError, r"temperature\[1\] must be > 0, got 0\.0 at"),
        ([F, F, S, S], {"gamma": 0.0}, ValueError, r"gamma must be in \(0, 1\], got 0\.0"),
        ([F, F, S, S], {"gamma": (S + 1, S + 2)}, ValueError, r"gamma\[1\] must be in \(0, 1\], got 2\.0 at"),
        ([F, F, S, S], {"reference_weight": -1}, ValueError, "reference_weight must be >= 0, got -1"),
        ([F, F, S, S], {"radius": -0.5}, ValueError, r"radius must be >= 0, got -0\.5"),
        ([F, F, S, S], {"eps": -0.5}, ValueError, r"eps must be >= 0, got -0\.5"),
        ([F, F, S, S], {"reference_features": F}, TypeError,
         r"reference_features must be a pair \(view1, view2\) of arrays, got ndarray of shape"),
        ([F, F, S, S], {"reference_features": (F, F[:, :2])}, ValueError,
         r"reference_features\[1\] must have shape \(batch_size, reference_dim\) = \(3, 3\), got \(3, 2\)"),
        ([F, F, S, S], {"tile_size": 0}, ValueError, "tile_size must be at least 1, got 0"),
        ([F, F, S, S], {"memory_budget": -1}, ValueError, "memory_budget must be at least 0, got -1"),
        ([F, F, S, S], {"xp": "numpy"}, TypeError, "xp must be an Array API namespace"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        unimodal_contrastive_step(*arguments, **{"temperature": 0.5, **options})


def test_autograd_another_library_and_a_pair_mask_are_refused() -> None:
    import torch

    features, state = torch.eye(3), torch.zeros(3)
    with pytest.raises(ValueError, match="view2_features must not require gradients"):
        unimodal_contrastive_step(features, features.clone().requires_grad_(), state, state, temperature=0.5)
    with pytest.raises(TypeError, match=r"log_inner_view1 must come from the library of view1_features \(torch\)"):
        unimodal_contrastive_step(features, features, S, state, temperature=0.5)
    with pytest.raises(TypeError, match="pair_mask"):
        unimodal_contrastive_step(F, F, S, S, temperature=0.5, pair_mask=F > 0)  # type: ignore[call-arg]


def test_devices_must_agree() -> None:
    import array_api_strict as xp

    here, there = (
        [xp.ones((3, 2), device=xp.Device(d)), xp.zeros(3, device=xp.Device(d))] for d in ("CPU_DEVICE", "device1")
    )
    with pytest.raises(ValueError, match="log_inner_view2 must be on the device of view1_features"):
        unimodal_contrastive_step(here[0], here[0], here[1], there[1], temperature=0.5)
