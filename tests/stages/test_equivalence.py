"""Transforms leave the function as it is: logits before and after, more exact in every wider dtype."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fptquant.config.quantization import QuantizationConfig
from fptquant.errors import UserError
from fptquant.models.adapter import model_sizes
from fptquant.models.architectures import view_model
from fptquant.models.instrument import instrument
from fptquant.stages.merge_transforms import merge_transforms_
from fptquant.transforms import TransformOptions, build_transforms
from fptquant.transforms.residual_scaling import Where
from tests.models.tiny import ARCHITECTURES, tiny_model
from tests.stages.transformed import SIZES, act_online, fused_model, logits, random_transforms, relative_error

MERGEABLE = {
    "T_n": TransformOptions(norm_scaling=True),
    "T_k": TransformOptions(query_key_rotation=True),
    "T_k-scale": TransformOptions(query_key_rotation=True, query_key_constraint="scale"),
    "T_v-identity": TransformOptions(value_mixing="identity"),
    "T_v-hadamard": TransformOptions(value_mixing="hadamard"),
    "T_v-random-hadamard": TransformOptions(value_mixing="random_hadamard"),
    "T_v-orthogonal": TransformOptions(value_mixing="random_orthogonal", value_constraint="orthogonal"),
    "T_v-diagonal": TransformOptions(value_mixing="identity", value_constraint="diagonal"),
    "T_u": TransformOptions(up_scaling=True),
    "T_r-hadamard": TransformOptions(residual_rotation="hadamard"),
    "T_r-random-hadamard": TransformOptions(residual_rotation="random_hadamard"),
    "T_r-orthogonal": TransformOptions(residual_rotation="random_orthogonal"),
    "scales": TransformOptions(
        norm_scaling=True,
        query_key_rotation=True,
        query_key_constraint="scale",
        value_mixing="identity",
        value_constraint="diagonal",
    ),
    "all": TransformOptions(True, True, value_mixing="hadamard", up_scaling=True, residual_rotation="random_hadamard"),
}
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
BOUNDS = {torch.bfloat16: 0.1, torch.float32: 2e-5, torch.float64: 1e-12}
"""Largest relative error of the logits: some tens of roundings of each dtype; random transforms of condition below 100."""

ALL_ARCHITECTURES = sorted(ARCHITECTURES)


def allowed(architecture: str, name: str) -> TransformOptions:
    """Of these transforms those that the architecture allows."""
    return replace(MERGEABLE[name], query_key_rotation=False) if architecture == "Qwen3ForCausalLM" else MERGEABLE[name]


def everything(architecture: str) -> TransformOptions:
    """All mergeable transforms that the architecture allows."""
    return allowed(architecture, "all")


ALLOWED = [
    (architecture, name)
    for architecture in ALL_ARCHITECTURES
    for name, options in MERGEABLE.items()
    if not (architecture == "Qwen3ForCausalLM" and options.query_key_rotation)
]


@pytest.mark.parametrize(("architecture", "name"), ALLOWED)
def test_each_transform_keeps_the_logits(architecture: str, name: str) -> None:
    model = fused_model(architecture)
    before = logits(model)
    weight = view_model(model).blocks[1].v_proj.weight.clone()
    transforms = random_transforms(model, MERGEABLE[name])
    merge_transforms_(model, transforms)
    assert relative_error(logits(model), before) < BOUNDS[torch.float64]
    assert transforms.fully_mergeable
    changed = not torch.equal(view_model(model).blocks[1].v_proj.weight, weight)
    assert changed == (name.startswith(("T_n", "T_v", "T_r")) or name in ("scales", "all"))


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
@pytest.mark.parametrize("sizes", SIZES)
def test_all_together_at_every_size_with_tied_embeddings(architecture: str, sizes: str) -> None:
    tied = tiny_model(architecture, dtype=torch.float64, tie_word_embeddings=True, **SIZES[sizes])
    assert view_model(tied).tied
    model = fused_model(architecture, sizes, tie_word_embeddings=True)
    before = logits(model)
    merge_transforms_(model, random_transforms(model, everything(architecture)))
    assert relative_error(logits(model), before) < BOUNDS[torch.float64]


@pytest.mark.parametrize("name", ["scales", "all"])
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_the_error_falls_with_the_dtype(architecture: str, name: str) -> None:
    errors = []
    for dtype in DTYPES:
        model = fused_model(architecture, "hidden-72", dtype=dtype)
        before = logits(model)
        transforms = random_transforms(model, allowed(architecture, name))
        merge_transforms_(model, transforms)
        errors.append(relative_error(logits(model), before))
        assert errors[-1] < BOUNDS[dtype]
    assert errors[1] < 1e-3 * errors[0]
    assert errors[2] < 1e-6 * errors[1]


@pytest.mark.parametrize("name", ["scales", "all"])
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_merged_is_online(architecture: str, name: str) -> None:
    model = fused_model(architecture, "hidden-72")
    transforms = random_transforms(model, allowed(architecture, name))
    online = copy.deepcopy(model)
    act_online(online, transforms)
    merge_transforms_(model, transforms)
    assert relative_error(logits(online), logits(model)) < BOUNDS[torch.float64]


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
@pytest.mark.parametrize("block_size", [None, 20])
def test_down_hadamard_online_undoes_what_is_merged(architecture: str, block_size: int | None) -> None:
    model = fused_model(architecture)
    before = logits(model)
    options = TransformOptions(up_scaling=True, down_hadamard=True, down_hadamard_block=block_size)
    transforms = random_transforms(model, options)
    assert not transforms.fully_mergeable
    merge_transforms_(model, transforms)
    without_the_online_part = relative_error(logits(model), before)
    for index, block in enumerate(view_model(model).blocks):
        down_hadamard = transforms.block(index).down_hadamard
        assert down_hadamard is not None
        block.down_proj.register_forward_pre_hook(lambda _module, arguments, act=down_hadamard: (act(arguments[0]),))
    assert without_the_online_part > 1e-3
    assert relative_error(logits(model), before) < BOUNDS[torch.float64]


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
@pytest.mark.parametrize("where", ["input", "output"])
def test_all_of_them_in_an_instrumented_model(architecture: str, where: str) -> None:
    model = fused_model(architecture)
    before = logits(model)
    scaling: Where = "input" if where == "input" else "output"
    options = replace(everything(architecture), down_hadamard=True, out_hadamard=True, residual_scaling=scaling)
    merge_transforms_(model, random_transforms(model, options))
    instrument(model, QuantizationConfig(), residual_scaling=scaling, down_hadamard=True, out_hadamard=True)
    assert relative_error(logits(model), before) < BOUNDS[torch.float64]


ONLINE = {
    "products": TransformOptions(
        norm_scaling=True,
        value_mixing="hadamard",
        up_scaling=True,
        kronecker="random_orthogonal",
        query_key_mixing="random_orthogonal",
    ),
    "rotations": TransformOptions(norm_scaling=True, value_mixing="identity", up_scaling=True, block_rotation=16),
}


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_what_acts_online_keeps_the_logits_and_the_error_falls_with_the_dtype(architecture: str, sizes: str, name: str) -> None:
    errors = []
    for dtype in DTYPES:
        model = fused_model(architecture, sizes, dtype=dtype)
        before, names = logits(model), set(model.state_dict())
        transforms = random_transforms(model, ONLINE[name])
        merge_transforms_(model, transforms)
        without_the_online_part = relative_error(logits(model), before)
        instrument(model, QuantizationConfig(), transforms=transforms)
        errors.append(relative_error(logits(model), before))
        assert set(model.state_dict()) == names
        assert without_the_online_part > 0.3
        assert errors[-1] < BOUNDS[dtype]
    assert errors[1] < 1e-3 * errors[0]
    assert errors[2] < 1e-6 * errors[1]


def test_query_key_rotation_is_refused_on_qwen3() -> None:
    model = fused_model("Qwen3ForCausalLM")
    sizes = model_sizes(view_model(model))
    with pytest.raises(UserError, match="q_norm, k_norm"):
        build_transforms(sizes, TransformOptions(query_key_rotation=True))
    llama = fused_model("LlamaForCausalLM")
    transforms = random_transforms(llama, TransformOptions(query_key_rotation=True))
    with pytest.raises(UserError, match="T_k cannot be merged into Qwen3ForCausalLM"):
        merge_transforms_(model, transforms)


def test_a_rotation_that_would_change_the_function_is_refused_and_nothing_changes() -> None:
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=True, **SIZES["hidden-36"])
    transforms = random_transforms(model, TransformOptions(residual_rotation="hadamard"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="untie first"):
        merge_transforms_(model, transforms)
    model = tiny_model("LlamaForCausalLM", **SIZES["hidden-36"])
    with pytest.raises(UserError, match="layer 0 input_norm is not 1: fuse norms first"):
        merge_transforms_(model, transforms)
    untouched = tiny_model("LlamaForCausalLM", **SIZES["hidden-36"]).state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())
    assert before.keys() == untouched.keys()


def test_another_number_of_blocks_is_refused() -> None:
    model = fused_model("LlamaForCausalLM", num_hidden_layers=1)
    transforms = random_transforms(fused_model("LlamaForCausalLM"), TransformOptions(up_scaling=True))
    with pytest.raises(UserError, match="1 blocks, the transforms were built for 2"):
        merge_transforms_(model, transforms)
