"""Tiny models with random transforms, merged or acting online, for tests of function preservation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.models.adapter import model_sizes
from fptquant.models.architectures import view_model
from fptquant.models.norm import widen_norms_
from fptquant.stages.fuse_norms import NORM_READERS, fuse_norms_
from fptquant.stages.untie import untie_
from fptquant.transforms import (
    ModelTransforms,
    NormScaling,
    QueryKeyRotation,
    ResidualRotation,
    Transform,
    TransformOptions,
    UpScaling,
    ValueMixing,
    build_transforms,
)
from tests.models.tiny import tiny_model, token_ids

SIZES: dict[str, dict[str, Any]] = {
    "hidden-36": {
        "hidden_size": 36,
        "intermediate_size": 40,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 12,
    },
    "hidden-72": {
        "hidden_size": 72,
        "intermediate_size": 112,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "hidden-96": {
        "hidden_size": 96,
        "intermediate_size": 172,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
    "hidden-576": {
        "hidden_size": 576,
        "intermediate_size": 144,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
}
"""Grouped and single heads, head_dim 12, 64 and 128, no hidden size a power of two."""


def architecture_options(architecture: str) -> dict[str, Any]:
    """Every bias that the architecture can have."""
    return {"attention_bias": True, "mlp_bias": True} if architecture == "LlamaForCausalLM" else {}


def fused_model(
    architecture: str, sizes: str = "hidden-36", *, dtype: torch.dtype = torch.float64, **options: Any
) -> PreTrainedModel:
    """A tiny random model, untied, its norm gains folded in."""
    model = tiny_model(architecture, dtype=dtype, **SIZES[sizes], **architecture_options(architecture), **options)
    widen_norms_(model)
    untie_(model)
    fuse_norms_(model)
    return model


def random_transforms(model: PreTrainedModel, options: TransformOptions, *, seed: int = 3) -> ModelTransforms:
    """Transforms of a model with every parameter random."""
    transforms = build_transforms(model_sizes(view_model(model)), options, seed=seed)
    transforms.randomize_(torch.Generator().manual_seed(seed))
    return transforms


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Logits of a fixed batch, [2, 12, vocabulary], float64."""
    output: Tensor = model(token_ids()).logits
    return output.double()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def _after(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    module.register_forward_hook(lambda _module, _arguments, output: function(output))


def _before(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    module.register_forward_pre_hook(lambda _module, arguments: (function(arguments[0]),))


def _act_in_block(block: Any, transform: Transform) -> None:
    if isinstance(transform, QueryKeyRotation):
        _after(block.k_proj, transform)
        _after(block.q_proj, transform.forward_query)
    elif isinstance(transform, ValueMixing):
        _after(block.v_proj, transform)
        _before(block.o_proj, transform.inverse)
    elif isinstance(transform, UpScaling):
        _after(block.up_proj, transform)
        _before(block.down_proj, transform.inverse)
    elif isinstance(transform, NormScaling):
        norm = "input_norm" if transform.name == "attn_in_scaling" else "post_norm"
        _after(block.get(norm), transform)
        for reader in NORM_READERS[norm]:
            _before(block.linear(reader), transform.inverse)
    else:
        raise AssertionError(transform.symbol)


def act_online(model: PreTrainedModel, transforms: ModelTransforms) -> None:
    """Makes transforms act on activations, by hooks; their inverses undo them at the next place that reads."""
    view = view_model(model)
    for index, block in enumerate(view.blocks):
        for transform in transforms.block(index).used():
            _act_in_block(block, transform)
        if transforms.residual_rotation is not None:
            _rotate_block(block, transforms.residual_rotation)
    if transforms.residual_rotation is not None:
        _after(view.embedding, transforms.residual_rotation)
        _before(view.lm_head, transforms.residual_rotation.inverse)


def _rotate_block(block: Any, rotation: ResidualRotation) -> None:
    for linear in (block.q_proj, block.k_proj, block.v_proj, block.gate_proj, block.up_proj):
        _before(linear, rotation.inverse)
    for linear in (block.o_proj, block.down_proj):
        _after(linear, rotation)
