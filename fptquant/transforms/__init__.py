"""Function-preserving transforms: mathematics only, no model knowledge."""

from fptquant.transforms.base import Start, Transform
from fptquant.transforms.block_rotation import BlockRotation, DownRotation
from fptquant.transforms.down_hadamard import DownHadamard
from fptquant.transforms.kronecker import (
    AttentionInputKronecker,
    DownKronecker,
    Kronecker,
    MLPInputKronecker,
    OutKronecker,
    QueryKeyMixing,
)
from fptquant.transforms.norm_scaling import AttentionInputScaling, MLPInputScaling, NormScaling
from fptquant.transforms.order import (
    BlockTransforms,
    ModelSizes,
    ModelTransforms,
    TransformOptions,
    build_transforms,
    check_transforms,
)
from fptquant.transforms.out_hadamard import OutHadamard
from fptquant.transforms.query_key_hadamard import QueryKeyHadamard
from fptquant.transforms.query_key_rotation import QueryKeyRotation
from fptquant.transforms.residual_rotation import ResidualRotation
from fptquant.transforms.residual_scaling import ResidualScaling
from fptquant.transforms.up_scaling import UpScaling
from fptquant.transforms.value_mixing import ValueMixing

__all__ = [
    "AttentionInputKronecker",
    "AttentionInputScaling",
    "BlockRotation",
    "BlockTransforms",
    "DownHadamard",
    "DownKronecker",
    "DownRotation",
    "Kronecker",
    "MLPInputKronecker",
    "MLPInputScaling",
    "ModelSizes",
    "ModelTransforms",
    "NormScaling",
    "OutHadamard",
    "OutKronecker",
    "QueryKeyHadamard",
    "QueryKeyMixing",
    "QueryKeyRotation",
    "ResidualRotation",
    "ResidualScaling",
    "Start",
    "Transform",
    "TransformOptions",
    "UpScaling",
    "ValueMixing",
    "build_transforms",
    "check_transforms",
]
