"""What a run takes, counted over all processes that work on it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fptquant.config.loading import load_config
from fptquant.reports import effort, experiment
from fptquant.reports.effort import Effort, EffortMeter
from fptquant.reports.progress import Progress
from fptquant.reports.unfinished_run import note_checkpoint
from fptquant.training.checkpoint import Checkpoint, save_checkpoint
from tests.killed_run import settings
from tests.tiny_folder import save_tiny_folder

CPU = torch.device("cpu")


def compute(seconds: float) -> None:
    """Keeps the processor busy."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def peaks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(effort, "peak_bytes", lambda: size)


def test_one_after_the_other_and_side_by_side() -> None:
    first, second = Effort(3.0, 5.0, 70, None), Effort(2.0, 4.0, 90, 10)
    assert second.after(first) == Effort(5.0, 9.0, 90, 10)
    assert second.beside(first) == Effort(3.0, 9.0, 90, 10)
    assert first.after(first).cuda_peak_bytes is None


def test_processes_add_up_and_memory_counts_until_it_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks(monkeypatch, 300)
    interrupted = EffortMeter(tmp_path, CPU)
    with interrupted, suppress(KeyboardInterrupt):
        compute(0.05)
        raise KeyboardInterrupt
    peaks(monkeypatch, 200)
    with EffortMeter(tmp_path, CPU) as meter:
        time.sleep(0.1)
        meter.end_memory()
        peaks(monkeypatch, 400)
    total = meter.total()
    assert 0.05 <= total.cpu_seconds < total.seconds
    assert total.seconds >= 0.15
    assert total.peak_bytes == 300
    assert not note_checkpoint(KeyboardInterrupt(), tmp_path)


def test_the_account_is_written_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from fptquant.reports.effort import EffortMeter\n"
        "progress = EffortMeter(Path(sys.argv[1]), torch.device('cpu'), keep_seconds=0).watch(lambda *told: print(told))\n"
        "progress(1, 2, 'step')\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    with EffortMeter(tmp_path, CPU) as meter:
        peaks(monkeypatch, 1)
    assert meter.total().peak_bytes > 2**20
    assert meter.total().cpu_seconds > 0


def test_processes_that_are_there_no_more_and_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_effort_0.json").write_text('{"seconds": 1e9,')
    (tmp_path / "checkpoint_effort_3.json").write_text('{"seconds": 5.0, "cpu_seconds": 7.0}')
    with EffortMeter(tmp_path, CPU) as meter:
        pass
    assert meter.total().seconds == 5.0
    assert 7.0 <= meter.total().cpu_seconds < 8.0


def test_memory_of_tensors_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device in asked else 0)
    with EffortMeter(tmp_path, torch.device("cuda", 0)) as meter:
        pass
    assert meter.total().cuda_peak_bytes == 7


def test_a_run_that_goes_on_counts_what_was_spent_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_folder(tmp_path / "model")
    monkeypatch.setattr(experiment, "_plot", lambda *arguments: None)
    unheard = Progress(Console(file=io.StringIO()))
    config = load_config("smoke", *settings(tmp_path))

    def stop(path: Path, saved: Checkpoint) -> None:
        save_checkpoint(path, saved)
        if saved.position.step == 4:
            compute(0.5)
            raise KeyboardInterrupt

    def run(**options: Any) -> Any:
        return experiment.run_experiment(config, title="t", output=tmp_path / "out", progress=unheard, **options)

    with monkeypatch.context() as patched:
        patched.setattr("fptquant.training.train_end_to_end.save_checkpoint", stop)
        peaks(patched, 2**50)
        with pytest.raises(KeyboardInterrupt):
            run()
    spent = Effort(**json.loads((tmp_path / "out.partial" / "checkpoint_effort_0.json").read_text()))
    assert spent.cpu_seconds >= 0.5
    row = run(resume=True).rows[1]
    assert row.peak_bytes == 2**50
    assert row.seconds > spent.seconds
    assert row.cpu_seconds > spent.cpu_seconds
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"][1]
    found = written["total_seconds"], written["cpu_seconds"], written["peak_bytes"], written["cuda_peak_bytes"]
    assert found == (row.seconds, row.cpu_seconds, 2**50, None)
    assert not list((tmp_path / "out").rglob("checkpoint*"))
