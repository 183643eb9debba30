"""The files of the house agree with each other: versions, commands, pinned dependencies, the citation."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import drrho_core

ROOT = Path(__file__).parents[2]


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(_read("pyproject.toml"))["project"]
    return found


@pytest.fixture(scope="module")
def pinned() -> dict[str, Version]:
    lines = [line for line in _read("constraints.txt").splitlines() if line and not line.startswith("#")]
    parts = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line) for line in lines]
    assert [line for line, part in zip(lines, parts, strict=True) if part is None] == []  # no host, path or local build
    versions = {canonicalize_name(part[1]): Version(part[2]) for part in parts if part is not None}
    assert len(versions) == len(lines)
    return versions


def test_every_direct_dependency_is_pinned_to_a_version_that_it_allows(
    project: dict[str, Any], pinned: dict[str, Version]
) -> None:
    groups = {"base": project["dependencies"], **project["optional-dependencies"]}
    wrong = []
    for group, requirements in groups.items():
        for requirement in map(Requirement, requirements):
            name = canonicalize_name(requirement.name)
            if group in ("cupy", "cupy13", "triton") or name == "drrho-core":
                continue
            if name not in pinned or not requirement.specifier.contains(pinned[name], prereleases=True):
                wrong.append(f"{group}: {requirement}")
    assert wrong == []


def test_extras_that_the_makefile_and_the_readme_name_exist(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    named = {
        name
        for value in re.findall(r"^EXTRAS_\w+ := (.*)$", _read("Makefile"), re.MULTILINE)
        for name in value.split(",")
    }
    named |= {name for value in re.findall(r'-e "\.\[([\w,]+)\]"', _read("README.md")) for name in value.split(",")}
    assert named
    assert named <= set(extras)
    table = _read("README.md").partition("| extra |")[2].partition("\n\n")[0]
    assert {
        name
        for row in table.splitlines()
        for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row[:1] else "")
    } == set(extras)


def test_ci_runs_the_test_command_of_the_readme_and_the_checks_of_the_hooks() -> None:
    targets = re.findall(r"^([a-z]+):", _read("Makefile"), re.MULTILINE)
    in_readme = re.findall(r"^make (\w+)", _read("README.md"), re.MULTILINE)
    in_ci = re.findall(r'^ *section "[\w ]+" make (\w+)(?: |$)', _read(".ci/run"), re.MULTILINE)
    in_hooks = re.findall(r"entry: make --silent (\w+)$", _read(".pre-commit-config.yaml"), re.MULTILINE)
    (checks,) = re.findall(r"^check: (.*)$", _read("Makefile"), re.MULTILINE)
    assert in_readme == ["demo", "test"]
    assert in_hooks == checks.split()
    assert in_ci == [*checks.split(), "gpu", "test"]
    assert '\nsection "GPU dry run" make gpu GPU_FLAGS=--dry-run ' in _read(".ci/run")
    assert set(in_readme + in_ci) <= set(targets)


def test_one_version_everywhere(project: dict[str, Any]) -> None:
    version = project["version"]
    assert drrho_core.__version__ == version
    assert f"\nversion: {version}\n" in _read("CITATION.cff")
    assert f"\n## [{version}]" in _read("CHANGELOG.md")


def test_the_citation_names_the_paper_as_the_readme_does() -> None:
    # A light check: YAML's own parser is no dependency of the tests.
    lines = [line for line in _read("CITATION.cff").splitlines() if line.strip()]
    keys = [line.partition(":")[0] for line in lines if re.match(r"[a-z-]+:", line)]
    assert "\t" not in _read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "license", "preferred-citation"} <= set(keys)
    assert len(keys) == len(set(keys))
    citation = _read("CITATION.cff").partition("preferred-citation:")[2]
    given = re.findall(r"given-names: (.*)", citation)
    family = re.findall(r"family-names: (.*)", citation)
    authors = ", ".join(" ".join(names) for names in zip(given, family, strict=True))
    (title,) = re.findall(r'title: "(Model .*)"', citation)
    quoted = " ".join(_read("README.md").replace("\n> ", " ").split())
    assert f"{authors}: *{title}.* ICML 2025" in quoted
    assert "arXiv:2505.06699" in citation


def test_no_file_holds_an_unfinished_merge() -> None:
    folders = [
        "drrho_core",
        "drrho_clip",
        "backends",
        "reference_impl",
        "docs",
        "tests",
        "benchmarks",
        "tools",
        "examples",
    ]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".md", ".rst"}]
    files += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".txt"}]
    assert len(files) > 300
    markers = ("<" * 7 + " ", ">" * 7 + " ")
    unfinished = [
        str(path.relative_to(ROOT))
        for path in files
        if any(line.startswith(markers) for line in path.read_text(encoding="utf-8").splitlines())
    ]
    assert unfinished == []
