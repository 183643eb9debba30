"""The contrastive step against the oracle on every array library, and against mpmath where the oracle's exp ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from drrho_reference import contrastive_step as oracle_step
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import ContrastiveStep, contrastive_step
from drrho_core.contrastive.step import wide_contrastive_step
from helpers import problems

NEVER = -np.inf
SEEDS = st.integers(0, 2**32 - 1)
FEATURES = st.sampled_from(["random", "aligned", "opposite", "identical", "ties"])
SCALARS = ("temperature", "gamma", "reference_weight", "radius", "eps")

# XLA compiles per shape and per structure of the arguments, so JAX gets few of them and draws values only.
FIXED = [
    {"b": 2, "d": 1, "r": None, "mask": None, "per_anchor_temperature": False, "gamma": "number", "as_arrays": ()},
    {"b": 5, "d": 4, "r": 3, "mask": None, "per_anchor_temperature": False, "gamma": "pair", "as_arrays": SCALARS},
    {"b": 6, "d": 3, "r": 5, "mask": "empty", "per_anchor_temperature": True, "gamma": "pair", "as_arrays": ("eps",)},
]


@st.composite
def structures(draw: Any, space: Any) -> dict[str, Any]:
    """Sizes and forms of the arguments."""
    if space.name == "jax":
        return dict(draw(st.sampled_from(FIXED if space.jit else FIXED[-1:])))
    return {
        "b": draw(st.integers(2, 7)),
        "d": draw(st.integers(1, 5)),
        "r": draw(st.sampled_from([None, 1, 3, 6])),
        "mask": draw(st.sampled_from([None, "random", "empty", "none"])),
        "per_anchor_temperature": draw(st.booleans()),
        "gamma": draw(st.sampled_from(["number", "pair", "one"])),
        "as_arrays": draw(st.sampled_from([(), SCALARS, ("temperature", "eps"), ("gamma", "radius")])),
    }


@st.composite
def values(draw: Any, b: int) -> dict[str, Any]:
    """Scalars and what the features look like."""
    return {
        "seed": draw(SEEDS),
        "features": draw(FEATURES),
        "reference_weight": draw(st.sampled_from([0.0, 0.5, 1.0, 1.5])),
        "eps": draw(st.sampled_from([0.0, 1e-4, 1 / (b - 1)])),
        "radius": draw(st.sampled_from([0.0, 0.7])),
    }


def drawn(data: Any, space: Any, **fixed: Any) -> Any:
    structure = data.draw(structures(space))
    return problems.draw(**structure, **data.draw(values(structure["b"])), **fixed)


def oracle(p: Any) -> ContrastiveStep:
    result = oracle_step(*p.arrays, **p.options)
    return ContrastiveStep(*(getattr(result, name) for name in ContrastiveStep._fields))


@given(data=st.data())
@settings(max_examples=40)
def test_the_step_is_the_oracles(space: Any, data: Any) -> None:
    coldest = data.draw(st.sampled_from([0.01, 0.1, 1.0]))
    p = drawn(data, space, temperature=(coldest, 10 * coldest), log_inner=3.0)
    exact = p.rounded(space)
    problems.check_step(p.run(space), oracle(exact), exact, space.unit)


# ---------------------------------------------------------------------------------------------------------------------
# Beyond the linear domain of float64
# ---------------------------------------------------------------------------------------------------------------------


def mpmath_step(p: Any) -> ContrastiveStep:
    """The step as docs/theory writes it, in the linear domain of numbers of 60 digits with any exponent."""
    with mp.workdps(60):
        b = p.batch_size
        E1, E2 = ([[mp.mpf(float(x)) for x in row] for row in side] for side in (p.image_features, p.text_features))

        def dot(left: Any, right: Any) -> Any:
            return mp.fsum(x * y for x, y in zip(left, right, strict=True))

        Z = [[dot(image, text) for text in E2] for image in E1]
        if p.reference_features is not None:
            R1, R2 = ([[mp.mpf(float(x)) for x in row] for row in side] for side in p.reference_features)
            Z = [[Z[i][j] - mp.mpf(p.reference_weight) * dot(R1[i], R2[j]) for j in range(b)] for i in range(b)]
        t, gamma = (
            [np.broadcast_to(side, b) for side in (option if isinstance(option, tuple) else (option,) * 2)]
            for option in (p.temperature, p.gamma)
        )
        counts = ~np.eye(b, dtype=bool) & (True if p.pair_mask is None else p.pair_mask)
        loss = surrogate = mp.mpf(0)
        V = [[mp.mpf(0)] * b for _ in range(b)]
        c = [mp.mpf(0)] * b
        slopes, states = np.zeros((2, b)), np.array([p.log_inner_image, p.log_inner_text])
        total_slope = mp.mpf(0)
        for side in (0, 1):
            for a in range(b):
                others = [j for j in range(b) if (counts[a, j] if side == 0 else counts[j, a])]
                if not others:
                    continue
                tau = mp.mpf(float(t[side][a]))
                D = {j: ((Z[a][j] if side == 0 else Z[j][a]) - Z[a][a]) / tau for j in others}
                g = mp.fsum(map(mp.exp, D.values())) / len(others)
                weight = mp.mpf(float(gamma[side][a]))
                old = states[side, a]
                u = g if old == -np.inf else (1 - weight) * mp.exp(mp.mpf(float(old))) + weight * g
                w = {j: mp.exp(D[j]) / (mp.mpf(p.eps) + u) / len(others) for j in others}
                level = mp.log(mp.mpf(p.eps) + u) + mp.mpf(p.radius)
                loss += tau * level
                surrogate += tau * level + tau * g / (mp.mpf(p.eps) + u)
                slope = level - mp.fsum(w[j] * D[j] for j in others)
                total_slope += slope
                slopes[side, a] = float(slope / (2 * b))
                states[side, a] = float(mp.log(u))
                for j in others:
                    i, k = (a, j) if side == 0 else (j, a)
                    V[i][k] += w[j]
                    c[a] += w[j]

        def pulled(matrix: Any, other: Any) -> np.ndarray:
            width = range(len(other[0]))
            sums = [[mp.fsum(row[j] * other[j][k] for j in range(b)) for k in width] for row in matrix]
            return np.array([[float((sums[i][k] - c[i] * other[i][k]) / (2 * b)) for k in width] for i in range(b)])

        gradients = [pulled(V, E2), pulled(list(zip(*V, strict=True)), E1)]
        return ContrastiveStep(
            np.float64(loss / (2 * b)),
            np.float64(surrogate / (2 * b)),
            *gradients,
            tuple(slopes) if isinstance(p.temperature, tuple) else np.float64(total_slope / (2 * b)),
            *states,
        )


def test_mpmath_and_the_oracle_agree_where_both_can() -> None:
    p = problems.draw(3, mask="empty", per_anchor_temperature=True, gamma="pair", radius=0.3, eps=0.1)
    problems.check_step(mpmath_step(p), oracle(p), p, 1e-13)


@given(data=st.data())
@settings(max_examples=25)
def test_beyond_the_linear_domain_the_step_is_mpmaths(space: Any, data: Any) -> None:
    coldest = data.draw(st.sampled_from([1e-4, 1e-3, 1e-2]))
    log_inner = data.draw(st.sampled_from([1.0, 1e2, 1e4]))
    p = drawn(data, space, temperature=(coldest, 2 * coldest), log_inner=log_inner)
    exact = p.rounded(space)
    problems.check_step(p.run(space), mpmath_step(exact), exact, space.unit, far=True)


# ---------------------------------------------------------------------------------------------------------------------
# dtypes
# ---------------------------------------------------------------------------------------------------------------------


def half_types() -> list[Any]:
    """Libraries with half types: the namespace, the type and how a NumPy array gets in and out."""
    import array_api_compat.numpy
    import array_api_compat.torch
    import jax.numpy as jnp

    torch = array_api_compat.torch
    return [
        pytest.param(array_api_compat.numpy, np.float16, 11, id="numpy-float16"),
        pytest.param(torch, torch.float16, 11, id="torch-float16"),
        pytest.param(torch, torch.bfloat16, 8, id="torch-bfloat16"),
        pytest.param(jnp, jnp.float16, 11, id="jax-float16"),
        pytest.param(jnp, jnp.bfloat16, 8, id="jax-bfloat16"),
    ]


def wide(array: Any, xp: Any) -> np.ndarray:
    return np.asarray(xp.astype(array, xp.float32)).astype(np.float64)  # JAX may have no float64


@pytest.mark.parametrize(("xp", "half", "digits"), half_types())
@pytest.mark.parametrize("features", ["random", "aligned"])
def test_half_features_are_computed_with_in_float32(xp: Any, half: Any, digits: int, features: str) -> None:
    p = problems.draw(11, b=6, d=3, r=5, features=features, per_anchor_temperature=True, gamma="pair", mask="empty",
                      radius=0.7, eps=1e-4, reference_weight=0.5)  # fmt: skip
    cold = np.exp(np.linspace(-3, -1, 6))
    p = replace(p, temperature=(cold, cold[::-1].copy()))
    single = {"dtype": xp.float32}
    image, text, *reference = (
        xp.astype(xp.asarray(x, **single), half) for x in (p.image_features, p.text_features, *p.reference_features)
    )
    state = [xp.asarray(side, **single) for side in (p.log_inner_image, p.log_inner_text)]
    pairs = {name: tuple(xp.asarray(side, **single) for side in getattr(p, name)) for name in ("temperature", "gamma")}
    step = contrastive_step(
        image, text, *state, **pairs, reference_features=tuple(reference), radius=p.radius, eps=0.25,
        reference_weight=0.5, pair_mask=xp.asarray(p.pair_mask),
    )  # fmt: skip
    assert {step.image_gradient.dtype, step.text_gradient.dtype} == {xp.asarray(image).dtype}
    floats = (step.loss, step.surrogate, *step.temperature_gradient, step.log_inner_image, step.log_inner_text)
    assert {value.dtype for value in floats} == {xp.asarray(state[0]).dtype}

    exact = replace(
        p, image_features=wide(image, xp), text_features=wide(text, xp), eps=0.25,
        reference_features=tuple(wide(side, xp) for side in reference),
        log_inner_image=wide(state[0], xp), log_inner_text=wide(state[1], xp),
        **{name: tuple(wide(side, xp) for side in pair) for name, pair in pairs.items()},
    )  # fmt: skip
    expected = oracle(exact)
    got = ContrastiveStep(*(
        tuple(wide(side, xp) for side in value) if isinstance(value, tuple) else wide(value, xp) for value in step
    ))  # fmt: skip
    rounded_once = got._replace(image_gradient=expected.image_gradient, text_gradient=expected.text_gradient)
    problems.check_step(rounded_once, expected, exact, 5e-6)
    bound = 5e-6 * 0.1 / cold[0] * problems.sizes(exact, expected).feature_gradient
    for name in ("image_gradient", "text_gradient"):
        error = np.abs(getattr(got, name) - getattr(expected, name))
        assert np.all(error <= np.abs(getattr(expected, name)) * 2.0**-digits + bound + 2.0**-25), name


@pytest.mark.parametrize(("features", "state"), [("float32", "float64"), ("float64", "float32")])
def test_the_state_keeps_its_dtype(eager_space: Any, features: str, state: str) -> None:
    if eager_space.dtype_name == "float32":
        pytest.skip("both dtypes are in the test itself")
    p = problems.draw(12, b=6, d=3, r=5, gamma="pair", per_anchor_temperature=True, mask="empty", eps=0.1, radius=0.3)
    cast = dict.fromkeys(("image_features", "text_features", "reference_features"), features)
    exact = p.mapped(lambda x: x.astype(features).astype(np.float64), float)
    exact = replace(exact, **{
        name: getattr(p, name).astype(state).astype(np.float64) for name in ("log_inner_image", "log_inner_text")
    })  # fmt: skip
    arrays, options = exact.given(eager_space)
    xp = eager_space.xp
    arrays = [
        xp.astype(x, getattr(xp, which)) for x, which in zip(arrays, (features, features, state, state), strict=True)
    ]
    for name in ("reference_features", "temperature", "gamma"):
        options[name] = tuple(xp.astype(side, getattr(xp, cast.get(name, "float32"))) for side in options[name])
    exact = replace(exact, temperature=tuple(x.astype("f4").astype("f8") for x in exact.temperature),
                    gamma=tuple(x.astype("f4").astype("f8") for x in exact.gamma))  # fmt: skip
    step = contrastive_step(*arrays, **options)
    assert step.image_gradient.dtype == step.text_gradient.dtype == getattr(xp, features)
    assert step.log_inner_image.dtype == step.log_inner_text.dtype == getattr(xp, state)
    assert step.loss.dtype == step.surrogate.dtype == step.temperature_gradient[0].dtype == xp.float64
    problems.check_step(problems.to_numpy(eager_space, step), oracle(exact), exact, 5e-6)


def test_the_two_directions_may_keep_different_dtypes(eager_space: Any) -> None:
    p = problems.draw(13, b=6, d=3, r=5, gamma="pair", per_anchor_temperature=True, mask="empty")
    arrays, options = p.given(eager_space)
    xp = eager_space.xp
    step = contrastive_step(*arrays[:2], xp.astype(arrays[2], xp.float32), xp.astype(arrays[3], xp.float64), **options)
    assert step.log_inner_image.dtype == xp.float32
    assert step.log_inner_text.dtype == xp.float64
    exact = p.rounded(eager_space)
    exact = replace(exact, log_inner_image=p.log_inner_image.astype("f4").astype("f8"))
    problems.check_step(problems.to_numpy(eager_space, step), oracle(exact), exact, 5e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What must hold
# ---------------------------------------------------------------------------------------------------------------------


def test_no_input_is_written_to(eager_space: Any) -> None:
    p = problems.draw(14, b=6, d=3, r=5, gamma="pair", per_anchor_temperature=True, mask="empty", as_arrays=("eps",))
    arrays, options = p.given(eager_space)
    everything = [*arrays]
    for value in options.values():
        everything += value if isinstance(value, tuple) else [value] if hasattr(value, "dtype") else []
    assert len(everything) == 12
    before = [np.array(eager_space.to_numpy(array), copy=True) for array in everything]
    step = contrastive_step(*arrays, **options)
    for array, old in zip(everything, before, strict=True):
        assert np.array_equal(eager_space.to_numpy(array), old)
    # Nor does a result share memory with an input: what is written to it later must not reach back.
    for new, old in ((step.log_inner_image, arrays[2]), (step.log_inner_text, arrays[3])):
        assert (
            not np.may_share_memory(eager_space.to_numpy(new), eager_space.to_numpy(old)) or eager_space.name == "jax"
        )


def test_an_anchor_without_negatives_adds_nothing_and_keeps_its_state(space: Any) -> None:
    p = problems.draw(
        15, b=6, d=3, r=5, gamma="pair", per_anchor_temperature=True, mask="empty", radius=0.7, as_arrays=("eps",)
    )
    alone = ~np.any(p.pair_mask & ~np.eye(6, dtype=bool), axis=1), ~np.any(p.pair_mask & ~np.eye(6, dtype=bool), axis=0)
    assert alone[0].any()
    assert alone[1].any()
    assert (~alone[0]).any()
    kept = [np.where(side, [0.25, NEVER, 1e4, -1e4, 3.0, -2.0], old) for side, old in
            zip(alone, (p.log_inner_image, p.log_inner_text), strict=True)]  # fmt: skip
    p = replace(p, log_inner_image=kept[0], log_inner_text=kept[1])
    step = p.run(space)
    exact = p.rounded(space)
    for new, old, side, slope in zip((step.log_inner_image, step.log_inner_text),
                                     (exact.log_inner_image, exact.log_inner_text), alone,
                                     step.temperature_gradient, strict=True):  # fmt: skip
        assert np.array_equal(new[side], old[side])
        assert np.all(slope[side] == 0)
        assert np.all(new[~side] != old[~side])
    # The outer mean still divides by b: the loss of the others, times their number, over b.
    total = sum(
        np.sum(np.where(side, 0.0, t * (np.where(side, 0.0, log_u) + 0.7)))
        for side, t, log_u in zip(alone, exact.temperature, (step.log_inner_image, step.log_inner_text), strict=True)
    )
    assert step.loss == pytest.approx(total / 12, rel=1e3 * space.unit)


def test_no_negatives_at_all_is_a_step_of_nothing(eager_space: Any) -> None:
    p = problems.draw(16, b=6, d=3, r=5, mask="none", per_anchor_temperature=True, gamma="pair", radius=1.0, eps=0.1)
    step = p.run(eager_space)
    assert step.loss == step.surrogate == 0
    assert not np.any(step.image_gradient)
    assert not np.any(step.text_gradient)
    assert not np.any(step.temperature_gradient)
    assert np.array_equal(step.log_inner_image, eager_space.rounded(p.log_inner_image))
    assert np.array_equal(step.log_inner_text, eager_space.rounded(p.log_inner_text))


def test_the_masks_diagonal_and_a_full_mask_change_nothing(eager_space: Any) -> None:
    p = problems.draw(17, b=6, d=3, r=5, mask="random", gamma="pair", per_anchor_temperature=True)
    diagonal = np.eye(6, dtype=bool)
    steps = [replace(p, pair_mask=mask).run(eager_space) for mask in (p.pair_mask | diagonal, p.pair_mask & ~diagonal)]
    for one, other in zip(*steps, strict=True):
        assert np.array_equal(one, other)
    full = replace(p, pair_mask=np.ones((6, 6), dtype=bool))
    exact = full.rounded(eager_space)
    problems.check_step(full.run(eager_space), oracle(replace(exact, pair_mask=None)), exact, eager_space.unit)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.05])
def test_weights_of_an_anchor_sum_to_at_most_one_over_gamma(gamma: float) -> None:
    # At temperature 1 surrogate - loss is the mean over anchors of g / u. An estimate far too small is the worst case.
    p = problems.draw(18, b=6, temperature=(1.0, 1.0001))
    p = replace(p, temperature=1.0, gamma=gamma, log_inner_image=np.full(6, -1e4), log_inner_text=np.full(6, -1e4))
    step = contrastive_step(*p.arrays, **p.options)
    assert step.surrogate - step.loss == pytest.approx(1 / gamma, rel=1e-13)


def test_a_state_of_0_is_an_estimate_of_1_and_not_a_first_visit(eager_space: Any) -> None:
    p = problems.draw(19, b=6, d=3, r=5, never=0.0, gamma="pair", per_anchor_temperature=True, mask="empty")
    p = replace(p, pair_mask=None, gamma=0.25, log_inner_image=np.zeros(6), log_inner_text=np.full(6, NEVER))
    once = replace(p, gamma=1.0).run(eager_space)
    step = p.run(eager_space)
    np.testing.assert_allclose(np.exp(step.log_inner_image), 0.75 + 0.25 * np.exp(once.log_inner_image), rtol=1e-5)
    assert np.array_equal(step.log_inner_text, once.log_inner_text)


def test_the_state_is_stored_without_eps() -> None:
    p = problems.draw(20)
    steps = [contrastive_step(*p.arrays, **{**p.options, "eps": eps}) for eps in (0.0, 0.3)]
    assert np.array_equal(steps[0].log_inner_image, steps[1].log_inner_image)
    assert np.array_equal(steps[0].log_inner_text, steps[1].log_inner_text)
    assert steps[1].loss > steps[0].loss


def test_images_and_texts_may_change_roles() -> None:
    p = problems.draw(21, b=6, per_anchor_temperature=True, gamma="pair", mask="empty", radius=0.2, eps=0.01)
    step = contrastive_step(*p.arrays, **p.options)
    swapped = {**p.options, "pair_mask": p.pair_mask.T}
    for name in ("temperature", "gamma", "reference_features"):
        swapped[name] = swapped[name][::-1]
    back = contrastive_step(*p.arrays[1::-1], *p.arrays[:1:-1], **swapped)
    back = ContrastiveStep(
        back.loss, back.surrogate, back.text_gradient, back.image_gradient, back.temperature_gradient[::-1],
        back.log_inner_text, back.log_inner_image,
    )  # fmt: skip
    problems.check_step(back, step, p, 1e-14)


def test_a_reference_is_a_wider_product() -> None:
    p = problems.draw(22, b=6, gamma="pair", reference_weight=1.5)
    step = contrastive_step(*p.arrays, **p.options)
    wider = [
        np.hstack([p.image_features, -1.5 * p.reference_features[0]]),
        np.hstack([p.text_features, p.reference_features[1]]),
    ]
    options = {name: value for name, value in p.options.items() if name != "reference_features"}
    other = contrastive_step(*wider, *p.arrays[2:], **options)
    other = other._replace(image_gradient=other.image_gradient[:, :4], text_gradient=other.text_gradient[:, :4])
    problems.check_step(other, step, p, 1e-14)


def test_repeated_visits_lead_to_the_objective() -> None:
    p = problems.draw(23, b=5, log_inner=3.0)
    image, text = p.arrays[2:]
    for _ in range(200):
        step = contrastive_step(*p.arrays[:2], image, text, temperature=0.5, gamma=0.2)
        image, text = step.log_inner_image, step.log_inner_text
    exact = contrastive_step(*p.arrays[:2], image, text, temperature=0.5, gamma=1.0)
    problems.check_step(step, exact, replace(p, temperature=0.5, reference_features=None), 1e-14)


def test_lists_of_two_are_pairs_too() -> None:
    p = problems.draw(24, per_anchor_temperature=True, gamma="pair")
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in p.options.items()}
    for one, other in zip(contrastive_step(*p.arrays, **p.options), contrastive_step(*p.arrays, **lists), strict=True):
        assert np.array_equal(one, other)


def test_numbers_of_any_kind_are_scalars() -> None:
    from fractions import Fraction

    p = problems.draw(25, b=6)
    expected = contrastive_step(*p.arrays, temperature=0.5, gamma=0.25, radius=1.0)
    for kind in (np.float32, np.float64, Fraction, np.asarray):
        got = contrastive_step(*p.arrays, temperature=kind(0.5), gamma=kind(0.25), radius=1)
        problems.check_step(got, expected, replace(p, temperature=0.5), 1e-15)
        assert np.shape(got.temperature_gradient) == ()


def test_what_is_not_given_is_the_mini_batch_loss_with_the_whole_reference() -> None:
    p = problems.draw(31, gamma="one", never=0.0)
    given = contrastive_step(
        *p.arrays,
        temperature=0.5,
        gamma=1.0,
        reference_features=p.reference_features,
        reference_weight=1.0,
        radius=0.0,
        eps=0.0,
    )
    default = contrastive_step(*p.arrays, temperature=0.5, reference_features=p.reference_features)
    for one, other in zip(default, given, strict=True):
        np.testing.assert_array_equal(one, other)


def test_neither_the_features_nor_the_state_costs_the_other_its_digits() -> None:
    p = problems.draw(32, r=None, never=0.0)
    features, (image, text) = p.arrays[:2], p.arrays[2:]
    coarse = [array.astype(np.float32) for array in features]
    step = contrastive_step(*coarse, image, text, temperature=0.3, gamma=1e-13)  # nearly nothing is learned
    np.testing.assert_allclose(step.log_inner_image, image, rtol=0, atol=1e-11)
    np.testing.assert_allclose(step.log_inner_text, text, rtol=0, atol=1e-11)
    assert float(step.loss) == pytest.approx(0.3 * float(np.sum(image + text)) / (2 * p.batch_size), rel=1e-10)
    fine = contrastive_step(*features, image.astype(np.float32), text.astype(np.float32), temperature=0.3)
    assert float(fine.loss) == pytest.approx(
        float(contrastive_step(*features, image, text, temperature=0.3).loss), rel=1e-13
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_temperature_that_is_a_number_widens_nothing(dtype: str) -> None:
    p = problems.draw(33)
    step = contrastive_step(*(array.astype(dtype) for array in p.arrays), temperature=0.5)
    assert {str(value.dtype) for value in step} == {dtype}


def test_the_wide_step_has_the_defaults_of_the_step() -> None:
    p = problems.draw(41, b=6, d=4, r=3, temperature=(0.2, 0.9))
    arrays, references = p.arrays, {"reference_features": p.reference_features}
    given = wide_contrastive_step(*arrays, temperature=0.3, **references)
    for name, value, expected in zip(
        ContrastiveStep._fields, given, contrastive_step(*arrays, temperature=0.3, **references), strict=True
    ):
        np.testing.assert_array_equal(value, expected, err_msg=name)


def test_features_without_columns_are_all_equal(space: Any) -> None:
    # All similarities are 0, so every negative fits as well as its positive: log u = 0 and loss 0.
    empty, unseen = space.asarray(np.zeros((3, 0))), space.asarray(np.full(3, -np.inf))
    for references in (None, (empty, empty)):
        step = contrastive_step(empty, empty, unseen, unseen, temperature=0.1, reference_features=references)
        assert float(step.loss) == 0.0
        assert space.to_numpy(step.log_inner_image).tolist() == [0.0, 0.0, 0.0]
        assert tuple(step.text_gradient.shape) == (3, 0)
