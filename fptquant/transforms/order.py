"""The transforms of a whole model, and the order in which they apply.

Order of merging: T_r (rows and columns of every weight turn), then T_n, T_k, T_v, T_u of each block, last what acts online on the
inputs of linears, T_d, T_o, Kronecker products or rotations of blocks: the down projection's columns are divided by T_u's scales
first and transformed by T_d then, because at run time T_d acts on the scaled activation; so it is with the output projection, T_v
and T_o. S_n, T_h and P_h act at run time only. Local optimization looks at the weights after T_r and before what acts online.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fptquant.errors import UserError
from fptquant.transforms.base import Start, Transform
from fptquant.transforms.block_rotation import AttentionInputRotation, DownRotation, MLPInputRotation, OutRotation
from fptquant.transforms.down_hadamard import DownHadamard
from fptquant.transforms.kronecker import (
    AttentionInputKronecker,
    DownKronecker,
    MLPInputKronecker,
    OutKronecker,
    QueryKeyMixing,
    balanced,
    possible_start,
)
from fptquant.transforms.norm_scaling import AttentionInputScaling, MLPInputScaling, NormScaling
from fptquant.transforms.out_hadamard import OutHadamard
from fptquant.transforms.query_key_hadamard import QueryKeyHadamard
from fptquant.transforms.query_key_rotation import PairConstraint, QueryKeyRotation
from fptquant.transforms.residual_rotation import ResidualRotation
from fptquant.transforms.residual_scaling import ResidualScaling, Where
from fptquant.transforms.up_scaling import UpScaling
from fptquant.transforms.value_mixing import Constraint, ValueMixing

if TYPE_CHECKING:
    from fptquant.config.transforms import TransformsConfig

BLOCK_ORDER = (
    "attn_in_scaling", "mlp_in_scaling", "query_key_rotation", "value_mixing", "up_scaling", "down_hadamard", "out_hadamard",
    "attn_in_kronecker", "mlp_in_kronecker", "out_kronecker", "down_kronecker", "query_key_mixing",
    "attn_in_rotation", "mlp_in_rotation", "out_rotation", "down_rotation",
)  # fmt: skip
"""Transforms of a block, in the order in which they are merged."""


BlockRotations = tuple[AttentionInputRotation, MLPInputRotation, OutRotation, DownRotation]
KroneckerTransforms = tuple[AttentionInputKronecker, MLPInputKronecker, OutKronecker, DownKronecker]


@dataclass(frozen=True)
class ModelSizes:
    """What transforms need to know about a model: sizes, no names."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    has_qk_norm: bool = False


@dataclass(frozen=True)
class TransformOptions:
    """Which transforms are used, and from where they start; the field names are those of configs."""

    norm_scaling: bool = False
    query_key_rotation: bool = False
    value_mixing: Start | None = None
    value_constraint: Constraint = "none"
    up_scaling: bool = False
    residual_rotation: Start | None = None
    down_hadamard: bool = False
    down_hadamard_block: int | None = None
    residual_scaling: Where | None = None
    out_hadamard: bool = False
    query_key_hadamard: bool = False
    kronecker: Start | None = None
    query_key_mixing: Start | None = None
    query_key_constraint: PairConstraint = "none"
    block_rotation: int | None = None

    @classmethod
    def of(cls, used: TransformsConfig) -> TransformOptions:
        """What a config says."""
        return cls(
            norm_scaling=used.norm_scaling is not None,
            query_key_rotation=used.query_key_rotation is not None,
            value_mixing=used.value_mixing.start if used.value_mixing else None,
            value_constraint=used.value_mixing.constraint if used.value_mixing else "none",
            up_scaling=used.up_scaling is not None,
            residual_rotation=used.residual_rotation.start if used.residual_rotation else None,
            down_hadamard=used.down_hadamard is not None,
            down_hadamard_block=used.down_hadamard.block_size if used.down_hadamard else None,
            residual_scaling=used.residual_scaling.where if used.residual_scaling else None,
            out_hadamard=used.out_hadamard is not None,
            query_key_hadamard=used.query_key_hadamard is not None,
            kronecker=used.kronecker.start if used.kronecker else None,
            query_key_mixing=used.query_key_mixing.start if used.query_key_mixing else None,
            query_key_constraint=used.query_key_rotation.constraint if used.query_key_rotation else "none",
            block_rotation=used.block_rotation.block_size if used.block_rotation else None,
        )


class BlockTransforms(nn.Module):
    """The transforms of one decoder block; those not in use are None."""

    def __init__(
        self,
        query_key_rotation: QueryKeyRotation | None = None,
        value_mixing: ValueMixing | None = None,
        up_scaling: UpScaling | None = None,
        down_hadamard: DownHadamard | None = None,
        attn_in_scaling: AttentionInputScaling | None = None,
        mlp_in_scaling: MLPInputScaling | None = None,
        out_hadamard: OutHadamard | None = None,
        kronecker: KroneckerTransforms | None = None,
        query_key_mixing: QueryKeyMixing | None = None,
        rotations: BlockRotations | None = None,
    ) -> None:
        super().__init__()
        self.attn_in_scaling = attn_in_scaling
        self.mlp_in_scaling = mlp_in_scaling
        self.query_key_rotation = query_key_rotation
        self.value_mixing = value_mixing
        self.up_scaling = up_scaling
        self.down_hadamard = down_hadamard
        self.out_hadamard = out_hadamard
        self.attn_in_kronecker = None if kronecker is None else kronecker[0]
        self.mlp_in_kronecker = None if kronecker is None else kronecker[1]
        self.out_kronecker = None if kronecker is None else kronecker[2]
        self.down_kronecker = None if kronecker is None else kronecker[3]
        self.query_key_mixing = query_key_mixing
        self.attn_in_rotation = None if rotations is None else rotations[0]
        self.mlp_in_rotation = None if rotations is None else rotations[1]
        self.out_rotation = None if rotations is None else rotations[2]
        self.down_rotation = None if rotations is None else rotations[3]

    def used(self) -> Iterator[Transform]:
        """The transforms in use, in the order of merging."""
        return (transform for name in BLOCK_ORDER if (transform := getattr(self, name)) is not None)

    def norm_scalings(self) -> Iterator[NormScaling]:
        """T_n of the two norms, if in use."""
        return (transform for transform in self.used() if isinstance(transform, NormScaling))

    def of_linears(self) -> Iterator[Transform]:
        """The transforms in use that change linears alone: all but T_n, which changes norms too."""
        return (transform for transform in self.used() if not isinstance(transform, NormScaling))


class ModelTransforms(nn.Module):
    """The transforms of a whole model."""

    blocks: nn.ModuleList

    def __init__(
        self,
        blocks: list[BlockTransforms],
        residual_rotation: ResidualRotation | None = None,
        residual_scaling: ResidualScaling | None = None,
        query_key_hadamard: QueryKeyHadamard | None = None,
    ) -> None:
        super().__init__()
        self.residual_rotation = residual_rotation
        self.residual_scaling = residual_scaling
        self.query_key_hadamard = query_key_hadamard
        self.blocks = nn.ModuleList(blocks)

    def block(self, index: int) -> BlockTransforms:
        """The transforms of decoder block ``index``."""
        block = self.blocks[index]
        assert isinstance(block, BlockTransforms)
        return block

    def used(self) -> Iterator[Transform]:
        """All transforms in use, in the order of merging."""
        yield from self._of_all_blocks()
        for index in range(len(self.blocks)):
            yield from self.block(index).used()

    def _of_all_blocks(self) -> Iterator[Transform]:
        for transform in (self.residual_rotation, self.residual_scaling, self.query_key_hadamard):
            if transform is not None:
                yield transform

    @property
    def fully_mergeable(self) -> bool:
        """Whether nothing is left to do at run time once everything is merged."""
        return all(transform.mergeable for transform in self.used())

    def randomize_(self, generator: torch.Generator | None = None, spread: float = 0.3) -> None:
        """Random parameters everywhere (for tests)."""
        for transform in self.used():
            transform.randomize_(generator, spread)

    def largest_condition_numbers(self) -> dict[str, float]:
        """Of all blocks, for each kind of transform with matrices that need not be orthogonal, by its symbol."""
        found: dict[str, float] = {}
        for facts in self.describe():
            number = facts.get("largest_condition_number")
            if number is not None:
                found[facts["symbol"]] = max(number, found.get(facts["symbol"], 1.0))
        return found

    def describe(self) -> list[dict[str, Any]]:
        """What is used: the model's transforms, then those of each block with the block's index."""
        whole = [transform.describe() for transform in self._of_all_blocks()]
        blocks = ({"block": i, **t.describe()} for i in range(len(self.blocks)) for t in self.block(i).used())
        return [*whole, *blocks]


def check_transforms(sizes: ModelSizes, options: TransformOptions) -> None:
    """Finds what cannot work, before any work is done.

    Raises:
        UserError: for T_k on a model whose queries and keys are normalized; for impossible Hadamard sizes.
    """
    if options.query_key_rotation and sizes.has_qk_norm:
        raise UserError(
            "T_k (query_key_rotation) does not preserve the function of this model: norms of queries and keys "
            "(q_norm, k_norm) sit between the projections and RoPE. Remove transforms.query_key_rotation; the other "
            "transforms work."
        )
    if options.down_hadamard:
        DownHadamard(sizes.intermediate_size, options.down_hadamard_block)
    if options.out_hadamard:
        OutHadamard(sizes.num_heads, sizes.head_dim)
    if options.query_key_hadamard:
        QueryKeyHadamard(sizes.head_dim)
    if options.query_key_mixing is not None:
        QueryKeyMixing(sizes.head_dim, start=options.query_key_mixing)
    if options.residual_rotation is not None:
        ResidualRotation(sizes.hidden_size, start=options.residual_rotation)
    if options.value_mixing is not None:
        ValueMixing(1, sizes.head_dim, start=options.value_mixing, constraint=options.value_constraint)


def build_transforms(sizes: ModelSizes, options: TransformOptions, *, seed: int = 0) -> ModelTransforms:
    """Transforms at their starts: T_n, T_k and T_u do nothing yet, T_v and T_r are what their start says.

    Raises:
        UserError: as `check_transforms`.

    >>> sizes = ModelSizes(2, hidden_size=24, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8)
    >>> options = TransformOptions(up_scaling=True, residual_rotation="random_hadamard")
    >>> [transform.symbol for transform in build_transforms(sizes, options).used()]
    ['T_r', 'T_u', 'T_u']
    """
    check_transforms(sizes, options)

    def value_mixing(index: int) -> ValueMixing | None:
        if options.value_mixing is None:
            return None
        return ValueMixing(
            sizes.num_kv_heads,
            sizes.head_dim,
            start=options.value_mixing,
            constraint=options.value_constraint,
            seed=seed + 1 + index,
        )

    def kronecker(index: int) -> KroneckerTransforms | None:
        start = options.kronecker
        return None if start is None else _kronecker(sizes, start, seed=seed + 1 + sizes.num_layers + 4 * index)

    def query_key_rotation() -> QueryKeyRotation | None:
        if not options.query_key_rotation:
            return None
        return QueryKeyRotation(sizes.num_kv_heads, sizes.head_dim, constraint=options.query_key_constraint)

    def query_key_mixing(index: int) -> QueryKeyMixing | None:
        start = options.query_key_mixing
        if start is None:
            return None
        return QueryKeyMixing(sizes.head_dim, start=start, seed=seed + 1 + 5 * sizes.num_layers + index)

    blocks = [
        BlockTransforms(
            query_key_rotation(),
            value_mixing(index),
            UpScaling(sizes.intermediate_size) if options.up_scaling else None,
            DownHadamard(sizes.intermediate_size, options.down_hadamard_block) if options.down_hadamard else None,
            AttentionInputScaling(sizes.hidden_size) if options.norm_scaling else None,
            MLPInputScaling(sizes.hidden_size) if options.norm_scaling else None,
            OutHadamard(sizes.num_heads, sizes.head_dim) if options.out_hadamard else None,
            kronecker(index),
            query_key_mixing(index),
            _rotations(sizes, options.block_rotation) if options.block_rotation is not None else None,
        )
        for index in range(sizes.num_layers)
    ]
    rotation, scaling = options.residual_rotation, options.residual_scaling
    return ModelTransforms(
        blocks,
        ResidualRotation(sizes.hidden_size, start=rotation, seed=seed) if rotation is not None else None,
        ResidualScaling(sizes.norm_eps, scaling) if scaling is not None else None,
        QueryKeyHadamard(sizes.head_dim) if options.query_key_hadamard else None,
    )


def _kronecker(sizes: ModelSizes, start: Start, *, seed: int) -> KroneckerTransforms:
    """P_a, P_ug, P_o and P_d of one block; a factor of which there is no Hadamard matrix starts as a random orthogonal one."""
    hidden, inner, heads = balanced(sizes.hidden_size), balanced(sizes.intermediate_size), (sizes.num_heads, sizes.head_dim)
    return (
        AttentionInputKronecker(*hidden, start=possible_start(start, *hidden), seed=seed),
        MLPInputKronecker(*hidden, start=possible_start(start, *hidden), seed=seed + 1),
        OutKronecker(*heads, start=possible_start(start, sizes.num_heads), seed=seed + 2),
        DownKronecker(*inner, start=possible_start(start, *inner), seed=seed + 3),
    )


def _rotations(sizes: ModelSizes, block_size: int) -> BlockRotations:
    """D_a, D_ug, D_o and D_d of one block, which do nothing yet."""
    return (
        AttentionInputRotation(sizes.hidden_size, block_size),
        MLPInputRotation(sizes.hidden_size, block_size),
        OutRotation(sizes.num_heads * sizes.head_dim, block_size),
        DownRotation(sizes.intermediate_size, block_size),
    )
