"""Prose about code is tested: paths, links, commands, variables, names, configs, the operator table and the notebooks."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import fptquant as fq
from fptquant.cli import app
from fptquant.config.tables import load_table, table_cells
from fptquant.reports.table import format_perplexity
from tests.notebooks import KEY, NOTEBOOKS, made_from, what_changed
from tests.operator_table import operator_table
from tests.tiny_folder import save_tiny_folder

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "csrc").rglob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
METHODS, METHOD_PAGES = ROOT / "configs" / "methods", ROOT / "docs" / "methods"
RESULTS = ROOT / "docs" / "results"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SOURCE_ENDINGS = (".c", ".h", ".cpp", ".py", ".md", ".yaml", ".toml", ".ipynb", ".in")
PRODUCTS = (".venv", "out/", "runs/", "build/", "model.safetensors", "config.json", "merged/", "transformed/", "Python.h")
"""Beginnings of paths that commands make or users bring; they are not in the repository."""


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    """Markdown without its fenced blocks."""
    return FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def notebook_markdown(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def text_of(document: Path) -> str:
    return notebook_markdown(document) if document.suffix == ".ipynb" else document.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ paths and links


def looks_like_a_path(code: str) -> bool:
    """A word with a slash that begins with something in the repository, or with the ending of a source file."""
    if " " in code or code.startswith(("-", "http", "~", "$", "/")) or "(" in code or "=" in code or code.startswith(PRODUCTS):
        return False
    first = code.split("/")[0]
    return code.endswith(SOURCE_ENDINGS) or ("/" in code and (ROOT / first).exists())


def exists(code: str, document: Path) -> bool:
    """A path starts at the root or beside the document; of ``csrc/cpu/<isa>/`` the folder before the placeholder must exist."""
    path = code.partition("<")[0].rpartition("/")[0] if "<" in code else code
    return any((folder / path).exists() for folder in (ROOT, document.parent))


@pytest.mark.parametrize("document", [*DOCUMENTS, *NOTEBOOKS], ids=ids)
def test_every_path_in_backticks_exists(document: Path) -> None:
    missing = [code for code in inline_code(text_of(document)) if looks_like_a_path(code) and not exists(code, document)]
    assert not missing


@pytest.mark.parametrize("document", [*DOCUMENTS, *NOTEBOOKS], ids=ids)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(text_of(document)))
    local = [link.partition("#")[0] for link in links if not link.startswith(("http", "#"))]
    assert not [link for link in local if not (document.parent / link).exists() and not drawn_from_a_recipe(document, link)]


def drawn_from_a_recipe(document: Path, link: str) -> bool:
    """A picture of a method, which is made when the site is built."""
    return (
        document.parent == METHOD_PAGES
        and link == f"figures/{Path(link).stem}.svg"
        and (METHODS / f"{Path(link).stem}.yaml").exists()
    )


def test_every_method_has_its_page() -> None:
    index = (METHOD_PAGES / "index.md").read_text(encoding="utf-8").splitlines()
    pages = {page.stem: page.read_text(encoding="utf-8") for page in METHOD_PAGES.glob("*.md") if page.stem != "index"}
    assert [line for line in index if line in pages] == sorted(pages, key=index.index)
    named = {name for page in pages.values() for name in re.findall(r"fptquant run ([\w-]+)", page)}
    assert named == {recipe.stem for recipe in METHODS.glob("*.yaml")}


@pytest.mark.parametrize("document", [*DOCUMENTS, *NOTEBOOKS], ids=ids)
def test_every_dotted_name_can_be_imported(document: Path) -> None:
    names = [code.removesuffix("()") for code in inline_code(text_of(document))]
    dotted = [name for name in names if re.fullmatch(r"fptquant(\.\w+)+", name)]
    assert not [name for name in dotted if not resolves(name)]


def resolves(dotted: str) -> bool:
    """Whether ``a.b.C.d`` is a module or an attribute of one."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            if not hasattr(value, name) and name not in getattr(value, "__annotations__", {}):
                return False
            value = getattr(value, name, None)
        return True
    return False


@cache
def words_of_the_code() -> frozenset[str]:
    """Every identifier in sources, tests and configs."""
    files = [path for folder in ("fptquant", "csrc", "tests", "configs", "benchmarks") for path in (ROOT / folder).rglob("*.*")]
    texts = (path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".c", ".h", ".cpp", ".yaml"))
    return frozenset(re.findall(r"\w+", "\n".join(texts)))


@pytest.mark.parametrize("document", [*DOCUMENTS, *NOTEBOOKS], ids=ids)
def test_every_name_in_backticks_is_used_by_the_code(document: Path) -> None:
    codes = (re.fullmatch(r"([A-Za-z_]\w*)(\([\w, ]*\))?", code) for code in inline_code(text_of(document)))
    names = {match[1] for match in codes if match}
    outside = {name for name in names if name.isupper() and not name.startswith("FPTQUANT_")}  # variables and words of others
    assert names - outside <= words_of_the_code(), names - outside - words_of_the_code()


# ------------------------------------------------------------------------------------------- what method pages point at

REFERENCE = re.compile(r"\[`[^`]+`\]\(([^)]+)\)((?:,?\s+(?:and\s+)?`[^`]+`)+)")
"""A link to a file and the symbols behind it that are to be found there."""
PAGES_OF_METHODS = [page for page in sorted(METHOD_PAGES.glob("*.md")) if page.stem != "index"]


@cache
def symbols_of(path: Path) -> frozenset[str]:
    """What a Python file defines, members with the name of their class; of any other file all words."""
    text = path.read_text(encoding="utf-8")
    return frozenset(defined(ast.parse(text).body) if path.suffix == ".py" else re.findall(r"\w+", text))


def defined(body: list[ast.stmt]) -> Iterator[str]:
    """Names of functions, classes and variables, and ``Class.member`` of what a class or its methods define."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from (node.name, *(f"{node.name}.{member}" for member in (*defined(node.body), *attributes(node))))
        elif isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def attributes(node: ast.ClassDef) -> Iterator[str]:
    """``name`` of every ``self.name = ...``."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and getattr(part.value, "id", "") == "self":
            yield part.attr


@pytest.mark.parametrize("page", PAGES_OF_METHODS, ids=ids)
def test_every_symbol_of_a_method_page_is_in_the_file_that_it_names(page: Path) -> None:
    references = REFERENCE.findall(page.read_text(encoding="utf-8"))
    named = [(page.parent / link, symbol) for link, symbols in references for symbol in re.findall(r"`([^`]+)`", symbols)]
    assert len(named) >= 10
    assert not [(path.name, symbol) for path, symbol in named if symbol not in symbols_of(path.resolve())]


def test_a_symbol_that_is_used_but_not_defined_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text("from a import used\nclass C:\n    x: int\n    def f(self):\n        self.y, g = used(1), 2\n")
    assert symbols_of(file) == {"C", "C.x", "C.f", "C.y"}


# -------------------------------------------------------------------------------------------------------------- commands


def commands(text: str) -> Iterator[list[str]]:
    """Every ``make ...`` and ``fptquant ...`` of a document: in backticks, or a line of a shell block."""
    blocks = [body.splitlines() for language, body in FENCE.findall(text) if language in ("", "sh", "bash", "console")]
    lines = [line.removeprefix("$ ").strip() for body in blocks for line in body]
    for line in [*lines, *inline_code(text)]:
        words = shlex.split(line, comments=True) if re.match(r"(make|fptquant|python -m fptquant)(\s|$)", line) else []
        if words[:3] == ["python", "-m", "fptquant"]:
            words = words[2:]
        if words:
            yield words


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def check_fptquant(arguments: list[str]) -> None:
    """The subcommand and its options exist, and a config with such overrides is valid."""
    if not arguments or arguments[0] == "--help":
        return
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    flags = {flag: parameter for parameter in command.params for flag in parameter.opts + parameter.secondary_opts}
    words, rest = [], iter(arguments[1:])
    for word in rest:
        if word.startswith("-"):
            assert word in flags or word in ("-h", "--help"), f"{arguments[0]} has no option {word}"
            if word in flags and not getattr(flags[word], "is_flag", False):
                next(rest)
        else:
            words.append(word)
    placeholders = any(word.isupper() or "KEY=" in word or "..." in word for word in words)
    if arguments[0] == "table" and words and not placeholders:
        table_cells(load_table(*words))
    elif arguments[0] in ("show", "validate", "run") and words and not placeholders and words[0] != "my.yaml":
        fq.load_config(*words)


@pytest.mark.parametrize("document", [*DOCUMENTS, *NOTEBOOKS], ids=ids)
def test_every_command_exists(document: Path) -> None:
    for program, *arguments in commands(text_of(document)):
        if program == "make":
            targets = [word for word in arguments if "=" not in word]
            assert set(targets) <= make_targets(), targets
        else:
            check_fptquant(arguments)


def test_contributing_names_every_make_target() -> None:
    named = {words[1] for words in commands((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")) if words[0] == "make"}
    assert named >= make_targets() - {"help"}


# ---------------------------------------------------------------------------------------------------------- python blocks


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_python_blocks_use_the_real_interface(document: Path) -> None:
    """Blocks are not run (they take minutes): names must exist, arguments must fit, configs must load."""
    for language, body in FENCE.findall(document.read_text(encoding="utf-8")):
        if language == "python":
            check_python(ast.parse(body))


def check_python(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = node.func
            if isinstance(called.value, ast.Name) and called.value.id == "fq":
                function = getattr(fq, called.attr)
                keywords = {str(keyword.arg): None for keyword in node.keywords}
                inspect.signature(function).bind(*node.args, **keywords)
                if called.attr == "load_config":
                    fq.load_config(*[ast.literal_eval(argument) for argument in node.args])
            elif isinstance(called.value, ast.Name) and called.value.id == "result":
                assert hasattr(fq.CalibrationResult, called.attr)


# -------------------------------------------------------------------------------------------- variables, configs, tables


def test_every_variable_that_is_read_is_documented() -> None:
    sources = [path for folder in ("fptquant", "csrc", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.[cph]*")]
    sources += [ROOT / "setup.py", ROOT / "Makefile"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.suffix in (".py", ".c", ".h", ".cpp", ""))
    read = set(re.findall(r"\bFPTQUANT_[A-Z0-9_]+\b", code))
    documented = set(re.findall(r"\bFPTQUANT_[A-Z0-9_]+\b", (ROOT / "docs" / "env_vars.md").read_text(encoding="utf-8")))
    assert documented == read


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_every_config_loads(path: Path) -> None:
    if path.parent.name == "tables":
        table = load_table(path)
        assert table.name == path.stem
        assert len(table_cells(table)) == len(table.models) * len(table.methods) * len(table.settings)
    else:
        assert fq.load_config(path).name == path.stem


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.parent.name == "tables"], ids=ids)
def test_no_two_methods_of_a_table_are_the_same(path: Path) -> None:
    """A recipe that changes can make an override of it say nothing."""
    methods: dict[str, list[str]] = {}
    for cell in table_cells(load_table(path)):
        methods.setdefault(cell.config.name, []).append(cell.config.model_copy(update={"name": "any"}).model_dump_json())
    alike = [(one, other) for one, other in itertools.combinations(methods, 2) if methods[one] == methods[other]]
    assert not alike


def recipes(document: Path) -> list[str]:
    """Every YAML block of a document that is a whole recipe: it has a name."""
    blocks = [body for language, body in FENCE.findall(document.read_text(encoding="utf-8")) if language == "yaml"]
    return [body for body in blocks if re.search(r"^name:", body, re.MULTILINE)]


WITH_RECIPES = [document for document in DOCUMENTS if recipes(document)]


@pytest.mark.parametrize("document", WITH_RECIPES, ids=ids)
def test_a_recipe_in_a_document_is_its_file_or_a_valid_one_of_its_own(document: Path, tmp_path: Path) -> None:
    for text in recipes(document):
        written = tmp_path / "recipe.yaml"
        written.write_text(text, encoding="utf-8")
        name = fq.load_config(written).name
        if (shipped := METHODS / f"{name}.yaml").exists():
            assert text == shipped.read_text(encoding="utf-8"), f"{name} is quoted as it was once"


def test_the_operator_table_matches_the_tree() -> None:
    expected = operator_table()
    text = (ROOT / "csrc" / "README.md").read_text(encoding="utf-8")
    assert expected in text, f"csrc/README.md is out of date; python -m tests.operator_table prints this table:\n{expected}"


@pytest.mark.parametrize(("document", "rows"), [("README.md", 7), ("docs/results.md", 12)])
def test_quoted_figures_are_those_of_the_cells(document: str, rows: int) -> None:
    """A table with a column for each setting, ``perplexity / divergence``; what has no cell is no figure of ours."""
    cells = RESULTS / "smollm2-static" / "cells" / "smollm2-135m"
    text = (ROOT / document).read_text(encoding="utf-8")
    table = text.partition("<!-- table: smollm2-static -->\n")[2].partition("<!-- end of table: smollm2-static -->")[0]
    head, _, *lines = ([part.strip() for part in line.strip("|").split("|")] for line in table.splitlines())
    found = 0
    for method, *figures in lines:
        folders = [cells / f"{method.partition(',')[0]}-{setting}" for setting in head[1:5]]
        if not any(folder.is_dir() for folder in folders):
            continue
        for folder, figure in zip(folders, figures[:4], strict=True):
            measured = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["results"][1]["evaluation"]
            expected = f"{format_perplexity(measured['perplexity'])} / {measured['jsd']:.4f}".replace("/ 0.", "/ .")
            assert figure.replace("*", "") == expected, folder.name
        found += 1
    assert found == rows


# -------------------------------------------------------------------------------------------------------------- notebooks


@cache
def notebook_code(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_the_notebook_is_stored_executed(path: Path) -> None:
    cells = notebook_code(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] in ("error", "stream")]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert not re.search(r'"[^"\n]*(/home/|/root/|/tmp/)', json.dumps([output for output in outputs if "text" in output]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_the_outputs_of_the_notebook_are_of_its_code_and_of_today_s_recipes(path: Path) -> None:
    changed = what_changed(json.loads(path.read_text(encoding="utf-8")))
    assert not changed, f"changed since the notebook was run: {changed}; python -m tests.notebooks {path.stem[:2]} runs it again"


def test_a_changed_cell_and_a_changed_recipe_make_outputs_old() -> None:
    def book(code: str, made: dict[str, Any]) -> dict[str, Any]:
        return {"cells": [{"cell_type": "code", "source": [code]}], "metadata": {KEY: made}}

    code = "config = fq.load_config('fptquant-local')"
    made = made_from([code])
    assert what_changed(book(code, made)) == []
    assert what_changed(book(f"{code}  # another", made)) == ["the code"]
    assert what_changed({**book(code, made), "metadata": {}}) == ["nothing says what the outputs were made from"]

    recipe = made["recipes"]["fptquant-local"]
    recipe["quantization"]["activation"]["centered"] = False
    assert what_changed(book(code, made)) == ["fptquant-local: quantization.activation.centered: False, now True"]
    del recipe["quantization"]["activation"]["centered"]  # a setting that there was not, which the recipe uses
    assert what_changed(book(code, made)) == ["fptquant-local: quantization.activation.centered: absent, now True"]
    recipe["quantization"]["activation"]["centered"] = True
    del recipe["quantization"]["weight"]["symmetric"]  # one that it leaves at its default
    assert what_changed(book(code, made)) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_the_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, with a tiny random model in the place of the one it names."""
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = save_tiny_folder(tmp_path / "model", max_position_embeddings=256)
    book = nbformat.read(path, as_version=4)
    cell = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = f"MODEL = {str(folder)!r}"
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
