"""Every bad input of the step: one error that names argument, rule and received value, before anything is computed."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as torch_namespace
import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from drrho_core import contrastive_step
from helpers import problems

B, D, R = 5, 4, 3
DEVICE1 = array_api_strict.Device("device1")
NAN, INF = np.nan, np.inf


def good() -> dict[str, Any]:
    """Arguments of a step by name, the positional ones by "0" to "3"."""
    p = problems.draw(61, b=B, d=D, r=R, mask="random")
    return {**dict(zip("0123", p.arrays, strict=True)), **p.options}


def step(arguments: dict[str, Any]) -> Any:
    return contrastive_step(
        *(arguments[name] for name in "0123"), **{name: x for name, x in arguments.items() if name not in "0123"}
    )


def with_value(value: float, *shape: int, dtype: Any = "f8") -> np.ndarray:
    array = np.ones(shape, dtype=dtype)
    array[-1] = value
    return array


ONES = np.ones(B)
REFERENCE = np.ones((B, R))

BAD = {
    # shapes
    "features of one axis": (
        {"0": ONES},
        ValueError,
        r"image_features must have 2 axes \(batch_size, feature_dim\), got shape \(5,\)",
    ),
    "features of three axes": (
        {"1": np.ones((B, D, 1))},
        ValueError,
        r"text_features must have 2 axes .*, got shape \(5, 4, 1\)",
    ),
    "another number of texts": (
        {"1": np.ones((4, D))},
        ValueError,
        r"text_features must have shape \(batch_size, feature_dim\) = \(5, 4\), got \(4, 4\)",
    ),
    "another width": ({"1": np.ones((B, 3))}, ValueError, r"text_features must have shape .* = \(5, 4\), got \(5, 3\)"),
    "one pair": (
        {"0": np.ones((1, D)), "1": np.ones((1, D))},
        ValueError,
        "image_features must hold at least 2 pairs, .*, got 1",
    ),
    "no pair": (
        {"0": np.ones((0, D)), "1": np.ones((0, D))},
        ValueError,
        "image_features must hold at least 2 pairs, .*, got 0",
    ),
    "state too long": (
        {"2": np.zeros(6)},
        ValueError,
        r"log_inner_image must have shape \(batch_size,\) = \(5,\), got \(6,\)",
    ),
    "state of two axes": (
        {"3": np.zeros((B, 1))},
        ValueError,
        r"log_inner_text must have shape .* = \(5,\), got \(5, 1\)",
    ),
    "reference rows": (
        {"reference_features": (np.ones((4, R)),) * 2},
        ValueError,
        r"reference_features\[0\] must have shape .* = \(5, 3\), got \(4, 3\)",
    ),
    "reference widths": (
        {"reference_features": (REFERENCE, np.ones((B, 2)))},
        ValueError,
        r"reference_features\[1\] must have shape .* = \(5, 3\), got \(5, 2\)",
    ),
    "reference of one axis": (
        {"reference_features": (ONES, ONES)},
        ValueError,
        r"reference_features\[0\] must have 2 axes",
    ),
    "mask of one axis": ({"pair_mask": ONES > 0}, ValueError, r"pair_mask must have shape .* = \(5, 5\), got \(5,\)"),
    "mask of another size": (
        {"pair_mask": np.ones((4, 5), dtype=bool)},
        ValueError,
        r"pair_mask must have shape .* = \(5, 5\), got \(4, 5\)",
    ),
    # kinds
    "list of features": ({"0": [[1.0] * D] * B}, TypeError, "image_features must be an array, got list"),
    "number of features": ({"1": 1.0}, TypeError, "text_features must be an array, got float"),
    "list of states": ({"2": [0.0] * B}, TypeError, "log_inner_image must be an array, got list"),
    "no state": ({"3": None}, TypeError, "log_inner_text must be an array, got NoneType"),
    "reference is one array": (
        {"reference_features": np.ones((2, B, R))},
        TypeError,
        r"reference_features must be a pair \(image, text\) of arrays, got ndarray of shape \(2, 5, 3\)",
    ),
    "reference of one": (
        {"reference_features": (REFERENCE,)},
        TypeError,
        r"reference_features must be a pair \(image, text\) of arrays, got \(",
    ),
    "reference of three": ({"reference_features": (REFERENCE,) * 3}, TypeError, "reference_features must be a pair"),
    "reference of lists": (
        {"reference_features": ([[1.0]] * B, REFERENCE)},
        TypeError,
        r"reference_features\[0\] must be an array, got list",
    ),
    "mask of lists": ({"pair_mask": [[True] * B] * B}, TypeError, "pair_mask must be an array, got list"),
    # dtypes
    "integer features": (
        {"0": np.ones((B, D), dtype=int)},
        TypeError,
        "image_features must have a real floating dtype, got int64",
    ),
    "complex features": (
        {"1": np.ones((B, D), dtype=complex)},
        TypeError,
        "text_features must have a real floating dtype, got complex128",
    ),
    "two dtypes": (
        {"1": np.ones((B, D), dtype="f4")},
        TypeError,
        r"text_features must have the dtype of image_features \(float64\), got float32",
    ),
    "reference dtype": (
        {"reference_features": (REFERENCE, np.ones((B, R), dtype="f4"))},
        TypeError,
        r"reference_features\[1\] must have the dtype of reference_features\[0\] \(float64\), got float32",
    ),
    "half state": ({"2": np.zeros(B, dtype="f2")}, TypeError, "log_inner_image must be float32 or wider, got float16"),
    "integer state": (
        {"3": np.zeros(B, dtype=int)},
        TypeError,
        "log_inner_text must have a real floating dtype, got int64",
    ),
    "mask of numbers": ({"pair_mask": np.ones((B, B))}, TypeError, "pair_mask must have dtype bool, got float64"),
    "mask of integers": (
        {"pair_mask": np.ones((B, B), dtype=np.uint8)},
        TypeError,
        "pair_mask must have dtype bool, got uint8",
    ),
    "boolean temperature array": (
        {"temperature": np.asarray(True)},
        TypeError,
        "temperature must have a real floating dtype, got bool",
    ),
    # values
    "nan feature": (
        {"0": with_value(NAN, B, D)},
        ValueError,
        r"image_features must be finite, got nan at position \(4, 0\)",
    ),
    "infinite feature": (
        {"1": with_value(INF, B, D)},
        ValueError,
        r"text_features must be finite, got inf at position \(4, 0\)",
    ),
    "nan in the reference": (
        {"reference_features": (REFERENCE, with_value(NAN, B, R))},
        ValueError,
        r"reference_features\[1\] must be finite, got nan at position \(4, 0\)",
    ),
    "nan state": (
        {"2": with_value(NAN, B)},
        ValueError,
        "log_inner_image must be finite, or -inf for a sample that was never visited, got nan at position 4",
    ),
    "infinite state": (
        {"3": with_value(INF, B)},
        ValueError,
        "log_inner_text must be finite, or -inf for a sample that was never visited, got inf at position 4",
    ),
    # temperature
    "temperature 0": ({"temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
    "negative temperature": ({"temperature": np.asarray(-0.5)}, ValueError, r"temperature must be > 0, got -0\.5"),
    "nan temperature": ({"temperature": NAN}, ValueError, "temperature must be finite, got nan"),
    "infinite temperature": ({"temperature": INF}, ValueError, "temperature must be finite, got inf"),
    "nan temperature array": ({"temperature": np.asarray(NAN)}, ValueError, "temperature must be > 0, got nan"),
    "boolean temperature": ({"temperature": True}, TypeError, "temperature must be a real number, got True"),
    "a word for a temperature": ({"temperature": "warm"}, TypeError, "temperature must be a real number, got 'warm'"),
    "no temperature": ({"temperature": None}, TypeError, "temperature must be a real number, got None"),
    "one array of temperatures": (
        {"temperature": ONES},
        ValueError,
        r"temperature must be a scalar or a pair of arrays, one value per anchor, got ndarray of shape \(5,\)",
    ),
    "pair of one": (
        {"temperature": (ONES,)},
        ValueError,
        r"temperature must be a scalar or a pair \(image, text anchors\), got 1 entries",
    ),
    "pair of numbers": (
        {"temperature": (0.1, 0.2)},
        TypeError,
        r"temperature\[0\] must be an array of shape \(batch_size,\), got 0\.1",
    ),
    "short temperatures": (
        {"temperature": (ONES, np.ones(4))},
        ValueError,
        r"temperature\[1\] must have shape \(batch_size,\) = \(5,\), got \(4,\)",
    ),
    "a temperature of 0 among others": (
        {"temperature": (ONES, with_value(0.0, B))},
        ValueError,
        r"temperature\[1\] must be > 0, got 0\.0 at position 4",
    ),
    # gamma
    "gamma 0": ({"gamma": 0}, ValueError, r"gamma must be in \(0, 1\], got 0"),
    "gamma above 1": ({"gamma": 1.5}, ValueError, r"gamma must be in \(0, 1\], got 1\.5"),
    "nan gamma": ({"gamma": np.asarray(NAN)}, ValueError, r"gamma must be in \(0, 1\], got nan"),
    "boolean gamma": ({"gamma": True}, TypeError, "gamma must be a real number, got True"),
    "gamma of three": ({"gamma": (ONES, ONES, ONES)}, ValueError, "gamma must be a scalar or a pair .*, got 3 entries"),
    "a gamma of 2 among others": (
        {"gamma": (with_value(2.0, B), ONES)},
        ValueError,
        r"gamma\[0\] must be in \(0, 1\], got 2\.0 at position 4",
    ),
    # the others take no pair
    "negative reference_weight": ({"reference_weight": -0.1}, ValueError, r"reference_weight must be >= 0, got -0\.1"),
    "reference_weight pair": (
        {"reference_weight": (ONES, ONES)},
        TypeError,
        "reference_weight must be a real number, got ",
    ),
    "reference_weight array": (
        {"reference_weight": ONES},
        ValueError,
        r"reference_weight must be a scalar, got ndarray of shape \(5,\)",
    ),
    "negative radius": ({"radius": np.asarray(-1.0)}, ValueError, r"radius must be >= 0, got -1\.0"),
    "infinite radius": ({"radius": INF}, ValueError, "radius must be finite, got inf"),
    "radius pair": ({"radius": [ONES, ONES]}, TypeError, "radius must be a real number, got "),
    "negative eps": ({"eps": -1e-9}, ValueError, "eps must be >= 0, got -1e-09"),
    "eps pair": ({"eps": (ONES, ONES)}, TypeError, "eps must be a real number, got "),
    "eps of a word": ({"eps": "0"}, TypeError, "eps must be a real number, got '0'"),
    # how it is computed
    "tile_size 0": ({"tile_size": 0}, ValueError, "tile_size must be at least 1, got 0"),
    "fractional tile_size": ({"tile_size": 1.5}, TypeError, r"tile_size must be an integer, got 1\.5"),
    "negative memory_budget": ({"memory_budget": -1}, ValueError, "memory_budget must be at least 0, got -1"),
    # namespaces
    "xp is no namespace": ({"xp": "numpy"}, TypeError, "xp must be an Array API namespace such as .*, got 'numpy'"),
    "xp of the bare torch": (
        {"xp": torch},
        TypeError,
        "xp must be an Array API namespace such as .*, got <module 'torch'",
    ),
    "xp of another library": (
        {"xp": torch_namespace},
        TypeError,
        r"xp must be the namespace of image_features \(numpy\), got torch",
    ),
    "torch among numpy": (
        {"1": torch.ones(B, D)},
        TypeError,
        r"text_features must come from the library of image_features \(numpy\), got an array of torch",
    ),
    "jax among numpy": (
        {"3": jnp.zeros(B)},
        TypeError,
        r"log_inner_text must come from the library of image_features \(numpy\), got an array of jax\.numpy",
    ),
    "torch temperature": (
        {"temperature": torch.tensor(0.1)},
        TypeError,
        r"temperature must come from the library of image_features \(numpy\)",
    ),
    "torch gamma": (
        {"gamma": (ONES, torch.ones(B))},
        TypeError,
        r"gamma\[1\] must come from the library of image_features \(numpy\)",
    ),
    "torch reference": (
        {"reference_features": (REFERENCE, torch.ones(B, R))},
        TypeError,
        r"reference_features\[1\] must come from the library",
    ),
    "torch mask": (
        {"pair_mask": torch.ones(B, B) > 0},
        TypeError,
        "pair_mask must come from the library of image_features",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    change, error, message = BAD[case]
    arguments = good()
    step(arguments)
    with pytest.raises(error, match=f"^{message}"):
        step({**arguments, **change})


@pytest.mark.parametrize(
    "case", [name for name in BAD if not any(key in BAD[name][0] for key in ("xp", "0", "1", "3"))]
)
def test_nothing_is_written_before_an_error(case: str) -> None:
    arguments = {**good(), **BAD[case][0]}
    before = {name: np.array(value, copy=True) for name, value in arguments.items() if isinstance(value, np.ndarray)}
    with pytest.raises(BAD[case][1]):
        step(arguments)
    for name, value in before.items():
        assert np.array_equal(arguments[name], value, equal_nan=value.dtype.kind == "f")


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="tau"):
        step({**good(), "tau": 0.1})
    with pytest.raises(TypeError, match="temperature"):
        contrastive_step(*(good()[name] for name in "0123"))  # type: ignore[call-arg]


ARRAYS = (
    "0",
    "1",
    "2",
    "3",
    "temperature",
    "gamma",
    "reference_weight",
    "radius",
    "eps",
    "pair_mask",
    "reference_features",
)
NAMES = dict(zip("0123", ("image_features", "text_features", "log_inner_image", "log_inner_text"), strict=True))


def carried(convert: Any, forms: Any) -> dict[str, Any]:
    arguments = good()
    arguments |= {name: np.asarray(arguments[name]) for name in ("reference_weight", "radius", "eps")}
    if forms == "pairs":
        arguments |= {"temperature": (ONES, ONES), "gamma": (ONES, ONES)}
    else:
        arguments |= {name: np.asarray(arguments[name]) for name in ("temperature", "gamma")}
    return {
        name: tuple(map(convert, value)) if isinstance(value, tuple) else convert(value)
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("name", ARRAYS[1:])
@pytest.mark.parametrize("forms", ["scalars", "pairs"])
def test_mixed_devices_are_refused(name: str, forms: str) -> None:
    arguments = carried(array_api_strict.asarray, forms)
    step(arguments)
    value = arguments[name]
    if isinstance(value, tuple):
        moved, label = (value[0], value[1].to_device(DEVICE1)), f"{name}[1]"
    else:
        moved, label = value.to_device(DEVICE1), NAMES.get(name, name)
    with pytest.raises(
        ValueError, match=r"must be on the device of image_features \(.*CPU_DEVICE.*\), got .*device1"
    ) as error:
        step({**arguments, name: moved})
    assert str(error.value).startswith(f"{label} must")


@pytest.mark.parametrize("name", [name for name in ARRAYS if name != "pair_mask"])
@pytest.mark.parametrize("forms", ["scalars", "pairs"])
def test_what_asks_for_autograd_is_refused(name: str, forms: str) -> None:
    arguments = carried(torch.asarray, forms)
    step(arguments)
    value = arguments[name]
    asking = (
        (value[0], value[1].clone().requires_grad_()) if isinstance(value, tuple) else value.clone().requires_grad_()
    )
    label = f"{name}[1]" if isinstance(value, tuple) else NAMES.get(name, name)
    with pytest.raises(ValueError, match=r"must not require gradients, .*detach .*, or use drrho_torch") as error:
        step({**arguments, name: asking})
    assert str(error.value).startswith(f"{label} must")


def test_values_are_not_looked_at_on_a_device() -> None:
    arguments = carried(lambda x: array_api_strict.asarray(x, device=DEVICE1), "scalars")
    broken = array_api_strict.asarray(with_value(NAN, B, D), device=DEVICE1)
    with np.errstate(invalid="ignore"):  # a real device does not warn
        loss = step({**arguments, "0": broken}).loss
    assert np.isnan(float(loss.to_device(array_api_strict.Device("CPU_DEVICE"))))
