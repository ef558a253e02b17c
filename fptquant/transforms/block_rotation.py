"""D_a, D_o, D_ug, D_d: online rotations of blocks of channels, a permutation between two of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.transforms.base import Transform, random_orthogonal


class BlockRotation(Transform):
    """Rotates blocks of channels of the input of linears at run time, permutes the channels, and rotates blocks again.

    forward: x' = B P A x with block-diagonal orthogonal A and B and a permutation P;  inverse: x = A^T P^T B^T x'.
    Merged into the linears that read the input: W' = W (B P A)^T. At its start it does nothing; `set_` gives it what
    `find_rotation` has found.

    Shape: activations [..., C]; weight [out, C] (side ``read``; its bias is not touched); A, B [C / size, size, size], float64: the
        function stays as exactly as they are orthogonal.

    Source: DuQuant (arXiv 2406.01721), section 3.

    Args:
        block_size: the largest size of a block; blocks have its largest divisor that divides the channels.
    """

    mergeable: ClassVar[bool] = False
    online: ClassVar[bool] = True
    sides: ClassVar[tuple[str, ...]] = ("read",)

    first: Tensor
    second: Tensor
    permutation: Tensor

    def __init__(self, channels: int, block_size: int = 128) -> None:
        super().__init__()
        self.channels, self.size = channels, largest_divisor(channels, block_size)
        identity = torch.eye(self.size, dtype=torch.float64).repeat(channels // self.size, 1, 1)
        self.register_buffer("first", identity)
        self.register_buffer("second", identity.clone())
        self.register_buffer("permutation", torch.arange(channels))

    def set_(self, first: Tensor, permutation: Tensor, second: Tensor) -> None:
        """Gives it the matrices A and B and which channel comes to each place between them."""
        self.first.copy_(first)
        self.permutation.copy_(permutation)
        self.second.copy_(second)

    def forward(self, x: Tensor) -> Tensor:
        """Rotates activations [..., C]."""
        return ops.rotate_blocks(ops.rotate_blocks(x, self.first), self.second, self.permutation)

    def inverse(self, x: Tensor) -> Tensor:
        """Undoes ``forward``."""
        return ops.rotate_blocks(ops.rotate_blocks(x, self.second, self.permutation, transpose=True), self.first, transpose=True)

    def merge(self, weight: Tensor, side: str) -> Tensor:
        self._check_side(side)
        if weight.shape[-1] != self.channels:
            raise UserError(f"{self.symbol} of {self.channels} channels does not fit a weight of {list(weight.shape)}")
        # Row w of W (B P A)^T is B P A w: the same transform that the activations get.
        rotated: Tensor = self(weight)
        return rotated

    def randomize_(self, generator: torch.Generator | None = None, spread: float = 0.3) -> None:
        """Random rotations and a random permutation (for tests)."""
        rng = torch.Generator() if generator is None else generator
        matrices = [torch.stack([random_orthogonal(self.size, rng) for _ in self.first]) for _ in range(2)]
        self.set_(matrices[0], torch.randperm(self.channels, generator=rng), matrices[1])

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "block_size": self.size, "blocks": len(self.first)}


class AttentionInputRotation(BlockRotation):
    """D_a: on the output of the norm before attention, read by q, k and v."""

    symbol: ClassVar[str] = "D_a"
    name: ClassVar[str] = "attn_in_rotation"


class MLPInputRotation(BlockRotation):
    """D_ug: on the output of the norm before the MLP, read by gate and up."""

    symbol: ClassVar[str] = "D_ug"
    name: ClassVar[str] = "mlp_in_rotation"


class OutRotation(BlockRotation):
    """D_o: on the input of the output projection."""

    symbol: ClassVar[str] = "D_o"
    name: ClassVar[str] = "out_rotation"


class DownRotation(BlockRotation):
    """D_d: on the input of the down projection."""

    symbol: ClassVar[str] = "D_d"
    name: ClassVar[str] = "down_rotation"


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor that is at most ``limit``.

    >>> largest_divisor(576, 128), largest_divisor(4096, 128), largest_divisor(7, 4)
    (96, 128, 1)
    """
    return next(n for n in range(min(limit, number), 0, -1) if number % n == 0)


def find_rotation(x: Tensor, size: int, *, steps: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rotations and a permutation that spread the outliers of activations: A, P as places, and B of `BlockRotation`.

    Shape: x [tokens, C], C divisible by size; returns [C / size, size, size], int64 [C], [C / size, size, size], float64.

    Source: DuQuant (arXiv 2406.01721), equations 3 to 6, Algorithm 1.
    """

    def in_blocks(x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, size).transpose(0, 1)

    blocks = in_blocks(x.float())  # [K, tokens, size]
    turns = _turns(size, steps, rng).to(x.device)
    first = _spread(blocks, turns)
    rotated = (blocks @ first.mT.float()).transpose(0, 1).flatten(1)
    permutation = zigzag(rotated.abs().amax(0), size)
    second = _spread(in_blocks(rotated[:, permutation]), turns)
    return first, permutation, second


def _turns(size: int, steps: int, rng: torch.Generator) -> Tensor:
    """Orthogonal matrices [steps, size, size] whose first rows are uniform: they spread channel 0 over all, and mix the others."""
    uniform = torch.eye(size, dtype=torch.float64)
    uniform[:, 0] = 1
    spreading = torch.linalg.qr(uniform).Q.mT
    spreading = spreading * spreading[0, 0].sign()
    turns = []
    for _ in range(steps):
        mixing = torch.eye(size, dtype=torch.float64)
        mixing[1:, 1:] = random_orthogonal(size - 1, rng)
        turns.append(mixing @ spreading)
    return torch.stack(turns).float()


def _spread(blocks: Tensor, turns: Tensor) -> Tensor:
    """For each block the product of turns after which its largest value is least; each turn spreads the loudest channel.

    Shape: blocks [K, tokens, size]; returns matrices M [K, size, size], for M x.
    """
    count, tokens, size = blocks.shape
    identity = torch.eye(size, device=blocks.device).expand(count, -1, -1)
    both = torch.cat([blocks, identity], dim=1)  # rows of x, and what has become of every channel
    best, least = identity.clone(), blocks.abs().amax((1, 2))
    for turn in turns:
        loudest = both[:, :tokens].abs().amax(1).argmax(-1)
        order = torch.arange(size, device=blocks.device).repeat(count, 1)
        order[torch.arange(count), loudest] = 0
        order[:, 0] = loudest
        both = both @ turn[order[:, :, None], order[:, None, :]]  # the turn acts where the loudest channel stands first
        largest = both[:, :tokens].abs().amax((1, 2))
        best = torch.where((largest < least)[:, None, None], both[:, tokens:], best)
        least = torch.minimum(least, largest)
    left, _, right = torch.linalg.svd(best.mT.double())  # many products later, the nearest orthogonal matrices
    spread: Tensor = left @ right
    return spread


def zigzag(loudness: Tensor, size: int) -> Tensor:
    """Which channel comes to each place, so that blocks are equally loud: the loudest to the first block, the next to the second,
    ..., and back from the last.

    >>> zigzag(torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), 2)
    tensor([0, 5, 1, 4, 2, 3])
    """
    rounds = loudness.argsort(descending=True, stable=True).reshape(size, -1)
    rounds[1::2] = rounds[1::2].flip(-1)
    return rounds.mT.reshape(-1)
