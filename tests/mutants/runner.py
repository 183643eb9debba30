"""Run the NumPy suite of one module of the core against a changed source, in a copy of the package.

Python with array libraries, pytest and hypothesis takes seconds to start, a suite about one. So a server imports
everything but the package, and every change is met by a fork of it, which reads the package from the copy: two steps
before the suite, its import and a small call, tell a wrong number from a crash. The tree itself is never touched.

Start it as ``python tests/mutants/runner.py``, or use `Runner`. A request is a line of JSON, ``{"module": "risk",
"source": "..."}`` (null: as it is), and so is the answer, see `Answer`. What a module's suite is stands in hand.toml.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = "drrho_core"

CPU_SECONDS = 15
"""What a suite may take: of one core's time, so that a busy machine changes no verdict."""

WALL_SECONDS = 300
"""A last resort, for what waits without computing."""

FOREIGN = (
    "pytest",
    "hypothesis",
    "hypothesis.strategies",
    "mpmath",
    "array_api_compat.numpy",
    "array_api_compat.torch",
    "array_api_strict",
    "drrho_reference",
    "jax.numpy",
    "ml_dtypes",
    "safetensors.numpy",
    "scipy.optimize",
    "scipy.special",
)
"""What the suites import beside the package. It is imported once; what is missing is left to the suites."""

IMPORT_FAILED, CALL_FAILED = 64, 65
"""Beside pytest's exit codes, 0 to 5."""

VERDICTS = {0: "green", 1: "red", IMPORT_FAILED: "does not import", CALL_FAILED: "small call fails"}


@dataclass(frozen=True)
class Answer:
    """What became of a change."""

    verdict: str
    """One of `VERDICTS`, "too slow" or "broken run: ..." where pytest did not get as far as a test."""
    seconds: float
    """Of one core's time."""
    output: str
    """The end of what the suite printed."""


def suites() -> dict[str, dict[str, Any]]:
    """Return every module's suite: files, what to leave out of them, and a small call."""
    found: dict[str, dict[str, Any]] = tomllib.loads((HERE / "hand.toml").read_text(encoding="utf-8"))["suite"]
    return found


def source_of(module: str) -> str:
    """Return a module's text as it is in the tree."""
    return (ROOT / PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def hand_written() -> list[dict[str, str]]:
    """Return the mutants of hand.toml: module, inside, find, put, what."""
    found: list[dict[str, str]] = tomllib.loads((HERE / "hand.toml").read_text(encoding="utf-8"))["mutant"]
    return found


def mutated(source: str, *, inside: str, find: str, put: str) -> str:
    """Return a source with one line of one function replaced; the indentation stays.

    Raises
    ------
    LookupError
        If there is no such function, or not exactly one such line in it: the mutant is out of date.
    """
    body: list[ast.stmt] = ast.parse(source).body
    first, last = 0, 0
    for name in inside.split("."):
        # A method is no function of the module, so what stands directly in the body goes first.
        below = (node for statement in body for node in ast.walk(statement))
        inner = [
            [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
            for nodes in (body, below)
        ]
        inner = inner[0] or inner[1]
        if len(inner) != 1:
            raise LookupError(f"{inside} must name one function, got {len(inner)} times {name}")
        body, first, last = inner[0].body, inner[0].lineno - 1, inner[0].end_lineno or 0
    lines = source.splitlines(keepends=True)
    places = [number for number in range(first, last) if lines[number].strip() == find]
    if len(places) != 1:
        raise LookupError(f"{inside} must hold this line once, got it {len(places)} times: {find}")
    line = lines[places[0]]
    lines[places[0]] = line[: len(line) - len(line.lstrip())] + put + "\n"
    return "".join(lines)


class Runner:
    """A server in a process of its own; a context manager."""

    def __init__(self) -> None:
        environment = os.environ | {
            "DRRHO_SPACES": "numpy",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # coverage and workers are for the outer run
            "PYTHONDONTWRITEBYTECODE": "1",  # two changes within a second would share one compiled file
        }
        for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "COV_CORE_SOURCE"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def try_out(self, module: str, source: str | None = None) -> Answer:
        """Return what becomes of a source in place of a module's; None: the one it has."""
        ask, hear = self._process.stdin, self._process.stdout
        assert ask is not None
        assert hear is not None
        ask.write(json.dumps({"module": module, "source": source}) + "\n")
        ask.flush()
        answer = hear.readline()
        if not answer:
            raise RuntimeError(f"the server ended with exit code {self._process.wait()}")
        return Answer(**json.loads(answer))

    def close(self) -> None:
        """End the server; it ends by itself where nobody asks any more."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(timeout=60)


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until there are no more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in FOREIGN:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # pytest collects garbage more than once, and half a second each goes by over all that is imported
    loaded = [name for name in sys.modules if name.split(".")[0] == PACKAGE]
    if loaded:
        raise RuntimeError(f"{PACKAGE} must not be imported before the fork, got {loaded}")
    with tempfile.TemporaryDirectory(prefix="drrho-mutants-") as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / PACKAGE, copy / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        for line in requests:
            request = json.loads(line)
            module, source = request["module"], request["source"]
            place = copy / PACKAGE / f"{module}.py"
            original = place.read_text(encoding="utf-8")
            if source is not None:
                place.write_text(source, encoding="utf-8")
            answer = _fork(copy, module, suites()[module])
            place.write_text(original, encoding="utf-8")
            answers.write(json.dumps(asdict(answer)) + "\n")
            answers.flush()


def _fork(copy: Path, module: str, suite: dict[str, Any]) -> Answer:
    """Try the copy out in a fork."""
    begin = time.monotonic()
    printed = copy / "printed.txt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that threads do not survive it: the libraries have started none
        child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            code = _try_out(copy, module, suite, printed)
        finally:
            os._exit(code)
    status = None
    while status is None:
        if time.monotonic() - begin > WALL_SECONDS:
            os.kill(child, signal.SIGKILL)
        ended, code, used = os.wait4(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.005)
    output = printed.read_text(encoding="utf-8", errors="replace")[-4000:] if printed.exists() else ""
    printed.unlink(missing_ok=True)
    slow = status in (-signal.SIGXCPU, -signal.SIGKILL)
    verdict = "too slow" if slow else VERDICTS.get(status, f"broken run: exit code {status}")
    return Answer(verdict, used.ru_utime + used.ru_stime, output)


def _try_out(copy: Path, module: str, suite: dict[str, Any], printed: Path) -> int:
    """Import the module, call it, run its suite: what the fork does. Returns its exit code."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spent = int(sum(os.times()[:2]))  # a fork starts at 0 on Linux, not everywhere
    resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_SECONDS, spent + CPU_SECONDS))
    with printed.open("wb", buffering=0) as file, Path(os.devnull).open("rb") as nothing:
        for descriptor, target in ((0, nothing), (1, file), (2, file)):
            os.dup2(target.fileno(), descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(fd, mode, buffering=0), write_through=True)
        for fd, mode in ((0, "rb"), (1, "wb"), (2, "wb"))
    )
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    try:
        found = importlib.import_module(f"{PACKAGE}.{module}")
        if Path(str(found.__file__)).parent != copy / PACKAGE:
            raise RuntimeError(f"imported {found.__file__}, which is not the copy")
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
        return IMPORT_FAILED
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(suite["call"], f"small call of {module}", "exec"), {"__name__": "small_call"})
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
        return CALL_FAILED
    import pytest

    return int(pytest.main(arguments(suite)))


def arguments(suite: dict[str, Any]) -> list[str]:
    """Return pytest's arguments for a suite; with DRRHO_SPACES=numpy they are all one needs to run it by hand."""
    # Without shrinking: that a test fails is enough. The plugin's names are rewritten on import, so it comes by name.
    return [
        "-x", "-q", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "--hypothesis-profile", "mutants",
        "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--tb", "line",
        "-k", suite.get("choose", "not (torch or jax or jit or compile or tracing)"),
        *(str(ROOT / name) for name in suite["files"]),
    ]  # fmt: skip


if __name__ == "__main__":
    # What is imported may print; only answers belong into the pipe.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as pipe:
        os.dup2(2, 1)
        serve(sys.stdin, pipe)
