"""DuQuant's rotations in a model: found from its activations, after the scales before them, they leave less to round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fptquant as fq
from fptquant.errors import UserError
from fptquant.models.architectures import view_model
from fptquant.stages.find_rotations import find_rotations_
from fptquant.transforms import ModelTransforms, TransformOptions
from fptquant.transforms.block_rotation import find_rotation
from tests.models.tiny import ARCHITECTURES, tiny_model, token_ids
from tests.stages.transformed import fused_model, random_transforms
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

WINDOWS = token_ids(3, 20, seed=5)
OPTIONS = TransformOptions(norm_scaling=True, value_mixing="identity", up_scaling=True, block_rotation=12)


def found(architecture: str, **options: object) -> ModelTransforms:
    model = fused_model(architecture, "hidden-36")
    transforms = random_transforms(model, OPTIONS)
    find_rotations_(model, transforms, WINDOWS, steps=8, **options)  # type: ignore[arg-type]
    return transforms


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_place_gets_rotations_and_twice_the_same(architecture: str) -> None:
    one, two = found(architecture), found(architecture)
    for index in range(len(one.blocks)):
        used, again = one.block(index), two.block(index)
        for name in ("attn_in_rotation", "mlp_in_rotation", "out_rotation", "down_rotation"):
            rotation = getattr(used, name)
            identity = torch.eye(rotation.size, dtype=torch.float64).expand_as(rotation.first)
            assert not torch.equal(rotation.first, identity)
            torch.testing.assert_close(rotation.first @ rotation.first.mT, identity, rtol=0, atol=1e-13)
            assert rotation.permutation.sort().values.tolist() == list(range(rotation.channels))
            assert all(torch.equal(a, b) for a, b in zip(rotation.buffers(), getattr(again, name).buffers(), strict=True))


@pytest.mark.parametrize("norms_scaled", [True, False])
def test_they_are_those_of_scaled_activations(norms_scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """T_u and T_v are not merged yet, nor T_n where it is not, but rotations are found for what they leave."""
    seen: list[Tensor] = []

    def remembered(x: Tensor, *args: Any, **named: Any) -> Any:
        seen.append(x)
        return find_rotation(x, *args, **named)

    monkeypatch.setattr("fptquant.stages.find_rotations.find_rotation", remembered)
    model, plain = fused_model("LlamaForCausalLM", "hidden-36"), TransformOptions(block_rotation=12)
    used = random_transforms(model, OPTIONS)
    for transforms in (random_transforms(model, plain), used):
        find_rotations_(model, transforms, WINDOWS, steps=2, norms_scaled=norms_scaled)
    raw, transformed = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for index in range(len(used.blocks)):
        block = used.block(index)
        norms = (None, None) if norms_scaled else (block.attn_in_scaling, block.mlp_in_scaling)
        for place, before in enumerate((norms[0], block.value_mixing, norms[1], block.up_scaling)):
            x = raw[4 * index + place]
            assert torch.equal(transformed[4 * index + place], x if before is None else before(x))
            assert before is None or not torch.allclose(before(x), x, rtol=0.01)


def test_they_depend_on_the_seed() -> None:
    one, other = (found("LlamaForCausalLM", seed=seed).block(0) for seed in (0, 1))
    assert not torch.equal(one.down_rotation.first, other.down_rotation.first)


def test_it_leaves_less_to_round() -> None:
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
    with torch.no_grad():
        for block in view_model(model).blocks:  # a loud channel in the inputs of all linears that norms feed
            block.get("input_norm").weight[3] *= 30
            block.get("post_norm").weight[5] *= 30
    tokens, errors = token_ids(2, 40), []
    small = ["calibration.windows=2", "calibration.window=48", "quantization.prefix=null", "quantization.weight.bits=16"]
    for transforms in ("transforms={}", "transforms={block_rotation: {block_size: 16, steps: 32}}"):
        config = fq.load_config("rtn", "quantization=w4a4-static", transforms, *small)
        result = fq.calibrate(model, tiny_tokenizer(), config, progress=lambda *_: None)
        with torch.no_grad():
            errors.append(float((result.model(tokens).logits - model(tokens).logits).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_infinite_activations_are_named() -> None:
    model = fused_model("LlamaForCausalLM", "hidden-36")
    view_model(model).blocks[1].up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"the inputs of layers\.1\.down_proj hold NaN or infinity"):
        find_rotations_(model, random_transforms(model, OPTIONS), WINDOWS, steps=2)
