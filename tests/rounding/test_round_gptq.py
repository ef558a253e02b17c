"""GPTQ of a model: every weight is rounded for the inputs that it meets, in the order of data flow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.errors import UserError
from fptquant.models.architectures import view_model
from fptquant.models.instrument import instrument, iter_quantizers, set_modes
from fptquant.models.prefix import compute_prefix_
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.quantizers.gptq import GPTQOptions
from fptquant.rounding.round_gptq import round_gptq_
from fptquant.stages.set_ranges import set_activation_ranges_, set_weight_ranges_
from tests.memory import NO_RESERVE, measurable
from tests.models.prepare import setting
from tests.models.tiny import ARCHITECTURES, tiny_model, token_ids
from tests.program import run_python
from tests.quantizers.obq import obq
from tests.rounding.together import round_together

WINDOWS = token_ids(5, 24, seed=5)
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
FULL: dict[str, Any] = {"residual_scaling": "input", "down_hadamard": True, "down_hadamard_block": 4, "out_hadamard": True}


def prepared(
    architecture: str,
    *,
    dtype: torch.dtype = torch.float64,
    weights: dict[str, Any] | None = None,
    prefix: bool = False,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A model whose quantizers are on, the weights' at 3 bits."""
    model = tiny_model(architecture, dtype=dtype, hidden_size=32, intermediate_size=40, head_dim=8)
    weight = {"bits": 3, "symmetric": False, **(weights or {})}
    instrument(model, setting(weight=weight, prefix=[3, 4] if prefix else None, **(settings or {})), **options)
    if prefix:
        compute_prefix_(model, [3, 4])
    set_weight_ranges_(model)
    set_activation_ranges_(model, WINDOWS)
    set_modes(model, "on")
    return model


def inputs_of(model: PreTrainedModel, linear: QuantizedLinear) -> Tensor:
    """What the weight meets in a pass of the whole model, divided by the running scale where the output is; [tokens, columns]."""
    found: list[Tensor] = []

    def catch(module: nn.Module, arguments: tuple[Tensor]) -> None:
        x = arguments[0]
        inverse = linear.context.inverse_scale(x) if linear.scaled == "output" else None
        prepared_input = linear.prepare_input(x)
        found.append(prepared_input if inverse is None else prepared_input * inverse)

    hook = linear.register_forward_pre_hook(catch)
    with torch.no_grad():
        model(WINDOWS)
    hook.remove()
    return found[0].flatten(0, 1)


def expected_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Rounds in place, word for word: for each group of linears a pass of the whole model, and the paper's update."""
    for block in view_model(model).blocks:
        for group in GROUPS:
            x = inputs_of(model, block.linear(group[0]))  # type: ignore[arg-type]
            h = x.T @ x
            h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
            for linear in (block.linear(name) for name in group):
                quantizer = linear.weight_quantizer
                scale, zero = (part[:, None].expand_as(linear.weight) for part in (quantizer.scale, quantizer.zero_point))
                grid, order = quantizer.grid, torch.arange(len(h))
                linear.weight.data = obq(linear.weight.detach(), h, scale, zero.round(), order, grid.qmin, grid.qmax)
    return {name: value for name, value in model.named_parameters() if name.endswith("proj.weight")}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((architecture, {}) for architecture in ARCHITECTURES),
        ("LlamaForCausalLM", FULL),
        ("LlamaForCausalLM", {**FULL, "residual_scaling": "output"}),
        ("Qwen3ForCausalLM", {"prefix": True}),
    ],
    ids=str,
)
def test_one_pass_of_each_block_rounds_as_a_pass_of_the_model_for_each_weight(architecture: str, options: dict[str, Any]) -> None:
    model, other = prepared(architecture, **options), prepared(architecture, **options)
    report = round_gptq_(model, WINDOWS, GPTQOptions())
    for name, expected in expected_weights(other).items():
        assert torch.allclose(model.get_parameter(name), expected, rtol=0, atol=1e-9), name
    names = {f"layers.{index}.{name}" for index in range(2) for group in GROUPS for name in group}
    assert report.linears.keys() == names
    assert all(entry.loss > 0 and entry.damping == 0.01 for entry in report.linears.values())


@pytest.mark.parametrize("weights", [{}, {"granularity": "per_group", "group_size": 8}, {"granularity": "per_tensor"}], ids=str)
@pytest.mark.parametrize("options", [GPTQOptions(act_order=True), GPTQOptions(static_groups=False)], ids=["ordered", "late"])
def test_weights_lie_on_their_grids_and_hidden_states_come_closer(weights: dict[str, Any], options: GPTQOptions) -> None:
    model = prepared("LlamaForCausalLM", weights=weights, **FULL)
    decoder = view_model(model).decoder

    def hidden() -> Tensor:
        with torch.no_grad():
            return decoder(input_ids=WINDOWS).last_hidden_state

    set_modes(model, "off", "weight")
    exact = hidden()
    set_modes(model, "on", "weight")
    nearest = float((hidden() - exact).square().mean())
    round_gptq_(model, WINDOWS, options)
    assert float((hidden() - exact).square().mean()) < 0.8 * nearest
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.quantized_weight(), module.weight)


def test_float32_agrees_with_float64() -> None:
    """Nearly everywhere: a weight at the border between two steps may go either way, and those after it make up for it."""
    models = [prepared("LlamaForCausalLM", dtype=dtype, **FULL) for dtype in (torch.float32, torch.float64)]
    for model in models:
        round_gptq_(model, WINDOWS, GPTQOptions())
    pairs = zip(*(model.named_parameters() for model in models), strict=True)
    same = [(a.double() - b).abs() < 1e-4 for (name, a), (_, b) in pairs if name.endswith("proj.weight")]
    assert torch.cat([part.flatten() for part in same]).double().mean() > 0.98


def test_the_same_call_gives_the_same_bits() -> None:
    first, second = (prepared("Qwen2ForCausalLM", dtype=torch.float32) for _ in range(2))
    assert round_gptq_(first, WINDOWS).linears == round_gptq_(second, WINDOWS).linears
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_two_processes_share_the_windows_and_go_on_together(tmp_path: Path) -> None:
    """Three windows and two; their Hessians are added up, in float64. What the first has kept serves both."""
    facts = "{name: linear.loss for name, linear in report.linears.items()}"
    losses, *others = round_together(tmp_path, call="round_gptq_(model, WINDOWS, kept=kept, resume=resume)", facts=facts)
    assert all(found == pytest.approx(losses, rel=1e-9) for found in others)


def test_inputs_that_are_not_finite_are_named() -> None:
    model = prepared("LlamaForCausalLM")
    view_model(model).blocks[1].linear("v_proj").bias = nn.Parameter(torch.full((16,), torch.nan, dtype=torch.float64))
    with pytest.raises(UserError, match=r"the inputs of layers\.1\.o_proj hold NaN or infinity"):
        round_gptq_(model, WINDOWS)


def test_a_model_without_weight_quantizers_is_refused() -> None:
    model = tiny_model("LlamaForCausalLM")
    instrument(model, setting())
    with pytest.raises(UserError, match=r"layers\.0\.q_proj has no weight quantizer"):
        round_gptq_(model, WINDOWS)
    assert not list(iter_quantizers(model, "weight"))


MEMORY = """
import torch
from tests.memory import memory
from tests.models.tiny import tiny_model
from fptquant.models.instrument import instrument, set_modes
from fptquant.rounding.round_gptq import round_gptq_
from fptquant.stages.set_ranges import set_weight_ranges_
from tests.models.prepare import setting

torch.set_num_threads(1)
windows = torch.randint(3, 101, (2, 64), generator=torch.Generator().manual_seed(0))
for blocks in (1, 24):  # the first loads libraries
    model = tiny_model("LlamaForCausalLM", hidden_size=64, head_dim=16, intermediate_size=1280, num_hidden_layers=blocks)
    instrument(model, setting(16, weight_bits=4))
    set_weight_ranges_(model)
    set_modes(model, "on")
    held, before = [], memory("VmRSS")
    round_gptq_(model, windows, progress=lambda *_: held.append(memory("VmRSS")))
print(held[-1] - held[1], max(held) - before)
"""


@measurable
def test_memory_holds_the_hessians_of_one_block() -> None:
    """One of down_proj's is 12.5 MiB, of 24 blocks 300; its factor and copies come and go, and the process keeps two or three."""
    growth, most = map(int, run_python(MEMORY, environment=NO_RESERVE).split())
    assert growth < 75 * 2**20
    assert most < 150 * 2**20
