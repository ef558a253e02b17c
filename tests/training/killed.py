"""Trains the toy again and again in a child process that is killed, until it comes to an end: python -m tests.training.killed.

Arguments: folder, number of kills from outside, number of kills while a checkpoint is written, seed. The child is a fork, so
that many kills take seconds; it prints nothing. The last line of the output is the number of kills.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fptquant import files as module
from fptquant.config.training import TrainingConfig
from fptquant.training.train_end_to_end import train_end_to_end_
from tests.training.toy import Toy, windows

STEPS = 40


def settings(**options: Any) -> TrainingConfig:
    """Three windows a step in two micro batches, a checkpoint after every one of them."""
    return TrainingConfig.model_validate(
        {
            "steps": STEPS, "batch": 3, "micro_batch": 2, "window": 8, "evaluate_every": 7, "checkpoint_seconds": 0.0,
            "lr": {"value_mixing": 0.2, "weight_range": 0.05}, **options,
        }
    )  # fmt: skip


def train(folder: Path | None, *, resume: bool, seconds: float = 0.0) -> Toy:
    """The run that is to give the same bits, however often it is killed."""
    toy = Toy(noise=0.02, seconds=seconds)
    train_end_to_end_(toy, windows(11, seed=1), windows(3, seed=2), settings(), seed=4, folder=folder, resume=resume)
    return toy


def die_while_writing(after: int) -> None:
    """Lets this process be killed in the middle of the checkpoint that is so far away."""
    left = [after]

    def write(path: Path, content: bytes) -> None:
        left[0] -= 1
        if left[0] == 0:
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        path.write_bytes(content)

    module.write_through = write


def child(folder: Path, after: int | None) -> int:
    """Process id of a fork that goes on with the run."""
    process = os.fork()
    if process == 0:
        if after is not None:
            die_while_writing(after)
        train(folder, resume=True, seconds=0.004)
        os._exit(0)
    return process


def main(folder: Path, kills: int, kills_while_writing: int, seed: int) -> None:
    train(None, resume=False)  # what PyTorch loads at the first step is then there in every child
    rng, done = random.Random(seed), 0
    plan = [True] * kills_while_writing + [False] * kills
    rng.shuffle(plan)
    for while_writing in plan:
        process = child(folder, rng.randint(1, 12) if while_writing else None)
        if not while_writing:
            time.sleep(rng.uniform(0.005, 0.15))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        done += os.WIFSIGNALED(status)
    _, status = os.waitpid(child(folder, None), 0)
    assert status == 0
    print(done)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
