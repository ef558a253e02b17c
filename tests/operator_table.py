"""The table of operators in csrc/README.md, made from the files that are there: ``python -m tests.operator_table``."""

from __future__ import annotations

import ast
from pathlib import Path

import fptquant.ops

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
ISAS = ("avx2", "avx512")
NO_OPERATORS = {"dispatch", "table", "bind"}
"""C files beside the operators' own."""
HEAD = ("operator", "scalar", "avx2", "avx512", "cuda", "binding", "python", "NumPy", "tests")


def operators() -> list[str]:
    """Names of operator files, in C or in Python."""
    in_c = {path.stem for folder in ("cpu", "torch") for path in (CSRC / folder).glob("*.c")} - NO_OPERATORS
    in_python = {path.stem for path in (ROOT / "fptquant" / "ops").glob("*.py") if not path.stem.startswith(("_", "reference"))}
    return sorted(in_c | in_python)


def _link(path: Path, text: str) -> str | None:
    """A Markdown link from csrc/README.md, or None if there is no such file."""
    if not path.is_file():
        return None
    target = path.relative_to(CSRC) if path.is_relative_to(CSRC) else Path("..", path.relative_to(ROOT))
    return f"[{text}]({target})"


def _python(operator: str) -> str | None:
    """The operator's own file, or the one in which its public function stands."""
    path = ROOT / "fptquant" / "ops" / f"{operator}.py"
    if not path.is_file():
        module = getattr(fptquant.ops, operator).__module__
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return _link(path, "ops")


def _numpy_functions() -> set[str]:
    tree = ast.parse((ROOT / "fptquant" / "numpy.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def _cells(operator: str) -> list[str]:
    scalar = _link(CSRC / "cpu" / f"{operator}.c", "C")
    twins = [_link(CSRC / "cpu" / isa / f"{operator}.c", "twin") or ("compiled" if scalar else "reference") for isa in ISAS]
    folder = ROOT / "tests"
    tests = [_link(folder / "ops" / f"test_{operator}.py", "ops"), _link(folder / "csrc" / f"test_{operator}.c", "C")]
    return [
        f"`{operator}`",
        scalar or "reference",
        *twins,
        _link(CSRC / "cuda" / f"{operator}.cu", "CUDA") or "reference",
        _link(CSRC / "torch" / f"{operator}.c", "C") or "-",
        _python(operator) or "-",
        "yes" if operator in _numpy_functions() else "-",
        ", ".join(test for test in tests if test) or "-",
    ]


def operator_table() -> str:
    """The table as Markdown, one line for each operator file."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += [f"| {' | '.join(_cells(operator))} |" for operator in operators()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(operator_table())
