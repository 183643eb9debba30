"""How a backend is found by name, and what is said where there is none."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from drrho_core import backend as module
from drrho_core.backend import backend_names, default_backend, get_backend


def register(monkeypatch: pytest.MonkeyPatch, **targets: str) -> None:
    points = [EntryPoint(name=name, value=value, group="drrho.backends") for name, value in targets.items()]

    def entry_points(*, group: str) -> list[EntryPoint]:
        assert group == "drrho.backends"
        return points

    monkeypatch.setattr(module, "entry_points", entry_points)


def test_all_of_ours_are_registered() -> None:
    assert set(backend_names()) >= {"numpy", "torch", "jax", "cupy"}
    assert backend_names() == sorted(backend_names())


def test_names_are_those_of_the_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, zeta="nowhere:Nothing", alpha="nowhere:Nothing")
    assert backend_names() == ["alpha", "zeta"]


def test_the_default_is_the_installed_backend_with_the_highest_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, preference in (("low", 1), ("high", 2), ("as_high", 2)):
        module_of_backend = types.ModuleType(f"backend_{name}")
        module_of_backend.Backend = types.SimpleNamespace(preference=preference)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"backend_{name}", module_of_backend)
    register(monkeypatch, low="backend_low:Backend", missing="nowhere:Nothing")
    assert default_backend() == "low"
    register(monkeypatch, low="backend_low:Backend", high="backend_high:Backend", missing="nowhere:Nothing")
    assert default_backend() == "high"
    register(monkeypatch, high="backend_high:Backend", low="backend_low:Backend", as_high="backend_as_high:Backend")
    assert default_backend() == "as_high"  # the first in the alphabet of two that are equal


def test_torch_is_preferred_to_numpy_and_numpy_to_the_rest() -> None:
    preferences = {name: get_backend(name).preference for name in ("numpy", "torch", "jax")}
    assert preferences["torch"] > preferences["numpy"] > preferences["jax"]
    assert default_backend() == "torch"


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_backend_is_built_as_asked(name: str, dtype: str) -> None:
    backend = get_backend(name, dtype=dtype)
    assert (backend.name, backend.dtype) == (name, dtype)
    assert backend.asarray([1.5, 2.5]).dtype == getattr(backend.xp, dtype)


def test_device_and_dtype_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, mine="unittest.mock:Mock")
    built: Any = get_backend("mine", device="cuda:1", dtype="float64")
    assert (built.device, built.dtype) == ("cuda:1", "float64")
    built = get_backend("mine")
    assert (built.device, built.dtype) == (None, "float32")


def test_an_unknown_name_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, zeta="nowhere:Nothing", alpha="nowhere:Nothing")
    with pytest.raises(ValueError, match=r"^backend must be one of alpha, zeta, got 'tensorflow'$"):
        get_backend("tensorflow")


@pytest.mark.parametrize("dtype", ["float16", "double", 32])
def test_another_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"^dtype must be 'float32' or 'float64', got {dtype!r}$"):
        get_backend("numpy", dtype=dtype)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, cupy="a_library_that_nobody_has:Backend")
    expected = (
        "the cupy backend needs a_library_that_nobody_has, which is not installed: pip install 'drrho-core[cupy]'"
    )
    with pytest.raises(ImportError) as error:
        get_backend("cupy")
    assert str(error.value) == expected


def test_a_broken_backend_of_ours_is_not_called_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, cupy="drrho_numpy.a_module_that_is_not_there:Backend")
    with pytest.raises(ModuleNotFoundError, match=r"drrho_numpy\.a_module_that_is_not_there"):
        get_backend("cupy")


def test_a_missing_library_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(EntryPoint):
        def load(self) -> Any:
            raise ModuleNotFoundError("no such thing")

    monkeypatch.setattr(module, "entry_points", lambda *, group: [Broken(name="x", value="x:X", group=group)])
    with pytest.raises(ImportError, match="the x backend needs"):
        get_backend("x")
