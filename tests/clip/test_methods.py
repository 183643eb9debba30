"""Every method on one batch: loss and gradients on every array library, against the oracle in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import drrho_reference as oracle
import numpy as np
import pytest

from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput
from drrho_clip.methods import DEFAULTS, METHODS, OPTIONAL, ObjectiveInputs
from drrho_clip.selection import gumbel_noise
from drrho_clip.setting_rules import check_used
from drrho_clip.step import StepBatch, build_step
from drrho_clip.update import initial_scalars, initial_state
from drrho_core.backend import get_backend
from helpers.features import unit_rows

B, D, R = 6, 5, 4
RNG = np.random.default_rng(3)
IMAGES, TEXTS = unit_rows(RNG, B, D), unit_rows(RNG, B, D)
REFERENCE = unit_rows(RNG, B, R), unit_rows(RNG, B, R)
# The third sample was never visited.
STATE = (RNG.normal(size=B), RNG.normal(size=B))
STATE[0][2] = STATE[1][2] = -np.inf
MASK = ~np.eye(B, k=1, dtype=bool) & ~np.eye(B, k=-1, dtype=bool)
GAMMA = 0.6
BACKENDS = ("numpy", "torch", "jax")


def _config(method: str) -> TrainConfig:
    reference = "runs/reference" if METHODS[method].needs_reference else None
    config = TrainConfig(data="digits", method=method, reference=reference, backend="numpy", dtype="float64")
    return replace(
        config, temperature=0.4, reference_temperature=0.3, distillation_weight=0.7, log_alpha=1.0, bias=-2.0
    )


def _expected(method: str, config: TrainConfig) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the loss and the gradients of both features by the oracle."""
    if method.startswith("distill:"):
        loss, *gradients = _expected(method.removeprefix("distill:"), config)
        teacher = oracle.distillation_loss(IMAGES, TEXTS, *REFERENCE, temperature=0.4, reference_temperature=0.3)
        weight = config.distillation_weight
        own = [g + weight * t for g, t in zip(gradients, (teacher.image_gradient, teacher.text_gradient), strict=True)]
        return loss + weight * teacher.loss, own[0], own[1]
    options: dict[str, Any] = {"temperature": 0.4, "gamma": GAMMA, "pair_mask": MASK}
    if METHODS[method].objective is METHODS["clip"].objective:
        step: Any = oracle.info_nce(IMAGES, TEXTS, temperature=0.4, pair_mask=MASK)
    elif method == "siglip":
        step = oracle.sigmoid_loss(IMAGES, TEXTS, scale=2.5, bias=-2.0, pair_mask=MASK)
    else:
        if method == "drrho":
            options["reference_features"] = REFERENCE
        if method == "scent":
            options["gamma"] = tuple(oracle.scent_gamma(side, log_alpha=1.0) for side in STATE)
        step = oracle.contrastive_step(IMAGES, TEXTS, *STATE, **options, radius=config.radius)
    factor = 1 / 0.4 if method == "fastclip-v0" else 1.0
    return step.loss * factor, step.image_gradient * factor, step.text_gradient * factor


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_the_loss_and_the_gradients_of_the_oracle(method: str, name: str) -> None:
    config, backend = _config(method), get_backend(name, dtype="float64")
    features = backend.asarray(IMAGES), backend.asarray(TEXTS)
    batch, temperature = _batch(backend, config), _temperature(backend, config)
    found = METHODS[method].objective(ObjectiveInputs(*features, batch, temperature, config, backend.xp))
    loss, *gradients = _expected(method, config)
    np.testing.assert_allclose(backend.to_numpy(found.loss), loss, rtol=1e-12)
    for gradient, expected in zip((found.image_gradient, found.text_gradient), gradients, strict=True):
        np.testing.assert_allclose(backend.to_numpy(gradient), expected, rtol=1e-10, atol=1e-13)


def _temperature(backend: Any, config: TrainConfig) -> Any:
    if config.temperature_scheme == "per_sample":
        return backend.asarray(np.full(B, 0.4)), backend.asarray(np.full(B, 0.4))
    return backend.asarray(np.asarray(config.temperature))


def _batch(backend: Any, config: TrainConfig) -> StepBatch:
    learned = config.temperature_scheme in ("global", "per_sample")
    return StepBatch(
        images=backend.asarray(IMAGES),
        texts=backend.asarray(TEXTS),
        log_inner_image=backend.asarray(STATE[0]),
        log_inner_text=backend.asarray(STATE[1]),
        reference_features=(backend.asarray(REFERENCE[0]), backend.asarray(REFERENCE[1])),
        learning_rate=0.01,
        gamma=GAMMA,
        temperature=_temperature(backend, config) if learned else None,
        pair_mask=backend.asarray(MASK),
    )


class _Features:
    """An encoder whose features are its inputs plus one parameter, so that a step needs no real encoder."""

    def encode(self, parameters: Any, images: Any, texts: Any) -> tuple[Any, Any, Callable[[Any, Any], Any]]:
        return images, texts, lambda image, text: {"shift": parameters["shift"] * 0 + image.sum() + text.sum()}


@pytest.mark.parametrize("method", ["siglip", "fastclip-v0", "distill:siglip", "distill:clip"])
def test_the_optimiser_learns_the_scale_and_the_bias_by_the_slope_of_the_loss(method: str) -> None:
    """The first update of Adam has the size of the learning rate and the sign of the slope, which is measured here."""
    config, backend = replace(_config(method), temperature_scheme="log_scale"), get_backend("numpy", dtype="float64")
    scalars = {name: np.asarray(value) for name, value in initial_scalars(config).items()}
    assert ("bias" in scalars) == method.endswith("siglip")
    assert math.exp(-scalars["log_scale"]) == pytest.approx(0.4)

    def result_at(**moved: float) -> Any:
        values = {name: value + moved.get(name, 0.0) for name, value in scalars.items()}
        batch = _batch(backend, config)._replace(bias=values.get("bias"))
        temperature = np.exp(-values["log_scale"])
        return METHODS[method].objective(ObjectiveInputs(IMAGES, TEXTS, batch, temperature, config, np))

    for name in scalars:
        up, down = (float(result_at(**{name: step}).loss) for step in (1e-6, -1e-6))
        here = result_at()
        gradient = here.bias_gradient if name == "bias" else -0.4 * here.temperature_gradient
        if method != "fastclip-v0":  # the estimates of that loss move with the temperature, its gradient holds them
            assert float(gradient) == pytest.approx((up - down) / 2e-6, rel=1e-6)
        optimizer = backend.adamw(weight_decay=0.5)
        state = initial_state(backend, optimizer, config, {"shift": np.asarray(0.0)})
        after = build_step(backend, _Features(), optimizer, config)(state, _batch(backend, config)).state  # type: ignore[arg-type]
        assert float(after.scalars[name] - scalars[name]) == pytest.approx(-0.01 * np.sign(gradient), rel=1e-4)


def test_the_gradient_of_the_unscaled_loss_holds_the_estimates() -> None:
    """With gamma 1 there is no memory, so the gradient of FastCLIP v0's temperature is the slope of its loss."""
    config = _config("fastclip-v0")
    batch = _batch(get_backend("numpy", dtype="float64"), config)._replace(gamma=1.0)
    up, here, down = (
        METHODS["fastclip-v0"].objective(ObjectiveInputs(IMAGES, TEXTS, batch, 0.4 + step, config, np))
        for step in (1e-6, 0.0, -1e-6)
    )
    assert float(here.temperature_gradient) == pytest.approx(float(up.loss - down.loss) / 2e-6, rel=1e-6)


def test_methods_differ_in_their_defaults_and_the_user_may_change_each() -> None:
    of = {method: _config(method) for method in METHODS} | {
        method: TrainConfig(data="digits", method=method, backend="numpy") for method in ("siglip", "fastclip-v2")
    }
    named = {"temperature", "bias"}
    assert {name: getattr(of["sogclr"], name) for name in DEFAULTS.keys() - named} == {
        name: value for name, value in DEFAULTS.items() if name not in named
    }
    schemes = [of[f"fastclip-v{version}"].temperature_scheme for version in range(4)]
    assert schemes == ["log_scale", "fixed", "per_sample", "global"]
    assert (of["fastclip-v3"].radius, of["fastclip-v3"].temperature_slow_below, of["fastclip-v2"].temperature) == (
        6.5, 0.03, 0.03
    )  # fmt: skip
    assert (of["siglip"].temperature, of["siglip"].temperature_scheme) == (0.1, "log_scale")
    own = TrainConfig(data="digits", method="fastclip-v3", backend="numpy", radius=2.0, gamma_min=0.9)
    assert (own.radius, own.gamma_min, own.temperature_scheme) == (2.0, 0.9, "global")
    with pytest.raises(BadInput, match="radius must be 0 for method fastclip-v0, whose loss has no radius"):
        TrainConfig(data="digits", method="fastclip-v0", backend="numpy", radius=1.0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.2] * 4), ("epoch", [1.0, 1.0, 0.6, 0.6]), ("step", [1.0, 0.883, 0.6, 0.317])],
)
def test_gamma_falls_by_epoch_or_by_step(schedule: str, expected: list[float]) -> None:
    config = TrainConfig(
        data="digits", method="fastclip-v1", backend="numpy", epochs=4, gamma_schedule=schedule, gamma_share=0.5
    )
    assert [round(config.gamma_at(step, 2), 3) for step in range(4)] == expected
    assert config.gamma_at(7, 2) == pytest.approx(0.2)


CHANGED: dict[str, Any] = {
    "anchor_weights": "reference", "gamma_min": 0.3, "gamma_schedule": "constant", "gamma_share": 0.25, "eps": 0.1,
    "reference_weight": 0.5, "log_alpha": 2.0, "super_batch": 2, "jest_chunks": 1, "bias": -3.0,
    "distillation_weight": 0.5, "reference_temperature": 0.5,
}  # fmt: skip


class _Inputs(_Features):
    """The same encoder, also for a forward pass of a super-batch."""

    def encode_images(self, _: Any, images: Any) -> Any:
        return images

    def encode_texts(self, _: Any, texts: Any) -> Any:
        return texts


def _numbers_of_a_step(config: TrainConfig) -> list[float]:
    """Return the numbers that a step in the second epoch computes from 12 pairs, of which some methods choose 6 or 4.

    The choice of 12 pairs stands for any super-batch, so the size of the batch follows from `super_batch`.
    """
    backend, method = get_backend("numpy", dtype="float64"), METHODS[config.method]
    config = replace(config, batch_size=12 // config.super_batch)
    rng = np.random.default_rng(5)
    side = lambda size: unit_rows(rng, 12, size)  # noqa: E731
    log_inner = rng.normal(size=(2, 12))
    batch = _batch(backend, config)._replace(
        images=side(D), texts=side(D), log_inner_image=log_inner[0], log_inner_text=log_inner[1],
        reference_features=(side(R), side(R)), gamma=config.gamma_at(1, 1), pair_mask=None,
        anchor_weight=np.linspace(0.1, 1.0, 12) if config.anchor_weights else None,
        gumbel=gumbel_noise(config, 0) if method.draws_noise else None,
    )  # fmt: skip
    if config.temperature_scheme == "per_sample":
        batch = batch._replace(temperature=(np.full(12, 0.4), np.full(12, 0.4)))
    optimizer = backend.adamw(weight_decay=0.0)
    state = initial_state(backend, optimizer, config, {"shift": np.asarray(0.0)})
    result = build_step(backend, _Inputs(), optimizer, config)(state, batch)  # type: ignore[arg-type]
    moments = [float(array) for _, array in sorted(result.state.optimizer.items())]
    return [float(result.loss), *moments, *map(float, (result.log_inner_image[0], result.log_inner_text[0]))]


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_changes_the_step_of_a_method_or_is_refused(method: str) -> None:
    assert set(CHANGED) == OPTIONAL
    # The table of chosen numbers is that of a run whose user has named none of these settings.
    reference = "runs/reference"
    needs = METHODS[method].needs_reference
    plain = TrainConfig(data="digits", method=method, reference=reference if needs else None, backend="numpy",
                        dtype="float64", temperature=0.4, batch_size=4)  # fmt: skip
    check_used(plain)
    selects = METHODS[method].select is not None
    settled = {"reference_temperature": 0.3} | ({"super_batch": 3} if selects else {})
    expected = _numbers_of_a_step(replace(plain, **settled))
    for name, value in CHANGED.items():
        if name == "super_batch" and not selects:
            with pytest.raises(BadInput, match="super_batch must be 1"):
                replace(plain, super_batch=value)
            continue
        options = {name: value} | ({"reference": reference} if name == "anchor_weights" else {})
        used = name in METHODS[method].settings
        changed = replace(plain, **options)
        differs = _numbers_of_a_step(replace(changed, **(settled | options))) != expected
        # The weights of anchors would change a part of the loss of distill:METHOD only, so they are refused there.
        in_part = name == "anchor_weights" and method.startswith("distill:")
        assert differs == used or in_part, name
        if used:
            check_used(changed)
        else:
            with pytest.raises(BadInput, match=f"{name} must be left out for method {method}, which does not use it"):
                check_used(changed)


@pytest.mark.parametrize("scheme", ["fixed", "global", "per_sample", "log_scale"])
def test_a_setting_of_another_temperature_scheme_is_refused_for_a_new_run(scheme: str) -> None:
    radius = 0.0 if scheme == "fixed" else 1.0
    plain = TrainConfig(data="digits", method="sogclr", backend="numpy", temperature_scheme=scheme, radius=radius)
    check_used(plain)
    used_by = {
        "temperature_learning_rate": ("global", "per_sample"),
        "temperature_min": ("global", "per_sample", "log_scale"),
        "temperature_max": ("global", "per_sample", "log_scale"),
        "temperature_slow_below": ("global",),
    }
    for name, schemes in used_by.items():
        # The settings themselves are valid, so that a run of an earlier version can be read.
        changed = replace(plain, **{name: 0.05 if name != "temperature_max" else 0.5})
        if scheme in schemes:
            check_used(changed)
        else:
            with pytest.raises(BadInput, match=f"{name} must be left out for temperature_scheme {scheme}, which does"):
                check_used(changed)
