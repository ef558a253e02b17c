"""Massive tokens are found by their definition, and the shortest prefix that takes them over is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import fptquant as fq
from fptquant.config.schema import Config
from fptquant.data.text import Text
from fptquant.models.instrument import set_modes
from fptquant.models.prefix import model_prefixes, prefix_length
from fptquant.stages import find_prefix as stage
from fptquant.stages.calibrate import calibration_windows
from fptquant.stages.find_prefix import find_prefix, massive_tokens, prefix_candidates
from tests.models.tiny import tiny_model, token_ids
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer


def quiet(done: int, total: int, description: str) -> None:
    """No bars in tests."""


def model_of(massive: Any = None, **options: Any) -> PreTrainedModel:
    """A tiny model; tokens for which ``massive(ids)`` holds get a residual of 5,000 in channel 3 after the first block."""
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY, **options)
    if massive is not None:
        seen: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            seen[:] = [args[0]]

        def add(module: nn.Module, args: Any, output: Any) -> Any:
            where = massive(seen[0])
            output[..., 3] = torch.where(where, 5000.0, output[..., 3])
            return output

        model.model.embed_tokens.register_forward_hook(note)
        model.model.layers[0].register_forward_hook(add)
    return model


def first_tokens(number: int) -> Any:
    """The first tokens, whatever they are."""
    return lambda ids: torch.arange(ids.shape[1])[None] < number


def unless_read_before(token: int, trigger: int) -> Any:
    """Every ``trigger`` that has no ``token`` before it."""
    return lambda ids: (ids == trigger) & ((ids == token).cumsum(1) == 0)


def windows(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def test_the_definition_of_a_massive_token() -> None:
    model, ids = model_of(), token_ids(3, 8)
    assert not massive_tokens(model, ids).any()
    assert massive_tokens(model_of(first_tokens(1)), ids).nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]
    assert massive_tokens(model_of(first_tokens(3)), ids, [7, 7]).nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]
    for value, expected in ((90.0, 0), (110.0, 1)):  # above 100; the median below is 0.01
        assert int(massive_tokens(_constant(value, 0.01), ids[:1]).sum()) == expected
    for median, expected in ((0.6, 0), (0.4, 1)):  # 500 is a thousand times 0.5
        assert int(massive_tokens(_constant(500.0, median), ids[:1]).sum()) == expected


def _constant(largest: float, median: float) -> PreTrainedModel:
    model = model_of()

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        made = torch.full_like(output, median)
        made[0, 2, 1] = -largest
        return made

    for layer in model.model.layers:
        layer.register_forward_hook(replace)
    return model


def test_the_shortest_prefix_is_found() -> None:
    tokenizer = tiny_tokenizer()
    ids = windows([9, 4, 7, 9, 4, 4], [4, 9, 8, 8, 7, 9])
    none = find_prefix(model_of(), tokenizer, ids)
    assert (none.ids, none.massive_tokens_before, none.massive_tokens_after, none.candidates) == ([], 0, 0, [])
    one = find_prefix(model_of(first_tokens(1)), tokenizer, ids)
    assert (len(one.ids), one.massive_tokens_before, one.massive_tokens_after) == (1, 2, 0)
    assert one.text == tokenizer.decode(one.ids)
    three = find_prefix(model_of(first_tokens(3)), tokenizer, ids)
    assert (len(three.ids), three.massive_tokens_before, three.massive_tokens_after) == (3, 6, 0)
    assert set(three.ids) <= set(three.candidates)
    assert three.searched_tokens == 12


def test_a_prefix_that_helps_but_does_not_suffice() -> None:
    ids = windows([9, 4, 7, 9, 4, 4], [4, 9, 8, 8, 7, 9])
    found = find_prefix(model_of(first_tokens(6)), tiny_tokenizer(), ids)
    assert (len(found.ids), found.massive_tokens_before, found.massive_tokens_after) == (4, 12, 4)
    short = find_prefix(model_of(first_tokens(6)), tiny_tokenizer(), ids, longest=1)
    assert (len(short.ids), short.massive_tokens_after) == (1, 10)
    useless = find_prefix(model_of(lambda read: read == 9), tiny_tokenizer(), ids)
    assert (useless.ids, useless.massive_tokens_after) == ([], 4)


def test_candidates_are_special_tokens_and_the_frequent_massive_ones() -> None:
    tokenizer = tiny_tokenizer()
    assert prefix_candidates(tokenizer, torch.tensor([5, 9, 9, 6, 9, 6, 1, 2, 3])) == [9, 6, 1, 2]
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    assert prefix_candidates(tokenizer, torch.tensor([9])) == [tokenizer.bos_token_id, tokenizer.eos_token_id, 9]
    model = model_of(unless_read_before(9, 4))  # 9 is none of the massive tokens: only a special token can be it
    ids = windows([4, 5, 6, 4])
    assert find_prefix(model, tiny_tokenizer(), ids).ids == []
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(9)
    assert find_prefix(model, tokenizer, ids).ids == [9]


def config(*overrides: str) -> Config:
    return fq.load_config("fptquant-local", "calibration.windows=2", "calibration.window=48", *overrides)


@pytest.mark.parametrize(("prefix", "ids"), [("[9, 4]", [9, 4]), ("'to'", tiny_tokenizer()("to")["input_ids"])])
def test_a_calibrated_model_acts_as_if_it_had_read_the_prefix(prefix: str, ids: list[int]) -> None:
    model, tokens = model_of(), token_ids(2, 20)
    result = fq.calibrate(model, tiny_tokenizer(), config(f"quantization.prefix={prefix}"), progress=quiet)
    assert result.config.quantization.prefix == ids
    assert result.metrics["prefix"] == {"ids": ids, "text": tiny_tokenizer().decode(ids)}
    assert result.config.quantization.setting.endswith("prefix of 2 tokens")
    set_modes(result.model, "off")
    before = torch.tensor([ids, ids])
    expected = model(torch.cat([before, tokens], dim=1)).logits[:, 2:]
    assert (result.model(tokens).logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_weights_alone_have_a_prefix_if_it_is_given(tmp_path: Path, rounding: str) -> None:
    """In full precision, as the quantized weights are behind it; a search is for ranges, and left out."""
    model, tokens = model_of(), token_ids(2, 20)
    overrides = ["quantization=w4a16", f"rounding={{method: {rounding}, text: topics, windows: 2, window: 32}}"]
    overrides = overrides if rounding == "gptq" else overrides[:1]
    result = fq.calibrate(model, tiny_tokenizer(), config(*overrides, "quantization.prefix=[9, 4]"), progress=quiet)
    loaded, _ = fq.load_calibrated(result.save(tmp_path / "out"))
    assert torch.equal(loaded(tokens).logits, result.model(tokens).logits)
    set_modes(result.model, "off")
    if rounding == "nearest":
        expected = model(torch.cat([torch.tensor([[9, 4]] * 2), tokens], dim=1)).logits[:, 2:]
        assert (result.model(tokens).logits - expected).abs().max() < 2e-5 * expected.abs().max()
    searched = fq.calibrate(model, tiny_tokenizer(), config("quantization=w4a16"), progress=quiet)
    assert (searched.config.quantization.prefix, prefix_length(searched.model)) == (None, 0)


def test_ranges_are_set_behind_the_prefix() -> None:
    model, tokenizer, prefix = model_of(), tiny_tokenizer(), [9, 4]
    ranges = "quantization.activation={centered: false, range: {method: min_max}}"
    minimal = ["transforms={}", "norm_gains=kept", "quantization=w16a8-static", ranges]
    chosen = config(*minimal, f"quantization.prefix={prefix}")
    result = fq.calibrate(model, tokenizer, chosen, progress=quiet)
    seen: list[Tensor] = []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, len(prefix) :]))
    for window in calibration_windows(model, tokenizer, chosen):
        model(torch.cat([torch.tensor(prefix), window])[None])
    x = torch.cat(seen)
    found = result.model.model.layers[1].self_attn.o_proj.input_quantizer.scale
    torch.testing.assert_close(found, (x.max() - x.min()) / 255, rtol=1 / 255, atol=0)  # 0 is moved onto the grid
    without = fq.calibrate(model, tokenizer, config(*minimal), progress=quiet).model.model.layers[1].self_attn.o_proj
    assert abs(float(without.input_quantizer.scale / found) - 1) > 0.02


def test_auto_is_resolved_saved_and_loaded_without_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(), token_ids(2, 20)
    monkeypatch.setattr(stage, "MASSIVE", 1.0)
    monkeypatch.setattr(stage, "MASSIVE_RATIO", 5.0)
    result = fq.calibrate(model, tiny_tokenizer(), config("quantization.prefix=auto"), progress=quiet)
    found = result.metrics["prefix"]
    assert 1 <= len(found["ids"]) <= 4
    assert found["massive_tokens_after"] < found["massive_tokens_before"]
    assert result.config.quantization.prefix == found["ids"]
    assert prefix_length(result.model) == len(found["ids"])
    out = result.save(tmp_path / "out")
    assert fq.load_config(out).quantization.prefix == found["ids"]
    assert json.loads((out / "metrics.json").read_text())["prefix"] == found
    monkeypatch.setattr(stage, "find_prefix", None)
    loaded, _ = fq.load_calibrated(out)
    assert torch.equal(loaded(tokens).logits, result.model(tokens).logits)
    assert all(prefix.key is not None for prefix in model_prefixes(loaded))
    (out / "prefix.safetensors").unlink()
    with pytest.raises(fq.UserError, match=r"prefix\.safetensors is missing or damaged"):
        fq.load_calibrated(out)


def test_auto_without_massive_tokens_is_no_prefix(tmp_path: Path) -> None:
    result = fq.calibrate(
        model_of(), tiny_tokenizer(), config("quantization=w4a4kv4-dynamic", "quantization.prefix=auto"), progress=quiet
    )
    assert result.config.quantization.prefix is None
    assert result.metrics["prefix"]["massive_tokens_before"] == 0
    assert prefix_length(result.model) == 0
    loaded, _ = fq.load_calibrated(result.save(tmp_path / "out"))
    assert not (tmp_path / "out" / "prefix.safetensors").exists()
    assert torch.equal(loaded(token_ids()).logits, result.model(token_ids()).logits)


@pytest.mark.parametrize(
    ("prefix", "message", "options"),
    [
        ("[3, 256]", "token 256 is none of the model's 256", {}),
        ("[1, 2, 3]", r"calibration\.window = 48 and a prefix of up to 3 tokens, together = 51", {"max_position_embeddings": 50}),
        ("auto", "and a prefix of up to 4 tokens", {"max_position_embeddings": 51}),
        ("[1, 2, 3]", "prefix of 3 tokens is longer than the model's sliding window of 2", {"sliding_window": 2}),
        ("auto", "RoPE of type dynamic", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_prefixes_that_cannot_be_are_refused_before_any_work(prefix: str, message: str, options: dict[str, Any]) -> None:
    calls: list[str] = []
    with pytest.raises(fq.UserError, match=message):
        fq.calibrate(
            model_of(**options),
            tiny_tokenizer(),
            config(f"quantization.prefix={prefix}"),
            progress=lambda done, total, text: calls.append(text),
        )
    assert not calls


def test_an_evaluation_window_must_leave_room_for_the_prefix() -> None:
    model = model_of(max_position_embeddings=50)
    result = fq.calibrate(model, tiny_tokenizer(), config("quantization.prefix=[1, 2]"), progress=quiet)
    text = Text("given", "words " * 100)
    assert fq.evaluate(result.model, tiny_tokenizer(), text=text, windows=1, window=48).tokens == 47
    with pytest.raises(fq.UserError, match="the evaluation window with a prefix of 2 tokens = 51"):
        fq.evaluate(result.model, tiny_tokenizer(), text=text, windows=1, window=49)
