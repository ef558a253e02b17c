"""Compiles the core with AddressSanitizer and UBSan and runs its C tests; compares the binding with PyTorch's headers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
FLAGS = ["-std=gnu17", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def core_objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("core")
    sources = sorted([*CSRC.glob("cpu/*.c"), *CSRC.glob("ops/*.c")])
    objects = [folder / f"{source.parent.name}_{source.stem}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        run("gcc", *FLAGS, *SANITIZERS, "-c", source, "-o", target)
    return objects


@pytest.mark.parametrize("source", sorted(HERE.glob("test_*.c")), ids=lambda path: path.stem)
def test_under_sanitizers(source: Path, core_objects: list[Path], tmp_path: Path) -> None:
    program = tmp_path / source.stem
    run("gcc", *FLAGS, *SANITIZERS, source, *core_objects, "-lm", "-o", program)
    output = run(program)
    assert ", 0 failures" in output


def test_binding_conforms_to_installed_headers() -> None:
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed; PyTorch's headers are C++")
    include = Path(torch.__file__).parent / "include"
    run("g++", "-std=c++20", "-fsyntax-only", f"-I{include}", HERE / "conformance.cpp")
