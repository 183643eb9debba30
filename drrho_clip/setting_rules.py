"""The rules that hold for several settings together; `TrainConfig` holds the rule of each single setting."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from drrho_clip.constants import FULL
from drrho_clip.errors import BadInput
from drrho_clip.methods import DEFAULTS, LOG_SCALE, METHODS, OPTIONAL
from drrho_core.state.temperatures import SCHEMES

if TYPE_CHECKING:
    from drrho_clip.config import TrainConfig

_LEARNED = frozenset({*SCHEMES, LOG_SCALE}) - {"fixed"}
# The temperature schemes that use a setting; `log_scale` learns the temperature with the optimiser of the parameters.
_OF_SCHEMES = {
    "temperature_learning_rate": _LEARNED - {LOG_SCALE},
    "temperature_min": _LEARNED,
    "temperature_max": _LEARNED,
    "temperature_slow_below": frozenset({"global"}),
}


def check_together(config: TrainConfig) -> None:
    """Raise BadInput if the values of several settings contradict each other; each value obeys its own rule already."""
    _check_reference(config)
    _check_model(config)
    _check_temperature(config)
    _check_step(config)


def ignored_settings(method: str | None, scheme: str | None) -> frozenset[str]:
    """Return the settings that a method or a temperature scheme ignores; nothing is ignored for an unknown name."""
    of_method = frozenset() if method not in METHODS else OPTIONAL - METHODS[method].settings
    known = scheme in {*SCHEMES, LOG_SCALE}
    return of_method | {name for name, schemes in _OF_SCHEMES.items() if known and scheme not in schemes}


def dropped_of_preset(method: str | None, scheme: str | None) -> frozenset[str]:
    """Return the settings of a preset that another method or temperature scheme does not use."""
    # A radius is no ignored setting: a user who names a radius for such a run gets the rule of `_check_temperature`.
    no_radius = scheme == "fixed" or (method in METHODS and not METHODS[method].has_radius)
    return ignored_settings(method, scheme) | (frozenset({"radius"}) if no_radius else frozenset())


def check_used(config: TrainConfig) -> None:
    """Raise BadInput if a setting that the method or the temperature scheme ignores has another value than its default.

    Only a new run is checked in this way: a run of an earlier version may have such a value, and can still be read.
    """
    method = METHODS[config.method]
    defaults = {option.name: option.default for option in fields(config)} | DEFAULTS | dict(method.defaults)
    for name in sorted(ignored_settings(config.method, config.temperature_scheme)):
        value = getattr(config, name)
        if value != defaults[name]:
            of_method = name in ignored_settings(config.method, None)
            owner = f"method {config.method}" if of_method else f"temperature_scheme {config.temperature_scheme}"
            raise BadInput(f"{name} must be left out for {owner}, which does not use it, got {value!r}")


def _check_reference(config: TrainConfig) -> None:
    """Raise BadInput unless method, reference and the settings that use a reference fit together."""
    uses = [f"method {config.method}"] if METHODS[config.method].needs_reference else []
    uses += [name for name in ("drop_suspects", "anchor_weights") if getattr(config, name) is not None]
    if uses and config.reference is None:
        raise BadInput(f"reference must be the folder of a reference run for {uses[0]}, got none")
    if not uses and config.reference is not None:
        raise BadInput(
            f"reference must be left out for method {config.method} without drop_suspects and anchor_weights, got "
            f"{config.reference!r}"
        )
    if config.init_estimates is not None and not METHODS[config.method].keeps_estimates:
        raise BadInput(
            f"init_estimates must be left out for method {config.method}, which keeps no estimates, got "
            f"{config.init_estimates!r}"
        )
    if config.as_reference and config.reference is not None:
        raise BadInput("as_reference must be off for a run that has a reference itself, got as_reference on")


def _check_model(config: TrainConfig) -> None:
    """Raise BadInput unless the settings that name the start of the training fit together."""
    if config.model is not None and config.init is not None:
        raise BadInput(f"init must be left out with model, got {config.init!r}")
    heads = config.model is not None and config.model.startswith("features:")
    if config.depth == 0 and not heads:
        raise BadInput("depth must be an integer of at least 1 without model features:CACHE, got 0")
    if config.augment is not None and heads:
        raise BadInput(f"augment must be left out with model features:CACHE, got {config.augment!r}")
    if config.from_scratch and config.model is None:
        raise BadInput("from_scratch must be off without model, got from_scratch on")


def _check_temperature(config: TrainConfig) -> None:
    """Raise BadInput unless temperature, bounds, radius, scheme and method fit together."""
    scheme, low, high = config.temperature_scheme, config.temperature_min, config.temperature_max
    method = METHODS[config.method]
    if high < low:
        raise BadInput(f"temperature_max must be at least temperature_min ({low}), got {high}")
    if scheme == "per_sample" and not (method.keeps_estimates and method.has_radius):
        raise BadInput(
            f"temperature_scheme must be fixed, global or {LOG_SCALE} for method {config.method}, got 'per_sample'"
        )
    # A learned temperature is the dual variable of a worst case over a set of size `radius`; see docs/theory.
    if scheme == "fixed":
        if config.radius != 0:
            raise BadInput(f"radius must be 0 if the temperature is fixed, got {config.radius}")
        return
    if not low <= config.temperature <= high:
        raise BadInput(f"temperature must be in [{low}, {high}] if it is learned, got {config.temperature}")
    if not method.has_radius and config.radius != 0:
        raise BadInput(f"radius must be 0 for method {config.method}, whose loss has no radius, got {config.radius}")
    if method.has_radius and config.radius == 0:
        raise BadInput(
            f"radius must be > 0 if {config.method} learns the temperature, because at 0 the temperature only rises, "
            f"got {config.radius}"
        )


def _check_step(config: TrainConfig) -> None:
    """Raise BadInput unless selection and precision fit the method and the dtype."""
    selects = METHODS[config.method].select is not None
    if selects != (config.super_batch > 1):
        rule = "at least 2" if selects else "1"
        raise BadInput(f"super_batch must be {rule} for method {config.method}, got {config.super_batch}")
    if config.precision != FULL and config.dtype != FULL:
        raise BadInput(f"precision must be {FULL} if dtype is {config.dtype}, got {config.precision!r}")
