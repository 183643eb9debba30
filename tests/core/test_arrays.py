"""Namespaces, devices and dtypes of arrays of any library."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as numpy_namespace
import array_api_compat.torch as torch_namespace
import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from drrho_core import _array_api


class Pretender:
    """Looks like an array and is of no library."""

    dtype, shape, ndim = np.float64, (3,), 1


def test_is_array_accepts_arrays_and_no_numbers(eager_space: Any) -> None:
    assert _array_api.is_array(eager_space.asarray(np.zeros(3)))
    assert _array_api.is_array(eager_space.asarray(np.zeros((2, 3))))
    for other in (1, 1.5, True, np.float32(1.5), np.int64(3), [1.0], (1.0,), "a", None, np.float64, object()):
        assert not _array_api.is_array(other)


def test_arrays_of_one_library_share_a_namespace(eager_space: Any) -> None:
    x = eager_space.asarray(np.zeros(3))
    assert _array_api.namespace_of({"x": x, "y": x}) is eager_space.xp
    assert _array_api.namespace_of({"x": x}, eager_space.xp) is eager_space.xp


def test_xp_may_be_the_bare_library_if_it_follows_the_standard() -> None:
    assert _array_api.namespace_of({"x": np.zeros(1)}, np) is np


@pytest.mark.parametrize(
    ("arrays", "xp", "message"),
    [
        ({"x": [1.0]}, None, "x must be an array, got list"),
        ({"x": 1.0}, None, "x must be an array, got float"),
        ({"x": np.float64(1.0)}, None, "x must be an array, got float64"),
        ({"x": Pretender()}, None, "x must be an array of a supported library, got Pretender"),
        ({"x": np.zeros(1), "y": None}, None, "y must be an array, got NoneType"),
        ({"x": np.zeros(1), "y": torch.zeros(1)}, None, r"y must come from the library of x \(numpy\), got .*torch"),
        ({"x": jnp.zeros(1), "y": np.zeros(1)}, None, r"y must come from the library of x \(jax\.numpy\), got"),
        ({"x": np.zeros(1)}, torch_namespace, r"xp must be the namespace of x \(numpy\), got torch"),
        ({"x": torch.zeros(1)}, np, r"xp must be the namespace of x \(torch\), got numpy"),
        ({"x": torch.zeros(1)}, torch, "xp must be an Array API namespace such as .*, got <module 'torch'"),
        ({"x": np.zeros(1)}, "numpy", "xp must be an Array API namespace such as .*, got 'numpy'"),
        ({"x": np.zeros(1), "y": torch.zeros(1)}, np, "y must come from the library of x"),
        # The one that differs from the others is blamed, and xp decides where it is the namespace of some.
        ({"x": np.zeros(1), "y": jnp.zeros(1), "z": jnp.zeros(1)}, None,
         r"^x must come from the library of y \(jax\.numpy\), got an array of numpy"),
        ({"x": np.zeros(1), "y": torch.zeros(1)}, torch_namespace,
         r"^x must come from the library of y \(torch\), got an array of numpy"),
    ],
)  # fmt: skip
def test_mixed_namespaces_are_refused(arrays: Any, xp: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _array_api.namespace_of(arrays, xp)


def test_library_names_leave_out_the_wrapper() -> None:
    names = [_array_api.library(xp) for xp in (numpy_namespace, torch_namespace, jnp, array_api_strict)]
    assert names == ["numpy", "torch", "jax.numpy", "array_api_strict"]


def test_only_half_types_are_widened(eager_space: Any) -> None:
    xp = eager_space.xp
    assert _array_api.wide_dtype(xp.float32, xp) == xp.float32
    assert _array_api.wide_dtype(xp.float64, xp) == xp.float64
    for narrow in ("float16", "bfloat16"):
        if hasattr(xp, narrow):
            assert _array_api.wide_dtype(getattr(xp, narrow), xp) == xp.float32


def test_values_are_visible_on_the_host_only(eager_space: Any) -> None:
    x = eager_space.asarray(np.zeros(3))
    assert _array_api.values_visible(x, eager_space.xp) == (eager_space.name in ("numpy", "torch", "jax", "strict")
                                                         and "device1" not in str(eager_space.device)
                                                         and "cuda" not in str(eager_space.device).lower())  # fmt: skip


def test_index_assignment_is_detected_without_writing() -> None:
    def answer(array: Any, xp: Any) -> bool:
        before = np.asarray(array).tolist()
        result = _array_api.supports_index_assignment(array, xp)
        assert np.asarray(array).tolist() == before
        return result

    read_only = np.zeros(3)
    read_only.flags.writeable = False
    assert answer(np.zeros(3), numpy_namespace)
    assert answer(torch.zeros(3), torch_namespace)
    assert not answer(read_only, numpy_namespace)
    assert not answer(jnp.zeros(3), jnp)
    assert not answer(array_api_strict.zeros(3), array_api_strict)
