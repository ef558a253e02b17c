"""What a config says of transforms: which are used, where they start, and how they are found without training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fptquant.config.strict import StrictModel

Start = Literal["identity", "hadamard", "random_hadamard", "random_orthogonal"]
"""Matrices from which a rotation or mixing starts; a random one is drawn from ``seed``."""


def _switch(data: Any) -> Any:
    """``true`` means with the defaults, ``false`` means not used, so that one override switches a transform."""
    if data is True:
        return {}
    return None if data is False else data


class QueryKeyRotationConfig(StrictModel):
    """T_k: rotation and scale of every RoPE pair of keys, undone in the queries."""

    constraint: Literal["none", "scale"] = Field(default="none", description="scale: pairs are not rotated")


class NormScalingConfig(StrictModel):
    """T_n: a scale per channel of the norms' outputs, undone in the linears that read them; set by ``smoothing``, or trained."""


class ValueMixingConfig(StrictModel):
    """T_v: a matrix per key/value head on the values, undone in the output projection."""

    start: Start = "hadamard"
    constraint: Literal["none", "orthogonal", "diagonal"] = "none"


class UpScalingConfig(StrictModel):
    """T_u: a scale per channel of the up projection, undone in the down projection."""


class ResidualRotationConfig(StrictModel):
    """T_r: an orthogonal matrix on the residual."""

    start: Start = "random_hadamard"
    learn: bool = False
    steps: int = Field(default=100, ge=1)
    lr: float = Field(default=0.01, gt=0)


class DownHadamardConfig(StrictModel):
    """T_d: an online block Hadamard transform on the input of the down projection."""

    block_size: int | None = Field(default=None, ge=1, description="null: the whole intermediate size")


class OutHadamardConfig(StrictModel):
    """T_o: an online Hadamard transform across the heads, on the input of the output projection."""


class KroneckerConfig(StrictModel):
    """P_a, P_ug, P_o, P_d: online Kronecker products of two learned matrices on the inputs of all linears."""

    start: Start = Field(default="random_orthogonal", description="of each factor; orthogonal where there is no Hadamard matrix")


class BlockRotationConfig(StrictModel):
    """D_a, D_ug, D_o, D_d: online rotations of blocks of channels, found from the calibration text, a permutation between two."""

    block_size: int = Field(default=128, ge=2, description="largest size of a block, which divides the channels")
    steps: int = Field(default=256, ge=1, description="turns that are tried for each block; the best number of them is kept")


class QueryKeyMixingConfig(StrictModel):
    """P_h: an online learned matrix on the heads of the keys after RoPE, undone in the queries."""

    start: Start = "random_orthogonal"


class QueryKeyHadamardConfig(StrictModel):
    """T_h: an online Hadamard transform of queries and keys after RoPE, for caches of few bits."""


class ResidualScalingConfig(StrictModel):
    """S_n: the residual is kept normalized and its running scale carried along."""

    where: Literal["input", "output"] = "input"


class TransformsConfig(StrictModel):
    """Which function-preserving transforms are used; absent or null means not used."""

    norm_scaling: Annotated[NormScalingConfig | None, BeforeValidator(_switch)] = None
    query_key_rotation: Annotated[QueryKeyRotationConfig | None, BeforeValidator(_switch)] = None
    value_mixing: Annotated[ValueMixingConfig | None, BeforeValidator(_switch)] = None
    up_scaling: Annotated[UpScalingConfig | None, BeforeValidator(_switch)] = None
    residual_rotation: Annotated[ResidualRotationConfig | None, BeforeValidator(_switch)] = None
    down_hadamard: Annotated[DownHadamardConfig | None, BeforeValidator(_switch)] = None
    residual_scaling: Annotated[ResidualScalingConfig | None, BeforeValidator(_switch)] = None
    out_hadamard: Annotated[OutHadamardConfig | None, BeforeValidator(_switch)] = None
    query_key_hadamard: Annotated[QueryKeyHadamardConfig | None, BeforeValidator(_switch)] = None
    kronecker: Annotated[KroneckerConfig | None, BeforeValidator(_switch)] = None
    query_key_mixing: Annotated[QueryKeyMixingConfig | None, BeforeValidator(_switch)] = None
    block_rotation: Annotated[BlockRotationConfig | None, BeforeValidator(_switch)] = None

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the transforms in use."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)


class SmoothingConfig(StrictModel):
    """Scales of T_n, T_u and a diagonal T_v from the activations of the calibration text."""

    method: Literal["smoothquant", "awq"] = Field(
        default="smoothquant", description="what is made small: the largest activations, or the error of rounded weights"
    )
    alpha: float = Field(default=0.5, ge=0, le=1, description="share of an outlier that moves into the weights (smoothquant)")
    candidates: int = Field(default=20, ge=2, le=1000, description="exponents of the mean activation that are tried (awq)")


class LocalConfig(StrictModel):
    """Local optimization: the L_p norm of the merged weights over T_k, T_v and T_u, without data."""

    method: Literal["closed_form", "adamw", "none"] = "closed_form"
    p: float = Field(default=4.0, ge=2, le=8)
    steps: int = Field(default=200, ge=1, description="AdamW steps per block for T_k and T_u")
    lr: float = Field(default=0.01, gt=0)
    value_steps: int = Field(default=100, ge=0, description="steps for T_v, which has no closed form")
    up_p: float | None = Field(default=None, ge=2, le=8, description="exponent for T_u; null: 2 where T_d follows, else p")
