"""What the function-preserving transforms have in common, and the matrices from which they start."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel, PerGroup

Start = Literal["identity", "hadamard", "random_hadamard", "random_orthogonal"]
"""Matrices from which a rotation or a mixing starts."""


class Transform(nn.Module):
    """A change of activations and weights that leaves the function of a model as it is.

    A transform knows no model. It acts on activations (``forward``, undone by ``inverse``) or, which is the same
    function without its run-time cost, on the weights around them (``merge_into``, one call for each weight, naming the
    side of the transform on which that weight stands). Parameters are float32 or float64 whatever the dtype of the
    model; weights are merged in float64 unless a transform says otherwise, and rounded once, back to their own dtype.
    Training merges anew in every step (``merge``, ``merge_fake_quant``), in the weight's own dtype.
    """

    symbol: ClassVar[str]
    """As in the paper: ``T_k``."""
    name: ClassVar[str]
    """As in configs: ``query_key_rotation``."""
    learning_rate: ClassVar[str | None] = None
    """The name of a learning rate that it shares with others; None: its own name."""
    mergeable: ClassVar[bool]
    """Nothing is left to do at run time once the weights are merged."""
    online: ClassVar[bool]
    """Something is left to do at run time."""
    sides: ClassVar[tuple[str, ...]]
    """What ``merge_into`` accepts as ``side``."""

    def merge(self, weight: Tensor, side: str) -> Tensor:
        """The weight [out, in] (or the bias [out]) of the linear that stands on ``side`` of the transform, merged.

        Computed in the weight's dtype (float32 or wider inside); differentiable in weight and parameters.

        Raises:
            UserError: if the transform has no such side or the weight's shape does not fit.
        """
        raise NotImplementedError

    def merge_into(self, weight: Tensor, side: str) -> Tensor:
        """``merge`` in float64, rounded once, back to the weight's dtype. Errors as there."""
        return self.merge(weight.double(), side).to(weight.dtype)

    def merge_fake_quant(
        self, weight: Tensor, side: str, scale: Tensor, zero_point: Tensor | None, *, grid: IntegerGrid, granularity: Granularity
    ) -> Tensor:
        """``fake_quant(merge(weight))``, differentiable; in one operator where there is one, without the merged weight."""
        return ops.fake_quant(self.merge(weight, side), scale, zero_point, grid=grid, granularity=granularity)

    def inverse(self, x: Tensor) -> Tensor:
        """Undoes ``forward`` on the same activations."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Symbol, name and the facts worth reporting, all fit for JSON."""
        return {"symbol": self.symbol, "name": self.name, "parameters": sum(p.numel() for p in self.parameters())}

    def randomize_(self, generator: torch.Generator | None = None, spread: float = 0.3) -> None:
        """Draws every parameter from a normal distribution of standard deviation ``spread`` (for tests)."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.describe().items() if key not in ("symbol", "name"))

    def _check_side(self, side: str) -> None:
        if side not in self.sides:
            raise UserError(f"{self.symbol} has no side {side!r}; its sides are {', '.join(self.sides)}")


def is_per_row(granularity: Granularity) -> bool:
    """Whether the operators that merge and quantize at once serve this granularity of a weight [out, in].

    >>> is_per_row(PerChannel(0)), is_per_row(PerChannel(1))
    (True, False)
    """
    return isinstance(granularity, PerGroup) or granularity == PerChannel(0)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 tensors, float32 for everything narrower.

    >>> compute_dtype(torch.zeros(1, dtype=torch.bfloat16))
    torch.float32
    """
    return torch.promote_types(x.dtype, torch.float32)


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that the result depends on ``seed`` and on nothing drawn elsewhere."""
    return torch.Generator().manual_seed(seed)


def random_signs(size: int, rng: torch.Generator) -> Tensor:
    """``size`` values of +1 or -1, float64."""
    return torch.randint(0, 2, (size,), generator=rng).double() * 2 - 1


def random_orthogonal(size: int, rng: torch.Generator) -> Tensor:
    """An orthogonal matrix [size, size], float64, uniformly distributed.

    Q of a Gaussian matrix's QR, its columns multiplied by the signs of R's diagonal; without these signs the
    distribution would depend on the convention of the factorization.
    """
    q, r = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))
    signs: Tensor = torch.sign(torch.diagonal(r))
    matrix: Tensor = (signs * q).contiguous()  # q is stored by columns, which no file of tensors takes
    return matrix


def is_hadamard_size(size: int) -> bool:
    """Whether `fptquant.ops.hadamard` can transform vectors of this size in one block."""
    return size in ops.hadamard_sizes(size)


def start_matrix(start: Start, size: int, rng: torch.Generator) -> Tensor:
    """The orthogonal matrix [size, size], float64, that a start stands for.

    Raises:
        UserError: if there is no such start, or no Hadamard matrix of this size (the message names the nearest sizes).

    >>> start_matrix("hadamard", 2, generator(0)).mul(2**0.5).round().tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    if start == "identity":
        return torch.eye(size, dtype=torch.float64)
    if start == "random_orthogonal":
        return random_orthogonal(size, rng)
    if start not in get_args(Start):
        raise UserError(f"start {start!r} is not known; choose one of {', '.join(get_args(Start))}")
    try:
        matrix: Tensor = ops.hadamard_matrix(size, torch.float64) / size**0.5
    except UserError as error:
        raise UserError(f"{error}; or choose the start identity or random_orthogonal, which exist in any size") from None
    return matrix * random_signs(size, rng) if start == "random_hadamard" else matrix
