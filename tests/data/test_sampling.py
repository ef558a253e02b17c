"""Text sampled from a model: its distribution, what is cached and when, and the settings that are put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from fptquant.data import sampling
from fptquant.data.sampling import sample_windows
from fptquant.data.training import training_windows
from fptquant.errors import UserError
from tests.models.tiny import tiny_model
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def sample(model: PreTrainedModel, folder: Path, **options: Any) -> Tensor:
    sizes: dict[str, Any] = {"windows": 6, "window": 12, "seed": 0}
    return sample_windows(model, TOKENIZER, cache_folder=folder, **(sizes | options))


def model_of_bytes(**options: Any) -> PreTrainedModel:
    return tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY, **options)


def test_the_first_tokens_are_the_most_probable_ones_and_the_others_drawn(tmp_path: Path) -> None:
    model = model_of_bytes()
    windows = sample(model, tmp_path, windows=40)
    assert windows.shape == (40, 12)
    assert windows.dtype == torch.int64
    with torch.no_grad():
        best = model(windows).logits[:, :-1].argmax(-1) == windows[:, 1:]
    assert best[:, :4].all()
    assert best[:, 4:].float().mean() < 0.5
    assert len(set(windows[:, 0].tolist())) > 20


def test_tokens_are_drawn_from_the_whole_distribution_at_temperature_one(tmp_path: Path) -> None:
    """A model that always gives the same four logits: frequencies of 3,840 draws within 4.5 standard deviations."""
    model = model_of_bytes()
    bias = torch.full((VOCABULARY,), -30.0)
    bias[100:104] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    model.lm_head = torch.nn.Linear(64, VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(bias)
    model.generation_config = GenerationConfig(temperature=0.1, top_k=1, do_sample=True, eos_token_id=100, repetition_penalty=5.0)
    drawn = sample(model, tmp_path, windows=64, window=65)[:, 5:].flatten()
    assert model.generation_config.eos_token_id == 100
    for token, share in ((101, 0.3), (102, 0.2), (103, 0.1)):
        bound = 4.5 * (share * (1 - share) / len(drawn)) ** 0.5
        assert abs((drawn == token).float().mean().item() - share) < bound


def test_special_tokens_are_not_drawn(tmp_path: Path) -> None:
    model = model_of_bytes()
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(7)
    model.lm_head = torch.nn.Linear(64, VOCABULARY)
    with torch.no_grad():
        model.lm_head.bias[7] = 50.0
    windows = sample_windows(model, tokenizer, windows=40, window=12, seed=0, cache_folder=tmp_path)
    assert not (windows == 7).any()
    assert (sample(model, tmp_path)[:, 1:] == 7).all()  # a tokenizer without special tokens


def test_a_window_is_sampled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of_bytes()
    monkeypatch.setattr(sampling, "_BATCH", 4)
    first = sample(model, tmp_path, windows=6)
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["000000-4.safetensors", "000004-2.safetensors"]
    assert not torch.equal(first[:2], first[4:6])

    calls = []
    sampled = sampling._sample
    monkeypatch.setattr(sampling, "_sample", lambda *args: calls.append(args[2]) or sampled(*args))
    assert torch.equal(sample(model, tmp_path, windows=6), first)
    assert torch.equal(sample(model, tmp_path, windows=4), first[:4])
    assert calls == []
    assert torch.equal(sample(model, tmp_path, windows=8)[:4], first[:4])
    assert calls == [4]
    other = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY, seed=1)
    assert not torch.equal(sample(other, tmp_path), first)
    assert not torch.equal(sample(model, tmp_path, seed=1), first)
    assert calls[1:] == [4, 2, 4, 2]


@pytest.mark.parametrize("windows", [3, 6])
def test_what_was_sampled_before_changes_nothing(windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later call for more windows draws a whole batch, whose first rows are others than those of a smaller one."""
    model = model_of_bytes()
    monkeypatch.setattr(sampling, "_BATCH", 4)
    alone = sample(model, tmp_path / "new", windows=windows)
    more = sample(model, tmp_path / "used", windows=8)
    assert torch.equal(sample(model, tmp_path / "used", windows=windows), alone)
    assert not torch.equal(more[:windows], alone)


def test_an_interrupted_call_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of_bytes()
    monkeypatch.setattr(sampling, "_BATCH", 2)
    whole = sample(model, tmp_path / "whole")

    def stop(done: int, total: int, description: str) -> None:
        if done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, tmp_path / "cut", progress=stop)
    assert [path.name for path in (tmp_path / "cut").rglob("*") if path.is_file()] == ["000000-2.safetensors"]
    assert torch.equal(sample(model, tmp_path / "cut"), whole)


def test_the_caller_s_random_state_and_model_are_as_before(tmp_path: Path) -> None:
    model = model_of_bytes().train()
    settings = model.generation_config
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample(model, tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert model.generation_config is settings
    assert model.training


def test_progress_counts_every_token(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    sample(model_of_bytes(), tmp_path, windows=40, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (480, 480)
    assert len({done for done, _ in seen}) >= 24


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"windows of 256 tokens are longer than the model's context of 128"):
        sample(model_of_bytes(), tmp_path, window=256)
    (tmp_path / "samples").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot keep sampled text in .* FPTQUANT_CACHE"):
        sample(model_of_bytes(), tmp_path)


def test_training_on_sampled_text(tmp_path: Path) -> None:
    model = model_of_bytes()
    options: dict[str, Any] = {"windows": 6, "window": 12, "held_out": 2, "seed": 0, "model": model, "cache_folder": tmp_path}
    data = training_windows(TOKENIZER, "model", **options)
    sampled = sample(model, tmp_path, windows=8)
    assert torch.equal(data.held_out, sampled[:2])
    assert {tuple(row) for row in data.train.tolist()} == {tuple(row) for row in sampled[2:].tolist()}
    assert (data.source, data.epochs, data.dropped) == ("sampled from the model", 1.0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_no_more_is_sampled_than_anybody_has_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fptquant.data.training.SAMPLED_WINDOWS", 4)
    options: dict[str, Any] = {"windows": 9, "window": 12, "held_out": 2, "seed": 0, "model": model_of_bytes()}
    data = training_windows(TOKENIZER, "model", **options, cache_folder=tmp_path)
    assert (len(data.train), len({tuple(row) for row in data.train.tolist()}), data.epochs) == (9, 4, 9 / 4)
    assert (
        len(
            {
                tuple(row)
                for row in training_windows(TOKENIZER, "model", **options, distinct=7, cache_folder=tmp_path).train.tolist()
            }
        )
        == 7
    )
