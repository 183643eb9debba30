"""Sphinx: the Markdown pages of this folder and a reference of the public functions, by `make docs`."""

from __future__ import annotations

from importlib.metadata import version as installed

project = "drrho_core"
author = "The drrho_core developers"
version = release = installed("drrho-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
root_doc = "index"
default_role = "py:obj"
html_theme = "furo"
html_title = f"drrho_core {version}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Links out of this folder (the code, the README) are for readers of the repository; tests/docs checks them.
suppress_warnings = ["myst.xref_missing", "ref.python"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc's own types say more than the annotations do
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
