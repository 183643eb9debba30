"""Bad input of drrho_jax.contrastive_loss is one clear error, or nan under jit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from drrho_jax import ContrastiveState, contrastive_loss, init_state  # noqa: E402

from helpers.jax_losses import (  # noqa: E402
    INDEX,
    B,
    N,
    Problem,
    draw,
)

pytestmark = pytest.mark.usefixtures("wide_types")


def valid() -> tuple[Problem, dict[str, Any]]:
    problem = draw("float32")
    return problem, {
        "state": problem.state,
        "image_features": problem.images,
        "text_features": problem.texts,
        "sample_index": problem.index,
        "temperature": jnp.asarray(0.3),
        "reference_features": problem.references,
        "pair_mask": problem.pair_mask,
    }


BAD_INPUT: dict[str, tuple[Callable[[Problem], dict[str, Any]], type[Exception], str]] = {
    "repeated index": (
        lambda p: {"sample_index": jnp.asarray([7, 0, 10, 0, 2])},
        ValueError,
        "sample_index must not repeat an index within a batch, got 0 twice",
    ),
    "index too large": (
        lambda p: {"sample_index": jnp.asarray([7, 0, 11, 4, 2])},
        ValueError,
        r"sample_index must hold row ids from 0 to 10 \(see docs/large-data\.md, .*\), got 11 at position 2",
    ),
    "negative index": (
        lambda p: {"sample_index": jnp.asarray([7, -1, 10, 4, 2])},
        ValueError,
        r"sample_index must hold row ids from 0 to 10 \(see docs/large-data\.md, .*\), got -1 at position 1",
    ),
    "floating index": (
        lambda p: {"sample_index": p.index.astype("float32")},
        TypeError,
        "sample_index must have an integer dtype, got float32",
    ),
    "list as index": (lambda p: {"sample_index": INDEX}, TypeError, "sample_index must be an array, got list"),
    "index without axes": (
        lambda p: {"sample_index": p.index[0]},
        ValueError,
        r"sample_index must have 1 axes \(batch_size,\), got shape \(\)",
    ),
    "short index": (
        lambda p: {"sample_index": p.index[:4]},
        ValueError,
        r"sample_index must have shape \(batch_size,\) = \(5,\), got \(4,\)",
    ),
    "shapes": (
        lambda p: {"text_features": p.texts[:, :3]},
        ValueError,
        r"text_features must have shape \(batch_size, feature_dim\) = \(5, 4\), got \(5, 3\)",
    ),
    "one axis": (
        lambda p: {"image_features": p.images[:, 0]},
        ValueError,
        r"image_features must have 2 axes \(batch_size, feature_dim\), got shape \(5,\)",
    ),
    "dtypes": (
        lambda p: {"image_features": p.images.astype("float16")},
        TypeError,
        r"text_features must have the dtype of image_features \(float16\), got float32",
    ),
    "reference dtype": (
        lambda p: {"reference_features": (p.references[0], p.references[1].astype("float64"))},
        TypeError,
        r"reference_features\[1\] must have the dtype of .* \(float32\), got float64",
    ),
    "nan": (
        lambda p: {"image_features": p.images.at[2, 1].set(jnp.nan)},
        ValueError,
        r"image_features must be finite, got nan at position \(2, 1\)",
    ),
    "temperature": (
        lambda p: {"temperature": jnp.asarray(-0.5)},
        ValueError,
        r"temperature must be > 0, got -0\.5",
    ),
    "temperature as number": (lambda p: {"temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
    "temperature of one side": (
        lambda p: {"temperature": (p.temperatures[0], p.temperatures[1][:4])},
        ValueError,
        r"temperature\[1\] must have shape \(batch_size,\) = \(5,\), got \(4,\)",
    ),
    "gamma": (lambda p: {"gamma": 1.5}, ValueError, r"gamma must be in \(0, 1\], got 1\.5"),
    "eps": (lambda p: {"eps": -1.0}, ValueError, r"eps must be >= 0, got -1\.0"),
    "radius": (lambda p: {"radius": math.inf}, ValueError, "radius must be finite, got inf"),
    "reference weight": (lambda p: {"reference_weight": -1.0}, ValueError, "reference_weight must be >= 0"),
    "one reference": (
        lambda p: {"reference_features": p.references[0]},
        TypeError,
        r"reference_features must be a pair \(image, text\) of arrays, got ArrayImpl",
    ),
    "mask shape": (
        lambda p: {"pair_mask": p.pair_mask[:4]},
        ValueError,
        r"pair_mask must have shape \(batch_size, batch_size\) = \(5, 5\), got \(4, 5\)",
    ),
    "mask dtype": (lambda p: {"pair_mask": p.pair_mask.astype("int8")}, TypeError, "pair_mask must have dtype bool"),
    "tile size": (lambda p: {"tile_size": 0}, ValueError, "tile_size must be at least 1, got 0"),
    "state of half width": (
        lambda p: {"state": ContrastiveState(*(side.astype("bfloat16") for side in p.state))},
        TypeError,
        r"state\.log_inner_image must be float32 or wider, got bfloat16",
    ),
    "uneven state": (
        lambda p: {"state": ContrastiveState(p.state[0], p.state[1][:9])},
        ValueError,
        r"state\.log_inner_text must have shape \(num_samples,\) = \(11,\), got \(9,\)",
    ),
    "square state": (
        lambda p: {"state": ContrastiveState(p.state[0][:, None], p.state[1])},
        ValueError,
        r"state\.log_inner_image must have 1 axes \(num_samples,\), got shape \(11, 1\)",
    ),
    "list in the state": (
        lambda p: {"state": ContrastiveState([0.0] * N, p.state[1])},
        TypeError,
        r"state\.log_inner_image must be an array, got \[0\.0, ",
    ),
    "no state": (lambda p: {"state": None}, TypeError, "state must be a ContrastiveState, got None"),
    "one pair": (
        lambda p: {
            "image_features": p.images[:1],
            "text_features": p.texts[:1],
            "sample_index": p.index[:1],
            "reference_features": None,
            "pair_mask": None,
        },
        ValueError,
        "image_features must hold at least 2 pairs",
    ),
}


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_bad_input_is_one_clear_error(case: str) -> None:
    change, error, message = BAD_INPUT[case]
    problem, arguments = valid()
    arguments.update(change(problem))
    with pytest.raises(error, match=f"^{message}"):
        contrastive_loss(**arguments)


@pytest.mark.parametrize("case", ["repeated index", "nan", "temperature", "index too large"])
def test_values_are_looked_at_while_differentiating(case: str) -> None:
    change, error, message = BAD_INPUT[case]
    problem, arguments = valid()
    arguments.update(change(problem))

    def function(images: Any, texts: Any, temperature: Any) -> Any:
        return contrastive_loss(
            **{**arguments, "image_features": images, "text_features": texts, "temperature": temperature}
        )[0]

    with pytest.raises(error, match=f"^{message}"):
        jax.grad(function, argnums=(0, 1, 2))(
            arguments["image_features"], arguments["text_features"], arguments["temperature"]
        )


@pytest.mark.parametrize("bad", [11, 10**6, -1])
def test_under_jit_an_index_out_of_range_shows_in_the_loss(bad: int) -> None:
    problem = draw()
    index = jnp.asarray([7, 0, bad, 4, 2])
    loss, state = jax.jit(lambda i: contrastive_loss(problem.state, problem.images, problem.texts, i, temperature=0.3))(
        index
    )
    assert math.isnan(float(loss))
    others = [i for i in range(N) if i not in (7, 0, 4, 2)]
    assert np.array_equal(np.asarray(state.log_inner_image)[others], np.asarray(problem.state[0])[others])


OUTSIDE = [
    ("gamma", 1.5), ("gamma", 0.0), ("gamma", -0.5), ("gamma", math.nan), ("temperature", 0.0), ("temperature", -0.3),
    ("eps", -0.1), ("radius", -1.0), ("reference_weight", -1.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bad"), OUTSIDE)
def test_under_jit_an_option_outside_its_domain_gives_nan(name: str, bad: float) -> None:
    problem = draw()

    def function(images: Any, options: Any) -> Any:
        given = {"temperature": 0.3, "reference_features": problem.references} | options
        return contrastive_loss(problem.state, images, problem.texts, problem.index, **given)

    step = jax.jit(jax.value_and_grad(function, has_aux=True))
    (loss, state), gradient = step(problem.images, {name: bad})
    assert math.isnan(float(loss))
    assert np.all(np.isnan(np.asarray(gradient)))
    for side, old in zip(state, problem.state, strict=True):
        others = [i for i in range(N) if i not in INDEX]
        assert np.all(np.isnan(np.asarray(side)[INDEX]))
        assert np.array_equal(np.asarray(side)[others], np.asarray(old)[others])


def test_under_jit_one_gamma_outside_its_domain_gives_nan_on_a_first_visit() -> None:
    # A first visit does not use gamma, so the values alone would not show the mistake.
    problem = draw()
    gamma = (problem.gammas[0], problem.gammas[1].at[2].set(1.5))
    loss, state = jax.jit(
        lambda g: contrastive_loss(
            init_state(N), problem.images, problem.texts, problem.index, temperature=0.3, gamma=g
        )
    )(gamma)
    assert math.isnan(float(loss))
    assert np.all(np.isnan(np.asarray(state.log_inner_image)[INDEX]))


def test_anchor_weights_scale_loss_and_gradient_and_not_the_state() -> None:
    problem = draw()
    results = {}
    for name, weight in {"none": None, "ones": np.ones(B), "twos": (jnp.full(B, 2.0), np.full(B, 2.0))}.items():

        def function(images: Any, weight: Any = weight) -> Any:
            return contrastive_loss(
                problem.state, images, problem.texts, problem.index, temperature=0.3, gamma=0.7, anchor_weight=weight
            )

        results[name] = jax.value_and_grad(function, has_aux=True)(problem.images)
    (loss, state), gradient = results["none"]
    for name, factor in {"ones": 1.0, "twos": 2.0}.items():
        (weighted_loss, weighted_state), weighted = results[name]
        assert float(weighted_loss) == pytest.approx(factor * float(loss), rel=1e-13)
        np.testing.assert_allclose(weighted, factor * gradient, rtol=1e-12, atol=1e-16)
        np.testing.assert_allclose(weighted_state.log_inner_text, state.log_inner_text, rtol=1e-13)


def test_an_anchor_weight_is_a_constant() -> None:
    problem = draw()

    def function(weight: Any) -> Any:
        options = {"temperature": 0.3, "anchor_weight": weight}
        return contrastive_loss(problem.state, problem.images, problem.texts, problem.index, **options)[0]

    assert not np.any(np.asarray(jax.grad(function)(jnp.linspace(0.5, 1.5, B))))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 2**63}, ValueError, "num_samples must fit int64, got 9223372036854775808"),
        ({"num_samples": 2.5}, TypeError, r"num_samples must be an integer, got 2\.5"),
        ({"num_samples": 3, "dtype": jnp.bfloat16}, TypeError, "dtype must be float32, or float64 .*, got bfloat16"),
        ({"num_samples": 3, "dtype": jnp.int32}, TypeError, "dtype must be float32, or float64 .*, got int32"),
    ],
)
def test_bad_states(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        init_state(**arguments)
