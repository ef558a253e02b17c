"""AWQ: its search against outputs computed one by one, under grouped heads too, and that the model's function stays."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import fptquant as fq
from fptquant import ops
from fptquant.errors import UserError
from fptquant.models.adapter import BlockView
from fptquant.models.architectures import view_model
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel, PerGroup
from fptquant.quantizers.range_method import RangeMethod
from fptquant.stages.awq import find_scales_
from fptquant.stages.merge_transforms import merge_transforms_
from fptquant.stages.progress import quiet
from fptquant.stages.smooth import READERS
from fptquant.transforms import TransformOptions
from tests.models.tiny import ARCHITECTURES
from tests.stages.test_smooth import WINDOWS, inputs, model_of, transforms_of
from tests.stages.transformed import logits, relative_error
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

GRID = IntegerGrid(3, symmetric=True)
PLACES = {"q_proj": "attn_in_scaling", "o_proj": "value_mixing", "gate_proj": "mlp_in_scaling", "down_proj": "up_scaling"}
find_ = partial(find_scales_, windows=WINDOWS, grid=GRID, granularity=PerChannel(0))


def rounding_error(weight: Tensor, x: Tensor, scale: Tensor, granularity: Granularity) -> float:
    """|| (Q(W s) / s - W) X ||^2 by the outputs themselves."""
    step, zero = ops.set_range(weight * scale, grid=GRID, granularity=granularity, method=RangeMethod("min_max"))
    rounded = ops.fake_quant(weight * scale, step, zero, grid=GRID, granularity=granularity) / scale
    return float(((x @ (rounded - weight).T) ** 2).sum().detach())


def best_scale(
    block: BlockView, name: str, x: Tensor, candidates: int, granularity: Granularity, kv_heads: int
) -> tuple[float, Tensor]:
    """alpha and the scale of every column, tried one after the other."""
    mean = x.abs().mean(0)
    if name == "o_proj":
        mean = mean.reshape(kv_heads, -1, block.linear("v_proj").out_features // kv_heads)
        mean = mean.mean(1, keepdim=True).expand_as(mean).reshape(-1)
    found = []
    for index in range(candidates):
        scale = mean ** (index / candidates)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = sum(rounding_error(block.linear(reader).weight, x, scale, granularity) for reader in READERS[name])
        found.append((error, index / candidates, scale))
    _, alpha, scale = min(found, key=lambda entry: entry[0])
    return alpha, scale


@pytest.mark.parametrize("granularity", [PerChannel(0), PerGroup(16)])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_the_scale_that_leaves_the_outputs_closest(architecture: str, granularity: Granularity) -> None:
    model = model_of(architecture)
    transforms, view = transforms_of(model), view_model(model)
    report = find_(model, transforms, granularity=granularity, candidates=8)
    alphas: dict[str, list[float]] = {name: [] for name in PLACES}
    for block, seen in zip(view.blocks, inputs(model, WINDOWS), strict=True):
        used = transforms.block(block.index)
        assert used.value_mixing is not None
        mixing = used.value_mixing.matrix().diagonal(dim1=1, dim2=2)[:, None]
        for name, transform in PLACES.items():
            alpha, scale = best_scale(block, name, seen[name], 8, granularity, view.num_kv_heads)
            alphas[name].append(alpha)
            if name == "o_proj":
                found = (1 / mixing).expand(-1, view.num_heads // view.num_kv_heads, -1).reshape(-1)
            else:
                found = (-getattr(used, transform).log_scale).exp()
            torch.testing.assert_close(found.double(), scale, rtol=1e-5, atol=1e-6)
    for name, transform in PLACES.items():
        assert report[transform]["alpha"] == pytest.approx(sum(alphas[name]) / len(alphas[name]))
        assert report[transform]["loss"] <= 1
    assert sum(alpha > 0 for tried in alphas.values() for alpha in tried) >= 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_function_stays(architecture: str) -> None:
    model = model_of(architecture)
    before, transforms = logits(model), transforms_of(model)
    find_(model, transforms)
    weights = [view_model(model).blocks[0].linear(name).weight.clone() for name in READERS]
    merge_transforms_(model, transforms)
    assert relative_error(logits(model), before) < 1e-12
    changed = [
        not torch.equal(weight, view_model(model).blocks[0].linear(name).weight)
        for weight, name in zip(weights, READERS, strict=True)
    ]
    assert any(changed)


def test_a_loud_channel_gets_a_finer_grid() -> None:
    model = model_of()
    transforms = transforms_of(model, TransformOptions(norm_scaling=True))
    find_(model, transforms)
    for block in range(2):
        for scaling in transforms.block(block).norm_scalings():
            assert int(scaling.log_scale.argmin()) == 7


def test_a_prefix_takes_no_part() -> None:
    """What stands before the windows is read, and not counted: the scales are those of the windows after it."""
    found = []
    for prefix in ((), (5, 6)):
        model = model_of()
        transforms = transforms_of(model, TransformOptions(norm_scaling=True))
        find_(model, transforms, prefix=prefix)
        found.append(transforms.block(0).attn_in_scaling.log_scale.detach())  # type: ignore[union-attr]
        whole = transforms_of(model, TransformOptions(norm_scaling=True))
    torch.testing.assert_close(found[0], found[1])  # the first norm's outputs do not depend on what stands before
    before = torch.tensor([[5, 6]]).expand(len(WINDOWS), -1)
    find_(model_of(), whole, windows=torch.cat([before, WINDOWS], 1))
    assert not torch.allclose(found[0], whole.block(0).attn_in_scaling.log_scale.detach())  # type: ignore[union-attr]


def test_channels_that_carry_nothing_and_inputs_that_are_not_finite() -> None:
    model = model_of()
    norm = view_model(model).blocks[0].input_norm
    norm.weight.data[3] = 0  # type: ignore[index]
    before, transforms = logits(model), transforms_of(model)
    find_(model, transforms)
    merge_transforms_(model, transforms)
    assert relative_error(logits(model), before) < 1e-12
    norm.weight.data[3] = float("nan")  # type: ignore[index]
    with pytest.raises(UserError, match=r"the inputs of layers\.0\.q_proj hold NaN"):
        find_(model, transforms_of(model))


def test_as_a_method_it_serves_rounding_better_than_none() -> None:
    model = model_of(dtype=torch.float32, vocab_size=VOCABULARY)
    small = [
        "quantization=w3a16",
        "quantization.prefix=null",
        "calibration={text: topics, windows: 3, window: 20}",
        "evaluation.window=20",
    ]
    errors = {}
    for method in ("rtn", "awq"):
        rounding = ["rounding={clip: true, text: topics, windows: 3, window: 20}"] if method == "awq" else []
        config = fq.load_config(method, *small, *rounding)
        result = fq.calibrate(model, tiny_tokenizer(), config, progress=quiet)
        errors[method] = relative_error(logits(result.model), logits(model))
        if method == "awq":
            clipped = result.metrics["rounding"]["linears"].values()
            assert sum(entry["after"] for entry in clipped) < sum(entry["before"] for entry in clipped)
            assert set(result.metrics["smoothing"]) == {"attn_in_scaling", "mlp_in_scaling", "value_mixing", "up_scaling"}
    assert errors["awq"] < errors["rtn"]


def test_settings_that_cannot_be_or_do_nothing() -> None:
    for override, message in (
        ("smoothing={method: awq, candidates: 1}", "smoothing.candidates: must be greater than"),
        ("smoothing.alpha=0.3", r"smoothing.alpha: has no effect: smoothing.method = awq does not read it"),
    ):
        with pytest.raises(UserError, match=message):
            fq.load_config("awq", override)
    with pytest.raises(UserError, match="down_hadamard mixes the scaled channels"):
        fq.load_config("awq", "transforms.down_hadamard={}")
    with pytest.raises(UserError, match="weights stay in full precision, for whose rounding awq"):
        fq.load_config("awq", "quantization=w16a8", "smoothing.method=awq")
    with pytest.raises(UserError, match=r"smoothing\.candidates: has no effect"):
        fq.load_config("smoothquant", "smoothing.candidates=3")
