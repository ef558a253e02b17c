"""Text sampled from the model itself: something to train on where no text is at hand.

The recipe of LLM-QAT (Liu et al., arXiv 2305.17888, section 3.1): a window begins with a random token of the vocabulary, the
next tokens are the most probable ones, all others are drawn from the model's whole distribution at temperature 1. They found
this mixture better than drawing from the beginning, and choosing the most probable token to the end repeats itself.
Deviation: special tokens are never drawn, so a window does not end early; windows of the evaluation hold none either, but for a BOS
before the text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.fingerprint import tensors_digest
from fptquant.models.smollm2 import cache_folder as default_cache_folder
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLED_NAME = "sampled from the model"
_GREEDY_TOKENS = 4
"""Tokens after the first that are the most probable ones; LLM-QAT takes 3 to 5."""
_BATCH = 32
"""Windows sampled together, and written together."""
_RECIPE = f"random token, {_GREEDY_TOKENS} greedy, temperature 1, no special tokens"


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    window: int,
    seed: int,
    cache_folder: Path | None = None,
    progress: Progress = quiet,
) -> Tensor:
    """Windows that the model wrote, sampled once for each model, seed and length, and read from the cache folder afterwards.

    Every 32 windows are a file of ``samples/`` in the cache folder, written beside and renamed: an interrupted call goes on
    where it was, and a later call for more windows begins with those that there are. A rest of fewer than 32 is a file of its own,
    drawn as such: what a call gives depends on what it asks for, not on what was asked for before.

    Shape:
        result: [windows, window], int64

    Raises:
        UserError: if the window is longer than the model's context, or the cache folder cannot be written.
    """
    from safetensors.torch import load_file, save_file

    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and window > context:
        raise UserError(f"windows of {window:,} tokens are longer than the model's context of {context:,} tokens; choose shorter")
    folder = (cache_folder or default_cache_folder()) / "samples" / _key(model, tokenizer, window, seed)
    parts: list[Tensor] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, windows, _BATCH):
            count = min(_BATCH, windows - first)
            file = folder / f"{first:06d}-{count}.safetensors"
            if not file.is_file():
                done = _Share(progress, first * window, windows * window)
                sampled = _sample(model, tokenizer, count, window, _batch_seed(seed, first), done)
                partial = file.with_name(f".{file.name}.{os.getpid()}")
                save_file({"tokens": sampled.to(torch.int32)}, partial)
                partial.replace(file)
            parts.append(load_file(file)["tokens"].long())
    except OSError as error:
        raise UserError(
            f"cannot keep sampled text in {folder}: {error}; free space or set FPTQUANT_CACHE to a folder that can be written"
        ) from error
    return torch.cat(parts)


def _batch_seed(seed: int, first: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {first}".encode()).digest()[:7])


def _key(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, window: int, seed: int) -> str:
    """Name of the folder: everything that decides what is sampled."""
    state = model.state_dict()
    names = sorted(state)
    recipe = f"{_RECIPE} {type(model).__name__} {sorted(tokenizer.all_special_ids)} {names}"
    digest = hashlib.sha256(f"{recipe} {tensors_digest(*(state[name] for name in names))}".encode()).hexdigest()
    return f"{digest[:16]}-seed{seed}-{window}"


class _Share:
    """Counts the tokens of one batch as a share of all; the library calls it with every token it has sampled."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self.progress, self.done, self.total = progress, done, total

    def put(self, tokens: Tensor) -> None:
        self.done += tokens.numel()
        self.progress(min(self.done, self.total), self.total, "sampling text from the model")

    def end(self) -> None:
        """Nothing is left to show."""


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, window: int, seed: int, progress: _Share
) -> Tensor:
    """[count, window], int64, from the library's own generation with its cache of keys and values."""
    allowed = _ordinary_tokens(model, tokenizer)
    drawn = torch.randint(int(allowed.sum()), (count, 1), generator=torch.Generator().manual_seed(seed))
    tokens = allowed.nonzero().flatten()[drawn].to(model.device)
    options: dict[str, Any] = {"suppress_tokens": (~allowed).nonzero().flatten().tolist() or None, "streamer": progress}
    greedy = min(_GREEDY_TOKENS, window - 1)
    with _own_settings(model, seed):
        if greedy:
            tokens = _continue(model, tokens, greedy, do_sample=False, **options)
            progress.done -= tokens.numel()  # the library begins by telling what it was given
        if tokens.shape[1] < window:
            drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            tokens = _continue(model, tokens, window - tokens.shape[1], **drawing, **options)
    return tokens.cpu()


def _continue(model: PreTrainedModel, tokens: Tensor, count: int, **options: Any) -> Tensor:
    generate: Any = model.generate
    continued: Tensor = generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, pad_token_id=0, use_cache=True, **options
    )
    return continued


def _ordinary_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Which rows of the embedding may be drawn, [vocab_size], bool: no special token, and none that only pads the table."""
    allowed = torch.arange(model.config.vocab_size) < len(tokenizer)
    special = {*tokenizer.all_special_ids, *(key for key, token in tokenizer.added_tokens_decoder.items() if token.special)}
    allowed[sorted(token for token in special if token < len(allowed))] = False
    return allowed


@contextmanager
def _own_settings(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Evaluation mode, no settings of generation but ours, and a random state of our own; all put back afterwards."""
    from transformers import GenerationConfig

    plain: Any = GenerationConfig
    before, training = model.generation_config, model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.generation_config = plain()  # no end token: nothing ends before the window is full
    model.train(False)
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = before
        model.train(training)
