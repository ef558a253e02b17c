"""Evaluation against logits taken whole, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fptquant.data.text import Text
from fptquant.errors import UserError
from fptquant.evaluation import hidden
from fptquant.evaluation.evaluate import build_reference, evaluate, evaluation_windows, relative_logits_error
from tests.models.tiny import tiny_model
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def models() -> list[torch.nn.Module]:
    return [tiny_model("LlamaForCausalLM", seed=seed, vocab_size=VOCABULARY) for seed in (0, 1)]


def test_against_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "_CHUNK_BYTES", 2 * 4 * VOCABULARY * 7)  # chunks of 7 tokens, the last one shorter
    teacher, student = models()
    tokens, _ = evaluation_windows(student, tiny_tokenizer(), "topics", 2, 64)
    seen: list[tuple[int, int, str]] = []
    found = evaluate(
        student, tiny_tokenizer(), text="topics", windows=2, window=64, reference=teacher,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    with torch.no_grad():
        logits, expected = student(tokens).logits[:, :-1], teacher(tokens).logits[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())
    assert found.perplexity == pytest.approx(float(nll.exp()), rel=1e-5)
    p, q = logits.double().softmax(-1), expected.double().softmax(-1)
    m = (p + q) / 2
    jsd = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean() / 2
    assert found.jsd == pytest.approx(float(jsd), rel=1e-5)
    assert found.kl == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), rel=1e-5)
    assert found.top1_agreement == float((logits.argmax(-1) == expected.argmax(-1)).double().mean())
    assert found.tokens == 2 * 63
    assert seen[-1] == (2, 2, "evaluation")


def test_the_reference_agrees_with_itself_after_its_model_changed() -> None:
    teacher = models()[0]
    cache, evaluation = build_reference(teacher, tiny_tokenizer(), text="topics", windows=2, window=64)
    again = evaluate(teacher, tiny_tokenizer(), text="topics", windows=2, window=64, reference=cache)
    assert evaluation.perplexity == pytest.approx(again.perplexity, rel=1e-7)
    assert again.jsd == pytest.approx(0, abs=1e-7)
    assert (again.top1_agreement, evaluation.top1_agreement, evaluation.jsd, evaluation.kl) == (1, 1, 0, 0)
    assert again.kl == pytest.approx(0, abs=1e-7)
    before = cache.head.weight.clone()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(2)
    assert torch.equal(cache.head.weight, before)


def test_a_reference_on_another_device_sends_its_logits() -> None:
    teacher, student = models()
    cache, _ = build_reference(teacher, tiny_tokenizer(), text="topics", windows=1, window=16)
    elsewhere = replace(cache, hidden=cache.hidden.to("meta"), head=cache.head.to("meta"))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # the copy; without it, mixed devices
        evaluate(student, tiny_tokenizer(), text="topics", windows=1, window=16, reference=elsewhere)


def test_a_reference_for_other_tokens_is_refused() -> None:
    model = models()[0]
    cache, _ = build_reference(model, tiny_tokenizer(), text="topics", windows=2, window=32)
    with pytest.raises(UserError, match=r"\[2, 32\] tokens.*\[2, 64\] tokens"):
        evaluate(model, tiny_tokenizer(), text="topics", windows=2, window=64, reference=cache)


def test_short_text_and_long_windows_are_refused() -> None:
    model = models()[0]
    with pytest.raises(UserError, match="5 tokens, but 2 windows of 64 tokens need 128"):
        evaluate(model, tiny_tokenizer(), text=Text("short", "words"), windows=2, window=64)
    with pytest.raises(UserError, match=r"evaluation window = 256 is longer than the model's context of 128"):
        evaluate(model, tiny_tokenizer(), text="topics", windows=1, window=256)


def test_nan_is_found_and_its_source_named() -> None:
    model = models()[0]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"not finite in window 0, position 0; .*model\.layers\.1\.mlp\.up_proj"):
        evaluate(model, tiny_tokenizer(), text="topics", windows=1, window=16)


def test_equivalence_of_models() -> None:
    teacher, student = models()
    tokens, _ = evaluation_windows(student, tiny_tokenizer(), "topics", 1, 16)
    assert relative_logits_error(teacher, teacher, tokens) == 0
    assert relative_logits_error(teacher, student, tokens) > 0.1


def test_a_trained_model_is_much_better_than_chance() -> None:
    folder, text = SHARED / "tinystories-656k", SHARED / "tinystories-text" / "sample.txt"
    if not folder.is_dir() or not text.is_file():
        pytest.skip("needs ../shared/data (tinystories-656k and tinystories-text)")
    from fptquant.models.loading import load_model

    model, tokenizer = load_model(str(folder))
    found = evaluate(model, tokenizer, text=str(text), windows=4, window=256)
    assert found.perplexity < model.config.vocab_size / 20
    assert found.tokens == 4 * 255
