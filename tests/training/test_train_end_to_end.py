"""End-to-end training with a student whose optimum is known: the result, what is refused, and that a killed run loses nothing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.training.checkpoint import CHECKPOINT, load_checkpoint
from fptquant.training.log import METRICS
from fptquant.training.report import TrainingReport
from fptquant.training.train_end_to_end import train_end_to_end_
from tests.training.killed import STEPS, settings, train
from tests.training.toy import Toy, windows

TRAIN, HELD_OUT = windows(11, seed=1), windows(3, seed=2)
TIMES = {"seconds", "tokens_per_second"}


def run(toy: Toy, *, folder: Path | None = None, resume: bool = False, **options: Any) -> TrainingReport:
    return train_end_to_end_(toy, TRAIN, HELD_OUT, settings(**options), seed=4, folder=folder, resume=resume)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def same(first: Toy, second: Toy) -> bool:
    return torch.equal(first.shift, second.shift) and torch.equal(first.log_scale, second.log_scale)


def test_it_finds_the_optimum_and_says_how() -> None:
    toy = Toy()
    report = run(toy, steps=300, batch=11, micro_batch=None, final_lr=0.0)
    # loss = mean |c E - s|^2 is lowest at s = 0 and c = 0; log c falls steadily, and s follows c times the mean of E.
    mean = toy.table[TRAIN].mean((0, 1)) * toy.log_scale.detach().exp()
    torch.testing.assert_close(toy.shift.detach(), mean, rtol=0.02, atol=0.02)
    assert report.initial == pytest.approx(float(Toy().divergence(HELD_OUT)))
    assert report.best == min(value for _, value in report.curve) == report.curve[-1][1] == report.final
    assert report.best == pytest.approx(float(toy.divergence(HELD_OUT)))
    assert report.best < 0.1 * report.initial
    assert report.last_loss < 0.1 * report.first_loss
    assert report.curve[0][0] == 0
    assert [step for step, _ in report.curve] == [*range(0, 300, 7), 300]
    assert report.tokens == 300 * 11 * 8
    assert report.parameters == {"value_mixing": 6, "weight_range": 1}
    assert json.loads(json.dumps(report.as_dict()))["best_step"] == 300


def test_windows_follow_from_the_step() -> None:
    toy = Toy()
    run(toy, steps=5, batch=4, micro_batch=3)
    seen = torch.cat(toy.seen)
    assert [len(piece) for piece in toy.seen] == [3, 1] * 5
    assert torch.equal(seen, TRAIN[torch.arange(20) % 11])


def test_micro_batches_of_unequal_size_weigh_by_their_windows() -> None:
    whole, parts = Toy(), Toy()
    run(whole, micro_batch=None, batch=5)
    run(parts, micro_batch=2, batch=5)
    torch.testing.assert_close(parts.shift, whole.shift, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.log_scale, whole.log_scale, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the held-out divergence")
def test_the_best_state_is_the_result_and_a_rise_is_shown() -> None:
    class Overfitting(Toy):
        """The held-out windows want shift = 0.5."""

        @torch.no_grad()
        def divergence(self, tokens: Tensor) -> Tensor:
            return (self.shift - 0.3).square().mean()

    toy = Overfitting()
    report = run(toy, evaluate_every=1, final_lr=1.0, warmup=0.0, lr={"value_mixing": 0.1})
    assert 0 < report.best_step < STEPS // 4
    assert report.final > report.initial > report.best
    assert float(toy.divergence(HELD_OUT)) == pytest.approx(report.best)
    assert len(report.notices) == 2
    assert "the held-out divergence rises" in report.notices[0]
    assert f"lowest after {report.best_step} of {STEPS} steps" in report.notices[1]


def test_training_that_only_harms_keeps_the_start() -> None:
    class Perfect(Toy):
        @torch.no_grad()
        def divergence(self, tokens: Tensor) -> Tensor:
            return self.shift.square().mean()

    toy = Perfect()
    with pytest.warns(RuntimeWarning) as caught:
        report = run(toy)
    assert report.best_step == 0
    assert torch.equal(toy.shift, torch.zeros(6))
    assert [str(warning.message) for warning in caught] == report.notices
    assert "the state before it is kept" in report.notices[-1]


def test_metrics_hold_every_step(tmp_path: Path) -> None:
    toy = Toy()
    report = run(toy, folder=tmp_path)
    log = log_of(tmp_path)
    steps = [line for line in log if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[0]["loss"] == report.first_loss == pytest.approx(float(Toy().divergence(TRAIN[:3])))
    assert steps[0]["gradient_norm"] == pytest.approx(sum(norm**2 for norm in steps[0]["gradient_norms"].values()) ** 0.5)
    assert steps[4]["lr"] == {"value_mixing": 0.2, "weight_range": 0.05}
    assert steps[-1]["lr"] == pytest.approx({"value_mixing": 0.02, "weight_range": 0.005})
    assert [(line["step"], line["divergence"]) for line in log if line["kind"] == "evaluation"] == report.curve
    raw = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert all(line["tokens_per_second"] > 0 for line in raw if line["kind"] == "step")
    assert all(earlier["seconds"] < later["seconds"] for earlier, later in itertools.pairwise(raw))


def test_nan_stops_the_run_and_is_named(tmp_path: Path) -> None:
    bad = int(TRAIN[7, 0])
    first = next(index for index, window in enumerate(TRAIN) if bad in window)
    with pytest.raises(UserError, match=rf"step {first // 3 + 1} of {STEPS}: the loss is nan; .* not: toy\.root\. Lower"):
        run(Toy(bad_token=bad), folder=tmp_path)
    assert load_checkpoint(tmp_path / CHECKPOINT).position.step == first // 3


def test_gradients_that_are_not_finite_are_named() -> None:
    toy = Toy()
    toy.log_scale.register_hook(lambda gradient: gradient * (float("inf") if len(toy.seen) == 4 else 1))
    with pytest.raises(UserError, match=r"step 2 of 40: the gradient of toy\.log_scale is not finite; every tensor of the forward"):
        run(toy)


def test_a_divergence_that_is_not_finite_stops_the_run() -> None:
    toy = Toy()
    with torch.no_grad():
        toy.log_scale.fill_(1e9)
    with pytest.raises(UserError, match=r"step 1 of 40: the held-out divergence is inf"):
        run(toy)


def test_the_same_seed_gives_the_same_bits() -> None:
    assert same(train(None, resume=False), train(None, resume=False))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, list[dict[str, Any]]]:
    """The run that was never interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    return train(folder, resume=False), log_of(folder)


@pytest.mark.parametrize("seed", [0, 1])
def test_kills_at_random_moments_change_nothing(reference: tuple[Toy, Any], tmp_path: Path, seed: int) -> None:
    arguments = [sys.executable, "-m", "tests.training.killed", str(tmp_path), "8", "5", str(seed)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 6, "too few of the kills came in time"
    result = train(tmp_path, resume=True)
    assert same(result, reference[0])
    assert log_of(tmp_path) == reference[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_in_the_middle_of_a_step(reference: tuple[Toy, Any], tmp_path: Path, number: signal.Signals) -> None:
    toy = Toy(noise=0.02)
    toy.log_scale.register_hook(lambda gradient: signal.raise_signal(number) if len(toy.seen) == 15 else None)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught,
        pytest.warns(RuntimeWarning, match="stopping after the windows under way"),
    ):
        train_end_to_end_(toy, TRAIN, HELD_OUT, settings(checkpoint_seconds=1e6), seed=4, folder=tmp_path)
    assert caught.type is KeyboardInterrupt or caught.value.code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    saved = load_checkpoint(tmp_path / CHECKPOINT)
    assert (saved.position.step, len(saved.position.losses)) == (7, 1)
    assert same(train(tmp_path, resume=True), reference[0])
    assert log_of(tmp_path) == reference[1]


def test_a_new_run_forgets_the_checkpoint_of_an_old_one(tmp_path: Path) -> None:
    train(tmp_path, resume=False)
    toy = Toy()
    with torch.no_grad():
        toy.log_scale.fill_(1e9)
    with pytest.raises(UserError, match="held-out divergence is inf"):
        train_end_to_end_(toy, TRAIN, HELD_OUT, settings(), seed=4, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]
    assert log_of(tmp_path) == []


def test_a_finished_run_is_not_trained_again(reference: tuple[Toy, Any], tmp_path: Path) -> None:
    train(tmp_path, resume=False)
    toy = Toy(noise=0.02)
    report = train_end_to_end_(toy, TRAIN, HELD_OUT, settings(), seed=4, folder=tmp_path, resume=True)
    assert toy.seen == []
    assert same(toy, reference[0])
    assert report.tokens == STEPS * 24
    assert log_of(tmp_path) == reference[1]


def test_another_run_is_refused_by_name(tmp_path: Path) -> None:
    run(Toy(), folder=tmp_path)
    changed = settings(steps=41, checkpoint_seconds=3.0, lr={"value_mixing": 0.3, "weight_range": 0.05})
    with pytest.raises(UserError) as caught:
        train_end_to_end_(Toy(), TRAIN, HELD_OUT, changed, seed=5, folder=tmp_path, resume=True)
    for expected in ("training.steps: 40, now 41", "training.lr.value_mixing: 0.2, now 0.3", "seed: 4, now 5", "--overwrite"):
        assert expected in str(caught.value)
    assert "checkpoint_seconds" not in str(caught.value)
    with pytest.raises(UserError, match="windows: "):
        train_end_to_end_(Toy(), TRAIN[:10], HELD_OUT, settings(), seed=4, folder=tmp_path, resume=True)
    with pytest.raises(UserError, match=r"config\.model: absent, now other"):
        train_end_to_end_(
            Toy(), TRAIN, HELD_OUT, settings(), seed=4, folder=tmp_path, resume=True, fingerprint={"config": {"model": "other"}}
        )


def test_what_costs_the_last_bits_only_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Toy(), folder=tmp_path)
    monkeypatch.setattr("fptquant.fingerprint.torch.get_num_threads", lambda: 77)
    with pytest.warns(RuntimeWarning, match=r"goes on elsewhere \(threads: 1, now 77\)"):
        report = run(Toy(), folder=tmp_path, resume=True)
    assert "elsewhere" in report.notices[0]


def test_checkpoints_are_written_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, writes = [0.0], []
    toy = Toy()
    toy.log_scale.register_hook(lambda gradient: clock.__setitem__(0, clock[0] + 10))
    monkeypatch.setattr("fptquant.training.train_end_to_end.time.perf_counter", lambda: clock[0])
    save = __import__("fptquant.training.checkpoint", fromlist=["save_checkpoint"]).save_checkpoint

    def note(path: Path, checkpoint: Any) -> None:
        writes.append(clock[0])
        save(path, checkpoint)

    monkeypatch.setattr("fptquant.training.train_end_to_end.save_checkpoint", note)
    run(toy, folder=tmp_path, checkpoint_seconds=60.0, batch=4, micro_batch=1)
    assert writes[0] == 0
    assert max(later - earlier for earlier, later in itertools.pairwise(writes)) <= 60
    assert len(writes) <= 2 + 40 * 4 * 10 / 50


def test_impossible_wishes_are_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fptquant.training.train_end_to_end.world_size", lambda: 2)
    with pytest.raises(UserError, match=r"training\.batch = 3 windows cannot be split evenly over 2 processes"):
        run(Toy())
    monkeypatch.undo()
    monkeypatch.setattr("fptquant.training.train_end_to_end.check_tensorboard", lambda key: None)
    with pytest.raises(UserError, match=r"training\.tensorboard needs a folder"):
        run(Toy(), tensorboard=True)
