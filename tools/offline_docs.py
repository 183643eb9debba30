"""Make the documentation readable without a network: fetch MathJax once, and check the built pages.

    python tools/offline_docs.py fetch             # MathJax of a pinned version into build/docs-static, with npm
    python tools/offline_docs.py check build/docs  # fails if a page loads anything from another host

`make docs` runs both. MathJax (https://www.mathjax.org, Apache License 2.0) typesets the formulas in the browser. The
pages need one file of MathJax, with TeX input, SVG output and the fonts. This file has 2 MB, so it is not committed.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

PACKAGE, VERSION = "mathjax", "3.2.2"
SHA256 = "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09"
"""Hash of the package's file on the npm registry."""

FILES = ("package/es5/tex-svg.js", "package/LICENSE")
FOLDER = Path(__file__).resolve().parents[1] / "build" / "docs-static" / "mathjax"

# The attributes with which a page loads other files; a link that the reader must click loads no file.
_LOADING = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


def fetch() -> None:
    """Put MathJax and its licence into `FOLDER`, unless they are there already.

    Raises
    ------
    SystemExit
        npm is missing or fails, or the fetched file is not the pinned one.
    """
    if all((FOLDER / Path(name).name).is_file() for name in FILES):
        return
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("make docs needs npm to fetch MathJax, got none on the PATH (Debian: apt-get install npm)")
    with tempfile.TemporaryDirectory() as temporary:
        command = [npm, "pack", "--silent", "--pack-destination", temporary, f"{PACKAGE}@{VERSION}"]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"make docs needs {PACKAGE} {VERSION} from the npm registry, got an error from npm")
        package = Path(temporary) / f"{PACKAGE}-{VERSION}.tgz"
        # npm compares the file with the registry. This line compares the file with the version that was reviewed.
        digest = hashlib.sha256(package.read_bytes()).hexdigest()
        if digest != SHA256:
            sys.exit(f"{package.name} must have the SHA-256 {SHA256}, got {digest}")
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tarfile.open(package) as archive:
            for name in FILES:
                content = archive.extractfile(name)
                if content is None:
                    sys.exit(f"{package.name} must hold {name}, got no such file")
                (FOLDER / Path(name).name).write_bytes(content.read())


def external_files(page: str) -> list[str]:
    """Return the addresses on other hosts from which an HTML page would load files.

    Examples
    --------
    >>> external_files('<a href="https://a.org">a</a><script src="https://b.org/b.js"></script><img src="c.png">')
    ['https://b.org/b.js']
    """
    addresses = []

    class Page(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            address = dict(attrs).get(_LOADING.get(tag, "")) or ""
            # Links of these kinds name another page and load no file.
            names_only = tag == "link" and dict(attrs).get("rel") in ("canonical", "next", "prev", "search", "author")
            if urlsplit(address).netloc and not names_only:
                addresses.append(address)

    Page().feed(page)
    return addresses


def check(folder: Path) -> None:
    """Check every page of a folder.

    Raises
    ------
    SystemExit
        There is no page, a page loads a file from another host, or MathJax is missing.
    """
    # Without MathJax the pages would show formulas as TeX source, without an error.
    pages = sorted(folder.rglob("*.html"))
    problems = [
        f"{page.relative_to(folder)} loads {address}"
        for page in pages
        for address in external_files(page.read_text(encoding="utf-8"))
    ]
    if not pages or not (folder / "_static" / "mathjax" / "tex-svg.js").is_file():
        problems.append(f"{folder} must hold pages and _static/mathjax/tex-svg.js, got {len(pages)} pages")
    if problems:
        sys.exit("\n".join(problems))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the two commands of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="fetch MathJax into build/docs-static")
    commands.add_parser("check", help="check built pages").add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "fetch":
        fetch()
    else:
        check(options.folder)


if __name__ == "__main__":
    main()
