"""P_a, P_o, P_ug, P_d: online Kronecker products of two small matrices on the inputs of linears; P_h: a matrix on keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.quantizers.grid import IntegerGrid
from fptquant.transforms.base import Start, Transform, compute_dtype, generator, is_hadamard_size, start_matrix
from fptquant.transforms.matrix_exp import matrix_exp
from fptquant.transforms.value_mixing import bounded


class Kronecker(Transform):
    """Multiplies the input of linears by a Kronecker product of two invertible matrices at run time.

    forward: x' = (L (x) R) x;  inverse: x = (L^-1 (x) R^-1) x'.
    Each factor is expm(E) B with the parameter E (zero at first, scaled down where it grows too large: `bounded`) and the fixed
    base B. The determinant of expm(E) is never zero: no step of an optimizer can make a factor singular.
    Merged into the linears that read the input: W' = W (L (x) R)^-1, so that W' x' = W x.
    The transform itself stays online: rows + columns multiply-accumulates for each value.

    Shape: activations [..., rows * columns]; weight [out, rows * columns] (side ``read``; the bias is not touched); L [rows, rows],
    R [columns, columns], absent where it is to be the identity.

    Source: FlatQuant (arXiv 2410.09426), section 3.1; the exponential parameter is this project's choice.

    Raises:
        UserError: if there is no Hadamard matrix of a factor's size (choose another start).
    """

    learning_rate: ClassVar[str | None] = "kronecker"
    mergeable: ClassVar[bool] = False
    online: ClassVar[bool] = True
    sides: ClassVar[tuple[str, ...]] = ("read",)

    def __init__(self, rows: int, columns: int, *, start: Start = "random_orthogonal", seed: int = 0) -> None:
        super().__init__()
        self.rows, self.columns, self.start = rows, columns, start
        rng = generator(seed)
        for side, size in self.sizes.items():
            self.register_buffer(f"base_{side}", start_matrix(start, size, rng))
            self.register_parameter(f"log_{side}", nn.Parameter(torch.zeros(size, size)))
        self.held: dict[str, Tensor] | None = None
        """The factors of a training step, computed once for all that need them."""
        self._known: dict[str, tuple[Any, dict[str, Tensor]]] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each factor that is there."""
        return {"left": self.rows, "right": self.columns}

    def _factor(self, side: str) -> Tensor:
        exponent, base = getattr(self, f"log_{side}"), getattr(self, f"base_{side}")
        factor: Tensor = matrix_exp(bounded(exponent.double())) @ base
        return factor

    def factors(self) -> dict[str, Tensor]:
        """``left`` and ``right``, those that are there, float64, differentiable in the parameters."""
        return {side: self._factor(side) for side in self.sizes} if self.held is None else self.held

    def hold(self) -> None:
        """Computes the factors once, with their graph, until `release`."""
        self.held = None
        self.held = self.factors()

    def release(self) -> None:
        """Ends `hold`: factors follow the parameters again."""
        self.held = None

    def _multiply(self, x: Tensor, factors: dict[str, Tensor]) -> Tensor:
        left, right = (None if side not in factors else factors[side].to(x.device) for side in ("left", "right"))
        return ops.kronecker(x, left, right)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms activations [..., rows * columns]."""
        return self._multiply(x, self._known_for(x, "factors", self.factors))

    def fake_quant(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, *, grid: IntegerGrid) -> Tensor:
        """``fake_quant(forward(x))`` with one scale, in one operator: the transformed values are not written."""
        return ops.kronecker_fake_quant(x, *self._known_pair(x), scale, zero_point, grid=grid)

    def fake_quant_dynamic(self, x: Tensor, clip: Tensor | None, *, grid: IntegerGrid, clip_ratio: float) -> Tensor:
        """``forward(x)``, each token rounded in its own range, in one operator."""
        return ops.kronecker_fake_quant_dynamic(x, *self._known_pair(x), clip, grid=grid, clip_ratio=clip_ratio)

    def _known_pair(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        factors = self._known_for(x, "factors", self.factors)
        return factors.get("left"), factors.get("right")

    def _inverse_transposed(self, x: Tensor) -> dict[str, Tensor]:
        def compute() -> dict[str, Tensor]:
            return {side: torch.linalg.inv(factor).mT for side, factor in self.factors().items()}

        return self._known_for(x, "inverse transposed", compute)

    def _known_for(self, x: Tensor, what: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Matrices in the dtype of computation and on the device of ``x``; remembered while nothing is trained."""
        tensors = [*self.parameters(), *self.buffers()]
        if self.held is not None or (torch.is_grad_enabled() and any(p.requires_grad for p in tensors)):
            return {side: matrix.to(x.device, compute_dtype(x)) for side, matrix in compute().items()}
        key = (compute_dtype(x), x.device, *((id(p), p._version) for p in tensors))
        known = self._known.get(what)
        if known is None or known[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # a later pass may need them for a gradient
                matrices = {side: matrix.to(x.device, compute_dtype(x)) for side, matrix in compute().items()}
            known = self._known[what] = (key, matrices)
        return known[1]

    def inverse(self, x: Tensor) -> Tensor:
        """Undoes ``forward``."""
        return self._multiply(x, {side: torch.linalg.inv(factor) for side, factor in self.factors().items()})

    def merge(self, weight: Tensor, side: str) -> Tensor:
        self._check_side(side)
        if weight.shape[-1] != self.rows * self.columns:
            raise UserError(f"{self.symbol} of {self.rows} x {self.columns} channels does not fit a weight of {list(weight.shape)}")
        # Row w of W (L (x) R)^-1 is (L^-T (x) R^-T) w.
        return self._multiply(weight, self._inverse_transposed(weight))

    def randomize_(self, generator: torch.Generator | None = None, spread: float = 0.3) -> None:
        """Draws the parameters so that the condition numbers are alike, whatever the size."""
        for parameter in self.parameters():
            with torch.no_grad():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn * spread / len(parameter) ** 0.5)

    def describe(self) -> dict[str, Any]:
        conditions = [float(torch.linalg.cond(factor.detach())) for factor in self.factors().values()]
        return {
            **super().describe(),
            "rows": self.rows,
            "columns": self.columns,
            "start": self.start,
            "largest_condition_number": max(conditions),
        }


class AttentionInputKronecker(Kronecker):
    """P_a: on the output of the norm before attention, read by q, k and v."""

    symbol: ClassVar[str] = "P_a"
    name: ClassVar[str] = "attn_in_kronecker"


class MLPInputKronecker(Kronecker):
    """P_ug: on the output of the norm before the MLP, read by gate and up."""

    symbol: ClassVar[str] = "P_ug"
    name: ClassVar[str] = "mlp_in_kronecker"


class DownKronecker(Kronecker):
    """P_d: on the input of the down projection."""

    symbol: ClassVar[str] = "P_d"
    name: ClassVar[str] = "down_kronecker"


class OutKronecker(Kronecker):
    """P_o: mixes the heads of the output projection's input; T_v mixes the channels of each head, and is merged.

    rows: heads; columns: head_dim, whose factor is the identity.
    """

    symbol: ClassVar[str] = "P_o"
    name: ClassVar[str] = "out_kronecker"

    @property
    def sizes(self) -> dict[str, int]:
        return {"left": self.rows}


class QueryKeyMixing(Kronecker):
    """P_h: an invertible matrix on every head of the keys after RoPE, at run time, undone in the queries.

    forward: k' = R k;  queries: q' = R^-T q, so that q' . k' = q . k. RoPE comes between the projections and this place, so nothing
    of it can be merged.

    Shape: queries [B, heads, T, D], keys [B, kv_heads, T, D], both after RoPE; R [D, D], the same for all heads.
    """

    symbol: ClassVar[str] = "P_h"
    name: ClassVar[str] = "query_key_mixing"
    learning_rate: ClassVar[str | None] = None
    sides: ClassVar[tuple[str, ...]] = ()

    def __init__(self, head_dim: int, *, start: Start = "random_orthogonal", seed: int = 0) -> None:
        super().__init__(1, head_dim, start=start, seed=seed)

    @property
    def sizes(self) -> dict[str, int]:
        return {"right": self.columns}

    def forward_query(self, x: Tensor) -> Tensor:
        """Undoes ``forward`` in the products of queries [..., D] with keys."""
        return self._multiply(x, self._inverse_transposed(x))

    def merge_into(self, weight: Tensor, side: str) -> Tensor:
        raise UserError("P_h comes after RoPE: it acts at run time and cannot be merged into weights")


def balanced(size: int) -> tuple[int, int]:
    """The two factors of a size that are nearest to each other, the lesser first: their sum is what a value costs.

    >>> balanced(576), balanced(1536), balanced(14336)
    ((24, 24), (32, 48), (112, 128))
    """
    rows = next(n for n in range(int(size**0.5), 0, -1) if size % n == 0)
    return rows, size // rows


def possible_start(start: Start, *sizes: int) -> Start:
    """The start, or a random orthogonal one where there is no Hadamard matrix of one of the sizes."""
    return "random_orthogonal" if "hadamard" in start and not all(map(is_hadamard_size, sizes)) else start
