"""DuQuant's rotations in a model: found from its activations, after the scales before them, they leave less to round."""

from __future__ import annotations

import pytest
import torch

import fptquant as fq
from fptquant.errors import UserError
from fptquant.models.adapter import view_model
from fptquant.stages.find_rotations import find_rotations_
from fptquant.transforms import ModelTransforms, TransformOptions
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


def test_they_are_those_of_scaled_activations() -> None:
    """T_n, T_u and T_v are not merged yet, but rotations are found for what they leave."""
    merged, attached = found("LlamaForCausalLM").block(0), found("LlamaForCausalLM", norms_scaled=False).block(0)
    assert not torch.equal(merged.attn_in_rotation.first, attached.attn_in_rotation.first)
    seeded = found("LlamaForCausalLM", seed=1).block(0)
    assert not torch.equal(merged.down_rotation.first, seeded.down_rotation.first)


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
