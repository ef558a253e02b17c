"""Checkpoints: what comes back, what a damaged or interrupted one does, and random numbers that go on."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from fptquant import files as module
from fptquant.errors import UserError
from fptquant.training.checkpoint import CHECKPOINT, Checkpoint, Position, Randomness, load_checkpoint, save_checkpoint


def example(step: int = 3) -> Checkpoint:
    shared = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return Checkpoint(
        Position(step=step, losses=[0.1, 1 / 3], smoothed=0.2, curve=[(0, 0.5), (2, 0.25)], notices=["rises"], log_bytes=77),
        {"a/b.c": shared.mT, "narrow": shared.to(torch.bfloat16), "number": torch.tensor(2.5, dtype=torch.float64)},
        {"a/b.c/step": torch.tensor(3.0)},
        {},
        {"a/b.c": shared},
        Randomness.capture(),
        {"config": {"seed": 1}, "windows": "abc"},
        {"threads": 1},
    )


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = example()
    save_checkpoint(tmp_path / CHECKPOINT, saved)
    loaded = load_checkpoint(tmp_path / CHECKPOINT)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert asdict(loaded.position) == asdict(saved.position)
    assert (loaded.belongs_to, loaded.machine) == (saved.belongs_to, saved.machine)
    for kind in ("parameters", "optimizer", "gradients", "best"):
        before, after = getattr(saved, kind), getattr(loaded, kind)
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert value.dtype == after[name].dtype
            assert torch.equal(value, after[name])


def test_random_numbers_go_on(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return float(torch.randn(())), float(np.random.randn()), random.random(), random.gauss(0, 1)

    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        draw()
        save_checkpoint(tmp_path / CHECKPOINT, example())
        expected = [draw() for _ in range(3)]
        load_checkpoint(tmp_path / CHECKPOINT).randomness.restore()
        assert [draw() for _ in range(3)] == expected
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def test_a_failure_while_writing_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, example(3))

    def fail(target: Path, content: bytes) -> None:
        target.write_bytes(content[: len(content) // 2])
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_through", fail)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(path, example(4))
    assert load_checkpoint(path).position.step == 3
    save_checkpoint(path, example(5))
    assert load_checkpoint(path).position.step == 5
    assert [found.name for found in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_damaged_file_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, example())
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:20], b"x" * 4096):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged .* --overwrite"):
            load_checkpoint(path)
