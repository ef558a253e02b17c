"""Makes a table by two processes, one of whose cells the model cannot do: python -m tests.distributed.tables FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from fptquant.config.tables import TableConfig
from fptquant.reports import experiment
from fptquant.reports.grid import make_table
from fptquant.stages.progress import quiet
from tests.distributed.forks import together
from tests.tiny_folder import save_tiny_folder

GROUPS = "quantization.weight={bits: 4, granularity: per_group, group_size: 48}"
"""Of a size that divides no layer."""


def make(folder: Path, rank: int) -> None:
    """Makes the table and writes down what this process knows of it."""
    table = TableConfig.model_validate(
        {
            "name": "two",
            "models": [str(folder / "model")],
            "methods": [{"name": "wide", "method": "rtn", "overrides": [GROUPS]}, "rtn"],
            "settings": ["w4a16"],
            "overrides": ["calibration.windows=2", "calibration.window=32", "evaluation={text: topics, windows: 2, window: 32}"],
            "output": str(folder / "out"),
        }
    )
    experiment._plot = lambda *arguments: None  # type: ignore[assignment]
    made = make_table(table, progress=quiet)
    found = {"failed": [row.method for row in made.failed], "rows": [row.as_dict() for row in made.rows if row.evaluation]}
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    save_tiny_folder(place / "model")
    together(2, lambda rank: make(place, rank))
