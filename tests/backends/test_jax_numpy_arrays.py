"""drrho_jax takes NumPy arrays wherever JAX does, and a message blames the argument that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from drrho_jax import ContrastiveState, DonatingEstimator, contrastive_loss, drrho_risk, init_state  # noqa: E402

from drrho_core import CVaR  # noqa: E402


@pytest.fixture(autouse=True)
def _without_64_bit_types() -> Iterator[None]:
    """Run every test with JAX's default types, whatever tests before have switched on."""
    with jax.enable_x64(False):
        yield


B, D, N = 4, 3, 9
INDEX = np.asarray([5, 0, 8, 2])


def arguments(asarray: Callable[[Any], Any]) -> dict[str, Any]:
    """Return all arguments of the loss as arrays of one library."""
    generator = np.random.default_rng(0)
    draw = lambda *shape: asarray(generator.normal(size=shape).astype("float32"))  # noqa: E731
    mask = generator.random((B, B)) > 0.3
    return {
        "state": ContrastiveState(draw(N), draw(N)),
        "image_features": draw(B, D),
        "text_features": draw(B, D),
        "sample_index": asarray(INDEX),
        "temperature": (draw(B) ** 2 + 0.2, draw(B) ** 2 + 0.2),
        "gamma": asarray(np.asarray(0.7, dtype="float32")),
        "reference_features": (draw(B, 2), draw(B, 2)),
        "reference_weight": asarray(np.asarray(0.8, dtype="float32")),
        "radius": asarray(np.asarray(0.1, dtype="float32")),
        "pair_mask": asarray(mask),
    }


@pytest.mark.parametrize("jitted", [False, True])
def test_numpy_arrays_give_what_jax_arrays_give(jitted: bool) -> None:
    ours, theirs = arguments(np.asarray), arguments(jnp.asarray)
    call = lambda given: contrastive_loss(**given)  # noqa: E731
    loss, state = jax.jit(lambda: call(ours))() if jitted else call(ours)
    expected, expected_state = call(theirs)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert all(isinstance(side, jax.Array) for side in state)
    np.testing.assert_allclose(state.log_inner_text, expected_state.log_inner_text, rtol=1e-6)


@pytest.mark.parametrize("name", list(arguments(np.asarray)))
def test_one_numpy_array_among_jax_arrays_is_taken(name: str) -> None:
    given = arguments(jnp.asarray)
    expected, _ = contrastive_loss(**given)
    loss, _ = contrastive_loss(**{**given, name: arguments(np.asarray)[name]})
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_a_restored_state_continues_the_training(tmp_path: Path) -> None:
    given = arguments(jnp.asarray)
    _, state = contrastive_loss(**given)
    np.savez(tmp_path / "state.npz", **state._asdict())
    restored = ContrastiveState(**np.load(tmp_path / "state.npz"))
    for again in (restored, tuple(restored), jax.device_get(state)):
        loss, _ = contrastive_loss(**{**given, "state": again})
        assert float(loss) == float(contrastive_loss(**{**given, "state": state})[0])


def test_the_gradient_reaches_jax_arrays_beside_numpy_arrays() -> None:
    ours, theirs = arguments(np.asarray), arguments(jnp.asarray)

    def gradient(given: dict[str, Any]) -> Any:
        return jax.grad(lambda x: contrastive_loss(**{**given, "image_features": x})[0])(theirs["image_features"])

    np.testing.assert_allclose(gradient(ours), gradient(theirs), rtol=1e-6, atol=1e-7)


def test_float64_features_are_converted_as_jax_does() -> None:
    given = arguments(np.asarray)
    wide = {**given, "image_features": given["image_features"].astype("float64")}
    assert contrastive_loss(**wide)[0].dtype == "float32"
    with jax.enable_x64(True), pytest.raises(TypeError, match=r"^text_features must have the dtype of image_features"):
        contrastive_loss(**wide)


@pytest.mark.parametrize("features", ["float16", "bfloat16"])
def test_wide_references_beside_half_features_are_promoted(features: str) -> None:
    given = arguments(jnp.asarray)
    half = {name: given[name].astype(features) for name in ("image_features", "text_features")}
    wide = {name: array.astype("float32") for name, array in half.items()}
    loss, state = contrastive_loss(**{**given, **half})
    expected, expected_state = contrastive_loss(**{**given, **wide})
    assert float(loss) == float(expected)
    assert np.array_equal(state.log_inner_image, expected_state.log_inner_image)


def test_half_references_beside_float32_features_are_promoted() -> None:
    given = arguments(jnp.asarray)
    half = tuple(array.astype("float16") for array in given["reference_features"])
    wide = tuple(array.astype("float32") for array in half)
    loss, _ = contrastive_loss(**{**given, "reference_features": half})
    assert float(loss) == float(contrastive_loss(**{**given, "reference_features": wide})[0])


def test_float64_references_beside_float32_features_are_promoted() -> None:
    with jax.enable_x64(True):
        given = arguments(jnp.asarray)
        wide = tuple(np.asarray(array, dtype="float64") for array in given["reference_features"])
        loss, _ = contrastive_loss(**{**given, "reference_features": wide})
        assert float(loss) == pytest.approx(float(contrastive_loss(**given)[0]), rel=1e-5)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([5, 0, 2**32, 2], r"sample_index must hold row ids from 0 to 8 .*, got 4294967296 at position 2"),
        ([5, 0, -1, 2], r"sample_index must hold row ids from 0 to 8 .*, got -1 at position 2"),
        ([5, 0, 5, 2], "sample_index must not repeat an index within a batch, got 5 twice"),
    ],
)
def test_a_numpy_index_is_read_before_it_could_wrap_around(index: list[int], message: str, jitted: bool) -> None:
    given = {**arguments(jnp.asarray), "sample_index": np.asarray(index, dtype="int64")}
    call = lambda: contrastive_loss(**given)  # noqa: E731
    with pytest.raises(ValueError, match=f"^{message}"):
        (jax.jit(call) if jitted else call)()


BAD_INPUT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "masked features": (
        {"image_features": np.ma.masked_invalid(np.ones((B, D), dtype="f4"))}, TypeError,
        r"image_features must be (a plain array|an array of JAX or NumPy), got .*MaskedArray",
    ),
    "masked state": (
        {"state": ContrastiveState(np.ones(N, dtype="f4"), np.ma.masked_invalid(np.ones(N, dtype="f4")))}, TypeError,
        r"state\.log_inner_text must be (a plain array|an array of JAX or NumPy), got .*MaskedArray",
    ),
    "objects": (
        {"text_features": np.full((B, D), None)}, TypeError, "text_features must (hold numbers|be a plain array), got "
    ),
    "strings": (
        {"sample_index": np.asarray(list("abcd"))}, TypeError, "sample_index must have an integer dtype, got <U1"
    ),
    "floating index": (
        {"sample_index": np.arange(4.0)}, TypeError, "sample_index must have an integer dtype, got float64"
    ),
    "integer state": (
        {"state": ContrastiveState(np.zeros(N, dtype="i4"), np.zeros(N, dtype="i4"))}, TypeError,
        r"state\.log_inner_image must have a real floating dtype, got int32",
    ),
    "temperature": ({"temperature": np.asarray(-0.5)}, ValueError, r"temperature must be > 0, got -0\.5"),
    "gamma": ({"gamma": np.float32(1.5)}, ValueError, r"gamma must be in \(0, 1\], got 1\.5"),
    "flag": ({"radius": np.asarray(True)}, TypeError, "radius must be a real number, got True"),
    "wide temperatures": (
        {"temperature": (np.full(B, 1e300), np.full(B, 0.5))}, ValueError,
        r"temperature\[0\] must fit into float32, because jax_enable_x64 is off, got 1e\+300 at position 0",
    ),
    "wide features": (
        {"image_features": np.full((B, D), -1e39)}, ValueError,
        r"image_features must fit into float32, because jax_enable_x64 is off, got -1e\+39 at position 0, 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_a_message_blames_the_numpy_array_that_is_wrong(case: str) -> None:
    change, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=f"^{message}"):
        contrastive_loss(**{**arguments(jnp.asarray), **change})


def test_the_risk_takes_numpy_arrays() -> None:
    loss, reference_loss = np.random.default_rng(0).normal(size=(2, 3, 5)).astype("float32")
    where = np.arange(5) < 4
    mine = drrho_risk(loss, reference_loss, CVaR(0.4), reference_weight=np.asarray(0.5), where=where)
    theirs = drrho_risk(
        *map(jnp.asarray, (loss, reference_loss)), CVaR(0.4), reference_weight=0.5, where=jnp.asarray(where)
    )
    assert isinstance(mine, jax.Array)
    assert np.array_equal(mine, theirs)
    beside = jax.grad(lambda x: jnp.sum(drrho_risk(x, reference_loss, CVaR(0.4))))(jnp.asarray(loss))
    assert np.all(np.isfinite(np.asarray(beside)))


def test_the_donating_estimator_takes_numpy_arrays() -> None:
    estimator = DonatingEstimator(N, like=np.zeros(1, dtype="float32"))
    rows = np.linspace(-1.0, 1.0, B, dtype="float32")
    estimator.scatter(INDEX, rows, -rows)
    image, text = estimator.gather(INDEX)
    assert isinstance(image, jax.Array)
    assert np.array_equal(image, rows)
    assert np.array_equal(text, -rows)
    saved = {name: np.asarray(side) for name, side in estimator.state_dict().items()}
    other = DonatingEstimator(N, like=jnp.zeros(1))
    other.load_state_dict(saved)
    other.scatter(INDEX, rows, rows)
    assert np.array_equal(other.log_inner_image, saved["log_inner_image"])
    with pytest.raises(
        ValueError, match=r"^sample_index must hold row ids from 0 to 8 .*, got 4294967296 at position 0$"
    ):
        other.gather(np.asarray([2**32]))


def test_init_state_says_how_many_samples_an_index_can_count() -> None:
    with pytest.raises(ValueError, match=r"^num_samples must fit into int32, .*, got 2147483648$"):
        init_state(2**31)
