"""The documentation as a site: `make docs`. Sources are the repository's own Markdown files, notebooks and docstrings.

The source folder is the repository's root, so that a link in a document leads to the same place in the site and in an editor.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import figures  # noqa: E402

import fptquant  # noqa: E402

project = "fptquant"
author = "the fptquant authors"
release = version = fptquant.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["*.md", "csrc/README.md", "docs/**", "notebooks/*.ipynb"]
exclude_patterns = ["docs/*.py", "docs/results/*/cells"]
nb_execution_mode = "off"  # they are stored executed, and tests run them
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nitpicky = False
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_title = "fptquant"
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_custom_sections = [(name, "returns_style") for name in ("Shape", "Gradient", "Source")]


def _plain_docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: a star or a bar in a formula is no markup."""
    in_example = in_block = False
    for number, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        in_block = in_block and (line.startswith(" ") or not line)  # what is indented after a line that ends in ::
        if not (in_example or in_block):
            parts = re.split(r"(``.*?``|`.*?`)", line)  # every second one stands in backticks
            parts[::2] = [re.sub(r"([*|_])(?=\S)", r"\\\1", part) for part in parts[::2]]
            lines[number] = "".join(parts)
        in_block = in_block or line.endswith("::")


def setup(app: Any) -> None:
    os.environ.setdefault("MPLBACKEND", "Agg")
    app.connect("autodoc-process-docstring", _plain_docstring, priority=400)
    figures.draw_all(ROOT / "docs" / "methods" / "figures")
