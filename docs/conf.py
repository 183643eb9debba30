"""Configuration of Sphinx: `make docs` builds the pages of this folder and a reference of the public functions."""

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

# MathJax draws the formulas. A copy of MathJax belongs to the built pages, so that formulas appear without a network.
# tools/offline_docs.py downloads this copy before the build.
html_static_path = ["../build/docs-static"]
mathjax_path = "mathjax/tex-svg.js"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Sphinx cannot resolve links to files outside this folder (code, README); tests/docs checks these links.
suppress_warnings = ["myst.xref_missing", "ref.python"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the types in the docstrings say more than the annotations
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
