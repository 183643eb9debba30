"""Hypothesis' profiles, the handler of Ctrl-C, and the fixtures of array libraries (see ``helpers.spaces``)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from helpers.spaces import SPACES, Space, build, parameters

settings.register_profile(
    "drrho", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
# A mutant is dead when a test fails, however large the example.
settings.register_profile(
    "mutants", settings.get_profile("drrho"), max_examples=10, database=None, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("drrho")

# A shell that starts a program in the background lets it ignore Ctrl-C, and every process that the tests start would
# inherit that. Tests of Ctrl-C need the usual handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", params=parameters(list(SPACES)))
def space(request: pytest.FixtureRequest) -> Space:
    """Every array library, device and dtype, jitted too."""
    return build(*request.param)


@pytest.fixture(scope="session", params=parameters([name for name in SPACES if name != "jax-jit"]))
def eager_space(request: pytest.FixtureRequest) -> Space:
    """The same without tracing: for tests of values and errors that tracing cannot see."""
    return build(*request.param)


@pytest.fixture
def register_routines() -> Iterator[Callable[..., None]]:
    """Return `drrho_core.extend.register`, whose registrations end with the test."""
    from drrho_core import extend

    before: dict[str, extend.Extensions] = {}

    def register(name: str, **routines: Any) -> None:
        before.setdefault(name, extend.registered(name))
        extend.register(name, **routines)

    yield register
    for name, routines in before.items():
        extend.register(name, **routines._asdict())
