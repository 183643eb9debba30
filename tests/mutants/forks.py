"""Run tests against many mutants: pytest collects the tests once; then a fork per mutant changes code and runs tests.

A mutant that an early test detects takes milliseconds, and no file is written. A fork stops at the first test that
fails and reports the test and the exception, so that a wrong number can be distinguished from a crash.
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
"""CPU time limit of one test in a fork, in seconds: a test that takes longer counts as endless.

Without a mutant the slowest test takes three seconds.
"""

MEMORY = 4 * 2**30
"""Memory limit of a fork: a mutant may ask for any amount."""

SURVIVED, KILLED, ENDLESS = "survived", "killed", "endless"

WRONG_NUMBERS = ("AssertionError", "RuntimeWarning", "FloatingPointError")
"""Exceptions that mean a wrong number (warnings are errors in the tests). Any other exception is a crash."""


@dataclass(frozen=True)
class Change:
    """The source of one module with a mistake in it, and the starts of the ids of the tests to run; empty means all."""

    name: str
    module: str
    source: str
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """The result of one change: ``SURVIVED``, ``KILLED`` or ``ENDLESS``, the test that failed, and its exceptions."""

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
    """Collect the test files once and run the tests against every change. The caller needs a process for this alone.

    Raises
    ------
    SystemExit
        If a test fails without any change.
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
    """Return the environment of a process that calls `run`: NumPy, one thread, no plugins of the calling pytest."""
    # Plugins and options of the calling pytest must not affect the pytest that runs the mutants.
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
    """A plugin of pytest that replaces pytest's loop over the tests by a loop over all changes."""

    def __init__(self, changes: Sequence[Change], *, quiet: bool = False) -> None:
        self.changes, self.quiet = changes, quiet
        self.results: list[Result] = []
        self.baseline, self.red = -1, ""
        self._pipe = -1

    def pytest_runtestloop(self, session: Any) -> bool | None:
        """Fork for every change; the fork returns None, so that pytest's own loop runs the tests in it."""
        for change in self.changes:
            importlib.import_module(change.module)
        # Garbage collection in a fork would copy the pages of all objects.
        gc.collect()
        gc.freeze()
        # The first round has no change, and all its tests must pass: later failures are then caused by the changes.
        kills: Counter[str] = Counter()
        items, begin = list(session.items), time.monotonic()
        for number, change in enumerate([None, *self.changes]):
            session.items[:] = [item for item in items if change is None or _starts(item.nodeid, change.tests)]
            if change is None and all(known.tests for known in self.changes):
                session.items[:] = [i for i in items if any(_starts(i.nodeid, known.tests) for known in self.changes)]
            # Tests that have killed the most mutants come first.
            session.items.sort(key=lambda item: -kills[item.nodeid])
            if change is not None and not session.items:
                raise LookupError(f"{change.name}: no test has an id that starts with {change.tests}")
            # The fork reports a failed test through a pipe. No report means that all tests passed or a limit was hit.
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
                report = json.loads(pipe.read().strip() or "{}")
            _, status, used = os.wait4(child, 0)
            code, seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
            if change is None:
                self.baseline, self.red = code, report.get("test", "")
                self._say(f"{len(session.items)} tests, unchanged: exit code {code}, {seconds:.1f} s of CPU time")
                if code:
                    return True
                continue
            # These signals come from the limits of time and memory.
            endless = code in (-signal.SIGPROF, -signal.SIGXCPU, -signal.SIGKILL)
            fate = SURVIVED if code == 0 else ENDLESS if endless else KILLED
            killer = report.get("test", "")
            kills[killer] += fate == KILLED
            self.results.append(Result(change, fate, killer, tuple(report.get("errors", ())), seconds))
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
        """Prepare the fork: suppress its output, set its limits, and change the module."""
        # Output is suppressed and limits are set before any changed code runs.
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
        """Limit the CPU time of every test; the timer's signal kills the fork."""
        if self._pipe >= 0:
            signal.setitimer(signal.ITIMER_PROF, TEST_SECONDS)

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        """Report the first failure and end the fork."""
        if self._pipe >= 0:
            self._leave(node.nodeid, call.excinfo.value)

    def _leave(self, test: str, error: BaseException) -> None:
        # os._exit skips the end of pytest's session, which would print a summary per mutant.
        errors = sorted({type(leaf).__name__ for leaf in _leaves(error)})
        os.write(self._pipe, json.dumps({"test": test, "errors": errors}).encode())
        os._exit(1)

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        """End a fork in which all tests passed."""
        if self._pipe >= 0:
            os._exit(int(exitstatus))


def _starts(test: str, starts: tuple[str, ...]) -> bool:
    return not starts or test.startswith(starts)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Return the exceptions of a group, or the single exception; Hypothesis raises a group for several failures."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


def exchange(old: types.ModuleType, source: str) -> None:
    """Replace the code of a module's functions by the code of another source, so that all importers use the new code.

    Numbers at the top level of the module are replaced, too. Decorated functions are found through ``__wrapped__``.
    """
    # The changed source runs in a new module; then its code objects are assigned to the existing functions.
    new = types.ModuleType(old.__name__)
    new.__file__, new.__package__ = old.__file__, old.__package__
    sys.modules[old.__name__] = new  # dataclasses look up their module
    try:
        exec(compile(source, str(old.__file__), "exec"), new.__dict__)
    finally:
        sys.modules[old.__name__] = old
    _exchange_members(vars(old), vars(new), old, old.__name__)


def _exchange_members(old: Any, new: Any, owner: Any, name: str) -> None:
    for key, value in list(new.items()):
        member = old.get(key)
        if isinstance(value, property):
            value, member = value.fget, getattr(member, "fget", None)
        if isinstance(value, staticmethod | classmethod):
            value, member = value.__func__, getattr(member, "__func__", None)
        # A decorated function keeps the decorator of the original and gets the changed code.
        value, member = getattr(value, "__wrapped__", value), getattr(member, "__wrapped__", member)
        if isinstance(value, types.FunctionType) and isinstance(member, types.FunctionType):
            if value.__module__ == name and value.__code__.co_filename == member.__code__.co_filename:
                member.__code__ = value.__code__
                member.__defaults__, member.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
        elif isinstance(value, type) and isinstance(member, type) and value.__module__ == name:
            _exchange_members(vars(member), vars(value), member, name)
        elif isinstance(value, int | float) and isinstance(member, int | float) and value != member:
            setattr(owner, key, value)
