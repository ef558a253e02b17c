"""Weights of tokens: squared gradients as of plain autograd, on average the Fisher information, and what rounding makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.errors import UserError
from fptquant.files import KeptFiles
from fptquant.models.adapter import LINEAR_NAMES, view_model
from fptquant.models.hooks import hooked
from fptquant.models.instrument import instrument, quantizers_off
from fptquant.quantizers.gptq import GPTQOptions
from fptquant.rounding import token_weights
from fptquant.rounding.clip_ranges import clip_ranges_
from fptquant.rounding.round_gptq import round_gptq_
from fptquant.rounding.token_weights import find_token_weights
from tests.models.prepare import setting
from tests.models.tiny import ARCHITECTURES, tiny_model
from tests.rounding.test_round_gptq import FULL, WINDOWS, prepared
from tests.rounding.together import round_together

NAMES = [f"layers.{index}.{name}" for index in range(2) for name in LINEAR_NAMES]


def labels_of(logits: Tensor, seed: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 2**32 + number)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def squared_gradients(
    model: PreTrainedModel, window: Tensor, labels: Tensor | None, seed: int = 0, number: int = 0
) -> dict[str, Tensor]:
    """|g_t|^2 of every linear by one backward pass of the whole model."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            output.requires_grad_()
            outputs[name] = output

        return hook

    blocks = view_model(model).blocks
    linears = {f"layers.{block.index}.{name}": block.linear(name) for block in blocks for name in LINEAR_NAMES}
    with quantizers_off(model), hooked(linear.register_forward_hook(keep(name)) for name, linear in linears.items()):
        logits = model(window[None]).logits[0]
        chosen = labels_of(logits.detach(), seed, number) if labels is None else labels
        loss = torch.nn.functional.cross_entropy(logits, chosen, reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    return {name: gradient[0].square().sum(-1) for name, gradient in zip(outputs, gradients, strict=True)}


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
def test_block_by_block_gives_the_gradients_of_the_whole_model(architecture: str, options: dict[str, Any]) -> None:
    model = prepared(architecture, **options)
    found = find_token_weights(model, WINDOWS, seed=3)
    expected = [squared_gradients(model, window, None, 3, number) for number, window in enumerate(WINDOWS)]
    assert sorted(found) == sorted(NAMES)
    for name in NAMES:
        both = torch.stack([each[name] for each in expected])
        torch.testing.assert_close(found[name], both / both.mean(), rtol=1e-9, atol=1e-20)
        assert found[name].std() > 0.1


def test_the_mean_over_labels_is_the_fisher_information() -> None:
    """The squared gradient for each label times its probability: after one token the labels can be gone through."""
    model = tiny_model("LlamaForCausalLM", dtype=torch.float64, vocab_size=11)
    instrument(model, setting(16))
    window = torch.tensor([7])
    with torch.no_grad():
        probabilities = model(window[None]).logits[0, 0].softmax(-1)
    exact = dict.fromkeys(NAMES, 0.0)
    for label, probability in enumerate(probabilities):
        for name, value in squared_gradients(model, window, torch.tensor([label])).items():
            exact[name] += float(probability * value[0])
    fisher = token_weights._Fisher(model)
    drawn = [fisher.of_window(window, 0, number) for number in range(400)]
    for name in NAMES:
        values = torch.stack([each[name][0] for each in drawn])
        error = float(values.std() / 20)
        assert abs(float(values.mean()) - exact[name]) < 4 * error


@pytest.mark.parametrize("options", [GPTQOptions(), GPTQOptions(act_order=True, clip=True)], ids=["plain", "ordered, clipped"])
def test_tokens_of_weight_0_might_as_well_not_be_there(options: GPTQOptions) -> None:
    """Rounded for all windows, of which two count, and for these two alone: the same weights."""
    one, other = prepared("LlamaForCausalLM", **FULL), prepared("LlamaForCausalLM", **FULL)
    counted = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)[:, None].expand(WINDOWS.shape)
    round_gptq_(one, WINDOWS, options, token_weights=dict.fromkeys(NAMES, counted))
    round_gptq_(other, WINDOWS[[0, 3]], options)
    plain = prepared("LlamaForCausalLM", **FULL)
    round_gptq_(plain, WINDOWS, options)
    for name, value in other.named_parameters():
        torch.testing.assert_close(one.get_parameter(name), value, rtol=0, atol=1e-9)
    assert any(not torch.allclose(plain.get_parameter(name), value) for name, value in other.named_parameters())


def test_each_linear_has_weights_of_its_own() -> None:
    """With all weight on one window for q and on another for k, which read the same."""
    model = prepared("LlamaForCausalLM")
    weights = dict.fromkeys(NAMES, torch.ones(WINDOWS.shape, dtype=torch.float64))
    for name, window in (("q_proj", 0), ("k_proj", 1)):
        weights[f"layers.0.{name}"] = torch.zeros(WINDOWS.shape, dtype=torch.float64).index_fill(0, torch.tensor(window), 1.0)
    clip_ranges_(model, WINDOWS, token_weights=weights)
    for name, window in (("q_proj", 0), ("k_proj", 1)):
        alone = prepared("LlamaForCausalLM")
        clip_ranges_(alone, WINDOWS[window : window + 1])
        found, expected = (view_model(each).blocks[0].linear(name).weight_quantizer.scale for each in (model, alone))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_killed_pass_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("LlamaForCausalLM")
    expected = find_token_weights(model, WINDOWS, seed=1)
    read: list[int] = []
    of_window = token_weights._Fisher.of_window

    def noted(self: Any, window: Tensor, seed: int, number: int) -> Any:
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(number)
        return of_window(self, window, seed, number)

    monkeypatch.setattr(token_weights._Fisher, "of_window", noted)
    with pytest.raises(KeyboardInterrupt):
        find_token_weights(model, WINDOWS, seed=1, kept=KeptFiles(tmp_path, 0.0), belongs_to="this")
    read.clear()
    found = find_token_weights(model, WINDOWS, seed=1, kept=KeptFiles(tmp_path, 0.0), belongs_to="this", resume=True)
    assert read == [3, 4]
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    monkeypatch.undo()
    monkeypatch.setattr(token_weights._Fisher, "of_window", lambda self, window, seed, number: {"seen": torch.ones(1)})
    again = find_token_weights(model, WINDOWS, seed=2, kept=KeptFiles(tmp_path, 0.0), belongs_to="this", resume=True)
    assert list(again) == ["seen"], "what is kept is of another seed"


@pytest.mark.slow
def test_two_processes_share_the_windows(tmp_path: Path) -> None:
    """Three windows and two, each with the weights of its own; what was kept of them serves both when they go on."""
    weights = "find_token_weights(model, WINDOWS, seed=0, kept=kept, resume=resume)"
    call = f"round_gptq_(model, WINDOWS, token_weights={weights}, kept=kept, resume=resume)"
    facts = "{name: linear.loss for name, linear in report.linears.items()}"
    losses, *others = round_together(tmp_path, call=call, facts=facts)
    assert all(found == pytest.approx(losses, rel=1e-9) for found in others)
    assert [len(list((tmp_path / name).glob("token-weights-*"))) for name in ("2-0", "2-1")] == [1, 1]


def test_gradients_that_are_not_finite_are_named() -> None:
    model = prepared("LlamaForCausalLM")
    activation = model.get_submodule("model.layers.1.mlp.act_fn")

    def spoil(module: Any, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))

    with hooked([activation.register_forward_hook(spoil)]), pytest.raises(UserError) as caught:
        find_token_weights(model, WINDOWS, seed=0)
    assert "layers.1.gate_proj is not finite in window 0" in str(caught.value)
