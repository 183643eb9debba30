"""The cupy backend: its contract is in test_contract.py; here is what can be seen without a device."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from drrho_core.backend import backend_names, get_backend

without_cupy = pytest.mark.skipif(find_spec("cupy") is not None, reason="CuPy is installed")
with_cupy = pytest.mark.skipif(find_spec("cupy") is None, reason="CuPy is not installed")


def test_it_is_listed_even_where_it_cannot_run() -> None:
    assert "cupy" in backend_names()


@without_cupy
def test_without_the_library_the_message_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r"^the cupy backend needs cupy, .*: pip install 'drrho-core\[cupy\]'$"):
        get_backend("cupy")


@without_cupy
def test_the_package_can_be_imported_without_the_library() -> None:
    import drrho_cupy
    from drrho_cupy.backend import CupyBackend

    with pytest.raises(ModuleNotFoundError, match="cupy"):
        drrho_cupy.CupyBackend  # noqa: B018
    with pytest.raises(AttributeError, match=r"^module 'drrho_cupy' has no attribute 'TorchBackend'$"):
        drrho_cupy.TorchBackend  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match="cupy"):
        CupyBackend()
    with pytest.raises(ValueError, match=r"^dtype must be 'float32' or 'float64', got 'int8'$"):
        CupyBackend(dtype="int8")


@with_cupy
def test_with_the_library_a_missing_device_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"^device must be .*, got 'cuda:99'"):
        get_backend("cupy", device="cuda:99")
