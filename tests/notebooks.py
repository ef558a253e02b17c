"""The stored notebooks: ``python -m tests.notebooks`` runs every cell and saves, with what the outputs were made from.

That is a digest of the code and every setting of the recipes that it names. A recipe that has changed since makes the outputs
old, and so does a changed cell; `tests/test_docs.py` asks `what_changed`. What the package computes may change too, which is not
seen here: after such a change run the notebooks again.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fptquant as fq
from fptquant.config.differences import differences, flat
from fptquant.config.loading import shipped_configs

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KEY = "fptquant"
"""Where a notebook's metadata holds what its outputs were made from."""


def code_cells(book: dict[str, Any]) -> list[str]:
    """The code of each cell; a file holds it as a list of lines, nbformat as one text."""
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def digest(cells: Sequence[str]) -> str:
    """SHA-256 of the code, cell by cell.

    >>> digest(["a", "b"]) == digest(["a", "b"]), digest(["a", "b"]) == digest(["ab"])
    (True, False)
    """
    return hashlib.sha256(json.dumps(list(cells)).encode()).hexdigest()


def recipes_named(cells: Sequence[str]) -> list[str]:
    """The shipped methods whose names stand in the strings of the code, alone or within a longer text.

    >>> recipes_named(['import fptquant as fq; fq.load_config("rtn", "seed=1")', 'text = "extends: fptquant-local"'])
    ['fptquant-local', 'rtn']
    """
    nodes = (node for cell in cells for node in ast.walk(ast.parse(cell)))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    words = {word for text in texts for word in re.findall(r"[\w-]+", text)}
    return sorted(words & shipped_configs("methods").keys())


def made_from(cells: Sequence[str]) -> dict[str, Any]:
    """What is kept in a notebook's metadata: settings, not their digest, so that it can be said which have changed."""
    recipes = {name: fq.load_config(name).model_dump(mode="json") for name in recipes_named(cells)}
    return {"code": digest(cells), "recipes": recipes}


def what_changed(book: dict[str, Any]) -> list[str]:
    """What was another when the notebook was run, one line each. A new setting that a recipe leaves at its default is no change."""
    cells, stored = code_cells(book), book["metadata"].get(KEY)
    if stored is None:
        return ["nothing says what the outputs were made from"]
    changed = [] if stored["code"] == digest(cells) else ["the code"]
    for name in recipes_named(cells):
        config, then = fq.load_config(name), stored["recipes"].get(name, {})
        new = {key for key, _ in flat(config.model_dump(mode="json"))} - {key for key, _ in flat(then)}
        chosen = {key for key, _ in flat(config.model_dump(mode="json", exclude_defaults=True))}
        changed += [f"{name}: {line}" for line in differences(then, config.model_dump(mode="json"), ignored=new - chosen)]
    return changed


def run_and_save(path: Path) -> None:
    """Runs every cell in a new kernel, in the repository's root, and saves the notebook in its place."""
    import nbclient
    import nbformat

    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, without ipywidgets; what is stored has no warnings
    book = nbformat.read(path, as_version=4)
    kept = dict(book.metadata)
    made = made_from(code_cells(book))
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(book, timeout=None, kernel_name="python3", record_timing=False, resources=resources).execute()
    book.metadata = nbformat.from_dict({**kept, KEY: made})  # a kernel adds the version of its Python
    nbformat.write(book, path)


def main(names: Sequence[str]) -> None:
    """All notebooks, or those whose file names begin with one of ``names``."""
    for path in NOTEBOOKS:
        if not names or path.name.startswith(tuple(names)):
            run_and_save(path)
            print(f"{path.relative_to(ROOT)}: run and saved")


if __name__ == "__main__":
    main(sys.argv[1:])
