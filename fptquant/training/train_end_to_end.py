"""Training end to end: a quantized student learns to say what its own full-precision teacher says.

Its parameters are transforms and ranges (`fptquant.training.transform_student`), or ranges alone
(`fptquant.training.range_student`).

Every step sees `batch` windows, in micro batches and split over the processes: window i of step s, both from 0, is number
(s batch + i) mod count of the training windows, which are shuffled already. The loss of a step is the mean over its windows
with equal weights. AdamW follows a warm-up and a cosine; the gradients of all groups together are clipped.

The state with the lowest held-out divergence is the result, the one before the first step included. A run can be killed at any
moment: it goes on from its last checkpoint and ends with the same bits (same machine, same number of threads).

Source: FPTQuant (arXiv 2506.04985), section 3.2, which trains with a Jensen-Shannon loss, AdamW and a cosine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fptquant.config.differences import differences
from fptquant.config.training import WITHOUT_INFLUENCE, OptimizationConfig
from fptquant.errors import UserError
from fptquant.files import check_same_run
from fptquant.fingerprint import machine, tensors_digest
from fptquant.stages.distributed import is_main, largest, on_main, own, rank, total, world_size
from fptquant.stages.progress import Progress, quiet, say, tell
from fptquant.training.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    Position,
    Randomness,
    load_checkpoint,
    save_checkpoint,
)
from fptquant.training.interruption import Interruption
from fptquant.training.log import MetricsLog, check_tensorboard
from fptquant.training.nonfinite import stop_if
from fptquant.training.optimizer import GroupedAdamW
from fptquant.training.report import TrainingReport
from fptquant.training.trainable import Trainable

_SMOOTHING = 0.9
_LATE = 0.75
"""A best state from before this share of the steps is worth a word."""


def train_end_to_end_(
    student: Trainable,
    train: Tensor,
    held_out: Tensor,
    settings: OptimizationConfig,
    *,
    seed: int,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress = quiet,
    fingerprint: Mapping[str, Any] | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> TrainingReport:
    """Trains the student in place and leaves it in the state with the lowest held-out divergence.

    Args:
        folder: where checkpoint and metrics.jsonl are kept, if they are to be.
        resume: go on from the checkpoint in ``folder``, if there is one.
        fingerprint: what the run depends on beyond settings, seed and windows, such as the rest of the config; plain values.
        forward: computes the loss in place of the student: with several processes, the student in DistributedDataParallel, which
            averages the gradients.

    Shape:
        train, held_out: [windows, window], int64; the same in every process

    Raises:
        UserError: before work if nothing is trained, the batch cannot be split over the processes, TensorBoard is asked for and
            missing, or the checkpoint belongs to another run; during work if a loss, gradient or divergence is not finite.
    """
    check_settings(settings)
    if settings.tensorboard and folder is None:
        raise UserError(f"{settings.key}.tensorboard needs a folder to write into; run it by `fptquant run`, or give folder=")
    belongs_to = {
        "training": {key: value for key, value in settings.model_dump().items() if key not in WITHOUT_INFLUENCE},
        "seed": seed,
        "windows": tensors_digest(train, held_out),
        "parameters": {name: f"{tuple(value.shape)} {value.dtype}" for name, value in student.trainable_state().items()},
        **(fingerprint or {}),
    }
    trainer = _Trainer(student, train, held_out, settings, forward or student, belongs_to, folder, progress)
    with Interruption(lambda line: say(progress, line) if is_main() else None) as interruption:
        trainer.start(seed, resume)
        try:
            return trainer.run(interruption)
        finally:
            trainer.log.close()


def check_settings(settings: OptimizationConfig) -> None:
    """Refuses what cannot be done with these processes and packages.

    Raises:
        UserError: if the batch cannot be split, or TensorBoard is not installed.
    """
    if settings.batch % world_size():
        raise UserError(
            f"{settings.key}.batch = {settings.batch} windows cannot be split evenly over {world_size()} processes; "
            "choose a multiple"
        )
    if settings.tensorboard:
        check_tensorboard(settings.key)


class _Trainer:
    """The state of a run and what moves it on."""

    def __init__(
        self,
        student: Trainable,
        train: Tensor,
        held_out: Tensor,
        settings: OptimizationConfig,
        forward: Callable[[Tensor], Tensor],
        belongs_to: dict[str, Any],
        folder: Path | None,
        progress: Progress,
    ) -> None:
        self.student, self.settings, self.forward = student, settings, forward
        self.train, self.held_out = train, held_out
        self.groups = student.parameter_groups()
        self.optimizer = GroupedAdamW(self.groups, settings)
        self.device = next(iter(self.optimizer.named.values())).device
        self.belongs_to = belongs_to
        self.folder = folder if is_main() else None
        self.read_folder = folder
        self.progress = progress if is_main() else quiet
        self.position = Position()
        self.best: dict[str, Tensor] = {}
        self.log = MetricsLog(None)
        self.saved_at = time.perf_counter()
        self.last_unit = 0.0
        self.tokens_per_second = 0.0
        share = settings.batch // world_size()
        self.share = share
        self.micro = min(settings.micro_batch or share, share)

    # Beginning, end, and checkpoints between them

    def start(self, seed: int, resume: bool) -> None:
        """Takes up the checkpoint, or begins."""
        path = None if self.read_folder is None or not resume else self.read_folder / CHECKPOINT
        checkpoint = None if path is None else on_main(lambda: load_checkpoint(path) if path.exists() else None)
        if path is not None and checkpoint is not None:
            self._take_up(checkpoint, path)
        else:
            if self.folder is not None:
                (self.folder / CHECKPOINT).unlink(missing_ok=True)
            Randomness.seed(seed)
        self.log = MetricsLog(
            self.folder, length=self.position.log_bytes, step=self.position.step, tensorboard=self.settings.tensorboard
        )

    def _take_up(self, checkpoint: Checkpoint, path: Path) -> None:
        on_main(lambda: check_same_run(path, checkpoint.belongs_to, self.belongs_to))
        self.position, self.best = checkpoint.position, checkpoint.best
        self.student.load_trainable_state_(checkpoint.parameters)
        self.optimizer.load_(checkpoint.optimizer, checkpoint.gradients)
        checkpoint.randomness.restore()
        elsewhere = differences(checkpoint.machine, machine(self.device, world_size()))
        if elsewhere:
            self._notice(f"the run goes on elsewhere ({'; '.join(elsewhere)}): its result may differ in the last bits")
        if self.position.losses and checkpoint.machine["processes"] != world_size():
            # Half a step of other processes is of no use to these; nothing has moved since its beginning.
            self.position.losses, self.position.step_seconds = [], 0.0
            self.optimizer.load_(checkpoint.optimizer, {})
        tell(self.progress, self.position.step, self.settings.steps, self.settings.title, "going on from the checkpoint")

    def save(self) -> None:
        """Writes a checkpoint, if anything is written at all."""
        if self.folder is None:
            return
        self.position.log_bytes = self.log.sync()
        save_checkpoint(
            self.folder / CHECKPOINT,
            Checkpoint(
                self.position,
                self.student.trainable_state(),
                self.optimizer.state(),
                self.optimizer.gradients(),
                self.best,
                Randomness.capture(),
                self.belongs_to,
                machine(self.device, world_size()),
            ),
        )
        self.saved_at = time.perf_counter()

    def pause(self, interruption: Interruption) -> None:
        """Writes a checkpoint if the next unit of work would end later than it is due; stops if the user wants it."""
        if world_size() > 1:
            # Inside a step every process has gradients of its own, and only one writes. After it, all stop or none.
            if self.position.losses:
                return
            interruption.adopt(int(largest(interruption.number, self.device)))
        due = time.perf_counter() - self.saved_at + self.last_unit >= self.settings.checkpoint_seconds
        if due or interruption.received:
            self.save()
        if interruption.received:
            interruption.stop()

    def run(self, interruption: Interruption) -> TrainingReport:
        """Goes on to the end; returns what happened from the beginning."""
        while True:
            if self._evaluation_due():
                self.evaluate()
                if self.position.step == 0:
                    self.save()
                self.pause(interruption)
            if self.position.step == self.settings.steps:
                return self.finish()
            self.step(interruption)
            self.pause(interruption)

    def finish(self) -> TrainingReport:
        """Puts back the best state and sums up."""
        position, settings, steps = self.position, self.settings, self.settings.steps
        best_step, best = min(position.curve, key=lambda point: point[1])
        if best_step == 0:
            self._notice(
                f"{settings.title} did not lower the held-out divergence: the state before it is kept; lower {settings.key}.lr"
            )
        elif best_step < _LATE * steps:
            self._notice(
                f"the held-out divergence was lowest after {best_step} of {steps} steps; that state is kept. "
                f"A lower {settings.key}.lr or fewer steps may do better"
            )
        self.student.load_trainable_state_(self.best)
        self.save()
        tell(self.progress, steps, steps, settings.title, self._note())
        return TrainingReport(
            steps=steps,
            tokens=steps * settings.batch * settings.window,
            initial=position.curve[0][1],
            best=best,
            best_step=best_step,
            final=position.curve[-1][1],
            curve=position.curve,
            first_loss=position.first_loss if position.first_loss is not None else math.nan,
            last_loss=position.last_loss if position.last_loss is not None else math.nan,
            parameters={group: sum(value.numel() for _, value in members) for group, members in self.groups.items()},
            notices=position.notices,
            seconds=position.seconds,
        )

    # Work

    def step(self, interruption: Interruption) -> None:
        """One step, or the rest of the one under way."""
        position = self.position
        pieces = torch.split(self._windows(position.step), self.micro)
        for piece in pieces[len(position.losses) :]:
            started = time.perf_counter()
            # The processes exchange gradients once in a step, with the last piece.
            last = len(position.losses) + 1 == len(pieces)
            with nullcontext() if last else getattr(self.forward, "no_sync", nullcontext)():
                loss = self.forward(piece)
                value = float(loss.detach())
                self._stop_if(None if math.isfinite(value) else f"the loss is {value}", [piece])
                torch.autograd.backward(loss * (len(piece) / self.share))
            position.losses.append(value)
            self._count_time(started)
            if len(position.losses) < len(pieces):
                self.pause(interruption)
        self._move(pieces)

    def _windows(self, step: int) -> Tensor:
        """The windows of one step that are this process's [share, window]: computable from the step alone."""
        first = step * self.settings.batch + rank() * self.share
        return self.train[torch.arange(first, first + self.share) % len(self.train)].to(self.device)

    def _move(self, pieces: Sequence[Tensor]) -> None:
        """Checks the gradients that were collected, moves the parameters, and writes the step down."""
        position, started = self.position, time.perf_counter()
        norms = self.optimizer.gradient_norms()
        norm = math.hypot(*norms.values())
        if not math.isfinite(norm):
            name = self.optimizer.nonfinite_gradient()
            self._stop_if(f"the gradient of {name} is not finite", pieces)
        rates = self.optimizer.rates(position.step)
        self.optimizer.apply_(position.step, norm)
        self._count_time(started)
        own = sum(len(piece) * value for piece, value in zip(pieces, position.losses, strict=True))
        loss = total(own, self.device) / self.settings.batch
        self.tokens_per_second = self.settings.batch * self.settings.window / position.step_seconds
        position.step, position.losses, position.step_seconds = position.step + 1, [], 0.0
        position.first_loss = loss if position.first_loss is None else position.first_loss
        position.last_loss = loss
        smoothed = loss if position.smoothed is None else position.smoothed
        position.smoothed = _SMOOTHING * smoothed + (1 - _SMOOTHING) * loss
        self.log.step(
            position.step,
            loss=loss,
            gradient_norm=norm,
            gradient_norms=norms,
            lr=rates,
            tokens_per_second=self.tokens_per_second,
            seconds=position.seconds,
        )
        if position.step < self.settings.steps:
            tell(self.progress, position.step, self.settings.steps, self.settings.title, self._note())

    def _count_time(self, started: float) -> None:
        self.last_unit = time.perf_counter() - started
        self.position.seconds += self.last_unit
        self.position.step_seconds += self.last_unit

    def _evaluation_due(self) -> bool:
        position, settings = self.position, self.settings
        if position.curve and position.curve[-1][0] == position.step:
            return False
        return position.step % settings.evaluate_every == 0 or position.step == settings.steps

    def evaluate(self) -> None:
        """Measures the held-out windows, each process its share, and keeps the state if it is the best so far."""
        position, started = self.position, time.perf_counter()
        if position.step == 0:
            tell(self.progress, 0, self.settings.steps, self.settings.title, "measuring the held-out windows")
        summed = 0.0
        for piece, weight in self._held_out_pieces():
            value = float(self.student.divergence(piece))
            self._stop_if(None if math.isfinite(value) else f"the held-out divergence is {value}", [piece])
            summed += weight * value
        divergence = total(summed, self.device) / len(self.held_out)
        if not position.curve or divergence < min(value for _, value in position.curve):
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in self.student.trainable_state().items()}
        position.curve.append((position.step, divergence))
        self.last_unit = time.perf_counter() - started
        position.seconds += self.last_unit
        self.log.evaluation(position.step, divergence=divergence, seconds=position.seconds)
        self._look_at_course()

    def _held_out_pieces(self) -> Iterator[tuple[Tensor, int]]:
        """This process's held-out windows and how many of them count: where weights are sharded, all make as many passes."""
        pieces = [piece for piece in torch.split(own(self.held_out), self.micro) if len(piece)]
        for piece in pieces:
            yield piece.to(self.device), len(piece)
        for _ in range(-(-len(self.held_out) // (world_size() * self.micro)) - len(pieces)):
            yield self.held_out[:1].to(self.device), 0

    # What the user is told

    def _look_at_course(self) -> None:
        """Says so when the held-out divergence has risen above that of the beginning."""
        curve = self.position.curve
        (_, initial), (step, now) = curve[0], curve[-1]
        if now > initial and curve[-2][1] <= initial:
            self._notice(f"the held-out divergence rises: {now:.4g} after {step} steps, {initial:.4g} before the first")

    def _notice(self, line: str) -> None:
        """Says a line once in a run, and puts it into the report."""
        if line not in self.position.notices:
            self.position.notices.append(line)
            if is_main():
                say(self.progress, line)

    def _note(self) -> str:
        """How things stand, in one line."""
        position = self.position
        best_step, best = min(position.curve, key=lambda point: point[1])
        rate = max(self.optimizer.rates(max(position.step - 1, 0)).values())
        return (
            f"loss {position.smoothed:.4g}, held-out {position.curve[-1][1]:.4g} (lowest {best:.4g} after {best_step}), "
            f"lr {rate:.2g}, {self.tokens_per_second:,.0f} tokens/s"
        )

    def _stop_if(self, what: str | None, pieces: Sequence[Tensor]) -> None:
        """Ends the run in all processes if something is wrong in one."""
        when = f"step {self.position.step + 1} of {self.settings.steps}"
        stop_if(what, when, self.settings.key, self.student, self.optimizer.named, pieces)
