"""The pass over blocks that the rounding methods share: what is checked, what is kept of finished blocks, and how a run goes on.

Blocks are rounded in their order, each for the inputs that the rounded blocks before it give. How one block is rounded is a
method's own (`fptquant.rounding.round_gptq`, `fptquant.rounding.round_autoround`). A block that is finished can be kept in a
file, from which a run that was killed goes on.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.files import KeptFile, KeptFiles, read_file, to_bytes
from fptquant.fingerprint import model_digest, tensors_digest
from fptquant.memory import reused_memory
from fptquant.models.adapter import LINEAR_NAMES, BlockView
from fptquant.models.architectures import view_model
from fptquant.models.instrument import get_context
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.models.streaming import PartialDecoder
from fptquant.stages.distributed import broadcast_, is_main, on_main
from fptquant.stages.progress import Progress, quiet, tell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DESCRIPTION = "rounding the weights"

Linears = dict[str, QuantizedLinear]
"""The linears of a block by name, each with a weight quantizer."""

Tick = Callable[[int, str], None]
"""``tick(done, note)``: so many units of the block are done, and how things stand."""


class BlockMethod(ABC):
    """How a method rounds one block after the other.

    Every method runs only the block that the decoder has in place, and carries the hidden states from block to block.
    """

    settings: Any
    """What decides the result besides windows, weights and ranges; its text tells one run from another."""
    units: int = 1
    """Steps of progress in each block."""

    def __init__(self, model: PreTrainedModel, windows: Tensor) -> None:
        self.model = model
        self.windows = windows
        self.decoder = PartialDecoder(model, get_context(model))

    @abstractmethod
    def begin(self) -> None:
        """Reads the windows through the embedding, which alone is in place."""

    def look(self) -> None:  # noqa: B027  most methods need none
        """Sees the block as it is in full precision, before anything is rounded or restored."""

    @abstractmethod
    def round_(self, linears: Linears, tick: Tick) -> dict[str, Any]:
        """Rounds the block and carries the hidden states through it; returns what is reported of it, in plain values."""

    @abstractmethod
    def go_on(self) -> None:
        """Carries the hidden states through a block that has been rounded before."""


@dataclass(frozen=True)
class RoundedBlock:
    """What is reported of a block."""

    report: dict[str, Any]
    seconds: float


def linears_to_round(block: BlockView) -> Linears:
    """The linears of a block by name.

    Raises:
        UserError: if one of them cannot be rounded.
    """
    found: Linears = {}
    for name in LINEAR_NAMES:
        linear = block.linear(name)
        if not isinstance(linear, QuantizedLinear) or linear.weight_quantizer is None:
            raise UserError(f"layers.{block.index}.{name} has no weight quantizer; nothing can be rounded at 16 bits")
        if linear.merging is not None:
            raise UserError(f"layers.{block.index}.{name}: merge the transforms before rounding")
        found[name] = linear
    return found


class _KeptBlock:
    """A file with the rounded weights of a block, their ranges, and what is reported of them. The main process alone uses it."""

    def __init__(self, file: KeptFile, linears: Linears, belongs_to: str) -> None:
        self.file, self.linears, self.belongs_to = file, linears, belongs_to

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            assert linear.weight_quantizer is not None
            ranges = {"scale": linear.weight_quantizer.scale, "zero_point": linear.weight_quantizer.zero_point}
            parts = {"weight": linear.weight, **ranges}
            found |= {f"{part}/{name}": value for part, value in parts.items() if value is not None}
        return found

    def write(self, block: RoundedBlock) -> None:
        """When it is time (`KeptFiles`)."""
        if is_main():
            rest = {"belongs_to": self.belongs_to, **asdict(block)}
            self.file.write(lambda: to_bytes({name: value.cpu().contiguous() for name, value in self._tensors().items()}, rest))

    def restore_(self) -> RoundedBlock | None:
        """Puts back what the file holds, in every process, and returns the report; None if there is no file of this run."""
        block = on_main(self._read)
        if block is not None:
            broadcast_(self._tensors().values())
        return block

    def _read(self) -> RoundedBlock | None:
        if not self.file.path.is_file():
            return None
        tensors, rest = read_file(self.file.path)
        if rest["belongs_to"] != self.belongs_to:
            return None
        for name, value in self._tensors().items():
            value.copy_(tensors[name])
        return RoundedBlock(rest["report"], rest["seconds"])


@torch.no_grad()
def round_blocks_(
    method: BlockMethod,
    *,
    kept: KeptFiles | None = None,
    belongs_to: str = "",
    resume: bool = False,
    progress: Progress = quiet,
) -> list[RoundedBlock]:
    """Rounds every block of the method's model in place, whose ranges are set and whose quantizers are on.

    Args:
        kept: where the weights of finished blocks are kept.
        belongs_to: what decides the result besides windows, settings, weights and static ranges.
        resume: go on with the blocks that are kept, if they belong to this run.

    Raises:
        UserError: if a weight has no quantizer, or transforms are not merged yet.
    """
    with reused_memory():
        return _round_blocks_(method, kept, belongs_to, resume, progress)


def _round_blocks_(
    method: BlockMethod, kept: KeptFiles | None, belongs_to: str, resume: bool, progress: Progress
) -> list[RoundedBlock]:
    view, decoder = view_model(method.model), method.decoder
    linears = [linears_to_round(block) for block in view.blocks]
    if kept is not None:
        belongs_to = f"{belongs_to} {method.settings} {tensors_digest(method.windows)} {model_digest(method.model)}"
    with decoder.only(-1):
        method.begin()
    found: list[RoundedBlock] = []
    for block, own_linears in zip(view.blocks, linears, strict=True):
        start = time.perf_counter()
        file = None if kept is None else _KeptBlock(kept.file(f"block-{block.index}.safetensors"), own_linears, belongs_to)
        tick = partial(_tick, progress, block.index, view.num_layers, method.units)
        with decoder.only(block.index):
            method.look()
            known = file.restore_() if file is not None and resume else None
            if known is None:
                found.append(RoundedBlock(method.round_(own_linears, tick), time.perf_counter() - start))
            else:
                method.go_on()
                found.append(known)
        if file is not None and known is None:
            file.write(found[-1])
        tick(method.units, "")
    return found


def _tick(progress: Progress, block: int, blocks: int, units: int, done: int, note: str) -> None:
    tell(progress, block * units + done, blocks * units, DESCRIPTION, note)
