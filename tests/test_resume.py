"""A run of the command line that is killed at random moments ends as if it had been left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from fptquant.cli import app
from fptquant.training.checkpoint import CHECKPOINT, Checkpoint, save_checkpoint
from tests.killed_run import settings
from tests.tiny_folder import save_tiny_folder

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")} for line in lines]


def results_of(folder: Path) -> list[Any]:
    """What was measured, without times."""
    results = json.loads((folder / "metrics.json").read_text())["results"]
    return [
        ({key: value for key, value in result["evaluation"].items() if key != "seconds"}, result["block_errors"])
        for result in results
    ]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "tests.killed_run", str(tmp_path), "7", "3"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    kills, with_checkpoint = map(int, done.stdout.split()[-2:])
    assert kills >= 4
    assert with_checkpoint >= 3
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert not (tmp_path / "killed.partial").exists()
    assert log_of(killed) == log_of(whole)
    assert len(log_of(whole)) == 10 + 5
    assert results_of(killed) == results_of(whole)
    calibration = json.loads((killed / "metrics.json").read_text())["results"][1]["calibration"]
    assert calibration["seconds"] >= calibration["stages"]["end-to-end training"] >= calibration["training"]["seconds"]
    files = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert sorted(path.name for path in files) == ["model.safetensors", "quantizers.safetensors", "transforms.safetensors"]
    for path in files:
        expected, found = load_file(whole / path), load_file(killed / path)
        assert expected.keys() == found.keys()
        assert all(expected[name].equal(found[name]) for name in expected), path
    tensors = load_file(whole / "model" / "transforms.safetensors")
    assert tensors
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in killed.iterdir())


@pytest.mark.slow
def test_a_polite_kill_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    save_tiny_folder(tmp_path / "model")
    arguments = ["run", "smoke", "--output", str(tmp_path / "out"), *settings(tmp_path), "training.steps=2000"]
    process = subprocess.Popen([sys.executable, "-m", "fptquant", *arguments], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    written, started = tmp_path / "out.partial" / CHECKPOINT, time.monotonic()
    while not written.exists() and process.poll() is None and time.monotonic() - started < 300:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143
    assert f"kept in {tmp_path / 'out.partial'}: the same command with --resume goes on" in errors
    assert "Traceback" not in errors
    resume = [*arguments, "--resume"]
    assert "holds an unfinished run; go on with --resume, or start anew with --overwrite" in refused(arguments)
    assert "another config (seed: 0, now 1; training.steps: 2000, now 5)" in refused([*resume, "training.steps=5", "seed=1"])
    save_tiny_folder(tmp_path / "model", seed=1)
    assert "belongs to another run (weights: " in refused(resume)
    assert written.exists()


def refused(arguments: list[str]) -> str:
    """The message of a command line that exits with code 2."""
    command = [sys.executable, "-m", "fptquant", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 2
    return done.stderr


@pytest.mark.slow
def test_a_table_goes_on_with_the_method_that_was_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_folder(tmp_path / "model")
    monkeypatch.setattr("fptquant.reports.experiment._plot", lambda *arguments: None)
    overrides = [setting for setting in settings(tmp_path) if not setting.startswith(("model=", "training.lr"))]
    windows = ["calibration.windows=2", "calibration.window=32", "evaluation.windows=2", "evaluation.window=64"]
    arguments = [
        "table", "demo", f"models=[{tmp_path / 'model'}]", "methods=[rtn]", "settings=[w4a16, w8a8-static]",
        "-o", str(tmp_path / "out"),
        f"overrides={json.dumps([*windows, *overrides])}",
    ]  # fmt: skip

    def stop(path: Path, saved: Checkpoint) -> None:
        save_checkpoint(path, saved)
        if "w8a8" in str(path) and saved.position.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fptquant.training.train_end_to_end.save_checkpoint", stop)
        assert CliRunner().invoke(app, arguments).exit_code == 130
    cells = tmp_path / "out" / "cells" / "model"
    assert {path.parent.name for path in cells.rglob(CHECKPOINT)} == {"rtn-w8a8-static.partial"}
    first = log_of(cells / "rtn-w4a16")
    done = CliRunner().invoke(app, [*arguments, "--resume"])
    assert done.exit_code == 0, done.output
    assert log_of(cells / "rtn-w4a16") == first
    assert len(log_of(cells / "rtn-w8a8-static")) == len(first) == 15
    assert not list((tmp_path / "out").rglob(CHECKPOINT))
    written = (tmp_path / "out" / "table.md").read_text()
    assert CliRunner().invoke(app, [*arguments, "--resume"]).exit_code == 0
    assert (tmp_path / "out" / "table.md").read_text() == written
