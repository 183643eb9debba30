"""The large mutation run, outside CI: mutmut changes whole modules, and the tests in NumPy must detect each change.

    make mutation                                                       # every mutant of the rooms in suites.py
    python tests/mutants/mutate.py contrastive ambiguity --sample 600 --seed 0

mutmut makes the mutants, and `forks.py` runs them: the tests are collected once, and each mutant is tested in a fork of
the process. The only file that is written is the report.

All of mutmut's mutants of functions count, and those of numbers at the top level of a module. Three kinds are left out:

- Mutants of messages, because tests of numbers should not depend on words: everything within a ``raise``, and the words
  of the checks in `drrho_core._validate`.
- Mutants of ``zip(strict=...)`` and ``astype(copy=...)``, which change no number: the first argument is a guard against
  mistakes, the second one affects speed.
- Mutants of questions whether values can be read (`QUESTIONS`), which select between two paths with equal numbers.

mutmut itself leaves out docstrings, annotations and decorators.

Mutants that survive in NumPy run against further tests: slow ones (proofs with other solvers and 50 digits), and the
tests on the second device of array-api-strict, on which a lost device or dtype is an error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutants.forks import ENDLESS, KILLED, SURVIVED, Change, environment, run
from mutants.suites import CHOOSE, PACKAGE, SUITES, files, modules_of, source_of


@dataclass(frozen=True)
class Mutant:
    """A change of one module."""

    module: str
    line: int
    inside: str
    before: str
    after: str
    start: int
    end: int
    text: str
    """The text between `start` and `end`, or of the whole module if `end` is negative."""
    counts: bool
    """Whether the mutant is a change of the mathematics, and not of a message or a guard."""

    def described(self) -> dict[str, Any]:
        """Return the mutant's entry in a report."""
        names = ("module", "line", "inside", "before", "after")
        return {name: getattr(self, name) for name in names}

    def source(self, original: str) -> str:
        """Return the source of the changed module."""
        return self.text if self.end < 0 else original[: self.start] + self.text + original[self.end :]


def mutants_of(module: str) -> list[Mutant]:
    """Return mutmut's mutants of a module; mutants of messages and guards have ``counts=False``."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    source = source_of(module)
    # The offsets at which lines start, to convert a line and a column into an offset.
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    mutants: list[Mutant] = []

    class Visitor(MutationVisitor):  # type: ignore[misc]
        """Records the place of every mutant that mutmut's own visitor makes."""

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
            # Outside of functions only mutants of numbers count: all other code there runs only at import.
            functions = [n.name.value for n in self.above if isinstance(n, cst.FunctionDef | cst.ClassDef)]
            in_function = any(isinstance(n, cst.FunctionDef) for n in self.above)
            if not in_function and not isinstance(node, cst.Integer | cst.Float):
                return
            if isinstance(node, cst.Float) and float(tree.code_for_node(node)) == float(tree.code_for_node(new)):
                return  # 1e30 and 1e+30 are one number
            place = self.get_metadata(PositionProvider, node)
            start, end = (starts[p.line - 1] + p.column for p in (place.start, place.end))
            old_text, new_text = tree.code_for_node(node), tree.code_for_node(new)
            start -= old_text.find(source[start:end])  # parentheses and spaces before the position belong to the node
            end = start + len(old_text)
            # If the node's text is not at this position, the node is replaced in the tree.
            if source[start:end] != old_text:  # slow, but always right
                start, end, text = 0, -1, tree.deep_replace(node, new).code
            else:
                text = new_text
            mutants.append(
                Mutant(
                    module=module,
                    line=place.start.line,
                    inside=".".join(functions) or "(top)",
                    before=" ".join(old_text.split()),
                    after=" ".join(new_text.split()),
                    start=start,
                    end=end,
                    text=text,
                    counts=not (self._is_message(node, new) or self._is_guard(node, new)),
                )
            )

        def _is_message(self, node: cst.CSTNode, new: cst.CSTNode) -> bool:
            # Words of a message are everything within a raise, and strings among the arguments of a check.
            if any(isinstance(n, cst.Raise) for n in self.above):
                return True
            checks = [n for n in self.above if isinstance(n, cst.Call) and _is_check(tree.code_for_node(n.func))]
            if not checks:
                return False
            if isinstance(node, cst.BaseString):
                return True
            if isinstance(node, cst.Call) and node is checks[-1] and isinstance(new, cst.Call):
                kept = {id(arg) for arg in new.args}
                lost = [arg.value for arg in node.args if id(arg) not in kept]
                return bool(lost) and all(isinstance(v, cst.BaseString) for v in lost)
            return False

        def _is_guard(self, node: cst.CSTNode, new: cst.CSTNode) -> bool:
            # A change within a question whether values can be read. Of `known`, which also asks for a condition, only
            # the arguments as a whole: a condition that is not read counts as unknown.
            calls = [n for n in [*self.above, node] if isinstance(n, cst.Call)]
            asked = [tree.code_for_node(n.func).rpartition(".")[2] for n in calls]
            if QUESTIONS & set(asked) or (isinstance(node, cst.Call) and asked[-1] == "known"):
                return True
            call = next((n for n in reversed([*self.above, node]) if isinstance(n, cst.Call)), None)
            guard = GUARDS.get(tree.code_for_node(call.func).rpartition(".")[2]) if call else None
            if call is None or guard is None:
                return False
            if call is not node:  # a change of the argument's value
                inner = [n for n in self.above if isinstance(n, cst.Arg)]
                return bool(inner) and inner[-1].keyword is not None and inner[-1].keyword.value == guard
            # A change of the call, in which the argument is dropped or replaced by None.
            kept = {tree.code_for_node(arg).strip(" ,") for arg in new.args} if isinstance(new, cst.Call) else set()
            lost = [arg for arg in call.args if tree.code_for_node(arg).strip(" ,") not in kept]
            return len(lost) == 1 and lost[0].keyword is not None and lost[0].keyword.value == guard

    wrapper = MetadataWrapper(cst.parse_module(source))
    tree = wrapper.module
    wrapper.visit(Visitor())
    return mutants


GUARDS = {"zip": "strict", "astype": "copy"}
"""Keyword arguments that change no number: `strict` is a guard against mistakes, `copy` affects speed."""

QUESTIONS = {"values_visible", "all_visible"}
"""Functions that say whether values can be read. The answer selects between a fast path and a path that does not read
values; both give the same numbers. The tests of compiled code and of other devices check the answers themselves."""

CHECKS = ("_validate.", "call.", "Rule", "check_", "_store_checked")
"""How the names of checks start: strings among the arguments of these calls are words of a message."""


def _is_check(function: str) -> bool:
    return function.startswith(CHECKS) or function == "_validate"


def chosen(options: argparse.Namespace) -> tuple[list[Mutant], int]:
    """Return the mutants to run, in the order of rooms and lines, and the number of mutants that are left out."""
    # The order of all mutants is fixed, so that a seed draws the same sample from the same code.
    every = [mutant for room in options.rooms for module in modules_of(room) for mutant in mutants_of(module)]
    every = [mutant for mutant in every if options.only in f"{mutant.module}.{mutant.inside}"]
    if options.again:
        left = json.loads(options.again.read_text(encoding="utf-8"))["survivors"]
        # Lines are not compared, because they change if the code is edited.
        known = {tuple(entry[name] for name in ("module", "inside", "before", "after")) for entry in left}
        every = [mutant for mutant in every if (mutant.module, mutant.inside, mutant.before, mutant.after) in known]
    counted = [mutant for mutant in every if mutant.counts]
    left_out = len(every) - len(counted)
    # The sample is drawn before it is divided into shares, so that all shares together are the sample.
    if options.sample is not None and options.sample < len(counted):
        picked = sorted(random.Random(options.seed).sample(range(len(counted)), options.sample))
        counted = [counted[index] for index in picked]
    part, parts = map(int, options.share.split("/"))
    return counted[part - 1 :: parts], left_out


def main() -> None:
    """Parse the arguments, run the mutants of each room in a process of its own, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rooms", nargs="+", metavar="room", choices=list(SUITES), help=", ".join(SUITES))
    parser.add_argument("--sample", type=int, help="number of mutants to run, drawn from all rooms together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--only", default="", help="run only mutants in modules or functions whose name contains this")
    parser.add_argument("--share", default="1/1", help="share of the mutants to run; 2/3 is the second of three shares")
    parser.add_argument("--with", dest="files", action="append", default=[], metavar="FILE", help="add a test file")
    parser.add_argument("--choose", default="", help="text added to pytest's -k, such as ' and not facts'")
    parser.add_argument("--spaces", default="numpy", help="array libraries, in the format of DRRHO_SPACES")
    parser.add_argument("--then", default="numpy,strict-device1", help="array libraries for the survivors; empty: none")
    parser.add_argument("--jobs", type=int, default=1, help="number of rooms that run at the same time")
    parser.add_argument("--later", action="store_true", help="add the slow tests of the second pass")
    parser.add_argument("--again", type=Path, help="run only the survivors of this report")
    parser.add_argument("--out", type=Path, default=Path("build/mutation.json"), help="the report, a JSON file")
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.inner:
        _run_room(options)
        return
    begin = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as jobs:
        reports = list(jobs.map(lambda room: _both_passes(options, room), options.rooms))
    for report in reports:
        _print_score(report["room"], report)
    total = {name: sum(report[name] for report in reports) for name in ("mutants", KILLED, ENDLESS, SURVIVED)}
    _print_score("all", total)
    versions = {name: importlib.metadata.version(name) for name in ("mutmut", "numpy", "hypothesis", "pytest")}
    result = {
        "versions": versions,
        "sample": options.sample,
        "seed": options.seed,
        "seconds": round(time.monotonic() - begin),
        **total,
        "survivors": [entry for report in reports for entry in report["survivors"]],
        "rooms": reports,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _both_passes(options: argparse.Namespace, room: str) -> dict[str, Any]:
    """Run one room in NumPy; then run the survivors once more, with slow tests and further array libraries."""
    report = _in_a_process(options, room, options.spaces)
    if options.then and report["survivors"]:
        _again(options, report)
    return report


def _in_a_process(options: argparse.Namespace, room: str, spaces: str, *more: str) -> dict[str, Any]:
    """Run one room in a process of its own and return the report."""
    part = options.out.with_suffix(f".{room}.{options.share.replace('/', '-')}.json")
    command = [sys.executable, __file__, *sys.argv[1:], *more, "--inner", room, "--out", str(part)]
    subprocess.run(command, env=environment() | {"DRRHO_SPACES": spaces}, check=True)
    report: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
    part.unlink()
    return report


def _again(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Run the survivors of a room once more in other array libraries, and update the report."""
    first = options.out.with_suffix(f".{report['room']}.first.json")
    first.write_text(json.dumps({"survivors": report["survivors"]}), encoding="utf-8")
    # The survivors are named one by one, so the sample is not drawn again.
    more = ("--again", str(first), "--sample", str(sys.maxsize), "--share", "1/1", "--later")
    second = _in_a_process(options, report["room"], options.then, *more)
    first.unlink()
    for fate in (KILLED, ENDLESS):
        report[fate] += second[fate]
    report[SURVIVED], report["survivors"] = second[SURVIVED], second["survivors"]
    report["seconds"] += second["seconds"]
    report["cpu_seconds"] += second["cpu_seconds"]


def _print_score(name: str, report: dict[str, Any]) -> None:
    dead = report[KILLED] + report[ENDLESS]
    score = 100 * dead / max(report["mutants"], 1)
    print(f"{name}: {dead} of {report['mutants']} killed, {score:.1f} %", flush=True)


def _run_room(options: argparse.Namespace) -> None:
    """Run the mutants of one room and write the results."""
    # Each room and pass has its own process, because every fork contains all libraries that were ever loaded.
    room, (mutants, left_out) = options.inner, chosen(options)
    modules = modules_of(room)
    mutants = [mutant for mutant in mutants if mutant.module in modules]
    originals = {module: source_of(module) for module in modules}
    # The names of survivors are printed during the run, so the name of a change describes it completely.
    changes = [
        Change(
            f"{mutant.module}:{mutant.line} {mutant.inside}: {mutant.before}  ->  {mutant.after}",
            f"{PACKAGE}.{mutant.module}",
            mutant.source(originals[mutant.module]),
        )
        for mutant in mutants
    ]
    begin, used = time.monotonic(), _cpu()
    results = (
        run(changes, [*files(room, later=options.later), *options.files], choose=CHOOSE + options.choose)
        if changes
        else []
    )
    fates = Counter(result.fate for result in results)
    report = {
        "room": room,
        "left_out": left_out,
        "mutants": len(mutants),
        **{fate: fates[fate] for fate in (KILLED, ENDLESS, SURVIVED)},
        "seconds": round(time.monotonic() - begin),
        "cpu_seconds": round(_cpu() - used),
        "survivors": [
            mutant.described() for mutant, result in zip(mutants, results, strict=True) if result.fate == SURVIVED
        ],
        "killers": Counter(result.killer for result in results if result.fate == KILLED).most_common(),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return float(used.ru_utime + used.ru_stime)


if __name__ == "__main__":
    main()
