"""When the kernels of an array library are asked, and what is said where there are none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest

from drrho_core import fused_kernels
from drrho_core._routines import find_kernels
from drrho_core.extend import Batch

BATCH = Batch(np.eye(2), np.eye(2), None, 1.0, np.ones(2), np.ones(2), None)


class Kernels:
    """Kernels that take everything, or say why not."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        self.modes: list[str] = []

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        assert batch is BATCH
        self.modes.append(mode)
        return self.reason

    def sum_negatives(self, batch: Batch, /) -> Any:
        raise NotImplementedError

    def pull_back(self, *_: Any) -> Any:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _nothing_registered(register_routines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register_routines("numpy")
    monkeypatch.delenv("DRRHO_FUSED", raising=False)


@pytest.fixture
def register(register_routines: Any) -> Callable[[Any], list[int]]:
    def register_kernels(kernels: Any) -> list[int]:
        loads: list[int] = []

        def load() -> Any:
            loads.append(1)
            return kernels

        register_routines("numpy", sweeps=load)
        return loads

    return register_kernels


def test_by_default_they_are_used_if_they_take_the_batch(register: Any) -> None:
    kernels = Kernels()
    loads = register(kernels)
    assert find_kernels(BATCH, xp) is kernels
    register(Kernels("the batch is small"))
    assert find_kernels(BATCH, xp) is None
    assert (loads, kernels.modes) == ([1], ["auto"])


def test_in_the_mode_never_they_are_not_even_loaded(register: Any) -> None:
    loads = register(Kernels())
    with fused_kernels("never"):
        assert find_kernels(BATCH, xp) is None
    assert loads == []


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_they_are_used_in_the_block_and_loaded_once(register: Any, mode: str) -> None:
    kernels = Kernels()
    loads = register(kernels)
    with fused_kernels(mode):
        assert find_kernels(BATCH, xp) is kernels
        assert find_kernels(BATCH, xp) is kernels
        with fused_kernels("never"):
            assert find_kernels(BATCH, xp) is None
        assert find_kernels(BATCH, xp) is kernels
    assert (loads, kernels.modes) == ([1], [mode] * 3)


def test_the_block_ends_with_an_error_too(register: Any) -> None:
    register(Kernels())
    with fused_kernels("never"):
        with pytest.raises(KeyError), fused_kernels("always"):
            raise KeyError
        assert find_kernels(BATCH, xp) is None


def test_what_they_decline_is_left_to_the_core(register: Any) -> None:
    register(Kernels("the batch is small"))
    with fused_kernels("auto"):
        assert find_kernels(BATCH, xp) is None


def test_always_says_why_not(register: Any) -> None:
    register(Kernels("the batch is small"))
    rule = r"^fused_kernels must be 'never' or 'auto' here, because the batch is small, got 'always'$"
    with fused_kernels("always"), pytest.raises(ValueError, match=rule):
        find_kernels(BATCH, xp)


def test_a_loader_may_say_why_there_are_none(register: Any) -> None:
    register("the kernels need a compiler")
    with fused_kernels("auto"):
        assert find_kernels(BATCH, xp) is None
    with fused_kernels("always"), pytest.raises(ValueError, match="because the kernels need a compiler, got"):
        find_kernels(BATCH, xp)


def test_a_library_without_any_may_get_them_later(register: Any) -> None:
    with fused_kernels("always"):
        with pytest.raises(ValueError, match="because no kernels are registered for numpy, got"):
            find_kernels(BATCH, xp)
        kernels = Kernels()
        register(kernels)
        assert find_kernels(BATCH, xp) is kernels
        other = Kernels()
        register(other)
        assert find_kernels(BATCH, xp) is other


def test_the_environment_holds_outside_of_blocks(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels()
    register(kernels)
    monkeypatch.setenv("DRRHO_FUSED", "auto")
    assert find_kernels(BATCH, xp) is kernels
    with fused_kernels("never"):
        assert find_kernels(BATCH, xp) is None
    monkeypatch.setenv("DRRHO_FUSED", "never")
    assert find_kernels(BATCH, xp) is None
    monkeypatch.setenv("DRRHO_FUSED", "")
    assert find_kernels(BATCH, xp) is kernels
    monkeypatch.setenv("DRRHO_FUSED", "yes")
    with pytest.raises(ValueError, match=r"^DRRHO_FUSED must be 'never', 'auto' or 'always', got 'yes'$"):
        find_kernels(BATCH, xp)


@pytest.mark.parametrize("mode", ["yes", None, True, 1])
def test_a_mode_is_one_of_three(mode: Any) -> None:
    with pytest.raises(ValueError, match=r"^mode must be 'never', 'auto' or 'always', got "), fused_kernels(mode):
        pass


def test_a_task_does_not_see_the_block_of_another(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels()
    register(kernels)
    monkeypatch.setenv("DRRHO_FUSED", "never")

    async def inside() -> Any:
        with fused_kernels("always"):
            await asyncio.sleep(0)
            return find_kernels(BATCH, xp)

    async def outside() -> Any:
        await asyncio.sleep(0)
        return find_kernels(BATCH, xp)

    async def both() -> Any:
        return await asyncio.gather(inside(), outside())

    assert asyncio.run(both()) == [kernels, None]


def test_under_torch_compile_the_core_is_compiled_instead(register: Any) -> None:
    loads = register(Kernels())
    compiling = SimpleNamespace(__name__="numpy", compiler=SimpleNamespace(is_compiling=lambda: True))
    with fused_kernels("always"):
        assert find_kernels(BATCH, compiling) is None
    assert loads == []
