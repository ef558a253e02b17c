"""Windows: where they are cut, how they are drawn, and when there are too few."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

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
