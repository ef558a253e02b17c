"""Programs that tests run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(program: str, *arguments: object, environment: Mapping[str, str] | None = None) -> str:
    """What the program prints. It can import from `tests`, and must succeed; ``environment`` adds to that of the tests."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout
