"""Ends of runs by two processes: python -m tests.distributed.ends FOLDER. FOLDER/NAME/RANK.json says how each of them ended."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from fptquant.config.training import TrainingConfig
from fptquant.errors import UserError
from fptquant.stages.distributed import gathered, largest, main_first, on_main, own, total
from fptquant.training.train_end_to_end import train_end_to_end_
from tests.distributed.forks import together
from tests.training.toy import Toy, windows

STEPS, BAD_STEP, STOP_STEP = 20, 3, 5
TRAIN, HELD_OUT = windows(80, seed=1), windows(3, seed=2)
BAD = 50
"""A token that stands in one window of the second process, of the step BAD_STEP."""
CPU = torch.device("cpu")


def settings() -> TrainingConfig:
    """Four windows a step, in parts of one; no checkpoint but those that have to be."""
    return TrainingConfig.model_validate(
        {
            "steps": STEPS, "batch": 4, "micro_batch": 1, "window": 8, "evaluate_every": 7, "checkpoint_seconds": 1e6,
            "lr": {"value_mixing": 0.2, "weight_range": 0.05},
        }
    )  # fmt: skip


def train(folder: Path, toy: Toy, *, together: bool = True, resume: bool = False, train: torch.Tensor = TRAIN) -> dict[str, Any]:
    forward = DistributedDataParallel(toy) if together else toy
    report = train_end_to_end_(toy, train, HELD_OUT, settings(), seed=4, folder=folder, resume=resume, forward=forward)
    return {"shift": toy.shift.tolist(), "log_scale": toy.log_scale.tolist(), "curve": report.curve, "steps": len(toy.seen)}


def whole(folder: Path, rank: int) -> dict[str, Any]:
    return train(folder, Toy())


def nan(folder: Path, rank: int) -> dict[str, Any]:
    toy, data = Toy(bad_token=BAD), TRAIN.clone()
    toy.table = torch.cat([toy.table, toy.table[:1]])
    data[4 * (BAD_STEP - 1) + 3, 5] = BAD
    return train(folder, toy, train=data)


def held_out(folder: Path, rank: int) -> dict[str, Any]:
    """The divergence of the first process alone is not finite."""
    toy = Toy()
    if rank == 0:
        toy.table = toy.table * float("inf")
    return train(folder, toy)


def stop(folder: Path, rank: int) -> dict[str, Any]:
    """Only the second process is told to stop, in the middle of a step."""
    toy = Toy()
    if rank == 1:
        toy.log_scale.register_hook(
            lambda gradient: signal.raise_signal(signal.SIGTERM) if len(toy.seen) == 2 * STOP_STEP - 1 else None
        )
    return train(folder, toy)


def exchange(folder: Path, rank: int) -> dict[str, Any]:
    """What the small functions give."""
    order: list[str] = []
    with main_first():
        order = (folder / "order").read_text().split() if (folder / "order").exists() else []
        (folder / "order").write_text(" ".join([*order, str(rank)]))
    found = {
        "sum": total(rank + 1.5, CPU), "largest": largest(-rank, CPU), "own": [*own(list(range(5)))],
        "gathered": gathered(f"r{rank}"), "main": on_main(lambda: rank + 10), "before": order,
    }  # fmt: skip

    def refuse() -> None:
        raise UserError(f"said by {rank}")

    try:
        on_main(refuse)
    except UserError as error:
        found["error"] = str(error)
    return found


def note(work: Callable[[Path, int], dict[str, Any]], folder: Path, rank: int) -> None:
    try:
        found = work(folder, rank)
    except (UserError, SystemExit) as error:
        found = {"kind": type(error).__name__, "text": str(error)}
    (folder / f"{rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    for work in (whole, nan, held_out, stop, exchange):
        place = folder / work.__name__
        place.mkdir()
        together(2, lambda rank, work=work, place=place: note(work, place, rank))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
