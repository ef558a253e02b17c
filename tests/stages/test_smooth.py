"""SmoothQuant: its scales, under grouped heads too, and that the model's function stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import fptquant as fq
from fptquant.config.schema import Config
from fptquant.errors import UserError
from fptquant.models.adapter import model_sizes
from fptquant.models.architectures import view_model
from fptquant.models.norm import widen_norms_
from fptquant.stages.merge_transforms import merge_transforms_
from fptquant.stages.smooth import READERS, smooth_
from fptquant.transforms import ModelTransforms, TransformOptions, build_transforms
from tests.models.tiny import ARCHITECTURES, tiny_model, token_ids
from tests.stages.transformed import architecture_options, logits, relative_error
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

ALL = TransformOptions(norm_scaling=True, value_mixing="identity", up_scaling=True)
WINDOWS = token_ids(3, 20, seed=4)


def model_of(architecture: str = "LlamaForCausalLM", *, dtype: torch.dtype = torch.float64, **options: Any) -> PreTrainedModel:
    """With one loud channel of each norm, as outliers of activations are."""
    model = tiny_model(architecture, dtype=dtype, **architecture_options(architecture), **options)
    widen_norms_(model)
    for block in view_model(model).blocks:
        for norm in (block.input_norm, block.post_norm):
            norm.weight.data[7] *= 50  # type: ignore[index]
    return model


def transforms_of(model: PreTrainedModel, options: TransformOptions = ALL) -> ModelTransforms:
    return build_transforms(model_sizes(view_model(model)), options)


def inputs(model: PreTrainedModel, ids: Tensor) -> list[dict[str, Tensor]]:
    """What the linears of every block read, [tokens, columns]."""
    found: list[dict[str, Tensor]] = [{} for _ in view_model(model).blocks]
    hooks = []
    for block in view_model(model).blocks:
        for name in READERS:

            def look(module: nn.Module, args: Any, block: int = block.index, name: str = name) -> None:
                found[block][name] = args[0].flatten(0, -2)

            hooks.append(block.linear(name).register_forward_pre_hook(look))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_function_stays(architecture: str) -> None:
    model = model_of(architecture)
    before, transforms = logits(model), transforms_of(model)
    smooth_(model, transforms, WINDOWS, alpha=0.7)
    weights = [view_model(model).blocks[0].linear(name).weight.clone() for name in READERS]
    merge_transforms_(model, transforms)
    assert relative_error(logits(model), before) < 1e-12
    changed = zip(weights, READERS, strict=True)
    assert all(not torch.equal(weight, view_model(model).blocks[0].linear(name).weight) for weight, name in changed)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_half_and_half_gives_activations_and_weights_the_same_largest_values(architecture: str) -> None:
    """alpha = 0.5: max|X / s| = sqrt(max|X| max|W|) = max|W s|, for every channel; where heads share a scale, for the largest."""
    model = model_of(architecture)
    transforms, view = transforms_of(model), view_model(model)
    smooth_(model, transforms, WINDOWS)
    merge_transforms_(model, transforms)
    for block, found in zip(view.blocks, inputs(model, WINDOWS), strict=True):
        for name, readers in READERS.items():
            activation = found[name].abs().amax(0)
            weight = torch.stack([block.linear(reader).weight.abs().amax(0) for reader in readers]).amax(0)
            if name == "o_proj":
                activation, weight = (x.reshape(view.num_kv_heads, view.group, view.head_dim).amax(1) for x in (activation, weight))
            torch.testing.assert_close(activation, weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("alpha", "flat"), [(0.0, "weights"), (1.0, "activations")])
def test_alpha_decides_which_side_gets_even(alpha: float, flat: str) -> None:
    model = model_of()
    transforms = transforms_of(model)
    report = smooth_(model, transforms, WINDOWS, alpha=alpha)
    merge_transforms_(model, transforms)
    block, found = view_model(model).blocks[1], inputs(model, WINDOWS)[1]
    activation, weight = found["down_proj"].abs().amax(0), block.down_proj.weight.abs().amax(0)
    torch.testing.assert_close(weight if flat == "weights" else activation, torch.ones_like(weight), rtol=1e-5, atol=0)
    assert report.keys() == {"attn_in_scaling", "mlp_in_scaling", "up_scaling", "value_mixing"}
    assert all(0 < place["smallest"] < place["largest"] for place in report.values())


def test_a_prefix_and_kept_tokens_take_no_part() -> None:
    """The scales are those of the other tokens, in the context of these."""
    model, transforms = model_of(), transforms_of(model_of())
    smooth_(model, transforms, WINDOWS, alpha=1.0, prefix=[5, 6], left_out=1)
    ids = torch.cat([torch.tensor([[5, 6]]).expand(len(WINDOWS), 2), WINDOWS], 1)
    seen = inputs(model, ids)[1]["gate_proj"].reshape(len(WINDOWS), -1, 64)[:, 3:].flatten(0, 1).abs().amax(0)
    scaling = transforms.block(1).mlp_in_scaling
    assert scaling is not None
    torch.testing.assert_close(scaling.log_scale.detach().double(), -seen.log(), rtol=1e-5, atol=1e-6)


def test_channels_that_carry_nothing_are_left_alone() -> None:
    model = model_of()
    block = view_model(model).blocks[0]
    block.up_proj.weight.data[3] = 0
    if block.up_proj.bias is not None:
        block.up_proj.bias.data[3] = 0
    block.down_proj.weight.data[:, 4] = 0
    transforms = transforms_of(model)
    smooth_(model, transforms, WINDOWS)
    scaling = transforms.block(0).up_scaling
    assert scaling is not None
    assert scaling.log_scale[[3, 4]].tolist() == [0, 0]
    assert scaling.log_scale.isfinite().all()


def test_errors() -> None:
    model = model_of()
    with pytest.raises(UserError, match=r"alpha = 1\.5"):
        smooth_(model, transforms_of(model), WINDOWS, alpha=1.5)
    view_model(model).blocks[1].up_proj.weight.data[2] = torch.nan
    with pytest.raises(UserError, match=r"the inputs of layers\.1\.down_proj hold NaN or infinity"):
        smooth_(model, transforms_of(model), WINDOWS)


def config(*overrides: str) -> Config:
    return fq.load_config("smoothquant", "calibration.windows=2", "calibration.window=40", *overrides)


def quiet(done: int, total: int, description: str) -> None:
    """No bars in tests."""


@pytest.mark.parametrize(
    "overrides", [[], ["norm_gains=fused", "transforms.residual_rotation=true", "transforms.residual_scaling=true"]]
)
def test_the_recipe_runs_repeats_itself_and_can_be_saved(tmp_path: Any, overrides: list[str]) -> None:
    def calibrated() -> fq.CalibrationResult:
        model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
        return fq.calibrate(model, tiny_tokenizer(), config("quantization.prefix=[1]", *overrides), progress=quiet)

    result, tokens = calibrated(), token_ids(1, 30)
    expected = result.model(tokens).logits
    assert torch.equal(calibrated().model(tokens).logits, expected)
    assert result.metrics["smoothing"]["attn_in_scaling"]["largest"] > 1
    result.save(tmp_path / "out")
    assert torch.equal(fq.load_calibrated(tmp_path / "out")[0](tokens).logits, expected)


@pytest.mark.filterwarnings("ignore:the held-out divergence was lowest")
@pytest.mark.parametrize("trained", [True, False])
def test_t_n_is_trained_with_the_others_or_stays_as_it_is(trained: bool) -> None:
    training = ["training={steps: 16, window: 32, batch: 4, text: topics, held_out_windows: 8, evaluate_every: 4}"]
    training += [] if trained else ["training.lr.norm_scaling=null"]
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
    result = fq.calibrate(model, tiny_tokenizer(), config(*training), progress=quiet)
    expected = fq.calibrate(model, tiny_tokenizer(), config(), progress=quiet)
    for block in range(2):
        for found, before in zip(
            result.transforms.block(block).norm_scalings(), expected.transforms.block(block).norm_scalings(), strict=True
        ):
            assert torch.equal(found.log_scale, before.log_scale) != trained
            torch.testing.assert_close(found.log_scale, before.log_scale, rtol=0, atol=0.05)
