from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from drrho_clip.errors import BadInput
from drrho_clip.models import ModelSpec, initial_parameters, parameter_shapes

MLP = ModelSpec("mlp", image_size=8, channels=1, vocabulary_size=20, context_length=6, width=16)
CONV = ModelSpec("conv", image_size=12, channels=3, vocabulary_size=20, context_length=6, width=16)


@pytest.mark.parametrize("spec", [MLP, CONV], ids=lambda spec: spec.architecture)
def test_parameters_have_their_shapes_and_depend_on_the_seed_alone(spec: ModelSpec) -> None:
    first = initial_parameters(spec, seed=3)
    again = initial_parameters(spec, seed=3)
    other = initial_parameters(spec, seed=4)
    assert {name: values.shape for name, values in first.items()} == parameter_shapes(spec)
    assert all(values.dtype == np.float64 for values in first.values())
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["image/projection/kernel"], other["image/projection/kernel"])


def test_conv_parameters_have_the_documented_shapes() -> None:
    shapes = parameter_shapes(CONV)
    assert shapes["image/conv0/kernel"] == (16, 3, 3, 3)
    assert shapes["image/conv2/kernel"] == (64, 32, 3, 3)
    assert shapes["image/projection/kernel"] == (2 * 2 * 64, 64)  # sides 12, 6, 3, 2
    assert shapes["text/tokens"] == (20, 32)
    assert shapes["text/block1/attention/query_key_value/kernel"] == (32, 96)
    assert not any(name.startswith("text/block2") for name in shapes)


def test_kernels_start_at_the_size_that_keeps_activations_alive() -> None:
    wide = initial_parameters(replace(CONV, width=64), seed=0)
    for name, inputs, variance in [
        ("image/conv1/kernel", 9 * 64, 2.0),
        ("image/projection/kernel", 4 * 256, 1.0),
        ("text/block0/feed_forward/hidden/kernel", 128, 2.0),
        ("text/block0/attention/output/kernel", 128, 1 / 4),
    ]:
        # n normal numbers: their variance is off by sqrt(2 / n), five deviations are allowed
        allowed = 5 * math.sqrt(2 / wide[name].size)
        assert np.var(wide[name]) * inputs / variance == pytest.approx(1.0, abs=allowed), name
    assert np.all(wide["text/norm/scale"] == 1.0)
    assert np.all(wide["text/norm/bias"] == 0.0)
    assert np.all(wide["image/projection/bias"] != 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vit"}, "architecture must be one of 'mlp', 'conv', 'hf', 'heads', got 'vit'"),
        ({"width": 0}, "width must be an integer of at least 1, got 0"),
        ({"feature_dim": 2.0}, r"feature_dim must be an integer of at least 1, got 2\.0"),
        ({"depth": True}, "depth must be an integer of at least 1, got True"),
        ({"vocabulary_size": 1}, "vocabulary_size must be an integer of at least 2, got 1"),
        ({"heads": 5}, r"heads must divide 2 \* width = 32, got 5"),
    ],
)
def test_a_bad_spec_names_field_rule_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=f"^{message}$"):
        replace(CONV, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0"])
def test_a_bad_seed_is_refused(seed: object) -> None:
    with pytest.raises(BadInput, match=r"^seed must be an integer of at least 0, got "):
        initial_parameters(MLP, seed=seed)  # type: ignore[arg-type]


def test_a_spec_survives_json_and_unknown_fields_are_refused() -> None:
    values = json.loads(json.dumps(CONV.to_json()))
    assert ModelSpec.from_json(values) == CONV
    with pytest.raises(BadInput, match=r"^a model must have the fields architecture, .* got \['architecture', "):
        ModelSpec.from_json({**values, "kernel": 3})
    del values["depth"]
    with pytest.raises(BadInput, match=r"^a model must have the fields "):
        ModelSpec.from_json(values)


def test_inputs_of_another_shape_are_refused() -> None:
    MLP.check_images(np.zeros((2, 8, 8, 1)))
    MLP.check_texts(np.zeros((2, 20)))
    CONV.check_texts(np.zeros((2, 4), dtype=np.int32))
    with pytest.raises(ValueError, match=r"^images must have shape \(b, 8, 8, 1\), got \(2, 1, 8, 8\)$"):
        MLP.check_images(np.zeros((2, 1, 8, 8)))
    with pytest.raises(ValueError, match=r"^images must have shape \(b, 8, 8, 1\), got \(8, 8, 1\)$"):
        MLP.check_images(np.zeros((8, 8, 1)))
    with pytest.raises(ValueError, match=r"^texts must have shape \(b, 20\), got \(2, 6\)$"):
        MLP.check_texts(np.zeros((2, 6)))
    with pytest.raises(ValueError, match=r"^texts must have shape \(b, at most 6\), got \(2, 20\)$"):
        CONV.check_texts(np.zeros((2, 20)))
    with pytest.raises(ValueError, match=r"^texts must have shape \(b, at most 6\), got \(6,\)$"):
        CONV.check_texts(np.zeros(6))
