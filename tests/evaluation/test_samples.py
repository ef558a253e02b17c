"""Greedy continuations against tokens chosen one by one, and the tables that show them beside each other."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from fptquant.errors import UserError
from fptquant.evaluation.samples import NEW_TOKENS, PROMPT_TOKENS, Continuation, continuations, sample_prompts
from fptquant.reports.samples import Samples, samples_markdown, samples_rich_tables
from tests.models.tiny import tiny_model
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer


def test_each_token_is_the_likeliest_until_the_context_is_full() -> None:
    windows = torch.randint(1, VOCABULARY, (3, 100), generator=torch.Generator().manual_seed(0))
    prompts = sample_prompts(windows, 2)
    assert torch.equal(prompts, windows[:2, :PROMPT_TOKENS])
    for context, length in ((128, NEW_TOKENS), (40, 8)):
        model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY, max_position_embeddings=context)
        shown: list[tuple[int, int, str]] = []
        found = continuations(model, tiny_tokenizer(), prompts, progress=lambda *step, shown=shown: shown.append(step))
        for prompt, said in zip(prompts, found, strict=True):
            ids = prompt[None]
            for _ in range(length):
                with torch.no_grad():
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            assert said.tokens == ids[0, PROMPT_TOKENS:].tolist()
            assert said.text == tiny_tokenizer().decode(said.tokens)
        assert shown == [(0, 2, "samples"), (1, 2, "samples"), (2, 2, "samples")]


def test_the_end_of_the_text_ends_a_continuation() -> None:
    model, tokenizer = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY), tiny_tokenizer()
    prompts = torch.randint(1, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(0))
    whole = continuations(model, tokenizer, prompts)[0].tokens
    end = next(number for number, token in enumerate(whole) if number >= 3 and token not in whole[:number])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(whole[end])
    assert continuations(model, tokenizer, prompts)[0].tokens == whole[: end + 1]


def test_too_many_samples_are_refused_and_prompts_leave_half_a_short_window() -> None:
    windows = torch.ones(2, 20, dtype=torch.long)
    assert sample_prompts(windows, 2).shape == (2, 10)
    for count in (0, 3):
        with pytest.raises(UserError, match="need as many windows of the text, and there are 2"):
            sample_prompts(windows, count)


def test_tables_show_texts_as_they_are() -> None:
    first = [Continuation([1, 2, 3], "a\n| b"), Continuation([4, 5], "[bold]c")]
    second = [Continuation([1, 2, 4], "a\n*b*"), Continuation([9, 5], "d")]
    samples = Samples(['"once"\tupon', "<b>"], [("full precision float32", first), ("rtn w4a16", second)])
    assert samples.lines(0)[1] == ("rtn w4a16", "2 of 3", "a\\n*b*")
    assert samples.lines(1)[1][1] == "0 of 2"
    markdown = samples_markdown(samples, title="samples: tiny")
    assert '> "once"\\\\tupon' in markdown
    assert "| full precision float32 | 3 of 3 | a\\\\n\\| b |" in markdown
    assert "| rtn w4a16 | 2 of 3 | a\\\\n\\*b\\* |" in markdown
    assert "> \\<b\\>" in markdown
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(*samples_rich_tables(samples))
    assert "[bold]c" in captured.get()
    assert 'sample 1: "once"\\tupon' in captured.get()
