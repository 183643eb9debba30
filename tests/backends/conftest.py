"""JAX's 64-bit types as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def wide_types() -> Iterator[None]:
    """JAX with 64-bit types, for one test."""
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        yield
