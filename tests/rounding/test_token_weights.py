"""Weights of tokens: squared gradients as of plain autograd, on average the Fisher information, and what rounding makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.errors import UserError
from fptquant.evaluation import hidden
from fptquant.files import KeptFiles, read_file, to_bytes
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.models.architectures import view_model
from fptquant.models.hooks import hooked
from fptquant.models.instrument import instrument, quantizers_off
from fptquant.quantizers.gptq import GPTQOptions
from fptquant.rounding import token_weights
from fptquant.rounding.clip_ranges import clip_ranges_
from fptquant.rounding.round_gptq import round_gptq_
from fptquant.rounding.token_weights import find_token_weights
from tests.memory import measurable
from tests.models.prepare import setting
from tests.models.tiny import ARCHITECTURES, tiny_model
from tests.program import run_python
from tests.rounding.test_round_gptq import FULL, WINDOWS, prepared
from tests.rounding.together import round_together

NAMES = [f"layers.{index}.{name}" for index in range(2) for name in LINEAR_NAMES]


def squared_gradients(model: PreTrainedModel, window: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """|g_t|^2 of every linear by one backward pass of the whole model, in float64 by torch alone."""
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
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    return {name: gradient[0].square().sum(-1) for name, gradient in zip(outputs, gradients, strict=True)}


@contextmanager
def noted_labels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Labels that are drawn meanwhile, chunk by chunk."""
    drawn: list[Tensor] = []
    draw = torch.multinomial

    def note(*args: Any, **options: Any) -> Tensor:
        drawn.append(draw(*args, **options))
        return drawn[-1]

    with monkeypatch.context() as patched:
        patched.setattr(torch, "multinomial", note)
        yield drawn


def found_and_expected(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, seed: int = 3
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of tokens, and those of plain autograd for the same labels."""
    with noted_labels(monkeypatch) as drawn:
        found, _ = find_token_weights(model, WINDOWS, seed=seed)
    labels = torch.cat(drawn)[:, 0].view(WINDOWS.shape)
    each = [squared_gradients(model, window, label) for window, label in zip(WINDOWS, labels, strict=True)]
    both = {name: torch.stack([gradients[name] for gradients in each]) for name in NAMES}
    return found, {name: value / value.mean() for name, value in both.items()}


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
def test_block_by_block_gives_the_gradients_of_the_whole_model(
    architecture: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, expected = found_and_expected(prepared(architecture, **options), monkeypatch)
    assert sorted(found) == sorted(NAMES)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-20)
        assert found[name].std() > 0.1


def test_logits_of_a_few_tokens_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 10, 10 and 4 tokens in place of one of 24."""
    model = prepared("LlamaForCausalLM")
    monkeypatch.setattr(hidden, "chunk_length", lambda vocabulary: 10)
    with noted_labels(monkeypatch) as drawn:
        find_token_weights(model, WINDOWS, seed=3)
    assert [len(labels) for labels in drawn] == [10, 10, 4] * len(WINDOWS)
    found, expected = found_and_expected(model, monkeypatch)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_models_of_narrow_dtypes_have_float32_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to those of the same weights in float64, for the labels that they draw."""
    model = prepared("LlamaForCausalLM", dtype=dtype)
    with noted_labels(monkeypatch) as drawn:
        found, _ = find_token_weights(model, WINDOWS, seed=0)
    wide = model.double()
    labels = torch.cat(drawn)[:, 0].view(WINDOWS.shape)
    for name in NAMES:
        assert found[name].dtype == torch.float32
    each = [squared_gradients(wide, window, label) for window, label in zip(WINDOWS, labels, strict=True)]
    largest = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for name in NAMES:
        expected = torch.stack([gradients[name] for gradients in each])
        error = (found[name].double() - expected / expected.mean()).norm() / (expected / expected.mean()).norm()
        assert float(error) < largest, name


def test_labels_depend_on_the_seed_and_on_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("LlamaForCausalLM")
    windows, drawn = WINDOWS[:1].expand(2, -1), {}
    for seed in (0, 0, 1, 2**32):
        with noted_labels(monkeypatch) as labels:
            find_token_weights(model, windows, seed=seed)
        again = torch.cat(labels)[:, 0].view(2, -1)
        assert torch.equal(drawn.setdefault(seed, again), again)
    every = [labels for each in drawn.values() for labels in each]
    assert all(not torch.equal(one, other) for one, other in combinations(every, 2))


def test_the_mean_over_labels_is_the_fisher_information() -> None:
    """The squared gradients for each pair of labels times its probability: of two tokens all pairs can be gone through."""
    model = tiny_model("LlamaForCausalLM", dtype=torch.float64, vocab_size=11)
    instrument(model, setting(16))
    window = torch.tensor([7, 2])
    with torch.no_grad():
        probabilities = model(window[None]).logits[0].softmax(-1)
    exact = {name: torch.zeros(2, dtype=torch.float64) for name in NAMES}
    for first, second in product(range(11), repeat=2):
        probability = probabilities[0, first] * probabilities[1, second]
        for name, value in squared_gradients(model, window, torch.tensor([first, second])).items():
            exact[name] += probability * value
    fisher = token_weights._Fisher(model)
    drawn = [fisher.of_window(window, 0, number) for number in range(400)]
    for name in NAMES:
        values = torch.stack([each[name] for each in drawn])
        error = values.std(0) / 20
        # the first token can look at none but itself: no gradient reaches its query
        counts = torch.tensor([not name.endswith("q_proj"), True])
        assert bool((error[counts] > 0).all())
        assert bool(((values.mean(0) - exact[name]).abs()[counts] < 4 * error[counts]).all()), name
        torch.testing.assert_close(values[:, ~counts], torch.zeros_like(values[:, ~counts]), rtol=0, atol=1e-20)


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
    expected, _ = find_token_weights(model, WINDOWS, seed=1)
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
    found, _ = find_token_weights(model, WINDOWS, seed=1, kept=KeptFiles(tmp_path, 0.0), belongs_to="this", resume=True)
    assert read == [3, 4]
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    monkeypatch.undo()
    monkeypatch.setattr(token_weights._Fisher, "of_window", lambda self, window, seed, number: {"seen": torch.ones(1)})
    again, _ = find_token_weights(model, WINDOWS, seed=2, kept=KeptFiles(tmp_path, 0.0), belongs_to="this", resume=True)
    assert list(again) == ["seen"], "what is kept is of another seed"


def test_seconds_are_those_of_all_parts_of_the_run(tmp_path: Path) -> None:
    model, kept = prepared("LlamaForCausalLM"), KeptFiles(tmp_path, 0.0)
    find_token_weights(model, WINDOWS, seed=1, kept=kept)
    file = tmp_path / "token-weights.safetensors"
    tensors, rest = read_file(file)
    assert rest["seconds"] > 0
    file.write_bytes(to_bytes(tensors, {**rest, "seconds": 1000.0}))
    _, seconds = find_token_weights(model, WINDOWS, seed=1, kept=kept, resume=True)
    assert 1000.0 < seconds < 1010.0


@pytest.mark.slow
def test_two_processes_share_the_windows(tmp_path: Path) -> None:
    """Three windows and two; each process gets the weights of all, and the main one keeps them for both when they go on."""
    weights = "find_token_weights(model, WINDOWS, seed=0, kept=kept, resume=resume)[0]"
    call = f"round_gptq_(model, WINDOWS, token_weights={weights}, kept=kept, resume=resume)"
    facts = "{name: linear.loss for name, linear in report.linears.items()}"
    losses, *others = round_together(tmp_path, call=call, facts=facts)
    assert all(found == pytest.approx(losses, rel=1e-9) for found in others)
    assert [len(list((tmp_path / name).glob("token-weights*"))) for name in ("2-0", "2-1")] == [1, 0]


def test_weights_of_other_windows_are_refused() -> None:
    model = prepared("LlamaForCausalLM")
    weights = dict.fromkeys(NAMES, torch.ones(1, WINDOWS.shape[1]))
    with pytest.raises(UserError, match=r"layers\.0\.q_proj have the shape \[1, 24\], but the windows \[5, 24\]"):
        round_gptq_(model, WINDOWS, token_weights=weights)
    weights = dict.fromkeys(NAMES[1:], torch.ones(WINDOWS.shape))
    with pytest.raises(UserError, match=r"no weights of tokens for layers\.0\."):
        round_gptq_(model, WINDOWS, token_weights=weights)


def test_a_model_that_cannot_be_rounded_is_refused_before_any_work() -> None:
    model = tiny_model("LlamaForCausalLM")
    instrument(model, setting(16))
    with pytest.raises(UserError, match=r"layers\.0\.q_proj has no weight quantizer"):
        find_token_weights(model, WINDOWS, seed=0, progress=lambda *_: pytest.fail("there was work"))


def test_logits_that_are_not_finite_are_named() -> None:
    model = prepared("LlamaForCausalLM")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[3] = float("nan")
    with pytest.raises(UserError, match=r"logits are not finite in window 0, position 0; .* is model\.layers\.1\.mlp\.down_proj"):
        find_token_weights(model, WINDOWS, seed=0)


def test_gradients_that_are_not_finite_are_named() -> None:
    model = prepared("LlamaForCausalLM")
    activation = model.get_submodule("model.layers.1.mlp.act_fn")

    def spoil(module: Any, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))

    with hooked([activation.register_forward_hook(spoil)]), pytest.raises(UserError) as caught:
        find_token_weights(model, WINDOWS, seed=0)
    assert "layers.1.gate_proj is not finite in window 0" in str(caught.value)


MEMORY = """
import torch
from fptquant.rounding.token_weights import find_token_weights
from tests.memory import memory
from tests.models.tiny import tiny_model
from fptquant.models.instrument import instrument
from fptquant.stages.set_ranges import set_weight_ranges_
from tests.models.prepare import setting

torch.set_num_threads(1)
sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 704, "num_hidden_layers": 4, "max_position_embeddings": 512}
model = tiny_model("LlamaForCausalLM", **sizes)
instrument(model, setting(weight={"bits": 4}))
set_weight_ranges_(model)
windows = torch.randint(3, 101, (32, 512), generator=torch.Generator().manual_seed(0))
held = []
find_token_weights(model, windows, seed=0, progress=lambda *_: held.append(memory("VmRSS")))
print(held[31] - held[7])
"""


@measurable
def test_memory_does_not_grow_with_the_windows() -> None:
    """Small tensors that are kept among large ones that are freed kept all of that memory from being used again."""
    assert int(run_python(MEMORY)) < 32 * 2**20
