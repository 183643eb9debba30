"""Links, paths and names in the README and the docs point to something that exists."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("[a-z]*/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = list(dict.fromkeys(PAGES))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:drrho_core|backends|reference_impl|docs|tests|benchmarks|\.ci)/[^`\s]*)`")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)

pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def _text(page: Path) -> str:
    return COMMENT.sub("", page.read_text(encoding="utf-8"))


def _anchors(page: Path) -> set[str]:
    """Return the anchors that a Markdown viewer gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", _text(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(_text(page)):
        if target.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        goal = (page.parent / file) if file else page
        if not goal.exists() or (anchor and anchor not in _anchors(goal)):
            broken.append(target)
    assert broken == []


@pages
def test_paths_in_the_text_exist(page: Path) -> None:
    paths = [path for path in PATH.findall(_text(page)) if "NAME" not in path]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pages
def test_formulas_are_whole(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", _text(page), flags=re.MULTILINE | re.DOTALL)
    display = text.split("$$")
    assert len(display) % 2 == 1, "a $$ is not closed"
    formulas = display[1::2]
    for paragraph in "\n\n".join(display[::2]).split("\n\n"):
        inline = paragraph.split("$")
        assert len(inline) % 2 == 1, paragraph
        formulas += inline[1::2]
    for formula in formulas:
        assert formula.count("{") == formula.count("}"), formula
        assert len(re.findall(r"[(\[]", formula)) == len(re.findall(r"[)\]]", formula)), formula  # (0, 1] is whole, too
        assert formula.count("\\lbrace") == formula.count("\\rbrace"), formula
        # Markdown takes the backslash away before punctuation, and one viewer forbids a macro.
        assert re.findall(r"\\[,;:!{}]|operatorname", formula) == [], formula


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page in seen:
            continue
        seen.add(page)
        targets = [target.partition("#")[0] for target in LINK.findall(_text(page)) if not target.startswith("http")]
        waiting += [page.parent / file for file in targets if file.endswith(".md")]
    assert {page.resolve() for page in PAGES} - seen == set()


PACKAGES = ("drrho_core", "drrho_torch", "drrho_jax")


def _section(package: str) -> str:
    """Return what docs/api.md says about a package."""
    parts = re.split(r"^## ", (ROOT / "docs/api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (part,) = [part for part in parts if part.startswith(f"`{package}`\n")]
    return part


def _import(package: str) -> object:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_listed_and_every_listed_name_exists(package: str) -> None:
    module: Any = _import(package)
    listed = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*)$", _section(package), flags=re.MULTILINE))))
    assert set(module.__all__) - listed == set()
    named = {
        name
        for cell in re.findall(r"^\| (`.*?) \|", _section(package), re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cell)
    }
    modules = [module, *(getattr(module, name) for name in dir(module) if inspect.ismodule(getattr(module, name)))]
    assert {name for name in named if not any(hasattr(one, name) for one in modules)} == set()
