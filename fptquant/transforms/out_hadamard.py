"""T_o: an online Hadamard transform across the heads, before the output projection."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.transforms.base import Transform, is_hadamard_size


class OutHadamard(Transform):
    """Mixes the heads of the output projection's input by a Hadamard matrix at run time.

    forward: x'[i, :] = H x[i, :] for every channel i of a head, with x[i, :] its values in all heads, H H^T = I; together with a
    T_v that mixes the channels of each head, every channel is mixed with every other.  inverse: x[i, :] = H^T x'[i, :].
    Where there is no Hadamard matrix for so many heads, the smallest number of neighboring channels is taken together for which
    there is one: 9 heads of 64 channels are mixed by matrices of size 36.
    Merged into the output projection: W' = W H^T in this order of its columns. Merging anew in a step of training makes three
    copies of that weight for a moment.

    Shape: activations [..., heads D]; o_proj weight [out, heads D] (side ``out``; its bias is not touched).

    Source: QuaRot (arXiv 2404.00456), Hadamard heads; channels taken together are this project's choice.

    Raises:
        UserError: if no number of channels gives a size of which there is a Hadamard matrix.
    """

    symbol: ClassVar[str] = "T_o"
    name: ClassVar[str] = "out_hadamard"
    mergeable: ClassVar[bool] = False
    online: ClassVar[bool] = True
    sides: ClassVar[tuple[str, ...]] = ("out",)

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.block_size = mixed_size(num_heads, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms the output projection's input [..., heads D]."""
        return self._mix(x, transpose=False)

    def inverse(self, x: Tensor) -> Tensor:
        """Undoes ``forward``."""
        return self._mix(x, transpose=True)

    def _mix(self, x: Tensor, *, transpose: bool) -> Tensor:
        by_channel = x.reshape(*x.shape[:-1], self.num_heads, self.head_dim).transpose(-1, -2).flatten(-2)
        mixed = ops.hadamard(by_channel, block_size=self.block_size, transpose=transpose)
        return mixed.reshape(*x.shape[:-1], self.head_dim, self.num_heads).transpose(-1, -2).flatten(-2)

    def merge(self, weight: Tensor, side: str) -> Tensor:
        self._check_side(side)
        if weight.shape[-1] != self.num_heads * self.head_dim:
            raise UserError(f"T_o of {self.num_heads} heads of {self.head_dim} does not fit a weight of {list(weight.shape)}")
        # Row w of W H^T is H w: the same transform that the activations get.
        return self._mix(weight, transpose=False)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "block_size": self.block_size}


def mixed_size(num_heads: int, head_dim: int) -> int:
    """The size of the Hadamard matrix by which the heads are mixed: all heads, times as few channels as possible.

    Raises:
        UserError: if there is none.

    >>> mixed_size(32, 128), mixed_size(9, 64)
    (32, 36)
    """
    sizes = [num_heads * channels for channels in range(1, head_dim + 1) if head_dim % channels == 0]
    for size in sizes:
        if is_hadamard_size(size):
            return size
    raise UserError(
        f"T_o (out_hadamard): there is no Hadamard matrix for {num_heads} heads, nor with channels taken together (sizes "
        f"{', '.join(map(str, sizes))}); remove transforms.out_hadamard"
    )
