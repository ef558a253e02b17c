"""A table made by several processes goes on after a cell that the model cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_what_a_model_cannot_do_fails_alone(tmp_path: Path) -> None:
    arguments = [sys.executable, "-W", "ignore", "-m", "tests.distributed.tables", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["failed"] == ["wide"]
    assert [row["method"] for row in first["rows"]] == ["full precision", "rtn"]
    assert first["rows"][1]["cpu_seconds"] > 0
    assert "does not divide" in (tmp_path / "out" / "table.md").read_text()
