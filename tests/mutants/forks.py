"""Run tests against many mutants: pytest collects once, then a fork per mutant exchanges code and runs the tests.

A mutant that dies early costs milliseconds, and no file is ever written. A fork stops at the first test that fails and
reports the test and the exception, so that a wrong number can be told from a crash.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mutants.suites import CHOOSE, ROOT

TEST_SECONDS = 10
"""CPU time limit of one test in a fork: a test that takes longer does not end. The slowest test takes three seconds."""

MEMORY = 4 * 2**30
"""Memory limit of a fork: a mutant may ask for any amount."""

SURVIVED, KILLED, ENDLESS = "survived", "killed", "endless"

WRONG_NUMBERS = ("AssertionError", "RuntimeWarning", "FloatingPointError")
"""Exceptions of tests that saw a wrong number; warnings are errors in the tests. Any other exception is a crash."""


@dataclass(frozen=True)
class Change:
    """The source of one module with a mistake in it, and the tests that meet it: starts of pytest's ids, or all."""

    name: str
    module: str
    source: str
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What happened to one change: ``SURVIVED``, ``KILLED`` or ``ENDLESS``, by which test, with which exceptions."""

    change: Change
    fate: str
    killer: str
    errors: tuple[str, ...]
    seconds: float

    @property
    def wrong_number(self) -> bool:
        """Whether a test failed because of a number, and not because the code crashed."""
        return self.fate == KILLED and bool(self.errors) and set(self.errors) <= set(WRONG_NUMBERS)


def run(changes: Sequence[Change], files: Sequence[str], *, choose: str = CHOOSE, quiet: bool = False) -> list[Result]:
    """Collect the test files once and meet every change with the tests; call it in a process of its own.

    Raises
    ------
    SystemExit
        If the tests are not green before any change.
    """
    import pytest

    plugin = Plugin(changes, quiet=quiet)
    pytest.main(
        [
            "-q", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "--hypothesis-profile", "mutants",
            "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--tb", "no", "-k", choose,
            *(str(ROOT / file) for file in dict.fromkeys(files)),
        ],
        plugins=[plugin],
    )  # fmt: skip
    if plugin.baseline:
        raise SystemExit(f"the tests must be green before any change, got exit code {plugin.baseline} {plugin.red}")
    return plugin.results


def environment() -> dict[str, str]:
    """Return the environment of a process that calls `run`: NumPy, one thread, no plugins of the outer pytest."""
    # The outer pytest's plugins and options must not reach the inner one.
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "COV_CORE_SOURCE")
    }
    return {
        "DRRHO_SPACES": "numpy",
        **kept,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")])),
    }


class Plugin:
    """A plugin of pytest that runs all changes in the place of pytest's own loop."""

    def __init__(self, changes: Sequence[Change], *, quiet: bool = False) -> None:
        self.changes, self.quiet = changes, quiet
        self.results: list[Result] = []
        self.baseline, self.red = -1, ""
        self._pipe = -1

    def pytest_runtestloop(self, session: Any) -> bool | None:
        """Fork for every change; in the fork, go on with pytest's own loop."""
        for change in self.changes:
            importlib.import_module(change.module)
        # Garbage collection in a fork would copy the pages of all objects.
        gc.collect()
        gc.freeze()
        # The first round changes nothing: its tests must be green, and it proves that a survivor would be seen.
        kills: Counter[str] = Counter()
        items, begin = list(session.items), time.monotonic()
        for number, change in enumerate([None, *self.changes]):
            session.items[:] = [item for item in items if change is None or _meets(item.nodeid, change.tests)]
            if change is None and all(one.tests for one in self.changes):
                session.items[:] = [i for i in items if any(_meets(i.nodeid, one.tests) for one in self.changes)]
            # Tests that have killed most come first.
            session.items.sort(key=lambda item: -kills[item.nodeid])
            if change is not None and not session.items:
                raise LookupError(f"{change.name}: no test has an id that starts with {change.tests}")
            # The fork reports the failed test through a pipe; a closed pipe without a report means green or killed.
            reader, writer = os.pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # libraries have started threads; the chosen tests do not use them
                child = os.fork()
            if child == 0:
                os.close(reader)
                session.config.pluginmanager.unregister(name="terminalreporter")
                self._enter(writer, change)
                return None
            os.close(writer)
            with os.fdopen(reader) as pipe:
                said = json.loads(pipe.read().strip() or "{}")
            _, status, used = os.wait4(child, 0)
            code, seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
            if change is None:
                self.baseline, self.red = code, said.get("test", "")
                self._say(f"{len(session.items)} tests, unchanged: exit code {code}, {seconds:.1f} s of CPU time")
                if code:
                    return True
                continue
            # Signals come from the limits of time and memory.
            endless = code in (-signal.SIGPROF, -signal.SIGXCPU, -signal.SIGKILL)
            fate = SURVIVED if code == 0 else ENDLESS if endless else KILLED
            killer = said.get("test", "")
            kills[killer] += fate == KILLED
            self.results.append(Result(change, fate, killer, tuple(said.get("errors", ())), seconds))
            if fate == SURVIVED:
                self._say(f"  survives: {change.name}")
            if number % 50 == 0 or number == len(self.changes):
                left = sum(result.fate == SURVIVED for result in self.results)
                self._say(f"{number}/{len(self.changes)}, {left} survive, {time.monotonic() - begin:.0f} s")
        return True

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def _enter(self, writer: int, change: Change | None) -> None:
        """Become the fork: without output, with limits, and changed."""
        # The fork is silent, and limited, before any changed code runs.
        self._pipe = writer
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        if change is not None:
            try:
                exchange(sys.modules[change.module], change.source)
            except BaseException as error:
                self._leave("import", error)

    def pytest_runtest_setup(self) -> None:
        """Limit every test; the signal of the timer kills the fork."""
        if self._pipe >= 0:
            signal.setitimer(signal.ITIMER_PROF, TEST_SECONDS)

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        """Report the first failure, and leave."""
        if self._pipe >= 0:
            self._leave(node.nodeid, call.excinfo.value)

    def _leave(self, test: str, error: BaseException) -> None:
        # os._exit skips pytest's own end, which would print a summary per mutant.
        errors = sorted({type(leaf).__name__ for leaf in _leaves(error)})
        os.write(self._pipe, json.dumps({"test": test, "errors": errors}).encode())
        os._exit(1)

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        """Leave a fork whose tests are green."""
        if self._pipe >= 0:
            os._exit(int(exitstatus))


def _meets(test: str, starts: tuple[str, ...]) -> bool:
    return not starts or test.startswith(starts)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Return the exceptions of a group; Hypothesis raises one if an example fails in several ways."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


def exchange(old: types.ModuleType, source: str) -> None:
    """Give a module's functions the code of another source, in place, so that all importers have it.

    Numbers at the top of the module are exchanged as well. Decorated functions are reached through ``__wrapped__``.
    """
    # The changed source runs in a module of its own; then code objects move into the functions that exist.
    new = types.ModuleType(old.__name__)
    new.__file__, new.__package__ = old.__file__, old.__package__
    sys.modules[old.__name__] = new  # dataclasses look their module up
    try:
        exec(compile(source, str(old.__file__), "exec"), new.__dict__)
    finally:
        sys.modules[old.__name__] = old
    _exchange_members(vars(old), vars(new), old, old.__name__)


def _exchange_members(old: Any, new: Any, owner: Any, name: str) -> None:
    for key, value in list(new.items()):
        mine = old.get(key)
        if isinstance(value, property):
            value, mine = value.fget, getattr(mine, "fget", None)
        if isinstance(value, staticmethod | classmethod):
            value, mine = value.__func__, getattr(mine, "__func__", None)
        # A decorated function keeps the decorator of the original and gets the changed code.
        value, mine = getattr(value, "__wrapped__", value), getattr(mine, "__wrapped__", mine)
        if isinstance(value, types.FunctionType) and isinstance(mine, types.FunctionType):
            if value.__module__ == name and value.__code__.co_filename == mine.__code__.co_filename:
                mine.__code__ = value.__code__
                mine.__defaults__, mine.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
        elif isinstance(value, type) and isinstance(mine, type) and value.__module__ == name:
            _exchange_members(vars(mine), vars(value), mine, name)
        elif isinstance(value, int | float) and isinstance(mine, int | float) and value != mine:
            setattr(owner, key, value)
