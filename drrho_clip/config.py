"""What one training run is: every number that decides its result, checked when it is built, kept as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from drrho_clip.errors import BadInput

METHODS = ("clip", "sogclr", "drrho")

TEMPERATURE_SCHEMES = ("fixed", "global", "per_sample")

BUILT_IN_DATA = ("scenes", "scenes:reference", "digits", "digits:reference")
"""Data sets by name; ``:reference`` is the part that a reference model is trained on, disjoint from the learner's."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    Parameters
    ----------
    data : str
        One of `BUILT_IN_DATA`, or the path of a CSV or TSV file with image paths and captions.
    method : {"clip", "sogclr", "drrho"}
        The objective: InfoNCE, the global contrastive loss, or that with a reference model.
    reference : str or None
        Folder of the reference model's run; drrho needs one, the others refuse one.
    seed : int
        Seed of the initial parameters and of the batch order.
    data_seed : int
        Seed of rendered scenes, of swapped captions and of splits.
    train_size : int
        Number of rendered scenes to train on; other data have their own size.
    swapped_fraction : float
        Share of training captions that are exchanged, in [0, 1]; ignored for a CSV.
    epochs, batch_size : int
        Passes over the data; pairs per step, >= 2. The last short batch of an epoch is dropped.
    learning_rate : float
        Peak of a linear warm-up followed by a cosine to 0.
    warmup_steps : int
        Steps of the warm-up.
    weight_decay : float
        AdamW's, on parameters with two or more axes.
    temperature : float
        tau > 0, where it starts; within the bounds where it is learned.
    temperature_scheme : {"fixed", "global", "per_sample"}
        Constant; learned, one for all (RGCL-g; InfoNCE's own gradient for clip); learned, one per sample and direction
        (RGCL, iSogCLR), which clip has not.
    temperature_learning_rate : float
        Of a learned temperature, constant, >= 0: Adam's, or per unit of slope and visit for one per sample.
    temperature_min, temperature_max : float
        Bounds of a learned temperature, 0 < temperature_min <= temperature_max.
    radius : float
        Size of the ball that a learned temperature stands for: > 0 where sogclr or drrho learn one, else 0.
    gamma_min : float
        Where the cosine schedule of gamma ends, in (0, 1]; 1 has no memory.
    reference_weight : float
        lambda >= 0 of drrho.
    eps : float
        Added to the inner estimate, >= 0.
    architecture : {"mlp", "conv"}
        The encoders, see `drrho_clip.architecture`.
    image_size, feature_dim, width, depth : int
        Their sizes.
    backend, dtype : str
        Array library and floating dtype of the run.
    checkpoint_every : int
        Steps between checkpoints; one more is written after every epoch.
    log_every : int
        Steps between lines of metrics.jsonl.

    Raises
    ------
    BadInput
        If a value breaks its rule, or method and reference do not fit together.
    """

    data: str
    method: str = "drrho"
    reference: str | None = None
    seed: int = 0
    data_seed: int = 0
    train_size: int = 20_000
    swapped_fraction: float = 0.3
    epochs: int = 8
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    temperature: float = 0.07
    temperature_scheme: str = "fixed"
    temperature_learning_rate: float = 1e-4
    temperature_min: float = 0.01
    temperature_max: float = 1.0
    radius: float = 0.0
    gamma_min: float = 0.5
    reference_weight: float = 1.0
    eps: float = 0.0
    architecture: str = "conv"
    image_size: int = 32
    feature_dim: int = 64
    width: int = 32
    depth: int = 2
    backend: str = "torch"
    dtype: str = "float32"
    checkpoint_every: int = 200
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadInput(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method == "drrho" and self.reference is None:
            raise BadInput("reference must be the folder of a reference run for method drrho, got none")
        if self.method != "drrho" and self.reference is not None:
            raise BadInput(f"reference must be left out for method {self.method}, got {self.reference!r}")
        for name, minimum in _INTEGERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise BadInput(f"{name} must be an integer of at least {minimum}, got {value!r}")
        for name, (low, high, rule) in _NUMBERS.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low <= value <= high or (rule.startswith("> 0") and value == 0):
                raise BadInput(f"{name} must be {rule}, got {value!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise BadInput(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self._check_temperature()

    def _check_temperature(self) -> None:
        """Raise BadInput where temperature, bounds, radius, scheme and method do not fit together."""
        scheme, low, high = self.temperature_scheme, self.temperature_min, self.temperature_max
        if high < low:
            raise BadInput(f"temperature_max must be at least temperature_min ({low}), got {high}")
        if scheme == "per_sample" and self.method == "clip":
            raise BadInput("temperature_scheme must be fixed or global for method clip, got 'per_sample'")
        if scheme != "fixed" and not low <= self.temperature <= high:
            raise BadInput(f"temperature must be in [{low}, {high}] where it is learned, got {self.temperature}")
        if scheme == "fixed" and self.radius != 0:
            raise BadInput(f"radius must be 0 where the temperature is fixed, got {self.radius}")
        if scheme != "fixed" and self.method == "clip" and self.radius != 0:
            raise BadInput(f"radius must be 0 for method clip, whose loss has none, got {self.radius}")
        if scheme != "fixed" and self.method != "clip" and self.radius == 0:
            raise BadInput(
                f"radius must be > 0 where {self.method} learns the temperature, because it only rises at 0, "
                f"got {self.radius}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return all settings as a dictionary of numbers, strings and None."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build settings from what `to_json` returned, now or before there were learned temperatures.

        Settings that came later take their defaults, which are what every run did before.

        Raises
        ------
        BadInput
            If a setting is unknown, missing or bad.
        """
        known = {field.name for field in fields(cls)}
        odd = sorted((known - set(values) - _LATER) | (set(values) - known))
        if odd:
            raise BadInput(f"the settings of a run must be those of this version, got a difference in {', '.join(odd)}")
        return cls(**values)

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Return the learning rate of a step (counted from 0): linear warm-up, then half a cosine to 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


_INTEGERS = {
    "seed": 0,
    "data_seed": 0,
    "train_size": 2,
    "epochs": 1,
    "batch_size": 2,
    "warmup_steps": 0,
    "image_size": 1,
    "feature_dim": 1,
    "width": 1,
    "depth": 1,
    "checkpoint_every": 1,
    "log_every": 1,
}

_NUMBERS = {
    "swapped_fraction": (0.0, 1.0, "in [0, 1]"),
    "learning_rate": (0.0, math.inf, "> 0"),
    "weight_decay": (0.0, math.inf, ">= 0"),
    "temperature": (0.0, math.inf, "> 0"),
    "temperature_learning_rate": (0.0, math.inf, ">= 0"),
    "temperature_min": (0.0, math.inf, "> 0"),
    "temperature_max": (0.0, math.inf, "> 0"),
    "radius": (0.0, math.inf, ">= 0"),
    "gamma_min": (0.0, 1.0, "> 0 and at most 1"),
    "reference_weight": (0.0, math.inf, ">= 0"),
    "eps": (0.0, math.inf, ">= 0"),
}

_CHOICES = {
    "temperature_scheme": TEMPERATURE_SCHEMES,
    "architecture": ("mlp", "conv"),
    "dtype": ("float32", "float64"),
}

_LATER = {"temperature_scheme", "temperature_learning_rate", "temperature_min", "temperature_max", "radius"}
"""Settings that runs of earlier versions do not name."""

_PRESETS: dict[str, dict[str, Any]] = {
    "scenes": {"image_size": 32},
    "digits": {"image_size": 8, "batch_size": 128, "epochs": 60, "warmup_steps": 20, "architecture": "mlp"},
    "pairs": {"image_size": 64, "epochs": 30},
}


def preset(data: str, backend: str) -> dict[str, Any]:
    """Return the settings that suit a data set and a backend where the user names none."""
    family = data.partition(":")[0] if data in BUILT_IN_DATA else "pairs"
    chosen = dict(_PRESETS[family])
    if backend in ("numpy", "cupy"):
        chosen["architecture"] = "mlp"  # their gradients are written by hand
    return chosen
