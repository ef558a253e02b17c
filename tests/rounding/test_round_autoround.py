"""AutoRound of a model: every block learns to give what the full-precision model gives, and is never worse than nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.errors import UserError
from fptquant.models.adapter import BlockView
from fptquant.models.architectures import view_model
from fptquant.models.instrument import get_context, set_modes
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.models.streaming import PartState
from fptquant.quantizers.autoround import AutoRoundOptions, LearnedRounding
from fptquant.rounding import round_autoround
from fptquant.rounding.round_autoround import round_autoround_
from tests.models.tiny import ARCHITECTURES
from tests.quantizers.signround import signround
from tests.rounding.test_round_gptq import FULL, WINDOWS, prepared
from tests.rounding.together import round_together

OPTIONS = AutoRoundOptions(iterations=24, batch=2)
CASES: list[tuple[str, dict[str, Any]]] = [
    *((architecture, {}) for architecture in ARCHITECTURES),
    ("LlamaForCausalLM", FULL),
    ("Qwen2ForCausalLM", {**FULL, "residual_scaling": "output", "query_key_hadamard": True}),
    ("Qwen3ForCausalLM", {"prefix": True}),
    ("MistralForCausalLM", {"settings": {"full_precision_tokens": 2, "sites": "all"}}),
    ("LlamaForCausalLM", {"weights": {"symmetric": True, "granularity": "per_group", "group_size": 8}}),
    ("Qwen2ForCausalLM", {"weights": {"granularity": "per_tensor"}, "prefix": True, **FULL}),
]


def output_of(model: PreTrainedModel, block: BlockView, *, exact: bool, windows: Tensor = WINDOWS) -> PartState:
    """Hidden states and running scale after a block, from a pass of the whole model in full precision or quantized."""
    found: list[PartState] = []

    def catch(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(PartState(output, get_context(model).running_scale))

    modes = {module: module.mode for module in model.modules() if hasattr(module, "set_range_from")}
    if exact:
        set_modes(model, "off")
    hook = block.layer.register_forward_hook(catch)
    view_model(model).decoder(input_ids=windows, use_cache=False)
    hook.remove()
    for quantizer, mode in modes.items():
        quantizer.mode = mode
    return found[0]


def errors(found: PartState, exact: PartState, *, relative: bool = False) -> Tensor:
    """Mean squared error of the true residual, of each window; of each token in proportion to its own size, or not."""
    ours, theirs = (state.hidden if state.running_scale is None else state.hidden * state.running_scale for state in (found, exact))
    squared = (ours - theirs).square().mean(-1)
    return (squared / theirs.square().mean(-1) if relative else squared).mean(1)


@pytest.mark.parametrize(("architecture", "options"), CASES, ids=str)
def test_blocks_come_closer_to_full_precision(architecture: str, options: dict[str, Any]) -> None:
    """The errors reported are those of passes of the whole model."""
    model = prepared(architecture, **options)
    blocks = view_model(model).blocks
    with torch.no_grad():
        exact = [output_of(model, block, exact=True) for block in blocks]
        nearest = errors(output_of(model, blocks[0], exact=False), exact[0]).mean()
        reports = list(round_autoround_(model, WINDOWS, OPTIONS).blocks.values())
        learned = [errors(output_of(model, block, exact=False), of).mean() for block, of in zip(blocks, exact, strict=True)]
    assert reports[0].nearest == pytest.approx(float(nearest), rel=1e-9)
    assert [report.learned for report in reports] == pytest.approx([float(error) for error in learned], rel=1e-9)
    for report in reports:
        assert report.learned < 0.85 * report.nearest
        assert report.best_iteration > 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.quantized_weight(), module.weight)
            assert not module.weight.requires_grad
            assert module.weight.grad is None


def word_for_word(model: PreTrainedModel, options: AutoRoundOptions, seed: int) -> dict[str, Tensor]:
    """The paper's algorithm with passes of the whole model and autograd from the loss to offsets and ratios."""
    blocks, relative = view_model(model).blocks, options.objective == "relative_mse"
    with torch.no_grad():
        targets = [output_of(model, block, exact=True) for block in blocks]
    for block, target in zip(blocks, targets, strict=True):
        with torch.no_grad():
            nearest = errors(output_of(model, block, exact=False), target, relative=relative)
        linears = [linear for _, linear in block.linears()]
        exact = [linear.weight.detach().clone() for linear in linears]
        edges = [[(edge - q.zero_point)[:, None] * q.scale[:, None] for edge in (q.grid.qmin, q.grid.qmax)]
                 for q in (linear.weight_quantizer for linear in linears)]  # fmt: skip
        learned = [[torch.zeros_like(w), torch.ones_like(w[:, :1]), torch.ones_like(w[:, :1])] for w in exact]
        best, least = [[part.clone() for part in parts] for parts in learned], 1.0
        generator = torch.Generator().manual_seed(seed)
        for linear in linears:
            linear.weight_quantizer.mode = "off"
            del linear.weight  # to be a tensor with a graph
        for iteration in range(options.iterations):
            batch = torch.randperm(len(WINDOWS), generator=generator)[: options.batch]
            for linear, weight, (low, high), parts in zip(linears, exact, edges, learned, strict=True):
                for part in parts:
                    part.requires_grad_(True)
                linear.weight = signround(weight, low, high, *parts, linear.weight_quantizer.grid)
            output = output_of(model, block, exact=False, windows=WINDOWS[batch])
            loss = errors(output, PartState(target.hidden[batch]), relative=relative).sum()
            loss.backward()
            share = float(loss.detach() / nearest[batch].sum())
            if share < least:
                best, least = [[part.detach().clone() for part in parts] for parts in learned], share
            rate = options.lr * (1 - iteration / options.iterations)
            for offset, *ratios in learned:
                offset.data = (offset - rate * offset.grad.sign()).clamp(-0.5, 0.5).detach()
                for ratio in ratios:
                    ratio.data = (ratio - rate * ratio.grad.sign()).clamp(0.01, 1).detach()
                for part in (offset, *ratios):
                    part.grad = None
        for linear, weight, (low, high), parts in zip(linears, exact, edges, best, strict=True):
            linear.weight = nn.Parameter(
                signround(weight, low, high, *parts, linear.weight_quantizer.grid).detach(), requires_grad=False
            )
    return {name: value for name, value in model.named_parameters() if name.endswith("proj.weight")}


@pytest.mark.parametrize("objective", ["mse", "relative_mse"])
@pytest.mark.parametrize("prefix", [False, True])
def test_it_is_the_paper_s_algorithm(prefix: bool, objective: Literal["mse", "relative_mse"]) -> None:
    options = AutoRoundOptions(iterations=6, batch=4, lr=0.07, objective=objective)
    model, other = (prepared("Qwen2ForCausalLM", prefix=prefix) for _ in range(2))
    start = {name: value.clone() for name, value in model.named_parameters()}
    round_autoround_(model, WINDOWS, options, seed=4)
    for name, expected in word_for_word(other, options, seed=4).items():
        assert torch.allclose(model.get_parameter(name), expected, rtol=0, atol=1e-9), name
        assert not torch.equal(start[name], expected)


def rounded(model: PreTrainedModel, options: AutoRoundOptions = OPTIONS, **more: Any) -> dict[str, Tensor]:
    round_autoround_(model, WINDOWS, options, **more)
    return {name: value for name, value in model.state_dict().items() if name.endswith(("proj.weight", "scale", "zero_point"))}


def nearest_weights() -> dict[str, Tensor]:
    model = prepared("LlamaForCausalLM")
    return {
        f"{name}.weight": module.quantized_weight().detach()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def test_steps_that_lead_nowhere_leave_rounding_to_nearest() -> None:
    model = prepared("LlamaForCausalLM")
    report = round_autoround_(model, WINDOWS, AutoRoundOptions(iterations=4, batch=2, lr=1000.0))
    assert [block.best_iteration for block in report.blocks.values()] == [0, 0]
    assert all(block.learned == block.nearest for block in report.blocks.values())
    for name, expected in nearest_weights().items():
        assert torch.equal(model.get_parameter(name), expected), name


def test_what_all_windows_do_not_confirm_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that was the best for its batch and is bad for the others."""
    monkeypatch.setattr(LearnedRounding, "restore_", lambda self: self.offset.copy_(self.offset.sign() / 2 + 0.5))
    model = prepared("LlamaForCausalLM")
    report = round_autoround_(model, WINDOWS, OPTIONS)
    assert [block.best_iteration for block in report.blocks.values()] == [0, 0]
    for name, expected in nearest_weights().items():
        assert torch.equal(model.get_parameter(name), expected), name


def test_the_seed_decides_and_parts_of_a_batch_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, again, other = (rounded(prepared("LlamaForCausalLM", **FULL), seed=seed) for seed in (3, 3, 5))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert any(not torch.equal(value, other[name]) for name, value in whole.items())
    monkeypatch.setattr(round_autoround, "TOKENS_AT_ONCE", 1)
    parts = rounded(prepared("LlamaForCausalLM", **FULL), seed=3)
    assert all(torch.allclose(value, parts[name], rtol=0, atol=1e-9) for name, value in whole.items())


def test_ranges_stay_where_clipping_is_not_learned() -> None:
    before = prepared("LlamaForCausalLM").state_dict()
    for learn_clipping in (False, True):
        after = rounded(prepared("LlamaForCausalLM"), AutoRoundOptions(iterations=6, batch=2, learn_clipping=learn_clipping))
        ranges = [name for name in after if name.endswith("weight_quantizer.scale")]
        assert len(ranges) == 14
        assert all(torch.equal(before[name], after[name]) is not learn_clipping for name in ranges)
        assert all(bool((after[name] <= before[name]).all()) for name in ranges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrower_models_learn_too(dtype: torch.dtype) -> None:
    model = prepared("LlamaForCausalLM", dtype=dtype, **FULL)
    report = round_autoround_(model, WINDOWS, OPTIONS)
    assert all(block.learned < 0.85 * block.nearest for block in report.blocks.values())
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            assert module.weight.dtype == dtype
            assert torch.equal(module.quantized_weight(), module.weight)


def test_outputs_that_are_not_finite_are_named() -> None:
    model = prepared("LlamaForCausalLM")
    view_model(model).blocks[1].linear("v_proj").bias = nn.Parameter(torch.full((16,), torch.nan, dtype=torch.float64))
    with pytest.raises(UserError, match=r"the output of layers\.1 holds NaN or infinity"):
        round_autoround_(model, WINDOWS, OPTIONS)


@pytest.mark.slow
def test_two_processes_share_the_windows_and_go_on_together(tmp_path: Path) -> None:
    """Three windows and two, of which two are drawn: a process may have none of a batch. Gradients are added up, in float64."""
    call = "round_autoround_(model, WINDOWS, AutoRoundOptions(iterations=8, batch=2), kept=kept, resume=resume)"
    facts = "{name: (block.nearest, block.learned, block.best_iteration) for name, block in report.blocks.items()}"
    blocks, *others = round_together(tmp_path, call=call, facts=facts)
    for found in others:
        assert all(found[name] == pytest.approx(block, rel=1e-9) for name, block in blocks.items())
