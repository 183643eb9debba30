"""The Pallas kernels: on a GPU where there is one, else interpreted; and lowered for a GPU that is not there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drrho_jax import fused as kernels
from drrho_reference import conformance

from drrho_core._fused import Batch, find, fused_kernels

ON_CPU = jax.default_backend() == "cpu"
DTYPES = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}
PULL_UNITS = {"float32": None, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""V is rounded before it is multiplied: to TensorFloat-32's 11 bits for float16, to bfloat16's 8."""


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small batch has several panels, and many tiles where they are interpreted."""
    small = {"panel": 16, "rows": 8, "columns": 8, "depth": 8} if ON_CPU else {"panel": 256}
    plans = {name: plan._replace(**small) for name, plan in kernels.PLANS.items()}
    monkeypatch.setattr(kernels, "PLANS", plans)


SHAPES = [
    ({"b": 2, "d": 1}, "float32"),
    ({"b": 33, "d": 20, "r": 7}, "float32"),
    ({"b": 37, "d": 7, "r": 20, "mask": True}, "bfloat16"),
    ({"b": 24, "d": 8, "mask": True}, "float16"),
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


def both_sweeps(batch: Batch, problem: Any) -> tuple[Any, Any]:
    sweeps = kernels.PallasSweeps()
    assert sweeps.declines(batch, "always") is None
    first = sweeps.sum_negatives(batch)
    logs = (jnp.asarray(x, dtype=jnp.float32) for x in (problem.log_denominator_image, problem.log_denominator_text))
    second = sweeps.pull_back(batch, first.positive, *logs)
    return first._make(map(to_numpy, first)), second._make(map(to_numpy, second))


@pytest.mark.parametrize(("shape", "name"), SHAPES, ids=str)
def test_both_sweeps_are_the_formula(fused: Any, shape: dict[str, Any], name: str) -> None:
    problem = fused.draw(**shape, rounded=lambda x: np.asarray(jnp.asarray(x, dtype=DTYPES[name]), dtype=np.float64))
    fused.check(*both_sweeps(given(problem, name), problem), problem, unit=5e-6, pull_unit=PULL_UNITS[name])


def test_cold_temperatures_overflow_nothing(fused: Any) -> None:
    problem = fused.draw(b=20, d=8, r=8, coldest=0.001)
    fused.check(*both_sweeps(given(problem, "float32"), problem), problem, unit=100 * 5e-6)


def test_they_work_inside_jit_with_a_traced_reference_weight(fused: Any) -> None:
    problem = fused.draw(b=20, d=8, r=8, coldest=0.05)
    batch = given(problem, "float32")

    @jax.jit
    def first(weight: jax.Array, features: jax.Array) -> Any:
        return kernels.PallasSweeps().sum_negatives(batch._replace(reference_weight=weight, image_features=features))

    traced = first(jnp.float32(batch.reference_weight), batch.image_features)
    eager = kernels.PallasSweeps().sum_negatives(batch)
    for one, other in zip(traced, eager, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_kit_passes_a_step_that_is_made_of_them(fused: Any) -> None:
    step = fused.step(kernels.PallasSweeps(), to_numpy)
    report = conformance.check({"contrastive_step": step}, xp=jnp, dtypes=["float32"])
    assert report.passed, report.table()


def test_importing_the_backend_registers_them(fused: Any) -> None:
    batch = given(fused.draw(b=4, d=3), "float32")
    with fused_kernels("always"):
        assert isinstance(find(batch, jnp), kernels.PallasSweeps)


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
    monkeypatch.setattr(kernels, "_platform", lambda array: "gpu")
    for dtype, b, reason in (
        (jnp.float32, 1024, "float32 has no faster product"),
        (jnp.bfloat16, 1023, "smaller than 1024"),
        (jnp.bfloat16, 1024, None),
    ):
        features = jnp.zeros((b, 1), dtype=dtype)
        batch = Batch(features, features, None, 1.0, jnp.ones(b), jnp.ones(b), None)
        said = kernels.PallasSweeps().declines(batch, "auto")
        assert said is None if reason is None else reason in str(said)
        assert kernels.PallasSweeps().declines(batch, "always") is None
    monkeypatch.setattr(kernels, "_platform", lambda array: "tpu")
    assert "NVIDIA GPU, not on tpu" in str(kernels.PallasSweeps().declines(batch, "always"))


@pytest.mark.parametrize("name", DTYPES)
def test_the_kernels_lower_for_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, fused: Any, name: str) -> None:
    monkeypatch.undo()  # the real tiles
    problem = fused.draw(b=130, d=96, r=40, mask=True)
    batch = given(problem, name)
    options = {"plan": kernels.PLANS[name], "interpret": False}
    for function, more in ((kernels._sum_negatives, ()), (kernels._pull_back, (jnp.zeros(130),) * 3)):
        text = function.trace(batch, *more, **options).lower(lowering_platforms=("cuda",)).as_text()
        assert "xla.gpu.triton" in text
