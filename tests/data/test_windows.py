"""Windows: where they are cut, how they are drawn, and when there are too few."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fptquant.data.text import Text
from fptquant.data.windows import check_window, token_windows
from fptquant.errors import UserError
from tests.tiny_tokenizer import tiny_tokenizer

TEXT = Text("digits", "0123456789" * 5)


def test_first_windows_follow_one_another() -> None:
    windows = token_windows(tiny_tokenizer(), TEXT, 3, 10)
    assert windows.shape == (3, 10)
    assert windows.dtype == torch.int64
    assert torch.equal(windows[0], windows[2])
    assert tiny_tokenizer().decode(windows[1]) == "0123456789"


def test_a_seed_draws_windows_without_overlap() -> None:
    text = Text("bytes", "".join(chr(33 + i) for i in range(90)))
    drawn = token_windows(tiny_tokenizer(), text, 6, 10, seed=3)
    assert torch.equal(drawn, token_windows(tiny_tokenizer(), text, 6, 10, seed=3))
    assert not torch.equal(drawn, token_windows(tiny_tokenizer(), text, 6, 10, seed=4))
    assert len(set(drawn.flatten().tolist())) == 60


def test_all_windows_are_the_whole_ones_of_a_text() -> None:
    every = token_windows(tiny_tokenizer(), TEXT, "all", 20)
    assert torch.equal(every, token_windows(tiny_tokenizer(), TEXT, 2, 20))  # 50 tokens
    with pytest.raises(UserError, match=r"1 windows of 60 tokens need 60"):
        token_windows(tiny_tokenizer(), TEXT, "all", 60)


def with_bos() -> PreTrainedTokenizerFast:
    """As Llama's: BOS before every text that is tokenized with special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return tokenizer


def test_a_bos_stands_once_before_the_whole_text() -> None:
    tokenizer, plain = with_bos(), tiny_tokenizer()
    windows = token_windows(tokenizer, TEXT, "all", 10)
    assert len(windows) == 5
    assert (windows == tokenizer.bos_token_id).nonzero().tolist() == [[0, 0]]
    assert plain.decode(windows[0, 1:]) == "012345678"
    assert plain.decode(windows[1]) == "9012345678"
    without = token_windows(tokenizer, replace(TEXT, add_bos_token=False), "all", 10)
    assert torch.equal(without, token_windows(plain, TEXT, "all", 10))


def test_an_end_that_a_tokenizer_puts_behind_the_text_is_left_out() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    windows = token_windows(tokenizer, TEXT, "all", 17)  # 52 tokens with both, 51 with the BOS alone
    assert windows.shape == (3, 17)
    assert windows[0, 0] == tokenizer.bos_token_id
    assert not (windows == tokenizer.eos_token_id).any()
    with pytest.raises(UserError, match="has 51 tokens"):
        token_windows(tokenizer, TEXT, 4, 17)


def test_a_tokenizer_that_puts_no_bos_gives_the_same_windows_either_way() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})  # SmolLM2's has one, too, and does not put it
    texts = (TEXT, replace(TEXT, add_bos_token=False))
    assert torch.equal(*(token_windows(tokenizer, text, 3, 10, seed=1) for text in texts))


def test_a_short_text_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"digits has 50 tokens, but 6 windows of 10 tokens need 60"):
        token_windows(tiny_tokenizer(), TEXT, 6, 10)


def test_a_window_longer_than_the_context_is_refused() -> None:
    config = SimpleNamespace(max_position_embeddings=2048)
    check_window(config, 2048, "evaluation.window")
    with pytest.raises(UserError, match=r"evaluation.window = 2,049 is longer than the model's context of 2,048"):
        check_window(config, 2049, "evaluation.window")


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(UserError, match=r"0 windows of the text digits were asked for"):
        token_windows(tiny_tokenizer(), TEXT, 0, 10)
    with pytest.raises(UserError, match=r"evaluation.window = 1 has no token that follows another"):
        check_window(SimpleNamespace(max_position_embeddings=2048), 1, "evaluation.window")
