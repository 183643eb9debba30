"""The large mutation run, outside CI: mutmut's operators on whole modules, killed by the same NumPy suites.

    make mutation                         # or: python tests/mutants/mutate.py numerics ambiguity contrastive _pairs

mutmut makes the mutants. They are run here: pytest imports and collects a module's suite once, then forks for every
mutant, and the fork exchanges the code of the functions that differ and runs the tests. So a mutant that dies early
costs milliseconds, and no file is ever written but the report.

What counts: every mutant of mutmut's in a function, and of the numbers at a module's top. Left out are mutants of
messages, which are no behaviour that a suite in one module should pin: everything within a ``raise``, and the words
that are handed to `drrho_core._validate` to make one. mutmut itself leaves out docstrings, annotations and decorators.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tomllib
import types
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = "drrho_core"
MORE_SUITES = {"_pairs": ("unimodal", "losses"), "ambiguity": ("risk",)}
"""What some functions of a module are for is told by the suites of those who call them."""

TEST_SECONDS = 5
"""Of one core's time, for one test: what takes longer does not end. No test takes a second."""

SURVIVED, KILLED, ENDLESS = "survived", "killed", "endless"


@dataclass(frozen=True)
class Mutant:
    """A change of one module."""

    line: int
    inside: str
    before: str
    after: str
    source: str
    """Of the whole module."""
    message: bool
    """Whether only the words of a message differ."""

    def described(self) -> dict[str, Any]:
        """Return what a report says."""
        return {"line": self.line, "inside": self.inside, "before": self.before, "after": self.after}


def mutants_of(source: str) -> list[Mutant]:
    """Return mutmut's mutants of a module, those of messages marked."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    found: list[Mutant] = []

    class Visitor(MutationVisitor):  # type: ignore[misc]
        """Notes where mutants are, while mutmut's own visitor makes them."""

        def __init__(self) -> None:
            super().__init__(mutation_operators, IgnoredCode(set(), set(), set()))
            self.above: list[cst.CSTNode] = []

        def on_visit(self, node: cst.CSTNode) -> bool:
            self.above.append(node)
            return bool(super().on_visit(node))

        def on_leave(self, original_node: cst.CSTNode) -> None:
            self.above.pop()

        def _create_mutations(self, node: cst.CSTNode) -> None:
            known = len(self.mutations)
            super()._create_mutations(node)
            for mutation in self.mutations[known:]:
                self._note(node, mutation.mutated_node)

        def _note(self, node: cst.CSTNode, new: cst.CSTNode) -> None:
            functions = [n.name.value for n in self.above if isinstance(n, cst.FunctionDef | cst.ClassDef)]
            in_function = any(isinstance(n, cst.FunctionDef) for n in self.above)
            if not in_function and not isinstance(node, cst.Integer | cst.Float):
                return
            place = self.get_metadata(PositionProvider, node)
            start, end = (starts[p.line - 1] + p.column for p in (place.start, place.end))
            old_text, new_text = module.code_for_node(node), module.code_for_node(new)
            start -= old_text.find(source[start:end])  # parentheses and spaces that the node owns
            end = start + len(old_text)
            if source[start:end] == old_text:
                changed = source[:start] + new_text + source[end:]
            else:  # slow, and always right
                changed = module.deep_replace(node, new).code
            found.append(
                Mutant(
                    line=place.start.line,
                    inside=".".join(functions) or "(top)",
                    before=" ".join(old_text.split()),
                    after=" ".join(new_text.split()),
                    source=changed,
                    message=self._is_message(node, new),
                )
            )

        def _is_message(self, node: cst.CSTNode, new: cst.CSTNode) -> bool:
            if any(isinstance(n, cst.Raise) for n in self.above):
                return True
            checks = [n for n in self.above if isinstance(n, cst.Call) and _is_check(module.code_for_node(n.func))]
            if not checks:
                return False
            if isinstance(node, cst.BaseString):
                return True
            if isinstance(node, cst.Call) and node is checks[-1] and isinstance(new, cst.Call):
                kept = {id(arg) for arg in new.args}
                lost = [arg.value for arg in node.args if id(arg) not in kept]
                return bool(lost) and all(isinstance(v, cst.BaseString) for v in lost)
            return False

    wrapper = MetadataWrapper(cst.parse_module(source))
    module = wrapper.module
    wrapper.visit(Visitor())
    return found


def _is_check(function: str) -> bool:
    return function.startswith("_validate.") or function in ("_validate", "check_values", "check_state")


def exchange(old: types.ModuleType, source: str) -> None:
    """Give a module's functions the code of another source, in place, so that whoever imported them has it, too."""
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
        if isinstance(value, types.FunctionType) and isinstance(mine, types.FunctionType):
            if value.__module__ == name and value.__code__.co_filename == mine.__code__.co_filename:
                mine.__code__ = value.__code__
                mine.__defaults__, mine.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
        elif isinstance(value, type) and isinstance(mine, type) and value.__module__ == name:
            _exchange_members(vars(mine), vars(value), mine, name)
        elif isinstance(value, int | float) and isinstance(mine, int | float) and value != mine:
            setattr(owner, key, value)


class Plugin:
    """pytest's: runs all mutants where pytest would run its tests."""

    def __init__(self, name: str, mutants: list[Mutant]) -> None:
        self.name, self.mutants = name, mutants
        self.module: Any = None
        self.results: list[tuple[Mutant, str, str, float]] = []
        self.baseline = -1
        self._pipe = -1

    def pytest_runtestloop(self, session: Any) -> bool | None:
        """Fork for every mutant; in the fork, go on with pytest's own loop."""
        self.module = importlib.import_module(f"{PACKAGE}.{self.name}")
        gc.collect()
        gc.freeze()
        kills: Counter[str] = Counter()
        begin = time.monotonic()
        for number, mutant in enumerate([None, *self.mutants]):
            # Whoever has killed most goes first.
            session.items.sort(key=lambda item: -kills[item.nodeid])
            reader, writer = os.pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # jax has threads by now; no test that is chosen uses it
                child = os.fork()
            if child == 0:
                os.close(reader)
                session.config.pluginmanager.unregister(name="terminalreporter")
                self._enter(writer, mutant)
                return None
            os.close(writer)
            with os.fdopen(reader) as pipe:
                said = pipe.read().strip()
            _, status, used = os.wait4(child, 0)
            code = os.waitstatus_to_exitcode(status)
            if mutant is None:
                self.baseline = code
                _say(f"{self.name}: {len(session.items)} tests, unchanged: exit code {code}, {_cpu(used):.1f} s")
                if code:
                    return True
                continue
            endless = code in (-signal.SIGPROF, -signal.SIGXCPU, -signal.SIGKILL)
            fate = SURVIVED if code == 0 else ENDLESS if endless else KILLED
            if fate == SURVIVED:
                _say(f"  {mutant.line} {mutant.inside}: {mutant.before}  ->  {mutant.after}")
            kills[said] += fate == KILLED
            self.results.append((mutant, fate, said, _cpu(used)))
            if number % 50 == 0 or number == len(self.mutants):
                left = sum(fate == SURVIVED for _, fate, _, _ in self.results)
                _say(f"{self.name}: {number}/{len(self.mutants)}, {left} survive, {time.monotonic() - begin:.0f} s")
        return True

    def _enter(self, writer: int, mutant: Mutant | None) -> None:
        """Be the fork: quiet, limited, and mutated."""
        self._pipe = writer
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        limit = 4 * 2**30
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # a mutant may ask for any amount
        if mutant is not None:
            try:
                exchange(self.module, mutant.source)
            except BaseException as error:
                os.write(writer, f"import: {type(error).__name__}".encode())
                os._exit(1)

    def pytest_runtest_setup(self) -> None:
        """Limit every test."""
        if self._pipe >= 0:
            signal.setitimer(signal.ITIMER_PROF, TEST_SECONDS)  # its signal kills

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Say who killed, and leave."""
        if self._pipe >= 0 and report.failed:
            os.write(self._pipe, report.nodeid.encode())
            os._exit(1)

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        """Leave a fork that has survived."""
        if self._pipe >= 0:
            os._exit(int(exitstatus))


def _say(text: str) -> None:
    print(text, flush=True)


def _cpu(used: Any) -> float:
    return float(used.ru_utime + used.ru_stime)


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the mutants of one module and return what became of them."""
    import pytest

    suites = tomllib.loads((HERE / "hand.toml").read_text(encoding="utf-8"))["suite"]
    suite = suites[name]
    files = [file for other in (name, *MORE_SUITES.get(name, ())) for file in suites[other]["files"]]
    source = (ROOT / PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    every = [mutant for mutant in mutants_of(source) if options.only in mutant.inside]
    if options.again:
        reports = json.loads(options.again.read_text(encoding="utf-8"))["modules"]
        left = [survivor for report in reports if report["module"] == name for survivor in report["survivors"]]
        known = {(one["inside"], one["before"], one["after"]) for one in left}  # lines move
        every = [mutant for mutant in every if (mutant.inside, mutant.before, mutant.after) in known]
    part, parts = map(int, options.share.split("/"))
    mutants = [mutant for mutant in every if not mutant.message][part - 1 :: parts]
    plugin = Plugin(name, mutants)
    begin, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    pytest.main(
        [
            "-x", "-q", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "--hypothesis-profile", "mutants",
            "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--tb", "no",
            "-k", suite.get("choose", "not (torch or jax or jit or compile or tracing)") + options.choose,
            *(str(ROOT / file) for file in (*files, *options.files)),
        ],
        plugins=[plugin],
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if plugin.baseline:
        raise SystemExit(f"{name}: the suite of what nobody changed must be green, got exit code {plugin.baseline}")
    fates = Counter(fate for _, fate, _, _ in plugin.results)
    return {
        "module": name,
        "messages": sum(mutant.message for mutant in every),
        "mutants": len(mutants),
        **{fate: fates[fate] for fate in (KILLED, ENDLESS, SURVIVED)},
        "seconds": round(time.monotonic() - begin),
        "cpu_seconds": round(_cpu(after) - _cpu(used)),
        "survivors": [m.described() for m, fate, _, _ in plugin.results if fate == SURVIVED],
        "killers": Counter(said for _, fate, said, _ in plugin.results if fate == KILLED).most_common(),
    }


def main() -> None:
    """Parse the arguments, run in a process of its own per module, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="+", metavar="module")
    parser.add_argument("--only", default="", help="mutants in functions whose name contains this")
    parser.add_argument("--share", default="1/1", help="2/3: of three processes the second")
    parser.add_argument("--with", dest="files", action="append", default=[], metavar="FILE", help="more tests")
    parser.add_argument("--choose", default="", help="added to pytest's -k, such as ' and not facts'")
    parser.add_argument("--spaces", default="numpy", help="array libraries, as DRRHO_SPACES")
    parser.add_argument("--again", type=Path, help="only what survived in this report")
    parser.add_argument("--out", type=Path, help="where to write the report, JSON")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        report = run(options.modules[0], options)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return
    environment = os.environ | {
        "DRRHO_SPACES": options.spaces,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    reports = []
    for name in options.modules:
        part = (options.out or Path("mutation.json")).with_suffix(f".{name}.{options.share.replace('/', '-')}.json")
        inner = [*sys.argv[1:], "--inner", "--out", str(part)]
        subprocess.run([sys.executable, __file__, name, *inner], env=environment, check=True)
        reports.append(json.loads(part.read_text(encoding="utf-8")))
        part.unlink()
    for one in reports:
        dead = one[KILLED] + one[ENDLESS]
        _say(f"{one['module']}: {dead} of {one['mutants']} killed, {100 * dead / max(one['mutants'], 1):.1f} %")
    versions = {name: importlib.metadata.version(name) for name in ("mutmut", "numpy", "hypothesis", "pytest")}
    text = json.dumps({"versions": versions, "modules": reports}, indent=1) + "\n"
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
