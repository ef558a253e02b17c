"""T_r: an orthogonal matrix on the residual, undone in everything that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.transforms.base import (
    Start,
    Transform,
    compute_dtype,
    generator,
    is_hadamard_size,
    random_signs,
    start_matrix,
)

ROWS_AT_ONCE = 2048
"""Rows that are merged together: bounds the wide copies of an embedding with many rows."""


def cayley(skew: Tensor) -> Tensor:
    """The orthogonal matrix (I - A/2)^-1 (I + A/2) of an antisymmetric A, in float64.

    It is I + A to first order, and never has -1 as an eigenvalue.

    >>> q = cayley(torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
    >>> (q @ q.T).round(decimals=12).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    half = skew.double() / 2
    eye = torch.eye(half.shape[-1], dtype=torch.float64, device=half.device)
    rotation: Tensor = torch.linalg.solve(eye - half, eye + half)
    return rotation


class ResidualRotation(Transform):
    """Rotates the residual by an orthogonal matrix.

    forward: x' = C B x;  inverse: x = B^T C^T x', with B the start and C = cayley(G - G^T) of the parameter G
    (``generator``, zero at first: C = I). B = H diag(signs) for the start ``random_hadamard`` (applied as a fast
    transform), diag(signs) = I for ``hadamard``.
    RMSNorm without a gain commutes with a rotation: fold the gains first.

    Shape: activations [..., H]. Weights: ``read`` [out, H] (q, k, v, gate, up, lm_head), ``write`` [H, in] or bias [H]
    (o_proj, down_proj), ``embedding`` [vocabulary, H].

    Weights are merged in float64 by the fast transform; by a dense matrix in float32 (float64 for float64 weights).

    Raises:
        UserError: if there is no Hadamard matrix of this size; names the nearest sizes and the starts that exist in any.

    Source: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406), FPTQuant (arXiv 2506.04985).
    """

    symbol: ClassVar[str] = "T_r"
    name: ClassVar[str] = "residual_rotation"
    mergeable: ClassVar[bool] = True
    online: ClassVar[bool] = False
    sides: ClassVar[tuple[str, ...]] = ("read", "write", "embedding")

    signs: Tensor
    dense: Tensor

    def __init__(self, hidden_size: int, *, start: Start = "random_hadamard", seed: int = 0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.start: Start = start
        rng = generator(seed)
        if start.endswith("hadamard") and not is_hadamard_size(hidden_size):
            start_matrix(start, hidden_size, rng)  # its error names the sizes that are possible, and other starts
        fast = self.start in ("hadamard", "random_hadamard")
        signs = random_signs(hidden_size, rng) if self.start == "random_hadamard" else torch.ones(hidden_size)
        # Of the two descriptions of B one is empty: signs of the fast transform, or a dense matrix.
        self.register_buffer("signs", signs.double() if fast else torch.zeros(0, dtype=torch.float64))
        dense = torch.zeros(0, dtype=torch.float64) if fast else start_matrix(self.start, hidden_size, rng)
        self.register_buffer("dense", dense)
        self.generator = nn.Parameter(torch.zeros(hidden_size, hidden_size))
        self.held: Tensor | None = None
        """The matrix of a training step, computed once for all the weights that need it."""

    @property
    def is_fast(self) -> bool:
        """Whether the whole rotation is a Hadamard transform with signs."""
        return self.signs.numel() > 0 and not bool(self.generator.detach().any())

    def base(self) -> Tensor:
        """B [H, H], float64."""
        if self.dense.numel():
            return self.dense
        return ops.hadamard(torch.diag(self.signs), block_size=self.hidden_size).mT

    def matrix(self) -> Tensor:
        """C B [H, H], float64, differentiable in the parameter."""
        if self.held is not None:
            return self.held
        return cayley(self.generator - self.generator.mT) @ self.base()

    def set_matrix_(self, matrix: Tensor) -> None:
        """Makes the orthogonal ``matrix`` [H, H] the start B, and the parameter zero.

        Raises:
            UserError: if the shape is another or the matrix is not orthogonal (1e-6).
        """
        wide = matrix.detach().double()
        if wide.shape != (self.hidden_size, self.hidden_size):
            raise UserError(f"T_r needs a matrix of shape {[self.hidden_size] * 2}, not {list(matrix.shape)}")
        defect = float((wide @ wide.mT - torch.eye(self.hidden_size, dtype=torch.float64, device=wide.device)).abs().max())
        if not defect < 1e-6:
            raise UserError(f"T_r needs an orthogonal matrix: max |M M^T - I| is {defect:.2g}")
        # One Newton step of the polar decomposition squares the defect, so that float64 models stay exact to 1e-12.
        self.dense = 1.5 * wide - 0.5 * wide @ (wide.mT @ wide)
        self.signs = self.signs.new_zeros(0)
        with torch.no_grad():
            self.generator.zero_()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, shape in (("signs", (self.hidden_size,)), ("dense", (self.hidden_size, self.hidden_size))):
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape in ((0,), shape):  # a learned matrix takes the place of signs
                setattr(self, name, own.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def frozen(self) -> ResidualRotation:
        """The same rotation with the parameter absorbed into the start, so that many merges compute C only once."""
        if self.is_fast or not bool(self.generator.detach().any()):
            return self
        copy = ResidualRotation(self.hidden_size, start="identity").to(self.generator.device)
        copy.set_matrix_(self.matrix())
        return copy

    def forward(self, x: Tensor) -> Tensor:
        """Rotates vectors of the residual [..., H]."""
        dtype = compute_dtype(x)
        if self.is_fast:
            return ops.hadamard(x.to(dtype) * self.signs.to(dtype), block_size=self.hidden_size).to(x.dtype)
        return (x.to(dtype) @ self.matrix().to(dtype).mT).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Rotates vectors of the rotated residual [..., H] back."""
        dtype = compute_dtype(x)
        if self.is_fast:
            back = ops.hadamard(x.to(dtype), block_size=self.hidden_size, transpose=True)
            return (back * self.signs.to(dtype)).to(x.dtype)
        return (x.to(dtype) @ self.matrix().to(dtype)).to(x.dtype)

    def _check_weight(self, weight: Tensor, side: str) -> None:
        self._check_side(side)
        axis = 0 if side == "write" else -1
        if weight.shape[axis] != self.hidden_size:
            raise UserError(f"T_r of size {self.hidden_size} does not fit a weight of shape {list(weight.shape)} on side {side}")

    def merge(self, weight: Tensor, side: str) -> Tensor:
        self._check_weight(weight, side)
        dtype = compute_dtype(weight)
        matrix = self.matrix().to(dtype)
        merged = matrix @ weight.to(dtype) if side == "write" else weight.to(dtype) @ matrix.mT
        return merged.to(weight.dtype)

    def merge_into(self, weight: Tensor, side: str) -> Tensor:
        self._check_weight(weight, side)
        # Rows of W that read the residual, columns that write it and rows of the embedding are vectors of the residual
        # space and turn alike: W' = W R with R^T = C B, as W x = (W R)(R^T x).
        vectors = weight.mT if side == "write" and weight.dim() == 2 else weight
        matrix = None if self.is_fast else self.matrix().to(compute_dtype(weight)).mT
        turned = torch.empty_like(vectors, memory_format=torch.contiguous_format)
        flat, flat_turned = (vectors[None], turned[None]) if vectors.dim() == 1 else (vectors, turned)
        for begin in range(0, flat.shape[0], ROWS_AT_ONCE):
            rows = flat[begin : begin + ROWS_AT_ONCE]
            if matrix is None:
                flat_turned[begin : begin + ROWS_AT_ONCE] = self.forward(rows.double())
            else:
                flat_turned[begin : begin + ROWS_AT_ONCE] = rows.to(matrix.dtype) @ matrix
        return turned.mT.contiguous() if side == "write" and weight.dim() == 2 else turned

    def randomize_(self, generator: torch.Generator | None = None, spread: float = 0.3) -> None:
        """Draws the parameter so that C turns by angles of about ``spread``, whatever the size."""
        super().randomize_(generator, spread / self.hidden_size**0.5)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "size": self.hidden_size, "start": self.start, "fast": self.is_fast}
