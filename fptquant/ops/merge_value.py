"""T_v merged into value and output projections: one invertible matrix per KV head."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops._library import compute_dtype


def merge_value(weight: Tensor, matrix: Tensor, *, group: int = 1, inverse: bool = False) -> Tensor:
    """Mixes the rows of each value head by its matrix or, with ``inverse``, the columns of output heads by its inverse.

    ``inverse=False`` (v_proj): W'_h = M_h W_h for KV head h. ``inverse=True`` (o_proj): W'_h = W_h M_{h // group}^-1
    for query head h, found by solving W'_h M = W_h (never by an explicit inverse). The product of the two is unchanged.
    Made of torch's own matrix product and solver, in float32 or wider; differentiable through both.

    Shape:
        matrix: [kv_heads, head_dim, head_dim].
        weight: [kv_heads * head_dim, in] or a bias; with ``inverse``: [out, kv_heads * group * head_dim].
        returns: like weight.

    Raises:
        UserError: if the shapes do not fit.
        torch.linalg.LinAlgError: if a matrix is singular (``inverse`` only).

    Source: FPTQuant, arXiv 2506.04985, T_v.

    >>> merge_value(torch.eye(2), torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]), inverse=True)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    if matrix.dim() != 3 or matrix.shape[1] != matrix.shape[2]:
        raise UserError(f"merge_value: matrix has shape {list(matrix.shape)}; it must be [kv_heads, head_dim, head_dim]")
    heads, head_dim = matrix.shape[0], matrix.shape[1]
    wide_dtype = compute_dtype(weight)
    wide, mixing = weight.to(wide_dtype), matrix.to(wide_dtype)
    if not inverse:
        if weight.dim() not in (1, 2) or weight.shape[0] != heads * head_dim:
            raise UserError(
                f"merge_value: weight has shape {list(weight.shape)}, but matrix {list(matrix.shape)} needs {heads * head_dim} rows"
            )
        return torch.matmul(mixing, wide.reshape(heads, head_dim, -1)).reshape(weight.shape).to(weight.dtype)
    columns = heads * group * head_dim
    if group < 1 or weight.dim() != 2 or weight.shape[1] != columns:
        raise UserError(
            f"merge_value: weight has shape {list(weight.shape)}, but matrix {list(matrix.shape)} with group = {group} "
            f"needs {columns} columns"
        )
    out = weight.shape[0]
    # One solve per KV head serves all query heads of its group: their rows are stacked.
    stacked = wide.reshape(out, heads, group, head_dim).permute(1, 0, 2, 3).reshape(heads, out * group, head_dim)
    solved = torch.linalg.solve(mixing, stacked, left=False)
    unstacked: Tensor = solved.reshape(heads, out, group, head_dim).permute(1, 0, 2, 3)
    return unstacked.reshape(weight.shape).to(weight.dtype)
