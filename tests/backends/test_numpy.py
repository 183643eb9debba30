"""What the numpy backend has beyond the contract: other namespaces on the host."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
from drrho_numpy import NumpyBackend

from drrho_core.backend import get_backend


def test_it_is_found_by_name() -> None:
    backend = get_backend("numpy")
    assert isinstance(backend, NumpyBackend)
    assert (backend.name, backend.device, backend.dtype) == ("numpy", "cpu", "float32")


def test_another_namespace_runs_through_it() -> None:
    backend = NumpyBackend(dtype="float64", xp=array_api_strict)
    array = backend.asarray(np.arange(3))
    assert isinstance(array, type(array_api_strict.asarray(0)))
    assert backend.asarray([0.5]).dtype == array_api_strict.float64


def test_arrays_go_to_the_device_that_was_asked_for() -> None:
    device = array_api_strict.Device("device1")
    backend = NumpyBackend(device, xp=array_api_strict)
    array = backend.asarray([1.0, 2.0])
    assert array.device == device
    assert backend.to_numpy(array).tolist() == [1.0, 2.0]
    assert backend.adamw(weight_decay=0.0).init({"a": array})["step"].device == device


def test_a_device_that_the_namespace_lacks() -> None:
    with pytest.raises(ValueError, match=r"^device must be 'cpu' for the numpy backend, got 'cuda'$"):
        NumpyBackend("cuda")
    with pytest.raises(ValueError, match=r"^device must be array_api_strict.Device\('CPU_DEVICE'\) or .*, got 'cpu'$"):
        NumpyBackend("cpu", xp=array_api_strict)


def test_compile_has_nothing_to_do() -> None:
    assert NumpyBackend().compile(abs) is abs
