"""The Pallas kernels: on a GPU where there is one, else interpreted; and lowered for a GPU that is not there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drrho_jax import fused as kernels
from drrho_reference import conformance

from drrho_core import fused_kernels
from drrho_core._routines import find_kernels
from drrho_core.extend import Batch
from helpers import fused_sweeps

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
ON_CPU = jax.default_backend() == "cpu"
DTYPES = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}
PULL_UNITS = {"float32": None, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""V is rounded before it is multiplied: to float16's 11 bits, to bfloat16's 8."""


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small batch has several panels, and many tiles where they are interpreted."""
    small = {"height": 512, "width": 256}
    if ON_CPU:
        small = {"height": 24, "width": 16, "rows": 8, "columns": 16, "depth": 8}
    plans = {name: plan._replace(**small) for name, plan in kernels.PLANS.items()}
    monkeypatch.setattr(kernels, "PLANS", plans)


SHAPES = [
    ({"b": 2, "d": 1}, "float32"),
    ({"b": 33, "d": 20, "r": 7}, "float32"),
    ({"b": 37, "d": 7, "r": 20, "mask": True}, "bfloat16"),
    ({"b": 24, "d": 8, "mask": True}, "float16"),
    ({"b": 49, "d": 9, "r": 0, "one_temperature": True}, "bfloat16"),
]
if not ON_CPU:
    SHAPES += [({"b": 700, "d": 200, "r": 130}, name) for name in DTYPES]
    SHAPES += [({"b": 1030, "d": 128, "r": 64, "mask": True}, name) for name in DTYPES]


def to_numpy(x: Any) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


def given(problem: Any, name: str) -> Batch:
    return problem.given(
        lambda x: jnp.asarray(x, dtype=DTYPES[name]), lambda x: jnp.asarray(x, dtype=jnp.float32), jnp.asarray
    )


def anchors(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, dtype=jnp.float32)


def both_sweeps(problem: Any, name: str) -> tuple[Any, Any]:
    sweeps, batch = kernels.PallasSweeps(), given(problem, name)
    assert sweeps.declines(batch, "always") is None
    first = sweeps.sum_negatives(batch)
    second = sweeps.pull_back(batch, first, anchors(problem.weight_image), anchors(problem.weight_text))
    return first._make([*map(to_numpy, first[:6]), None]), second._make(map(to_numpy, second))


@pytest.mark.parametrize(("shape", "name"), SHAPES, ids=str)
def test_both_sweeps_are_the_formula(shape: dict[str, Any], name: str) -> None:
    problem = fused_sweeps.draw(
        **shape, rounded=lambda x: np.asarray(jnp.asarray(x, dtype=DTYPES[name]), dtype=np.float64)
    )
    fused_sweeps.check(*both_sweeps(problem, name), problem, unit=5e-6, pull_unit=PULL_UNITS[name])


def test_cold_temperatures_overflow_nothing() -> None:
    problem = fused_sweeps.draw(b=20, d=8, r=8, coldest=0.001)
    fused_sweeps.check(*both_sweeps(problem, "float32"), problem, unit=100 * 5e-6)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-6, 1e-10])
def test_large_logits_lose_no_digits(temperature: float, name: str) -> None:
    problem = fused_sweeps.draw_exact(b=49, d=5, r=3, mask=True, temperature=temperature)
    fused_sweeps.check(*both_sweeps(problem, name), problem, unit=5e-6, pull_unit=PULL_UNITS[name])


@pytest.mark.parametrize("temperature", [0.05, 1e-4, 1e-10])
def test_the_weights_of_an_anchor_add_up(temperature: float) -> None:
    """Whatever the products round: with a column of ones the pull is the sum of the weights."""
    problem = fused_sweeps.draw(b=65, d=24, r=9, coldest=temperature)
    for side in (problem.image_features, problem.text_features, *problem.reference_features):
        side *= np.sqrt(temperature)  # logits of size 1 / temperature that differ by about 1
    for side in (problem.image_features, problem.text_features):
        side[:, 0] = 1.0
    nothing = np.zeros_like(problem.weight_image)
    for own, pull in (("weight_image", "image_pull"), ("weight_text", "text_pull")):
        other = "weight_text" if own == "weight_image" else "weight_image"
        _, second = both_sweeps(type(problem)(**{**vars(problem), other: nothing}), "float32")
        np.testing.assert_allclose(getattr(second, pull)[:, 0], getattr(problem, own), rtol=2e-6, atol=1e-9)


def test_the_positives_are_the_diagonal_whatever_the_shape_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = kernels.PLANS["float32"]
    for rows, columns in ((plan.rows, plan.columns), (plan.columns, plan.rows)):
        changed = plan._replace(rows=rows, columns=columns)
        rng = np.random.default_rng(0)
        e1, e2 = (jnp.asarray(rng.integers(-3, 4, (37, 5)), dtype=jnp.float32) for _ in range(2))
        batch = Batch(e1, e2, (e2, e1), 0.5, jnp.ones(37), jnp.ones(37), None)
        inputs, _, _ = kernels.prepare(batch, changed)
        found = kernels.positives(inputs, 37, changed, ON_CPU)
        np.testing.assert_array_equal(found, 0.5 * np.sum(np.asarray(e1) * np.asarray(e2), axis=1))


def test_they_work_inside_jit_with_a_traced_reference_weight() -> None:
    problem = fused_sweeps.draw(b=20, d=8, r=8, coldest=0.05)
    batch = given(problem, "float32")

    @jax.jit
    def first(weight: jax.Array, features: jax.Array) -> Any:
        return kernels.PallasSweeps().sum_negatives(batch._replace(reference_weight=weight, image_features=features))

    traced = first(jnp.float32(batch.reference_weight), batch.image_features)
    eager = kernels.PallasSweeps().sum_negatives(batch)
    for one, other in zip(traced[:6], eager[:6], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_kit_passes_a_step_that_is_made_of_them() -> None:
    step = fused_sweeps.step(kernels.PallasSweeps(), to_numpy)
    report = conformance.check({"contrastive_step": step}, xp=jnp, dtypes=["float32"])
    assert report.passed, report.table()


def test_importing_the_backend_registers_them() -> None:
    batch = given(fused_sweeps.draw(b=4, d=3), "float32")
    with fused_kernels("always"):
        assert isinstance(find_kernels(batch, jnp), kernels.PallasSweeps)


@pytest.mark.parametrize(
    ("change", "mode", "reason"),
    [
        ({}, "always", None),
        ({"dtype": jnp.int32}, "always", "take float32 and half types, not int32"),
        pytest.param({}, "auto", "on the CPU", marks=pytest.mark.skipif(not ON_CPU, reason="this is no CPU")),
    ],
)
def test_what_they_decline(change: dict[str, Any], mode: str, reason: str | None) -> None:
    features = jnp.zeros((2, 3), dtype=change.get("dtype", jnp.float32))
    said = kernels.PallasSweeps().declines(Batch(features, features, None, 1.0, jnp.ones(2), jnp.ones(2), None), mode)
    assert said is None if reason is None else reason in str(said)


def test_on_a_gpu_only_what_is_expected_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "platform_of", lambda array: "gpu")
    for dtype, b, reason in (
        (jnp.float32, 1024, "multiply float32 no faster"),
        (jnp.bfloat16, 1023, "smaller than 1024"),
        (jnp.bfloat16, 1024, None),
    ):
        features = jnp.zeros((b, 1), dtype=dtype)
        batch = Batch(features, features, None, 1.0, jnp.ones(b), jnp.ones(b), None)
        said = kernels.PallasSweeps().declines(batch, "auto")
        assert said is None if reason is None else reason in str(said)
        assert kernels.PallasSweeps().declines(batch, "always") is None
    monkeypatch.setattr(kernels, "platform_of", lambda array: "tpu")
    assert "NVIDIA GPU, not on tpu" in str(kernels.PallasSweeps().declines(batch, "always"))


@pytest.mark.parametrize("name", DTYPES)
def test_the_kernels_lower_for_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.undo()  # the real tiles
    problem = fused_sweeps.draw(b=130, d=96, r=40, mask=True)
    batch = given(problem, name)
    for mask, plan in ((problem.pair_mask, kernels.options_for(batch)["plan"]), (None, kernels.PLANS[name])):
        batch, options = batch._replace(pair_mask=mask), {"plan": plan, "interpret": False}
        saved = (jnp.zeros(130),) * 4
        for function, more in ((kernels.sum_negatives, ()), (kernels.pull_back, (saved, *saved[:2]))):
            text = function.trace(batch, *more, **options).lower(lowering_platforms=("cuda",)).as_text()
            assert "xla.gpu.triton" in text
