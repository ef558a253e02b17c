"""Tables of two methods and two settings on a tiny model, and what makes their cells fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fptquant.config.tables import TableConfig, load_table
from fptquant.reports import experiment
from fptquant.reports.grid import Table, make_table

SMALL = [
    "calibration={text: topics, windows: 2, window: 32}", "evaluation={text: topics, windows: 2, window: 32}",
]  # fmt: skip
TRANSFORMED = {"name": "rotated", "method": "fptquant-local", "overrides": ["local.value_steps=5", "quantization.prefix=null"]}


def grid(folder: Path, model: Path | str, **changes: Any) -> TableConfig:
    data = {
        "name": "mine",
        "models": [str(model)],
        "methods": ["rtn", TRANSFORMED],
        "settings": ["w4a16", "w4a4kv4-dynamic"],
        "overrides": SMALL,
        "output": str(folder),
    }
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(data | changes), encoding="utf-8")
    return load_table(file)


class Listener:
    """Keeps the lines that are to stay."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, done: int, total: int, description: str) -> None: ...

    def say(self, line: str) -> None:
        self.said.append(line)


def make(table: TableConfig, **options: Any) -> Table:
    return make_table(table, progress=options.pop("progress", Listener()), **options)


def scores(table: Table) -> dict[tuple[str, str], float | None]:
    return {(row.method, row.label): row.evaluation.perplexity if row.evaluation else None for row in table.rows}


def failing(monkeypatch: pytest.MonkeyPatch, when: Callable[[str], bool], error: type[BaseException]) -> list[str]:
    """Makes the calibration of some cells fail; returns the list of all that are begun."""
    begun: list[str] = []
    calibrate = experiment.calibrate

    def calibrate_or_fail(model: Any, tokenizer: Any, config: Any, **options: Any) -> Any:
        begun.append(f"{config.name} {config.quantization.label}")
        if when(begun[-1]):
            raise error("out of luck")
        return calibrate(model, tokenizer, config, **options)

    monkeypatch.setattr(experiment, "calibrate", calibrate_or_fail)
    return begun
