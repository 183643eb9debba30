"""The check of `make docs` that built pages load nothing from another host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "offline_docs.py"), "check", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A folder like that of built documentation: one page, MathJax, links that load nothing."""
    (tmp_path / "_static" / "mathjax").mkdir(parents=True)
    (tmp_path / "_static" / "mathjax" / "tex-svg.js").write_text("")
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="_static/a.css"><link rel="canonical" href="https://example.org/">'
        '<script src="_static/mathjax/tex-svg.js"></script><a href="https://example.org/">elsewhere</a>'
        '<img src="data:image/png;base64,">'
    )
    return tmp_path


def test_pages_that_load_their_own_files_pass(built: Path) -> None:
    assert (check(built).returncode, check(built).stderr) == (0, "")


@pytest.mark.parametrize(
    "element",
    [
        '<script async src="https://cdn.example.org/mathjax.js"></script>',
        '<link rel="stylesheet" href="//fonts.example.org/a.css">',
        '<img src="http://example.org/a.png">',
    ],
)
def test_page_that_loads_from_another_host_fails(built: Path, element: str) -> None:
    (built / "theory").mkdir()
    (built / "theory" / "page.html").write_text(element)
    done = check(built)
    assert done.returncode == 1
    assert done.stderr.startswith("theory/page.html loads ")
    assert "example.org" in done.stderr


def test_missing_mathjax_fails(built: Path) -> None:
    (built / "_static" / "mathjax" / "tex-svg.js").unlink()
    assert check(built).returncode == 1


def test_folder_without_pages_fails(tmp_path: Path) -> None:
    assert check(tmp_path).returncode == 1


def test_documentation_is_built_with_the_file_that_is_checked() -> None:
    settings = (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    assert 'mathjax_path = "mathjax/tex-svg.js"' in settings
    assert "http" not in settings
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.partition("\ndocs: ")[2].partition("\n\n")[0]
    assert [word for word in ("fetch", "sphinx", "check") if word in recipe] == ["fetch", "sphinx", "check"]
