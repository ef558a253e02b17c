"""torchrun: one process writes and speaks, and a run whose process was killed goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fptquant import cli
from fptquant.errors import ProcessLost, UserError
from fptquant.reports.processes import Launch, launched, resolve_device, speaks
from fptquant.training.checkpoint import CHECKPOINT, load_checkpoint
from tests.killed_run import settings
from tests.tiny_folder import save_tiny_folder

STEPS = 60
SETTINGS = [f"training.steps={STEPS}", "training.batch=2", "training.micro_batch=1", "training.shard_weights=true"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
END_SECONDS = 60
"""A run whose process has died is over after so long; on a quiet machine it takes two seconds."""
LOST = "error: one of the 2 processes has died or failed"


def start(folder: Path, output: str, *options: str, count: int = 2) -> subprocess.Popen[str]:
    """A run by so many processes, which writes FOLDER/OUTPUT."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
    arguments = ["run", "smoke", "--output", str(folder / output), *settings(folder), *SETTINGS, *options]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "fptquant", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def finish(process: subprocess.Popen[str], seconds: float = 300) -> tuple[str, str]:
    try:
        return process.communicate(timeout=seconds)
    finally:
        process.kill()


def child(process: subprocess.Popen[str], rank: int) -> int:
    """Process id of one of torchrun's processes."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())


def kill_in_training(process: subprocess.Popen[str], partial: Path, rank: int) -> float:
    """Kills a rank once there is a checkpoint from the middle of training; returns the time."""
    while not (partial / CHECKPOINT).exists() or load_checkpoint(partial / CHECKPOINT).position.step < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.kill(child(process, rank), signal.SIGKILL)
    return time.monotonic()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and ``whole``: a run by one process that was left alone."""
    place = tmp_path_factory.mktemp("torchrun")
    save_tiny_folder(place / "model")
    process = start(place, "whole", count=1)
    errors = finish(process)[1]
    assert process.returncode == 0, errors
    return place


def assert_same_model(first: Path, second: Path) -> None:
    for name in ("merged", "transformed"):
        if not (first / "model" / name).exists():
            continue
        expected, found = (load_file(run / "model" / name / "model.safetensors") for run in (first, second))
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
        return
    raise AssertionError(f"{first} holds no model")


def evaluations(run: Path) -> list[dict[str, float]]:
    """What was measured in full precision and after calibration."""
    results = json.loads((run / "metrics.json").read_text())["results"]
    return [{key: result["evaluation"][key] for key in ("perplexity", "jsd", "top1_agreement", "tokens")} for result in results]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of torchrun by /proc")
@pytest.mark.parametrize(("rank", "count"), [(1, 2), (0, 1)])
def test_a_run_whose_process_was_killed_goes_on_with_the_same_bits(folder: Path, rank: int, count: int) -> None:
    """Two processes share the two windows of a step as one process takes them one after the other: the result has the same bits."""
    output = f"killed {rank}"
    partial = folder / f"{output}.partial"
    process = start(folder, output)
    killed = kill_in_training(process, partial, rank)
    errors = finish(process, END_SECONDS)[1]
    assert time.monotonic() - killed < END_SECONDS
    assert process.returncode != 0
    assert errors.count(LOST) == 1, errors
    assert errors.count("the same command with --resume goes on") == 1, errors
    assert 3 <= load_checkpoint(partial / CHECKPOINT).position.step < STEPS
    process = start(folder, output, "--resume", count=count)
    table, errors = finish(process)
    assert process.returncode == 0, errors
    assert table.count(f"written to {folder / output}") == 1
    assert ("processes: 2, now 1" in errors) == (count == 1)
    assert errors.count(f"end-to-end training: {STEPS} of {STEPS}") == 1, errors
    assert_same_model(folder / "whole", folder / output)
    for expected, result in zip(evaluations(folder / "whole"), evaluations(folder / output), strict=True):
        assert result == pytest.approx(expected, rel=1e-12)  # each process its windows, summed in float64


@pytest.mark.slow
def test_a_mistake_is_said_once_and_soon(folder: Path) -> None:
    process = start(folder, "mistake", "training.batch=3")
    began = time.monotonic()
    errors = finish(process)[1]
    assert process.returncode != 0
    assert errors.count("training.batch = 3 windows cannot be split evenly over 2 processes") == 1, errors
    assert "has died" not in errors
    assert time.monotonic() - began < END_SECONDS
    assert not list(folder.glob("mistake*"))


STUCK = """
import os, signal, threading
from torch.distributed import TCPStore
from fptquant import cli
from fptquant.reports import processes
processes._GRACE = 0.2
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
signal.signal(signal.SIGTERM, cli._terminate)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
with processes._ending_in_time():
    store.get("what nobody will ever set")
"""


def test_a_process_that_waits_for_a_dead_one_ends_when_it_is_told_to() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM
    assert "told to stop, this process did not come to an end" in done.stderr
    assert "--resume goes on" in done.stderr
    assert time.monotonic() - began < END_SECONDS


@pytest.mark.parametrize("error", [RuntimeError("[../gloo/transport/tcp/pair.cc:534] closed by peer"), ProcessLost("one")])
def test_a_process_that_ends_because_another_is_lost_is_not_stopped_on_its_way(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """torchrun tells the others to stop a moment after one has died; what they have to say must still be said."""
    environment(monkeypatch)
    previous = signal.signal(signal.SIGTERM, cli._terminate)
    try:
        try:
            raise error
        except RuntimeError:
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)


def environment(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    values = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in (values | changes).items():
        monkeypatch.setenv(name, value)


def test_what_torchrun_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch)
    assert launched() == Launch(1, 4, 1, 2)
    assert not speaks()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)), raising=False)
    for given, expected in (("1", 4), ("", 4), ("3", 3)):  # torchrun itself sets 1
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert Launch(1, 4, 1, 2).threads == expected
    monkeypatch.setenv("RANK", "0")
    assert speaks()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() is None
    monkeypatch.delenv("MASTER_ADDR")
    assert launched() is None


def test_every_process_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    environment(monkeypatch)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"device = cuda:1, but 4 processes need a GPU each; choose device=cuda$"):
        resolve_device("cuda:1")
    environment(monkeypatch, LOCAL_WORLD_SIZE="3")
    with pytest.raises(UserError, match=r"3 processes need a GPU each, and PyTorch finds 2; start fewer"):
        resolve_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch finds no CUDA device here"):
        resolve_device("cuda")
