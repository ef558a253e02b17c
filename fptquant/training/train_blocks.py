"""Training block by block: transforms, ranges and, where asked, weights of each block learn together from the block's output.

Blocks are trained in their order. Two streams of hidden states go from block to block, that of the model in full precision (prefix
in place) and that of the quantized one, whose blocks are trained already. The loop, its checkpoints and the choice of the best
state by held-out windows are those of end-to-end training (`fptquant.training.train_end_to_end`).

Memory: three times the hidden states of all windows; while a block is trained, its activations for one micro batch.

Source: block-wise training of transforms as in FlatQuant, arXiv 2410.09426; here of transforms that merge, too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fptquant.config.training import BlockTrainingConfig
from fptquant.data.training import TrainingData
from fptquant.data.windows import own_position
from fptquant.errors import UserError
from fptquant.files import KeptFiles, read_file, to_bytes
from fptquant.models.instrument import get_context, quantizers_off, set_modes
from fptquant.models.streaming import PartialDecoder, PartState
from fptquant.stages.distributed import is_main, on_main
from fptquant.stages.progress import Progress, quiet, tell
from fptquant.training.block_student import BlockData, BlockStudent
from fptquant.training.parallel import over_processes
from fptquant.training.report import TrainingReport
from fptquant.training.train_end_to_end import train_end_to_end_
from fptquant.transforms import ModelTransforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "block_training"
"""Where the metrics.jsonl of each block lies, inside the run folder, and its checkpoint while the run is unfinished."""
KEPT = "checkpoint-blocks"
"""Folder of blocks that are trained, while a run is unfinished."""


@dataclass(frozen=True)
class _Streams:
    """The hidden states of all windows at one place of the model."""

    exact: PartState
    quantized: PartState


class _BlockProgress:
    """Shows the steps of one block among those of all; what it has to say stands in the report."""

    def __init__(self, progress: Progress, block: int, blocks: int) -> None:
        self._progress, self._block, self._blocks = progress, block, blocks

    def __call__(self, done: int, total: int, description: str, note: str = "") -> None:
        note = f"block {self._block}: {note}" if note else ""
        tell(self._progress, self._block * total + done, self._blocks * total, description, note)

    def say(self, line: str) -> None: ...


class _BlockTrainer:
    """Trains one block after the other."""

    def __init__(
        self,
        model: PreTrainedModel,
        transforms: ModelTransforms,
        settings: BlockTrainingConfig,
        data: TrainingData,
        seed: int,
        belongs_to: dict[str, Any],
        folder: Path | None,
        resume: bool,
        progress: Progress,
        positions: int | None,
    ) -> None:
        self.model, self.transforms, self.settings = model, transforms, settings
        self.decoder = PartialDecoder(model, get_context(model))
        self.tokens = torch.cat([data.train, data.held_out]).to(model.device)
        self.first = [own_position(window, positions) for window in self.tokens]
        self.held_out = torch.arange(len(data.train), len(self.tokens))[:, None]
        self.order = _order(len(data.train), settings.steps * settings.batch, seed)
        self.seed = seed
        self.belongs_to = {**belongs_to, "text": data.digest}
        self.folder, self.resume, self.progress = folder, resume, progress
        self.kept = None if folder is None else KeptFiles(folder / KEPT)

    def run(self) -> list[TrainingReport]:
        with torch.no_grad(), self.decoder.only(-1):
            state = self._through(None)
            with quantizers_off(self.model):
                streams = _Streams(self._through(None), state)
        reports = []
        for block in range(len(self.transforms.blocks)):
            with self.decoder.only(block):
                report, streams = self._block(block, streams)
            reports.append(report)
        return reports

    @torch.no_grad()
    def _through(self, state: PartState | None) -> PartState:
        """All windows through the part that is in place, as many at once as one step takes."""
        at_once = self.settings.micro_batch or self.settings.batch
        return self.decoder.run_in_parts(self.tokens, state, at_once, first=self.first)

    def _block(self, block: int, streams: _Streams) -> tuple[TrainingReport, _Streams]:
        """Trains one block, or takes it from its file; returns the states behind it."""
        with quantizers_off(self.model):
            exact = self._through(streams.exact)
        if not bool(exact.residual().isfinite().all()):
            raise UserError(f"layers.{block} gives NaN or infinity in full precision; check the model, or use a wider dtype")
        data = BlockData(self.decoder, self.tokens, self.first, streams.quantized, exact)
        student = BlockStudent(self.model, self.transforms, self.settings, block, data)
        report = self._restored(block, student)
        if report is None:
            report = self._trained(block, student)
        student.finish_()
        return report, _Streams(exact, self._through(streams.quantized))

    def _trained(self, block: int, student: BlockStudent) -> TrainingReport:
        folder = None if self.folder is None else self.folder / FOLDER / f"{block}"
        if folder is not None:
            on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        with over_processes(student) as forward:
            report = train_end_to_end_(
                student,
                self.order,
                self.held_out,
                self.settings,
                seed=self.seed,
                folder=folder,
                resume=self.resume,
                progress=_BlockProgress(self.progress, block, len(self.transforms.blocks)),
                fingerprint=self.belongs_to,
                forward=forward,
            )
        if self.kept is not None and is_main():
            state = {name: value.cpu().contiguous() for name, value in student.trainable_state().items()}
            content = to_bytes(state, {"belongs_to": self._mark(), "report": report.as_dict()})
            self.kept.file(f"block-{block}.safetensors").write(lambda: content)
        return report

    def _mark(self) -> str:
        return f"{self.belongs_to} {self.settings} {self.seed}"

    def _restored(self, block: int, student: BlockStudent) -> TrainingReport | None:
        """The report of a block that was trained before, with its state in place; None if there is none of this run."""
        found = on_main(lambda: self._read(block))
        if found is None:
            return None
        state, report = found
        student.load_trainable_state_({name: value.to(self.model.device) for name, value in state.items()})
        return TrainingReport(**report)

    def _read(self, block: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self.kept is None or not self.resume:
            return None
        path = self.kept.file(f"block-{block}.safetensors").path
        if not path.is_file():
            return None
        state, rest = read_file(path)
        return (state, rest["report"]) if rest["belongs_to"] == self._mark() else None


def _order(windows: int, count: int, seed: int) -> Tensor:
    """Numbers of windows for all steps of a block, every window once before any comes again.

    Shape: result [count, 1], int64
    """
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(windows, generator=generator) for _ in range(-(-count // windows))]
    return torch.cat(passes)[:count, None]


def train_blocks_(
    model: PreTrainedModel,
    transforms: ModelTransforms,
    settings: BlockTrainingConfig,
    data: TrainingData,
    *,
    seed: int,
    belongs_to: dict[str, Any],
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress = quiet,
    positions: int | None = None,
) -> dict[str, Any]:
    """Trains transforms and ranges block by block; the transforms stay attached. Returns the report.

    The model is instrumented, its ranges are set and on, its transforms attached. Where weights are in full precision meanwhile,
    their quantizers stay off, and their ranges are of no use any more.

    Args:
        belongs_to: what the result depends on besides settings, seed and texts; plain values.
        folder: where finished blocks, checkpoint and metrics are kept; nowhere by default.
        resume: go on with what is kept, if it belongs to this run.
        positions: as in `fptquant.training.student.EndToEndStudent`.

    Raises:
        UserError: if a block gives NaN or infinity, or as `fptquant.training.train_end_to_end.train_end_to_end_`.
    """
    start = time.perf_counter()
    if settings.weights == "full_precision":
        set_modes(model, "off", "weight")
    trainer = _BlockTrainer(model, transforms, settings, data, seed, belongs_to, folder, resume, progress, positions)
    reports = trainer.run()
    blocks = [
        {"initial": report.initial, "best": report.best, "best_step": report.best_step, "seconds": report.seconds}
        for report in reports
    ]
    return {
        "steps": settings.steps,
        "windows": len(data.train),
        "tokens": data.train.numel(),
        "text": data.source,
        "dropped_windows": data.dropped,
        "blocks": blocks,
        "parameters": reports[0].parameters,
        "unchanged_blocks": sum(report.best_step == 0 for report in reports),
        "seconds": max(time.perf_counter() - start, sum(report.seconds for report in reports)),
    }
